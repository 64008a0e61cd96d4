"""Write the tables of README.md and results/README.md, or sum up some runs, or test the weights.

    python results/report.py                                the tables, each between its markers
    python results/report.py runs/step4_aug_lr-seed*.csv    mean, spread and last five of these runs
    python results/report.py --verify                       the committed weights, tested

A marker names the runs of its table, what tells its lines apart, the measures, and with which
line the others are compared. Accuracies are in per cent. After ± is the standard deviation, or
the standard error of a difference, which is taken seed by seed.
"""

import argparse
import csv
import importlib
import io
import os
import re
import sys
from contextlib import redirect_stdout
from itertools import accumulate
from pathlib import Path
from statistics import fmean, stdev

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
EXPERIMENTS, VERIFIED = HERE / "experiments.csv", HERE / "verified.csv"
SCRIPTS = {"1": "step1_setup", "2": "step2_skeleton", "3": "step3_bn_gap", "4": "step4_aug_lr"}
LESSONS = {"1": "set-up; a network that overfits", "2": "a new architecture",
           "3": "batch normalization, dropout, global average pooling",
           "4": "augmentation, learning-rate schedule"}
DOCUMENTED = {"1": 99.26, "2": 98.69, "3": 99.16, "4": 99.52}  # best test epoch of one run
HISTORY = ("train_loss", "train_accuracy", "test_loss", "test_accuracy", "seconds")
LOGGED = ("machine", "torch", "threads", "precision", "compiled")


def first(values, run):
    """Return the one of `values`, one an epoch, where `run` first tests at 99.40; None: never."""
    over = [accuracy >= 99.40 for accuracy in run["test_accuracy"]]
    return list(values)[over.index(True)] if any(over) else None


MEASURES = {  # head of a column: what to take from a run, digits, how runs are joined
    "runs": (lambda run: 1, 0, sum),
    "epochs": (lambda run: len(run["test_accuracy"]), 0, max),
    "test accuracy": (lambda run: run["test_accuracy"][-1], 2, None),  # None: mean ± deviation
    "last epoch": (lambda run: run["test_accuracy"][-1], 3, None),
    "best epoch": (lambda run: max(run["test_accuracy"]), 2, max),
    "its number": (lambda run: run["test_accuracy"].index(max(run["test_accuracy"])), 0, None),
    "last five": (lambda run: fmean(run["test_accuracy"][-5:]), 3, None),
    "lowest of them": (lambda run: min(run["test_accuracy"][-5:]), 2, min),
    "under 99.40": (lambda run: sum(value < 99.40 for value in run["test_accuracy"][-5:]), 0, sum),
    "test loss": (lambda run: run["test_loss"][-1], 4, None),
    "training loss": (lambda run: run["train_loss"][-1], 4, None),
    "first training loss": (lambda run: run["train_loss"][0], 3, None),
    "training accuracy": (lambda run: run["train_accuracy"][-1], 2, None),
    "training ahead": (lambda run: run["train_accuracy"][-1] - run["test_accuracy"][-1], 2, None),
    "seconds": (lambda run: sum(run["seconds"]), 0, fmean),
    "reached 99.40": (lambda run: max(run["test_accuracy"]) >= 99.40, 0, sum),
    "in epoch": (lambda run: first(range(99), run), 2, fmean),
    "after seconds": (lambda run: first(accumulate(run["seconds"]), run), 0, fmean),
}


def read_rows(path):
    """Return the rows of a csv, dicts of str; none where there is no file."""
    if not Path(path).exists():
        return []
    with open(path, encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def write_rows(path, rows):
    """Write a csv; an interruption leaves the one that was there."""
    with open(f"{path}.tmp", "w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, rows[0], lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    os.replace(f"{path}.tmp", path)


def read_log(log):
    """Return what the text of a log tells of its run, a dict of str by LOGGED."""
    device = re.search(r"^Device: \w+[:\d]*[ ,(]+(.+?)\)?, (\d+) threads, torch (\S+)", log, re.M)
    settings = re.search(r"^Settings: .*(fp32|bf16), (not )?compiled", log, re.M)
    found = device[1], device[3], device[2], settings[1], "no" if settings[2] else "yes"
    return dict(zip(LOGGED, found, strict=True))


def all_rows():
    """Return the rows of all experiments, of the runs here ("results") and of verified.csv."""
    rows, verified = read_rows(EXPERIMENTS), read_rows(VERIFIED)
    for step, script in SCRIPTS.items():
        weights = [row | {"experiment": "verified", "step": step, "variant": ""}
                   for row in verified if row["script"] == script]
        gaps = [float(row["train_accuracy"]) - float(row["test_accuracy"]) for row in weights]
        gap = f"{fmean(gaps):.2f} ± {stdev(gaps):.2f}" if len(gaps) > 1 else ""
        words = {"experiment": "results", "step": step, "recipe": "D" if step == "4" else "",
                 "variant": "as committed", "script": f"[step {step}]({script}.py)",
                 "lesson": LESSONS[step], "course": f"{DOCUMENTED[step]:.2f}", "train − test": gap}
        files = HERE.glob(f"{script}-seed*.csv")
        for path in sorted(files, key=lambda path: (len(path.name), path.name)):
            seed, log = path.stem.split("-seed")[1], path.with_suffix(".log").read_text("utf-8")
            if seed.isdigit() and "\nLast Test Accuracy" in log:
                words |= read_log(log) | {"parameters": re.search("Total params: (.*)", log)[1]}
                words |= {"seed": seed, "run": f"[seed {seed}]({path.stem}.log)"}
                rows += [row | words for row in read_rows(path)]
        rows += weights
    return rows


def rows_of(pattern):
    """Return the rows whose EXPERIMENT/STEP/VARIANT/SEED begins with a regular expression."""
    return [row for row in all_rows()
            if re.match(pattern, "{experiment}/{step}/{variant}/{seed}".format(**row))]


def to_groups(rows, columns):
    """Return dicts of runs by seed, by the words that their rows have in `columns`.

    A run is a dict: lists of float by HISTORY, one value an epoch, and its last `row`.
    """
    groups = {}
    for row in rows:
        runs = groups.setdefault(" | ".join(row[name] for name in columns), {})
        run = runs.setdefault(row["seed"], {name: [] for name in HISTORY})
        run["row"] = row
        for name in HISTORY:
            run[name].append(float(row.get(name, "nan")))
    return groups


def to_cell(name, runs, reference):
    """Return a figure of some runs, dicts by seed; below it, how it differs from `reference`."""
    if name not in MEASURES:
        return next(iter(runs.values()))["row"][name]
    measure, digits, join = MEASURES[name]
    values = [value for value in map(measure, runs.values()) if value is not None]
    if join or not values:
        return f"{join(values):.{digits}f}" if values else "never"
    spread = f" ± {stdev(values):.{digits}f}" if len(values) > 1 else ""
    changes = [measure(runs[seed]) - measure(reference[seed]) for seed in runs if seed in reference]
    error = f" ± {stdev(changes) / len(changes) ** 0.5:.{digits}f}" if len(changes) > 1 else ""
    difference = f"<br>{fmean(changes):+.{digits}f}{error}" if any(changes) else ""
    return f"{fmean(values):.{digits}f}{spread}{difference}"


def to_table(rows, columns, measures, reference=None):
    """Return a Markdown table, a line for all runs with the same words in `columns`, and a caption.

    If there is a `reference`, each line is compared with the one of its step with that last word.
    """
    groups, machines = to_groups(rows, columns), {}
    lines = [" | ".join([*columns, *measures]), " | ".join("---" for _ in [*columns, *measures])]
    for words, runs in groups.items():
        compared = [groups[other] for other in groups if other[0] == words[0]
                    and other.split(" | ")[-1] == reference]
        cells = [to_cell(name, runs, compared[0] if compared else {}) for name in measures]
        lines.append(" | ".join([words, *cells]))
        for seed, run in runs.items() if words != "all" else ():
            row, name = run["row"], ", ".join(word for word in words.split(" | ") if word)
            machine = ", ".join(f"{column} {row[column]}" for column in LOGGED if column in row)
            machines.setdefault(f"- {machine}: ", {}).setdefault(name, []).append(seed)
    captions = [machine[2:-2] for machine in machines] if len(machines) == 1 else []
    for machine, parts in machines.items() if len(machines) > 1 else ():
        if len(parts) == len(groups) and len({*map(tuple, parts.values())}) == 1:
            parts = {"all rows": next(iter(parts.values()))}
        captions.append(machine + "; ".join(
            f"{name} (seeds {', '.join(seeds)})" for name, seeds in parts.items()))
    return "\n".join([*(f"| {line} |" for line in lines), "", *captions])


def tell(rows):
    """Return the table of several runs of one step, each by itself and then all together."""
    together = [row | {"seed": row["run"], "run": "all"} for row in rows]
    return to_table(rows + together, ["run"], [
        "epochs", "last epoch", "best epoch", "its number", "last five", "lowest of them",
        "under 99.40"])


def fill(text):
    """Return a Markdown text with the tables between its markers made anew."""
    def make(found):
        pattern, columns, *others = found[2].split(" | ")
        rows, table = rows_of(pattern), "Not yet run."
        if columns == "run":
            table = tell(rows)
        elif rows:
            table = to_table(rows, columns.split(", "), others[0].split(", "), *others[1:])
        return f"{found[1]}\n\n{table}\n\n<!-- end -->"
    return re.sub(r"(<!-- table: (.+?) -->).*?<!-- end -->", make, text, flags=re.DOTALL)


def verify():
    """Test all weights in results/ with the step's own code; return how many are not as recorded.

    The count of correct test images must be that of the csv; on another machine, which rounds sums
    otherwise, two may differ. Weights that verified.csv lacks are tested on training images too.
    """
    sys.path.insert(0, str(ROOT))
    import torch

    import common
    known, misses = {(row["script"], row["seed"]): row for row in read_rows(VERIFIED)}, 0
    for last in {row["run"]: row for row in rows_of("results")}.values():
        script, seed = name = SCRIPTS[last["step"]], last["seed"]
        weights, module = HERE / f"{script}-seed{seed}.pt", importlib.import_module(script)
        if last["step"] == "1" and not weights.exists():
            continue  # too large to commit: its rows stay
        with redirect_stdout(io.StringIO()) as output:
            args = common.parse_args(["--device=cpu"], "", 1, 128)
            common.setup(args)
            loaders = common.get_loaders(args, module.test_transform, module.test_transform)
            net = module.Net()
            with common.one_line(f"{weights} cannot be tested"):
                net.load_state_dict(torch.load(weights, map_location="cpu", weights_only=True))
            loss, accuracy = common.test(net, loaders[1])
            print("Settings: fp32, not compiled")  # as tests always are
            logged = read_log(output.getvalue())
            if name not in known or abs(float(known[name]["test_loss"]) - loss) > 1e-5:
                figures = (*common.test(net, loaders[0]), loss, accuracy)
                row = {column: f"{x:.6f}" for column, x in zip(HISTORY[:4], figures, strict=True)}
                known[name] = {"script": script, "seed": seed} | row | logged
                write_rows(VERIFIED, list(known.values()))
        here = all(logged[column] == last[column] for column in LOGGED[:3])
        miss = round(100 * abs(accuracy - float(last["test_accuracy"]))) > (0 if here else 2)
        misses += miss
        print(f"{'MISS' if miss else 'ok  '} {weights.name}: {accuracy:.2f}, recorded on "
              f"{'this' if here else 'another'} machine: {last['test_accuracy']}", flush=True)
    print(f"{misses} of them differ from what was recorded")
    return misses


def main():
    """Do what the command line asks for; exit with 1 if weights are not as recorded."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("files", nargs="*", type=Path, metavar="FILE.csv", help="runs of one step")
    parser.add_argument("--verify", action="store_true", help="test the committed weights")
    args = parser.parse_args()
    if args.verify:
        sys.exit(1 if verify() else 0)
    if args.files:
        files = [path.expanduser() for path in args.files if ".previous" not in path.name]
        bad = [str(p) for p in files if not any("test_loss" in row for row in read_rows(p))]
        if bad:
            sys.exit(f"{', '.join(bad)}: expected the csv of a run")
        print(tell([row | {"run": str(path), "seed": str(path)} for path in files
                    for row in read_rows(path)]))
        return
    for path in (ROOT / "README.md", HERE / "README.md"):
        path.write_text(fill(path.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
