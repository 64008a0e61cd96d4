"""Does what makes a run fast cost accuracy? Steps 3 and 4, with it and without.

    python results/fastpath.py

Compares the arithmetic that a run chooses with uncompiled fp32, and with bf16, which it chooses on
other machines; in step 3 also nn.Dropout2d with nn.Dropout (results/search.py does so for step 4).
Three seeds each, on the held-out part of the training set. The fast runs of step 4 are those that
results/search.py made of the recipe that was taken. Finished runs are skipped;
results/fastpath/README.md tells all of them.
"""

import argparse
import sys
from pathlib import Path

from search import HELD_OUT, TAKEN, write_held_out
from table import read_runs, show_deviation, summarize
from variants import HERE, drop_single_values, load_step, new_net, run_all

import common  # variants has put the root on the path

SEEDS = (1, 2, 3)
EAGER = ["--fp32", "--no-compile"]


def compute_in_bf16(module):
    """Take bf16, as a run does by itself where it is faster."""
    common.is_bf16_faster = lambda device: True


SWAPS = {"bf16": compute_in_bf16, "single-values": new_net(drop_single_values)}
ROWS = [  # step, folder of the runs, what is dropped, flags
    ("step3", "fast", "channels", []),
    ("step3", "fp32-uncompiled", "channels", EAGER),
    ("step3", "single-values", "single values", EAGER),
    ("step3", "bf16", "channels", []),
    ("step4", f"../search/{TAKEN}", "channels", []),
    ("step4", "fp32-uncompiled", "channels", EAGER),
    ("step4", "bf16", "channels", []),
]


def make_report(folder):
    """Return the text of README.md; the second log line of a run says what it computed in."""
    rows, means = [], {}  # means: of each step, those that differ in the arithmetic alone
    for step, name, dropped, _ in ROWS:
        place = folder / name
        runs = read_runs(step, place, SEEDS) if place.exists() else {}
        if runs:
            log = Path(place, f"{step}-seed{min(runs)}.log").read_text(encoding="utf-8")
            arithmetic = ", ".join(log.splitlines()[1].split(", ")[-2:])
            row = summarize(runs.values())
            if dropped == "channels":
                means.setdefault(step, []).append(row["mean"])
            rows.append(f"| {step[-1]} | {dropped} | {arithmetic} | {row['runs']} | "
                        f"{row['mean']:.3f} | {show_deviation(row)} | {row['last_five']:.3f} | "
                        f"{row['lowest']:.2f} |")
    most = max((max(found) - min(found) for found in means.values()), default=0)
    return "\n".join([
        "# Does what makes a run fast cost accuracy?",
        "",
        "Trained on the first 50,000 training images, judged on the other 10,000; 15 epochs, "
        "accuracy in per cent. Made by `results/fastpath.py`.",
        "",
        "No: compiled or not, in fp32 or bf16, the mean last epochs of a step differ by at most "
        f"{most:.3f}, less than the seeds do.",
        "",
        "In step 3, dropping single values made the tests of two of the three runs unstable, while "
        "their training went as well as that of the third: one ended low, one recovered. The cause "
        "may be that of Li et al., Understanding the Disharmony between Dropout and Batch "
        "Normalization by Variance Shift (2019): in testing the values that come to a batch "
        "normalization have another variance than in training.",
        "",
        "| step | dropped | arithmetic | runs | last epoch: mean | deviation | last five: mean | "
        "lowest |",
        "|---|---|---|---|---|---|---|---|",
        *rows,
        "",
    ])


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--workers", type=int, default=2, help="runs at a time, one thread each")
    parser.add_argument("--run", nargs=2, help=argparse.SUPPRESS)
    args, rest = parser.parse_known_args(argv)
    if args.run:
        step, name = args.run
        module = load_step(step)
        SWAPS.get(name, lambda module: None)(module)
        return module.main(rest)
    write_held_out()
    folder = HERE / "fastpath"
    run_all([(step, seed, folder / name,
              [__file__, "--run", step, name, *flags, "--data-dir", str(HELD_OUT)])
             for seed in SEEDS for step, name, _, flags in ROWS], args.workers)
    report = make_report(folder)
    Path(folder, "README.md").write_text(report, encoding="utf-8")
    print(report)


if __name__ == "__main__":
    sys.exit(main())
