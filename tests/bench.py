"""Measure ratios of times for results/bench.md, in half an hour: python tests/bench.py [ROUNDS]."""

import os
import statistics
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "results"))
import experiments  # noqa: E402

FEWER_IMAGES = ("    model = Net().to(args.device)", """\
    for loader in (train_loader, test_loader):
        loader.images = loader.images[:7680]  # 60 batches of 128
    model = Net().to(args.device)""")
PAIRS = [  # words, step, edits and flags of the first run; the second has none
    ("the course's recipe against step 4", 4, experiments.COURSE_RECIPE, ["--plain"]),
    ("nn.Dropout against nn.Dropout2d, step 4", 4, [experiments.SINGLE_VALUES], []),
    *((f"`--plain` against the defaults, {name}", step, [], ["--plain"])
      for step, name in experiments.SCRIPTS.items())]


def measure(step, edits, flags):
    """Return the seconds of the second epoch of a run."""
    edits, flags = [*edits, FEWER_IMAGES], ["--epochs=2", *flags]
    job = experiments.Experiment("times", step, "bench", [1], edits, flags)
    return float(experiments.train((job, 1))[1]["seconds"])


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
    cpu, version = experiments.common.CPU.get("cpu_name"), experiments.common.torch.__version__
    caption = (f"{cpu}, torch {version}, {os.cpu_count()} cores. Seconds of one epoch on 7,680 "
               f"images, medians of {rounds} rounds; a ratio has its range behind.\n")
    (experiments.HERE / "bench.md").write_text("\n".join([caption, *table, ""]), "utf-8")


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
