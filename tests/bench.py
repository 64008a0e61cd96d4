"""Measure ratios of times, taken in turn in one run: python tests/bench.py [ROUNDS].

A time is the seconds of the second epoch of a real run on the first 7,680 images of MNIST, as
its history.csv tells them. Writes results/bench.md and takes about half an hour.
"""

import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "results")]

import torchvision  # noqa: E402
from experiments import COURSE_RECIPE, SCRIPTS, SINGLE_VALUES, make_copy  # noqa: E402

FEWER_IMAGES = ("    show_summary(model)\n", """\
    show_summary(model)
    for loader in (train_loader, test_loader):
        loader.images = loader.images[:7680]  # 60 batches of 128
""")
PAIRS = [  # words, step, edits and flags of the first run; the second has none
    ("the course's recipe against step 4", 4, COURSE_RECIPE, ["--plain"]),
    ("nn.Dropout against nn.Dropout2d, step 4", 4, [SINGLE_VALUES], []),
    *((f"`--plain` against the defaults, {SCRIPTS[n]}", n, [], ["--plain"]) for n in SCRIPTS),
]


def measure(step, edits, flags):
    """Return the seconds of the second epoch of a run, and the lines that it printed."""
    with tempfile.TemporaryDirectory() as folder:
        copy = make_copy(step, [*edits, FEWER_IMAGES], folder)
        command = [sys.executable, copy, "--epochs=2", "--device=cpu", f"--out={folder}", *flags]
        environment = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONUTF8": "1"}
        process = subprocess.run(command, env=environment, stdout=subprocess.PIPE,
                                 encoding="utf-8", check=True)
        [path] = Path(folder).glob("*/history.csv")
        return float(path.read_text().strip().rpartition(",")[2]), process.stdout.splitlines()


def main(rounds=5):
    """Measure all pairs and write the table to results/bench.md."""
    table = ["| what | first, s | second, s | first / second |", "|---|---|---|---|"]
    for words, step, *first in PAIRS:
        times = [], []
        for number in range(rounds + 1):  # the first round fills caches and does not count
            for taken, (edits, flags) in zip(times, (first, ([], [])), strict=True):
                seconds, lines = measure(step, edits, flags)
                taken.extend([seconds] * (number > 0))
        ratios = sorted(a / b for a, b in zip(*times, strict=True))
        medians = " | ".join(f"{statistics.median(taken):.2f}" for taken in times)
        table.append(f"| {words} | {medians} | {statistics.median(ratios):.2f} "
                     f"({ratios[0]:.2f} to {ratios[-1]:.2f}) |")
        print(table[-1], flush=True)
    device, settings = (next(line for line in lines if line.startswith(word)).split(": ")[1]
                        for word in ("Device", "Settings"))
    caption = (f"{device}, torchvision {torchvision.__version__}. Step 4 runs by default in "
               f"{', '.join(settings.split(', ')[3:])}. Seconds are those of one epoch on 7,680 "
               f"images, medians of {rounds} rounds; a ratio has its range behind.")
    (ROOT / "results" / "bench.md").write_text("\n".join([caption, "", *table, ""]), "utf-8")


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
