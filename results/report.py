"""Write the tables of README.md and results/README.md anew, sum up some runs, or test the weights.

    python results/report.py                                the tables
    python results/report.py runs/step4_aug_lr-seed1 ...    mean and spread of these runs
    python results/report.py --verify                       the weights that are kept here

A table stands between <!-- table: NAME --> and <!-- end -->. After ± is the standard deviation of
the runs, or the standard error of a difference. A mean has one digit more than a single figure.
"""

import argparse
import importlib
import re
import sys
from pathlib import Path
from statistics import fmean, stdev

import torch
from experiments import (
    EXPERIMENTS, HERE, SCRIPTS, common, is_made_here, read_rows, read_runs, write_rows)

VERIFIED = HERE / "verified.csv"
STEPS = {  # lesson, parameters, the course's test accuracy: the best epoch of one run
    1: ("a big network learns the training set by heart", "6,379,786", "99.26"),
    2: ("a new architecture, 300 times fewer weights", "20,750", "98.69"),
    3: ("batch normalization, dropout, global average pooling", "9,078", "99.16"),
    4: ("augmentation, learning-rate schedule", "9,538", "99.52"),
}
START = ["runs", "last epoch", "wrong digits"]
TABLES = {  # heads of the columns
    "runs": ["run", "epochs", *START[1:], "best epoch", "last five", "under 99.40"],
    "steps": ["script", "lesson", "parameters", "course", *START, "best epoch",
              "training accuracy"],
    "ingredients": ["step", "run", *START, "more wrong digits", "last five", "test loss",
                    "first training loss", "logged train − test"],
    "plain": ["step", "run", *START, "more wrong digits"],
    "times": ["step", "run", *START, "seconds"],
}


def column(run, name):
    """Return a column of a run, a list of rows, as numbers."""
    return [float(row[name]) for row in run]


def join(values, digits=2, standard_error=False):
    """Return one value as it is, several as their mean ± their spread."""
    if len(values) < 2:
        return "".join(f"{value:.{digits}f}" for value in values)
    spread = stdev(values) / (len(values) ** 0.5 if standard_error else 1)
    return f"{fmean(values):.{digits + 1}f} ± {spread:.{digits + 1}f}"


def describe(runs, reference):
    """Return cells by the heads of their columns; `runs`, `reference`: dicts of runs by seed."""
    tested = [column(run, "test_accuracy") for run in runs.values()]
    last = [accuracies[-1] for accuracies in tested]
    trained = [float(run[-1]["verified"]) for run in runs.values() if "verified" in run[-1]]
    changes = [100 * (float(reference[seed][-1]["test_accuracy"]) - accuracy)
               for seed, accuracy in zip(runs, last, strict=True)
               if seed in reference and reference is not runs]
    return {
        "runs": str(len(runs)),
        "last epoch": join(last),
        "wrong digits": join([100 * (100 - accuracy) for accuracy in last], 0),
        "more wrong digits": join(changes, 0, True),
        "best epoch": f"{max(map(max, tested)):.2f}",
        "last five": join([fmean(accuracies[-5:]) for accuracies in tested]),
        "under 99.40": str(sum(value < 99.4 for accuracies in tested for value in accuracies[-5:])),
        "test loss": join([column(run, "test_loss")[-1] for run in runs.values()], 3),
        "first training loss": join([column(run, "train_loss")[0] for run in runs.values()]),
        "logged train − test": join([float(run[-1]["train_accuracy"]) - accuracy
                                     for run, accuracy in zip(runs.values(), last, strict=True)]),
        "training accuracy": join(trained),
        "seconds": join([sum(column(run, "seconds")) for run in runs.values()], 0),
    }


def to_table(name, lines):
    """Return a Markdown table; `lines` are dicts of cells by the heads of their columns."""
    heads = TABLES[name]
    rows = [heads, ["---"] * len(heads)]
    rows += [[line.get(head, "") for head in heads] for line in lines]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def runs_of(table, step, name="as it is"):
    """Return the runs of an experiment by seed; of steps, with what verified.csv tells of them."""
    every = sorted(read_runs().items())
    runs = {seed: run for (*key, seed), run in every if key == [table, step, name]}
    for row in read_rows(VERIFIED) if table == "steps" else []:
        last = runs.get(int(row["seed"]), [{}])[-1]
        if row["script"] == SCRIPTS[step] and row["test_loss"] == last.get("test_loss"):
            last["verified"] = row["train_accuracy"]
    return runs


def make_table(name, steps):
    """Return a table of experiments, and on what their runs were made."""
    lines = []
    made = set()
    references = {}  # the runs of the first line of each step
    for job in sorted(EXPERIMENTS, key=lambda job: job.step):
        if job.step not in steps or job.table not in (name, "steps" * (name == "ingredients")):
            continue
        runs = runs_of(job.table, job.step, job.name)
        if name == "ingredients" and job.table == "steps":  # older runs have their own
            runs = runs_of("ingredients", job.step) or runs
        lesson, parameters, course = STEPS[job.step]
        line = {"script": f"[step {job.step}]({SCRIPTS[job.step]}.py)", "step": str(job.step),
                "lesson": lesson, "parameters": parameters, "course": course, "run": job.name}
        first = references.setdefault(job.step, runs)
        lines.append(line | (describe(runs, first) if runs else {"runs": "not yet run"}))
        words = "- step {}: {machine}, torch {torch}, threads {threads}, {precision}, {compiled}"
        made |= {words.format(job.step, **run[-1]) for run in runs.values()}
    return "\n".join([to_table(name, lines), "", *sorted(made)])


def write_tables():
    """Make every table between its markers anew."""
    def make(found):
        name, *steps = found[1].split()
        if name == "runs":
            table = "\n\n".join(
                tell({HERE / f"{SCRIPTS[step]}-seed{seed}": run
                      for seed, run in runs_of("steps", step).items()}) for step in SCRIPTS)
        else:
            table = make_table(name, list(map(int, steps)) or SCRIPTS)
        return f"<!-- table: {found[1]} -->\n\n{table}\n\n<!-- end -->"
    for path in (HERE.parent / "README.md", HERE / "README.md"):
        text = path.read_text(encoding="utf-8")
        text = re.sub("<!-- table: (.+?) -->.*?<!-- end -->", make, text, flags=re.DOTALL)
        path.write_text(text, encoding="utf-8")


def read_folders(paths):
    """Return runs, lists of rows, by folder; exit with 1 if one is no run.

    The last row of one that has a checkpoint tells how many epochs were "planned".
    """
    if len({"-validation" in path.resolve().name for path in paths}) > 1:
        sys.exit("Some were tested on held-out images (-validation), others not: give them apart")
    runs = {}
    for path in {path.resolve(): path for path in paths}.values():
        try:
            run = read_rows(path / "history.csv")
            describe({path: run}, {})  # fails if a figure is missing
            if (path / "checkpoint.pt").exists():
                checkpoint = torch.load(path / "checkpoint.pt", "cpu", weights_only=True)
                run[-1]["planned"] = checkpoint["settings"]["epochs"]
        except Exception:  # damage has many names
            sys.exit(f"{path}: expected the folder of a run: history.csv, maybe checkpoint.pt")
        runs[path] = run
    return runs


def tell(runs):
    """Return a table of runs by folder, each by itself, and of all that are finished together."""
    lines = []
    finished = {}
    for path, run in runs.items():
        epochs = run[-1].get("planned", len(run))
        if len(run) == epochs:
            finished[path] = run
        name = f"[{path.name}]({path.name}/log.txt)" if path.parent == HERE else str(path)
        done = f"{len(run)}{f' of {epochs}, unfinished' if path not in finished else ''}"
        lines.append({"run": name, "epochs": done, **describe({path: run}, {})})
    if len(finished) > 1:
        lines.append({"run": f"**{len(finished)} runs**", **describe(finished, {})})
    return to_table("runs", lines)


def verify():
    """Test the weights kept here with the step's own code; return how many are not as recorded.

    On the kind of machine that made them every image must be classified as before; elsewhere two
    may differ, because rounding does. New weights are tested on the training images too.
    """
    misses = 0
    for path in sorted(HERE.glob("*-seed*/weights.pt")):
        script, seed = path.parent.name.split("-seed")
        module = importlib.import_module(script)
        last = runs_of("steps", int(script[4]))[int(seed)][-1]
        torch.set_num_threads(int(last["threads"]))
        args = common.parse_args(["--device=cpu"], "", 1, 128)
        train_loader, test_loader = common.get_loaders(
            args, module.test_transform, module.test_transform)
        net = module.Net()
        common.load_weights(net, path)
        if "verified" not in last:
            _, trained = common.test(net, train_loader)
            row = {"script": script, "seed": seed, "test_loss": last["test_loss"],
                   "train_accuracy": f"{trained:.6f}"}
            write_rows(VERIFIED, [*read_rows(VERIFIED), row])
        _, accuracy = common.test(net, test_loader)
        change = abs(accuracy - float(last["test_accuracy"])) / 100
        differ = round(change * len(test_loader.images))
        missed = differ > (0 if is_made_here(last) else 2)
        misses += missed
        print(f"{'MISS' if missed else 'ok'}: {path.parent.name}, recorded: "
              f"{last['test_accuracy']} % on {last['machine']}", flush=True)
    print(f"{misses} differ from what was recorded")
    return misses


def main(argv=None):
    """Do what the command line asks for; exit with 1 if weights are not as recorded."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("runs", nargs="*", type=Path, help="folders of runs to sum up")
    parser.add_argument("--verify", action="store_true", help="test the weights kept here")
    args = parser.parse_args(argv)
    if args.verify:
        sys.exit(verify() > 0)
    elif args.runs:
        print(tell(read_folders(args.runs)))
    else:
        write_tables()


if __name__ == "__main__":
    main()
