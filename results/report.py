"""Write the tables of README.md and results/README.md anew, sum up some runs, or test the weights.

    python results/report.py                                the tables
    python results/report.py runs/step4_aug_lr-seed1 ...    mean and spread of these runs
    python results/report.py --verify                       the weights that are kept here

A table stands between <!-- table: NAME --> and <!-- end -->. After ± is the standard deviation of
the runs, or the standard error of a difference. A mean has one digit more than a single figure.
"""

import argparse
import importlib
import io
import re
import sys
from contextlib import redirect_stdout
from pathlib import Path
from statistics import fmean, stdev

import torch
from experiments import EXPERIMENTS, HERE, KIND, SCRIPTS, common, read_rows, read_runs, write_rows

VERIFIED = HERE / "verified.csv"
STEPS = {  # lesson, parameters, the course's test accuracy: the best epoch of one run
    1: ("a big network learns the training set by heart", "6,379,786", "99.26"),
    2: ("a new architecture, 300 times fewer weights", "20,750", "98.69"),
    3: ("batch normalization, dropout, global average pooling", "9,078", "99.16"),
    4: ("augmentation, learning-rate schedule", "9,538", "99.52"),
}
INGREDIENTS = ["runs", "last epoch", "wrong digits", "more wrong digits", "last five",
               "lowest of them", "test loss", "first training loss", "logged train − test"]
TABLES = {  # name: tables of the experiments in it, their steps, columns
    "steps": (["steps"], [1, 2, 3, 4], [
        "runs", "last epoch", "wrong digits", "best epoch", "train − test"]),
    "overfitting": (["steps"], [1, 2, 3, 4], [
        "runs", "training accuracy", "wrong training digits", "last epoch", "wrong digits",
        "train − test"]),
    "ingredients 2": (["steps", "ingredients"], [2], INGREDIENTS),
    "ingredients 3": (["steps", "ingredients"], [3], INGREDIENTS),
    "ingredients 4": (["steps", "ingredients"], [4], INGREDIENTS),
    "plain": (["plain"], [3, 4], ["runs", "last epoch", "wrong digits", "more wrong digits"]),
    "times": (["times"], [4], ["runs", "last epoch", "wrong digits", "seconds", "reached 99.40"]),
}
EACH = ["last epoch", "wrong digits", "best epoch", "its number", "last five", "lowest of them",
        "under 99.40"]  # columns of the table of single runs
JOINED = {"runs": sum, "best epoch": max, "lowest of them": min, "under 99.40": sum,
          "reached 99.40": sum}  # how several runs are joined; all others: mean ± spread
WHOLE = ["runs", "wrong digits", "its number", "under 99.40", "wrong training digits", "seconds",
         "reached 99.40"]  # figures without digits behind the point; all others have two


def column(run, name):
    """Return a column of a run, a list of rows, as numbers."""
    return [float(row[name]) for row in run]


def summarize(run):
    """Return the figures of a run by the heads of their columns."""
    tested = column(run, "test_accuracy")
    figures = {
        "runs": 1,
        "last epoch": tested[-1],
        "wrong digits": 100 * (100 - tested[-1]),  # of 10,000
        "best epoch": max(tested),
        "its number": tested.index(max(tested)),
        "last five": fmean(tested[-5:]),
        "lowest of them": min(tested[-5:]),
        "under 99.40": sum(accuracy < 99.40 for accuracy in tested[-5:]),
        "test loss": column(run, "test_loss")[-1],
        "first training loss": column(run, "train_loss")[0],
        "logged train − test": column(run, "train_accuracy")[-1] - tested[-1],
        "seconds": sum(column(run, "seconds")),
        "reached 99.40": max(tested) >= 99.40,
    }
    if "plain" in run[-1]:  # accuracy of the last weights on plain training images
        [plain] = column(run[-1:], "plain")
        figures |= {"training accuracy": plain, "wrong training digits": 600 * (100 - plain),
                    "train − test": plain - tested[-1]}
    return figures


def to_cells(heads, runs, reference):
    """Return the cells of a line; `runs` and what they are compared with are runs by seed."""
    figures = {seed: summarize(run) for seed, run in runs.items()}
    cells = []
    for head in heads:
        digits = 0 if head in WHOLE else 3 if head == "test loss" else 2
        values = [figures[seed][head] for seed in runs if head in figures[seed]]
        if head == "more wrong digits":  # seed by seed
            changes = [figures[seed]["wrong digits"] - summarize(reference[seed])["wrong digits"]
                       for seed in runs if seed in reference and runs != reference]
            error = stdev(changes) / len(changes) ** 0.5 if len(changes) > 1 else 0
            cells.append(f"{fmean(changes):+.1f} ± {error:.1f}" if error else "")
        elif len(values) < len(runs) or not runs:
            cells.append("not yet run" if head == "runs" else "")
        elif head in JOINED or len(runs) == 1:
            cells.append(f"{JOINED.get(head, fmean)(values):.{digits}f}")
        else:
            cells.append(f"{fmean(values):.{digits + 1}f} ± {stdev(values):.{digits + 1}f}")
    return cells


def to_table(lines):
    """Return a Markdown table of `lines`, lists of cells, the heads first."""
    rows = [lines[0], ["---"] * len(lines[0]), *lines[1:]]
    widths = [max(map(len, cells)) for cells in zip(*rows, strict=True)]
    return "\n".join(f"| {' | '.join(map(str.ljust, row, widths))} |" for row in rows)


def runs_of(table, step, name="as it is"):
    """Return the runs of an experiment by seed; "plain" in a step's are figures of verified.csv."""
    runs = {key[3]: run for key, run in read_runs().items() if key[:3] == (table, str(step), name)}
    for row in read_rows(VERIFIED):
        if table == "steps" and row["script"] == SCRIPTS[step] and row["seed"] in runs:
            runs[row["seed"]][-1]["plain"] = row["train_accuracy"]
    return dict(sorted(runs.items(), key=lambda item: int(item[0])))


def tell_machines(runs):
    """Return how runs were made; `runs`: pairs of a name and the runs that have it, by seed."""
    machines = {}
    for name, found in runs:
        for run in found.values():
            made = "{machine}, torch {torch}, threads: {threads}, {precision}".format(**run[-1])
            made += ", compiled" if run[-1]["compiled"] == "yes" else ", not compiled"
            machines.setdefault(made, {})[name] = True
    if len(machines) == 1:
        return f"Made on: {', '.join(machines)}."
    return "\n".join(f"- {'; '.join(names)}: {made}" for made, names in machines.items())


def make_table(name):
    """Return a table, how its runs were made, and the edits of its experiments."""
    if name == "runs":
        steps = {step: runs_of("steps", step) for step in SCRIPTS}
        groups = {f"step {step}": {f"[seed {seed}]({SCRIPTS[step]}-seed{seed}/log.txt)": run
                                   for seed, run in runs.items()} for step, runs in steps.items()}
        return f"{tell(groups)}\n\n{tell_machines(groups.items())}"
    tables, steps, heads = TABLES[name]
    lines = [["step", "run", *heads]]
    made = []
    edits = ""
    references = {}
    for job in sorted(EXPERIMENTS, key=lambda job: job.step):
        if job.table not in tables or job.step not in steps:
            continue
        runs = runs_of(job.table, job.step, job.name)
        made.append((f"step {job.step}, {job.name}", runs))
        start = [str(job.step), job.name]
        if name == "steps":
            lines[0] = ["step", "lesson", "parameters", "course", *heads]
            start = [f"[step {job.step}]({SCRIPTS[job.step]}.py)", *STEPS[job.step]]
        lines.append([*start, *to_cells(heads, runs, references.setdefault(job.step, runs))])
        if job.edits:
            edits += f"\n\nStep {job.step}, {job.name}:\n\n```diff"
            for old, new in job.edits:
                edits += "".join([*(f"\n-{line}" for line in old.splitlines()),
                                  *(f"\n+{line}" for line in new.splitlines())])
            edits += "\n```"
    return f"{to_table(lines)}\n\n{tell_machines(made)}{edits}"


def write_tables():
    """Make every table between its markers anew."""
    def make(found):
        if found[1] not in ["runs", *TABLES]:
            sys.exit(f"{path} wants a table {found[1]!r}; known: runs, {', '.join(TABLES)}")
        return f"<!-- table: {found[1]} -->\n\n{make_table(found[1])}\n\n<!-- end -->"
    for path in (HERE.parent / "README.md", HERE / "README.md"):
        text = path.read_text(encoding="utf-8")
        text = re.sub("<!-- table: (.+?) -->.*?<!-- end -->", make, text, flags=re.DOTALL)
        path.write_text(text, encoding="utf-8")


def read_folders(paths):
    """Return the runs in these folders by name, lists of rows; exit with 1 if one is no run.

    If a run's checkpoint shows that it has not ended, its last row tells the epochs "planned".
    """
    held_out = [path for path in paths if "-validation" in path.resolve().name]
    if held_out and len(held_out) < len(paths):
        sys.exit(f"{held_out[0]} was tested on held-out images, others were not: give them apart")
    runs = {}
    for path in {path.resolve(): path for path in paths}.values():
        try:
            run = read_rows(path / "history.csv")
            summarize(run)
            if (path / "checkpoint.pt").exists():
                checkpoint = torch.load(path / "checkpoint.pt", "cpu", weights_only=True)
                if checkpoint["settings"]["epochs"] > len(run):
                    run[-1]["planned"] = checkpoint["settings"]["epochs"]
        except Exception:  # damage has many names
            sys.exit(f"{path}: expected the folder of a run: history.csv, maybe checkpoint.pt")
        runs[str(path)] = run
    return runs


def tell(groups):
    """Return a table of single runs and of those that belong together: dicts of runs by name."""
    lines = [["run", "epochs", *EACH]]
    for words, runs in groups.items():
        for name, run in runs.items():
            rest = f" of {run[-1]['planned']}, unfinished" if "planned" in run[-1] else ""
            lines.append([name, f"{len(run)}{rest}", *to_cells(EACH, {name: run}, {})])
        finished = {name: run for name, run in runs.items() if "planned" not in run[-1]}
        if len(finished) > 1:
            epochs = len(next(iter(finished.values())))
            lines.append([f"**{words}: {len(finished)} runs**", str(epochs),
                          *to_cells(EACH, finished, {})])
    return to_table(lines)


def sum_up(paths):
    """Print the table of these runs; those of one script and as many epochs belong together."""
    groups = {}
    for name, run in read_folders(paths).items():
        script = Path(name).resolve().name.partition("-seed")[0]
        epochs = run[-1].get("planned", len(run))
        groups.setdefault(f"{script}, {epochs} epochs", {})[name] = run
    if "-validation" in paths[0].resolve().name:
        print("Validation: tested on held-out training images, not on the test set.\n")
    print(tell(groups))


def verify():
    """Test all weights kept here with the step's own code; return how many are not as recorded.

    On the kind of machine that made them every image must be classified as before; elsewhere two
    may differ, because rounding does. New weights are tested on the training images too.
    """
    known = {(row["script"], row["seed"]): row for row in read_rows(VERIFIED)}
    misses = 0
    for (table, step, _, seed), run in sorted(read_runs().items()):
        script = SCRIPTS[int(step)]
        weights = HERE / f"{script}-seed{seed}" / "weights.pt"
        if table != "steps" or (step == "1" and not weights.exists()):
            continue  # the weights of step 1 are too large to be kept
        module = importlib.import_module(script)
        net = module.Net()
        torch.set_num_threads(int(run[-1]["threads"]))
        with redirect_stdout(io.StringIO()):
            args = common.parse_args(["--device=cpu"], "", 1, 128)
            loaders = common.get_loaders(args, module.test_transform, module.test_transform)
            common.load_weights(net, weights)
            loss, accuracy = common.test(net, loaders[1])
            if f"{loss:.5f}" != f"{float(known.get((script, seed), {}).get('test_loss', 9)):.5f}":
                figures = [*common.test(net, loaders[0]), loss, accuracy]
                known[script, seed] = dict(zip(
                    ["script", "seed", "train_loss", "train_accuracy", "test_loss",
                     "test_accuracy", "machine", "torch"],
                    [script, seed, *(f"{figure:.6f}" for figure in figures), *KIND], strict=True))
                write_rows(VERIFIED, sorted(
                    known.values(), key=lambda row: (row["script"], int(row["seed"]))))
        recorded = column(run, "test_accuracy")[-1]
        differ = round(abs(accuracy - recorded) * len(loaders[1].images) / 100)
        missed = differ > (0 if (run[-1]["machine"], run[-1]["torch"]) == KIND else 2)
        misses += missed
        print(f"{'MISS' if missed else 'ok  '} {weights.parent.name}: {accuracy:.2f} %, "
              f"recorded {recorded:.2f} % on {run[-1]['machine']}", flush=True)
    print(f"{misses} differ from what was recorded")
    return misses


def main():
    """Do what the command line asks for; exit with 1 if weights are not as recorded."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("runs", nargs="*", type=Path, help="folders of runs to sum up")
    parser.add_argument("--verify", action="store_true", help="test the weights kept here")
    args = parser.parse_args()
    if args.verify:
        sys.exit(verify() > 0)
    elif args.runs:
        sum_up([path.expanduser() for path in args.runs])
    else:
        write_tables()


if __name__ == "__main__":
    main()
