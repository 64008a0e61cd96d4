"""Measure ratios of times, taken in turn in one run: python tests/bench.py [ROUNDS].

A time is the seconds of the second epoch of a real run on the first 7,680 images of MNIST, as
its csv tells them. Writes results/bench.md and takes about half an hour.
"""

import importlib
import io
import statistics
import sys
import tempfile
from contextlib import redirect_stdout
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "results")]

import torchvision  # noqa: E402
from experiments import DOCUMENTED, DROP_VALUES  # noqa: E402

IMAGES = 7680  # 60 batches of 128
EAGER = ("--fp32", "--no-compile")
PAIRS = [  # words, script, the first run (flags, changes), the second
    ("course's recipe against step 4", "step4_aug_lr", (EAGER, DOCUMENTED), ((), ())),
    ("nn.Dropout against nn.Dropout2d", "step4_aug_lr", ((), (DROP_VALUES,)), ((), ())),
    *((f"`--fp32 --no-compile` against the defaults, {script}", script, (EAGER, ()), ((), ()))
      for script in ("step1_setup", "step2_skeleton", "step3_bn_gap", "step4_aug_lr")),
]


def write_small(folder):
    """Write the first images of each split of MNIST as a data set of its own."""
    (folder / "MNIST" / "raw").mkdir(parents=True)
    for path in (ROOT / "data" / "MNIST" / "raw").glob("*-ubyte"):
        header, item = (16, 784) if "images" in path.name else (8, 1)
        content = path.read_bytes()[: header + IMAGES * item]
        content = content[:4] + IMAGES.to_bytes(4, "big") + content[8:]
        (folder / "MNIST" / "raw" / path.name).write_bytes(content)


def measure(script, flags, changes, data):
    """Return the seconds of the second epoch of a run, and the line that tells its settings."""
    module = importlib.reload(importlib.import_module(script))
    for change in changes:
        change(module)
    with tempfile.TemporaryDirectory() as out, redirect_stdout(io.StringIO()) as printed:
        module.main([*flags, "--epochs", "2", "--data-dir", str(data), "--out", out])
        seconds = next(Path(out).glob("*.csv")).read_text().strip().rsplit(",", 1)[1]
    return float(seconds), printed.getvalue()


def main(rounds=5):
    """Measure all pairs and write the table to results/bench.md."""
    lines = ["| what | first, s | second, s | first / second |", "|---|---|---|---|"]
    with tempfile.TemporaryDirectory() as folder:
        write_small(Path(folder))
        for words, script, *pair in PAIRS:
            times = [], []
            for number in range(rounds + 1):  # the first round fills caches and does not count
                for taken, (flags, changes) in zip(times, pair, strict=True):
                    seconds, printed = measure(script, flags, changes, folder)
                    taken.extend([seconds] * (number > 0))
            ratios = sorted(a / b for a, b in zip(*times, strict=True))
            medians = " | ".join(f"{statistics.median(taken):.2f}" for taken in times)
            lines.append(f"| {words} | {medians} | {statistics.median(ratios):.2f} "
                         f"({ratios[0]:.2f} to {ratios[-1]:.2f}) |")
    device = next(line for line in printed.splitlines() if line.startswith("Device"))
    chosen = next(line for line in printed.splitlines() if line.startswith("Settings"))
    lines[:0] = [f"{device[8:]}, torchvision {torchvision.__version__}. Step 4 runs by default "
                 f"in {', '.join(chosen.split(', ')[3:])}. Seconds are those of one epoch on "
                 f"{IMAGES} images, medians of {rounds} rounds; a ratio has its range behind.", ""]
    (ROOT / "results" / "bench.md").write_text("\n".join([*lines, ""]), encoding="utf-8")


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
