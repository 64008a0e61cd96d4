"""Measure ratios of times, taken in turn in one run: python tests/bench.py [ROUNDS].

A time is that of the second epoch of a real run. Writes results/bench.md in half an hour.
"""

import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "results")]

from experiments import COURSE_RECIPE, KIND, SCRIPTS, SINGLE_VALUES, make_copy  # noqa: E402

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
    """Return the seconds of the second epoch of a run."""
    with tempfile.TemporaryDirectory() as folder:
        copy = make_copy(step, [*edits, FEWER_IMAGES], folder)
        command = [sys.executable, copy, "--epochs=2", "--device=cpu", f"--out={folder}", *flags]
        subprocess.run(command, env=os.environ | {"PYTHONPATH": str(ROOT), "PYTHONUTF8": "1"},
                       stdout=subprocess.DEVNULL, check=True)
        [path] = Path(folder).glob("*/history.csv")
        return float(path.read_text().strip().rpartition(",")[2])


def main(rounds=5):
    """Measure all pairs and write the table to results/bench.md."""
    table = ["| what | first, s | second, s | first / second |", "|---|---|---|---|"]
    for words, step, *first in PAIRS:
        times = [(measure(step, *first), measure(step, [], [])) for _ in range(rounds + 1)]
        ratios = sorted(a / b for a, b in times[1:])  # the first round fills caches
        medians = " | ".join(f"{statistics.median(it):.2f}" for it in zip(*times[1:], strict=True))
        table.append(f"| {words} | {medians} | {statistics.median(ratios):.2f} "
                     f"({ratios[0]:.2f} to {ratios[-1]:.2f}) |")
        print(table[-1], flush=True)
    caption = (f"{', torch '.join(KIND)}, {os.cpu_count()} cores. Seconds of one epoch on 7,680 "
               f"images, medians of {rounds} rounds; a ratio has its range behind.")
    (ROOT / "results" / "bench.md").write_text("\n".join([caption, "", *table, ""]), "utf-8")


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
