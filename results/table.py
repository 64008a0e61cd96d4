"""Print the table of several runs of one step, as Markdown.

    python results/table.py runs/step4-seed1.csv runs/step4-seed2.csv

Accuracies are in per cent of the test set. Nothing here needs torch.
"""

import csv
import re
import sys
from pathlib import Path
from statistics import fmean, stdev

HERE = Path(__file__).resolve().parent
COLUMNS = ["epoch", "train_loss", "train_accuracy", "test_loss", "test_accuracy",
           "learning_rate", "seconds"]
BAR = 99.40  # the accuracy that the last epochs of step 4 should not fall below


def read_run(path):
    """Return the columns of one csv as a dict of lists of float; exit with 1 if it is damaged."""
    try:
        with open(path, encoding="utf-8", newline="") as file:
            rows = list(csv.DictReader(file))
        if rows:
            return {name: [float(row[name]) for row in rows] for name in COLUMNS}
        found = "no epoch"
    except (OSError, ValueError, TypeError, KeyError) as error:
        found = error
    sys.exit(f"{path}: expected the csv of a run, found: {found}")


def is_finished(step, seed, folder):
    """Tell whether this run came to its end: the results close its log."""
    log = Path(folder, f"{step}-seed{seed}.log")
    return log.exists() and "\nLast Test Accuracy: " in log.read_text(encoding="utf-8")


def read_runs(step, folder=HERE, seeds=None):
    """Read the finished runs of one step.

    Args:
        step (str): "step1" to "step4".
        folder (Path): holds the csv and log files.
        seeds (Iterable[int] | None): only these; None means all that are there.

    Returns:
        dict[int, dict[str, list[float]]]: the columns of each run by seed, in their order.
    """
    names = (re.fullmatch(rf"{step}-seed(\d+)\.csv", path.name) for path in Path(folder).iterdir())
    found = sorted(int(name[1]) for name in names if name)
    return {seed: read_run(Path(folder, f"{step}-seed{seed}.csv")) for seed in found
            if (seeds is None or seed in seeds) and is_finished(step, seed, folder)}


def summarize(runs):
    """Say in figures how several runs ended.

    Args:
        runs (Iterable[dict]): the columns of each run, from read_run.

    Returns:
        dict: `runs`, their number; `mean` and `deviation` (sample standard deviation, None for
        one run) of the last epochs; `last_five`, the mean of all last fives; `lowest` and
        `under`, the lowest of them and how many of the `tail` epochs are under 99.40;
        `best`, the best single epoch of any run; `seconds`, the mean training time of a run.
    """
    runs = list(runs)
    tests = [run["test_accuracy"] for run in runs]
    last = [test[-1] for test in tests]
    tail = [accuracy for test in tests for accuracy in test[-5:]]
    return {
        "runs": len(runs),
        "mean": fmean(last),
        "deviation": stdev(last) if len(last) > 1 else None,
        "last_five": fmean(fmean(test[-5:]) for test in tests),
        "lowest": min(tail),
        "under": sum(accuracy < BAR for accuracy in tail),
        "tail": len(tail),
        "best": max(map(max, tests)),
        "seconds": fmean(sum(run["seconds"]) for run in runs),
    }


def show_deviation(summary):
    """Return the deviation of a summary as a cell of a table: empty for a single run."""
    return "" if summary["deviation"] is None else f"{summary['deviation']:.3f}"


def make_table(runs):
    """Return the Markdown table of a dict of runs by name or seed, with the summary below it."""
    lines = [
        "| run | epochs | last epoch | best epoch | last five: mean | lowest |",
        "|---|---|---|---|---|---|",
    ]
    for name, run in runs.items():
        test = run["test_accuracy"]
        best = f"{max(test):.2f} (epoch {test.index(max(test))})"
        lines.append(f"| {name} | {len(test)} | {test[-1]:.2f} | {best} | "
                     f"{fmean(test[-5:]):.3f} | {min(test[-5:]):.2f} |")
    summary = summarize(runs.values())
    spread = ""
    if summary["deviation"] is not None:
        spread = f", standard deviation {summary['deviation']:.3f}"
    return "\n".join([
        *lines,
        "",
        f"- Last epoch: mean {summary['mean']:.3f}{spread} (n = {summary['runs']})",
        f"- Best single epoch: {summary['best']:.2f}",
        f"- Last five epochs: mean {summary['last_five']:.3f}, lowest {summary['lowest']:.2f}; "
        f"{summary['under']} of {summary['tail']} under {BAR:.2f}",
    ])


def main(paths):
    if not paths or paths[0].startswith("-"):
        sys.exit("usage: python results/table.py FILE.csv ...   (runs of one step)")
    steps = sorted({Path(path).name.split("-")[0] for path in paths})
    if len(steps) > 1:
        sys.exit(f"expected runs of one step, found those of {', '.join(steps)}")
    print(make_table({Path(path).stem: read_run(path) for path in paths}))


if __name__ == "__main__":
    main(sys.argv[1:])
