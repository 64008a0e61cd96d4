"""Does the fast path cost accuracy? Steps 3 and 4, fp32 uncompiled beside what a run chooses.

    python results/fastpath.py [--workers 2]

Three seeds each, on the held-out part of the training set. The fast runs of step 4 are those
that results/search.py made of the recipe that was taken. Finished runs are skipped;
results/fastpath/README.md tells all of them.
"""

import argparse
import sys
from pathlib import Path

from search import HELD_OUT, TAKEN, write_held_out
from table import read_runs, show_deviation, summarize
from variants import HERE, ROOT, run_all

SEEDS = (1, 2, 3)
PATHS = {"fast": [], "fp32-uncompiled": ["--fp32", "--no-compile"]}
STEPS = {"step3": "step3_bn_gap.py", "step4": "step4_aug_lr.py"}


def find_place(step, name, folder):
    """Return the folder that holds the runs of a step with this arithmetic."""
    return HERE / "search" / TAKEN if (step, name) == ("step4", "fast") else folder / name


def make_report(folder):
    """Return the text of README.md; the second log line of a run says what it computed in."""
    lines = [
        "# Does the fast path cost accuracy?",
        "",
        "Trained on the first 50,000 training images, judged on the other 10,000; 15 epochs, "
        "accuracy in per cent. Made by `results/fastpath.py`.",
        "",
        "| step | arithmetic | runs | last epoch: mean | deviation | last five: mean |",
        "|---|---|---|---|---|---|",
    ]
    for step in STEPS:
        for name in PATHS:
            place = find_place(step, name, folder)
            runs = read_runs(step, place, SEEDS) if place.exists() else {}
            if runs:
                log = Path(place, f"{step}-seed{min(runs)}.log").read_text(encoding="utf-8")
                arithmetic = ", ".join(log.splitlines()[1].split(", ")[-2:])
                row = summarize(runs.values())
                deviation = show_deviation(row)
                lines.append(f"| {step[-1]} | {arithmetic} | {row['runs']} | {row['mean']:.3f} | "
                             f"{deviation} | {row['last_five']:.3f} |")
    return "\n".join([*lines, ""])


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--workers", type=int, default=1, help="runs at a time, one thread each")
    args = parser.parse_args(argv)
    write_held_out()
    folder = HERE / "fastpath"
    run_all([(step, seed, find_place(step, name, folder),
              [str(ROOT / script), "--data-dir", str(HELD_OUT), *flags])
             for seed in SEEDS for step, script in STEPS.items() for name, flags in PATHS.items()],
            args.workers)
    report = make_report(folder)
    Path(folder, "README.md").write_text(report, encoding="utf-8")
    print(report)


if __name__ == "__main__":
    sys.exit(main())
