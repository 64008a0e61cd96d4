"""Write the tables of both README.md anew, sum up some runs, or test the weights of results/."""

import argparse
import importlib
import re
import sys
from pathlib import Path
from statistics import fmean, stdev, variance

import torch
from experiments import (
    EXPERIMENTS, HERE, KIND, ROOT, SCRIPTS, common, find_kind, read_rows, read_runs, write_rows)

VERIFIED = HERE / "verified.csv"
STEPS = {  # lesson, parameters, the course's test accuracy: the best epoch of one run
    1: ("a big network learns the training set by heart", 6_379_786, 99.26),
    2: ("300 times fewer weights: 131 wrong digits instead of 74", 20_750, 98.69),
    3: ("batch normalization lets a small network train well", 9_078, 99.16),
    4: ("a high learning rate that falls to almost zero; augmentation adds little", 9_538, 99.52),
}
TABLES = {  # heads of the columns
    "runs": "run | epochs | last epoch | wrong digits | best epoch | last five | under 99.40",
    "steps": "script | lesson | parameters | course | runs | last epoch | wrong digits"
             " | best epoch | training accuracy",
    "ingredients": "step | run | runs | last epoch | wrong digits | more wrong digits | last five"
                   " | test loss | first training loss | logged train − test",
    "pairs": "run | runs | last epoch | wrong digits | more wrong digits | logged train − test",
    "times": "step | run | runs | last epoch | wrong digits | seconds",
}


def join(values, digits=2):
    """Return one value as it is, several as their mean ± their spread, with one digit more."""
    if len(values) < 2:
        return "".join(f"{value:.{digits}f}" for value in values)
    return f"{fmean(values):.{digits + 1}f} ± {stdev(values):.{digits + 1}f}"


def describe(runs, reference=()):
    """Return cells by the heads of their columns; `runs`, `reference`: lists of runs."""
    tested = [[float(row["test_accuracy"]) for row in run] for run in runs]
    last = [accuracies[-1] for accuracies in tested]
    wrong, before = ([100 * (100 - float(run[-1]["test_accuracy"])) for run in group]
                     for group in (runs, reference))
    change = ""
    if min(len(wrong), len(before)) > 1:
        error = sum(variance(each) / len(each) for each in (wrong, before)) ** 0.5  # Welch's
        change = f"{fmean(wrong) - fmean(before):.1f} ± {error:.1f}"
    trained = [float(run[-1]["train_accuracy"]) for run in runs]
    return {
        "runs": len(runs),
        "last epoch": join(last),
        "wrong digits": join(wrong, 0),
        "more wrong digits": change,
        "best epoch": f"{max(map(max, tested)):.2f}",
        "last five": join([fmean(accuracies[-5:]) for accuracies in tested]),
        "under 99.40": sum(value < 99.4 for accuracies in tested for value in accuracies[-5:]),
        "test loss": join([float(run[-1]["test_loss"]) for run in runs], 3),
        "first training loss": join([float(run[0]["train_loss"]) for run in runs]),
        "logged train − test": join([a - b for a, b in zip(trained, last, strict=True)]),
        "seconds": join([sum(float(row["seconds"]) for row in run) for run in runs], 0),
    }


def to_table(name, lines):
    """Return a Markdown table; `lines` are dicts of cells by the heads of their columns."""
    heads = TABLES[name].split(" | ")
    rows = [heads, ["---"] * len(heads)]
    rows += [[str(line.get(head, "")) for head in heads] for line in lines]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def make_table(name, *steps):
    """Return a table of experiments, and on what their runs were made; `steps`: of these only."""
    every = read_runs()
    if name == "runs":
        return "\n\n".join(
            tell([HERE / f"{script}-seed{seed}" for seed in every["steps", step, "as it is"]])
            for step, script in SCRIPTS.items())
    lines, made = [], set()
    reference = {}  # the runs of the first line of each step
    tables = ["steps", "ingredients"] if name == "ingredients" else [name]
    for job in EXPERIMENTS:
        if job.table not in tables or (steps and str(job.step) not in steps):
            continue
        runs = list(every[job[:3]].values())
        lesson, weights, course = STEPS[job.step]
        line = {"script": f"[step {job.step}]({SCRIPTS[job.step]}.py)", "step": job.step,
                "run": job.name, "lesson": lesson, "parameters": f"{weights:,}", "course": course}
        known = [row for row in read_rows(VERIFIED) if row["script"] == SCRIPTS[job.step]
                 and row["test_loss"] in {run[-1]["test_loss"] for run in runs}]
        line["training accuracy"] = join([float(row["train_accuracy"]) for row in known])
        cells = describe(runs, reference.get(job.step, ())) if runs else {"runs": "not yet run"}
        lines.append(line | cells)
        reference.setdefault(job.step, runs)
        words = "- step {}: {machine}, torch {torch}, threads {threads}, {precision}, {compiled}"
        made |= {words.format(job.step, **run[-1]) for run in runs}
    return "\n".join([to_table(name, lines), "", *sorted(made)])


def read_folders(paths):
    """Return runs by folder, with the epochs "planned" if known; exit with 1 if one is no run."""
    if len({"-validation" in path.resolve().name for path in paths}) > 1:
        sys.exit("Some were tested on held-out images (-validation), others not: give them apart")
    runs = {}
    for path in {path.resolve(): path for path in paths}.values():
        with common.one_line(f"{path}: expected a run's folder: history.csv, maybe checkpoint.pt"):
            run = read_rows(path / "history.csv")
            describe([run])  # fails if a figure is missing
            if (path / "checkpoint.pt").exists():
                checkpoint = torch.load(path / "checkpoint.pt", "cpu", weights_only=True)
                run[-1]["planned"] = checkpoint["settings"]["epochs"]
        runs[path] = run
    return runs


def tell(paths):
    """Return a table of runs by folder, each by itself, and of all that are finished together."""
    lines, finished = [], []
    for path, run in read_folders(paths).items():
        name = f"[{path.name}]({path.name}/log.txt)" if path.parent == HERE else str(path)
        epochs = str(len(run))
        if len(run) < run[-1].get("planned", 0):
            epochs += f" of {run[-1]['planned']}, unfinished"
        else:
            finished.append(run)
        lines.append({"run": name, "epochs": epochs} | describe([run]))
    if len(finished) > 1:
        lines.append({"run": f"**{len(finished)} runs**"} | describe(finished))
    return to_table("runs", lines)


def verify():
    """Test the weights kept here with the step's own code; return how many are not as recorded."""
    misses = 0
    for path in sorted(HERE.glob("*-seed*/weights.pt")):
        script, seed = path.parent.name.split("-seed")
        step = importlib.import_module(script)
        last = read_runs()["steps", int(script[4]), "as it is"][int(seed)][-1]
        torch.set_num_threads(int(last["threads"]))
        args = common.parse_args(["--device=cpu"], "", 1, 128)
        training, testing = common.get_loaders(args, step.test_transform, step.test_transform)
        net = step.Net()
        common.load_weights(net, path)
        key = {"script": script, "seed": seed, "test_loss": last["test_loss"]}
        if not any(key.items() <= row.items() for row in read_rows(VERIFIED)):
            accuracy = f"{common.test(net, training)[1]:.6f}"
            write_rows(VERIFIED, [*read_rows(VERIFIED), key | {"train_accuracy": accuracy}])
        _, accuracy = common.test(net, testing)
        differ = round(abs(accuracy - float(last["test_accuracy"])) * len(testing.images) / 100)
        missed = differ > (0 if find_kind([last]) == KIND else 2)  # elsewhere rounding differs
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
    if args.runs:
        print(tell(args.runs))
        return
    for path in (ROOT / "README.md", HERE / "README.md"):
        text = re.sub(
            "(?s)(<!-- table: (.+?) -->).*?<!-- end -->",
            lambda found: f"{found[1]}\n\n{make_table(*found[2].split())}\n\n<!-- end -->",
            path.read_text(encoding="utf-8"))
        path.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
