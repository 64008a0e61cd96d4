"""Write the tables of both README.md anew, compare some runs, or test the weights of results/."""

import argparse
import importlib
import re
import sys
from collections import defaultdict
from pathlib import Path
from statistics import fmean, stdev, variance

import torch
from experiments import (
    EXPERIMENTS, HERE, ROOT, SCRIPTS, common, find_kind, read_rows, read_runs, write_rows)
from torch import nn

VERIFIED = HERE / "verified.csv"
STEPS = {  # weights; the course's wrong digits of 10,000 in the best epoch of its one run
    1: (6_379_786, 74), 2: (20_750, 131), 3: (9_078, 84), 4: (9_538, 48)}
RUNS = "run | epochs | last epoch | wrong digits | best epoch | last five | under 99.40"


def get_series(run, column):
    """Return a column of a history, epoch by epoch; accuracies as wrong digits of 10,000."""
    values = [float(row[column]) for row in run]
    return [round(100 * (100 - value)) for value in values] if "accuracy" in column else values


def count_wrong(runs):
    """Return how many of 10,000 test digits each run gets wrong after its last epoch."""
    return [get_series(run, "test_accuracy")[-1] for run in runs]


def join(values, digits=2):
    """Return one value as it is, several as their mean ± their spread, with one digit more."""
    if len(values) < 2:
        return "".join(f"{value:.{digits}f}" for value in values)
    return f"{fmean(values):.{digits + 1}f} ± {stdev(values):.{digits + 1}f}"


def compare(runs, reference):
    """Return how many more digits `runs` get wrong, Welch's standard error, and a verdict."""
    groups = count_wrong(runs), count_wrong(reference)
    difference = fmean(groups[0]) - fmean(groups[1])
    fewest = min(map(len, groups))
    error = sum(variance(wrong) / len(wrong) for wrong in groups) ** 0.5 if fewest > 1 else None
    if fewest < 5:
        return difference, error, "too few runs to tell"
    hardly = abs(difference) >= 2.5 * error > 0
    return difference, error, "hardly chance" if hardly else "may be chance"


def describe(runs, reference=()):
    """Return cells by the heads of their columns; `runs`, `reference`: lists of runs."""
    tested = [[float(row["test_accuracy"]) for row in run] for run in runs]
    last = [accuracies[-1] for accuracies in tested]
    trained = [float(run[-1]["train_accuracy"]) for run in runs]
    difference, error, _ = compare(runs, reference) if reference else (0, None, "")
    return {
        "runs": len(runs), "last epoch": join(last), "wrong digits": join(count_wrong(runs), 0),
        "more wrong digits": "" if error is None else f"{difference:.1f} ± {error:.1f}",
        "best epoch": f"{max(map(max, tested)):.2f}",
        "last five": join([fmean(accuracies[-5:]) for accuracies in tested]),
        "under 99.40": sum(value < 99.4 for accuracies in tested for value in accuracies[-5:]),
        "test loss": join([float(run[-1]["test_loss"]) for run in runs], 3),
        "first training loss": join([float(run[0]["train_loss"]) for run in runs]),
        "logged train − test": join([a - b for a, b in zip(trained, last, strict=True)]),
        "seconds": join([sum(float(row["seconds"]) for row in run) for run in runs], 0),
    }


def to_table(heads, lines):
    """Return a Markdown table; `heads`: its columns; `lines`: dicts of cells by their heads."""
    heads = heads.split(" | ")
    rows = [heads, ["---"] * len(heads)]
    rows += [[str(line.get(head, "")) for head in heads] for line in lines]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def find_runs(steps, tables):
    """Return (experiment, its runs) of some steps and tables; only what has been run."""
    every = read_runs()
    jobs = [job for job in EXPERIMENTS if job.step in steps and job.table in tables]
    return [(job, list(every[job[:3]].values())) for job in jobs if every[job[:3]]]


def make_table(heads, name, *steps):
    """Return a table of experiments, and on what their runs were made; `steps`: of these only."""
    if name == "runs":
        paths = HERE.glob(f"step{steps[0]}*-seed*")
        return tell(sorted(paths, key=lambda path: (len(path.name), path.name)))  # 2 before 10
    lines, made = [], defaultdict(list)  # names of rows by what their runs were made on
    first = {}  # the runs of the first line of each step
    tables = {"ingredients": ["steps", "ingredients"]}.get(name, [name])
    for job, runs in find_runs([int(step) for step in steps] or SCRIPTS, tables):
        script = SCRIPTS[job.step]
        weights, course = STEPS[job.step]
        losses = [run[-1]["test_loss"] for run in runs]
        trained = [float(row["train_accuracy"]) for row in read_rows(VERIFIED)
                   if row["script"] == script and row["test_loss"] in losses]
        lesson = importlib.import_module(script).__doc__.splitlines()[0]
        lines.append(describe(runs, first.get(job.step)) | {
            "step": job.step, "run": job.name, "training accuracy": join(trained),
            "script": f"[step {job.step}]({script}.py)", "weights": f"{weights:,}",
            "lesson": lesson.partition(": ")[2].rstrip("."), "the course's best": course})
        first.setdefault(job.step, runs)
        for kind in sorted({find_kind(run[-1]) for run in runs}):
            made[kind].append(f"step {job.step} {job.name}")
    captions = [f"- {kind}" for kind in made]
    if len(made) > 1:
        captions = ["Made on more than one kind of machine or precision:\n"]
        captions += [f"- {kind}: {', '.join(rows)}" for kind, rows in made.items()]
    if "lesson" in heads:  # README's: it links to the captions
        return to_table(heads, lines)
    return "\n".join([to_table(heads, lines), "", *captions])


def read_folders(paths):
    """Return runs by folder, "epochs" in words in the last row; exit with 1 if one is no run."""
    if len({"-validation" in path.resolve().name for path in paths}) > 1:
        sys.exit("Some were tested on held-out images (-validation), others not: give them apart")
    runs = {}
    for path in {path.resolve(): path for path in paths}.values():
        with common.one_line(f"{path}: expected a run's folder: history.csv, maybe checkpoint.pt"):
            runs[path] = run = read_rows(path / "history.csv")
            if not run:
                raise ValueError("there is no history.csv, or no epoch in it")
            describe([run])  # fails if a figure is missing
            run[-1]["epochs"] = str(len(run))
            if (path / "checkpoint.pt").exists():
                checkpoint = torch.load(path / "checkpoint.pt", "cpu", weights_only=True)
                if len(run) < (planned := checkpoint["settings"]["epochs"]):
                    run[-1]["epochs"] += f" of {planned}, unfinished"
    return runs


def tell(paths):
    """Return a table of the runs of each script, its means last, and how the scripts compare."""
    scripts = defaultdict(dict)  # runs by script and folder
    for path, run in read_folders(paths).items():
        scripts[re.sub(r"-seed\d.*", "", path.resolve().name)][path] = run
    parts, counted = [], {}
    for script, runs in scripts.items():
        lines = []
        for path, run in runs.items():
            name = f"[{path.name}]({path.name}/log.txt)" if path.parent == HERE else str(path)
            lines.append({"run": name, "epochs": run[-1]["epochs"]} | describe([run]))
        finished = [run for run in runs.values() if "unfinished" not in run[-1]["epochs"]]
        counted[script] = finished or list(runs.values())  # none is finished: as far as they are
        if len(counted[script]) > 1:
            words = f"**{len(counted[script])} {'' if finished else 'unfinished '}runs**"
            lines.append({"run": words} | describe(counted[script]))
        parts.append(to_table(RUNS, lines))
    names = list(counted)
    for script in names[1:]:
        difference, error, verdict = compare(counted[script], counted[names[0]])
        spread = "" if error is None else f" ± {error:.1f}"
        parts.append(f"{script} against {names[0]}: {abs(difference):.1f}{spread} "
                     f"{'fewer' if difference < 0 else 'more'} wrong digits: {verdict}")
    return "\n\n".join(parts)


def verify():
    """Test the weights kept here with the step's own code; return how many are not as recorded."""
    (images, labels), testing = (
        common.read_split(ROOT / "data/MNIST/raw", prefix) for prefix in ("train", "t10k"))
    misses = 0
    for path in sorted(HERE.glob("*-seed*/weights.pt")):
        script, seed = path.parent.name.split("-seed")
        step = importlib.import_module(script)
        network = step.Net()
        common.load_weights(network, path)
        last = read_rows(path.with_name("history.csv"))[-1]
        rows = read_rows(VERIFIED)
        key = {"script": script, "seed": seed, "test_loss": last["test_loss"]}
        record = next((row for row in rows if key.items() <= row.items()), None)
        few = len(find_wrong(network, step.test_transform, images[:6000], labels[:6000]))
        if record is None:
            wrong = len(find_wrong(network, step.test_transform, images, labels))
            accuracy = f"{100 - 100 * wrong / len(images):.6f}"
            record = key | {"train_accuracy": accuracy, "wrong_of_6000": few}
            write_rows(VERIFIED, [*rows, record])
        wrong = len(find_wrong(network, step.test_transform, *testing))
        was = get_series([last], "test_accuracy")[0], int(record["wrong_of_6000"])
        missed = max(abs(wrong - was[0]), abs(few - was[1])) > 2  # elsewhere rounding differs
        misses += missed
        print(f"{'MISS' if missed else 'ok'}: {path.parent.name}: {wrong} test digits and {few} of "
              f"6,000 training digits wrong, recorded {was[0]} and {was[1]}", flush=True)
    print(f"{misses} differ from what was recorded")
    return misses


@torch.inference_mode()
def find_wrong(network, transform, images, labels):
    """Return (index, label, answer) of the images, uint8 Nx1x28x28, that a network gets wrong."""
    network.eval()
    answers = torch.cat([network(transform(part)).argmax(dim=1) for part in images.split(1000)])
    wrong = (answers != labels).nonzero().flatten().tolist()
    return [(index, labels[index].item(), answers[index].item()) for index in wrong]


@torch.no_grad()
def measure_activations(data_dir=ROOT / "data"):
    """Return how large step 2's values are after each layer, before training: rows of a csv.

    Root mean squares over 256 training digits; layer 0 is the input, the pool is no layer.
    """
    step = importlib.import_module(SCRIPTS[2])
    images, _ = common.read_split(data_dir / "MNIST" / "raw", "train")
    rows = [{"layer": layer} for layer in range(9)]
    for name in ("as it is", "He initialization", "batch normalization"):
        torch.manual_seed(1)
        network = step.Net()
        values = [step.test_transform(images[:256])]
        for layer in network.layers:
            for weights in layer.parameters() if name == "He initialization" else ():
                nn.init.kaiming_uniform_(weights)
            values.append(layer(values[-1]))
            if name == "batch normalization" and isinstance(layer, nn.Sequential):  # with a ReLU
                values[-1] = nn.functional.batch_norm(values[-1], None, None, training=True)
        del values[4]  # the pool's
        for row, value in zip(rows, values, strict=True):
            row[name] = f"{value.square().mean().sqrt():.3g}"
    return rows


def main(argv=None):
    """Do what the command line asks for; exit with 1 if weights are not as recorded."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("runs", nargs="*", type=Path, help="folders of runs to compare")
    parser.add_argument("--verify", action="store_true", help="test the weights kept here")
    args = parser.parse_args(argv)
    if args.verify:
        sys.exit(verify() > 0)
    if args.runs:
        print(tell(args.runs))
        return
    for path in (ROOT / "README.md", HERE / "README.md"):
        text = re.sub(  # the head of a table, in the page, says its columns
            r"(?s)(<!-- table: ([^\n]+?) -->\n\n)\| ([^\n]+) \|\n.*?<!-- end -->",
            lambda found: f"{found[1]}{make_table(found[3], *found[2].split())}\n\n<!-- end -->",
            path.read_text(encoding="utf-8"))
        path.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
