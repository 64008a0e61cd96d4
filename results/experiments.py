"""Train the runs behind the tables of results/README.md.

    python results/experiments.py [--tables steps ingredients] [--steps 4] [--seeds 1 2] [--jobs 2]

An experiment is a step with edits: in a copy of its file, a new text takes the place of an old
one, as if you had typed it. The copy runs as a script, and its history goes into experiments.csv;
a step as it is keeps the folder of its run, in results/. What is there already is skipped. But a
table must be of one kind of machine: elsewhere, a step that is not complete is begun anew.
"""

import argparse
import csv
import os
import re
import shutil
import subprocess
import sys
import tempfile
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import torch

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
sys.path.insert(0, str(ROOT))
import common  # noqa: E402

CSV = HERE / "experiments.csv"
KIND = (common.CPU.get("cpu_name", "unknown CPU"), str(torch.__version__))  # of this machine
LOCK = threading.Lock()  # for the csv
SCRIPTS = {1: "step1_setup", 2: "step2_skeleton", 3: "step3_bn_gap", 4: "step4_aug_lr"}

# ------------------------------------------------------------ edits: (old text, new text)

HE_INITIALIZATION = ("    model = Net().to(args.device)", """\
    model = Net().to(args.device)
    for layer in model.modules():
        if isinstance(layer, nn.Conv2d):
            nn.init.kaiming_uniform_(layer.weight, nonlinearity="relu")""")
NO_BATCH_NORMALIZATION = ("        nn.BatchNorm2d(out_channels),", "")
NO_GAP = (
    ("            nn.AvgPool2d(6),", "            nn.Conv2d(20, 10, 6, bias=False),"),
    ("            nn.Conv2d(20, 10, 1, bias=False),  # 1x1x10", "            # 1x1x10"),
)
NO_AUGMENTATION = ("    RandomAffine(degrees=8, shear=4, scale=(0.93, 1.07), translate=0.06),", "")
SCHEDULER = """\
    scheduler = OneCycleLR(optimizer, LEARNING_RATE, args.epochs * len(train_loader),
                           pct_start=WARM_UP, cycle_momentum=False)"""
NO_SCHEDULE = (SCHEDULER, "    scheduler = None")
STEP_SCHEDULE = (SCHEDULER, """\
    scheduler = optim.lr_scheduler.StepLR(optimizer, 8 * len(train_loader), 0.1)""")
LOW_RATE = ("LEARNING_RATE = 0.1", "LEARNING_RATE = 0.01")
PLAIN_MOMENTUM = ("""\
    optimizer = optim.SGD(model.parameters(), lr=LEARNING_RATE, momentum=MOMENTUM,
                          nesterov=True, weight_decay=WEIGHT_DECAY)""", """\
    optimizer = optim.SGD(model.parameters(), lr=LEARNING_RATE, momentum=MOMENTUM)""")
ONE_1X1 = (
    ("            nn.Conv2d(20, 22, 1, bias=False),", ""),
    ("            nn.Conv2d(22, 10, 1,", "            nn.Conv2d(20, 10, 1,"),
)
AVERAGE = (  # over about the last tenth of the batches so far; tested and saved as the network
    ("    run = Run(__file__, args, model, optimizer, scheduler)", """\
    average = optim.swa_utils.AveragedModel(
        model, avg_fn=lambda old, new, batches: old + (new - old) / (1 + batches / 10),
        use_buffers=True)
    optimizer.register_step_post_hook(lambda *_: average.update_parameters(model))
    run = Run(__file__, args, average.module, optimizer, scheduler)"""),
    ("        test_loss, test_accuracy = test(model, test_loader)",
     "        test_loss, test_accuracy = test(average, test_loader)"),
)
SINGLE_VALUES = ("nn.Dropout2d(DROPOUT)", "nn.Dropout(DROPOUT)")
COURSE_RECIPE = (
    LOW_RATE, STEP_SCHEDULE, PLAIN_MOMENTUM, SINGLE_VALUES,
    ("    train_loader, test_loader = get_loaders(args, train_transform, test_transform)", """\
    transform = v2.Compose([
        v2.ToPILImage(), v2.ColorJitter(0.4),
        v2.RandomAffine(7, shear=10, translate=(0.1, 0.1), scale=(0.8, 1.2)), v2.RandomRotation(7),
        v2.PILToTensor(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(MEAN, STD),
    ])
    train_loader, test_loader = get_loaders(
        args, lambda images: torch.stack(list(map(transform, images))), test_transform)"""),
)


class Experiment(NamedTuple):
    """One line of a table: a step, what is edited in it, and how it is run."""

    table: str  # "steps": the steps as they are; "times": alone on the machine, on all cores
    step: int
    name: str
    seeds: range
    edits: tuple = ()
    flags: tuple = ()


THREE, FIVE, TEN = range(1, 4), range(1, 6), range(1, 11)  # seeds
EXPERIMENTS = [
    Experiment("steps", 4, "as it is", TEN),
    Experiment("ingredients", 4, "no augmentation", TEN, (NO_AUGMENTATION,)),
    Experiment("ingredients", 4, "constant 0.01", FIVE, (LOW_RATE, NO_SCHEDULE)),
    Experiment("ingredients", 4, "constant 0.1", FIVE, (NO_SCHEDULE,)),
    Experiment("ingredients", 4, "plain momentum: no Nesterov, no weight decay", FIVE,
               (PLAIN_MOMENTUM,)),
    Experiment("ingredients", 4, "dropout 0.1", FIVE, (("DROPOUT = 0.03", "DROPOUT = 0.1"),)),
    Experiment("ingredients", 4, "one 1x1, 20 to 10", FIVE, ONE_1X1),
    Experiment("ingredients", 4, "average of the weights", FIVE, AVERAGE),
    Experiment("plain", 4, "defaults", THREE, (), ("--validate",)),
    Experiment("plain", 4, "--plain", THREE, (), ("--validate", "--plain")),
    Experiment("steps", 3, "as it is", FIVE),
    Experiment("ingredients", 3, "no batch normalization", FIVE, (NO_BATCH_NORMALIZATION,)),
    Experiment("ingredients", 3, "no dropout", FIVE, (("DROPOUT = 0.1", "DROPOUT = 0.0"),)),
    Experiment("ingredients", 3, "6x6 convolution in place of GAP and 1x1", FIVE, NO_GAP),
    Experiment("plain", 3, "defaults", THREE, (), ("--validate",)),
    Experiment("plain", 3, "--plain", THREE, (), ("--validate", "--plain")),
    Experiment("steps", 2, "as it is", FIVE),
    Experiment("ingredients", 2, "He initialization", FIVE, (HE_INITIALIZATION,)),
    Experiment("steps", 1, "as it is", range(1, 3)),  # hours: only with --steps 1
    *(Experiment("times", 4, f"{epochs} epochs", THREE, (), (f"--epochs={epochs}",))
      for epochs in (3, 5, 8, 15)),
    Experiment("times", 4, "the course's recipe", range(1, 2), COURSE_RECIPE, ("--plain",)),
]


def make_copy(step, edits, folder):
    """Write the edited file of a step into `folder`; return its path."""
    path = Path(folder, f"{SCRIPTS[step]}.py")
    text = (ROOT / path.name).read_text(encoding="utf-8")
    for old, new in edits:
        if text.count(old) != 1:
            raise ValueError(f"{path.name} has {text.count(old)} times, not once: {old!r}")
        text = text.replace(old, new)
    path.write_text(text, encoding="utf-8")
    return path


def read_rows(path):
    """Return the rows of a csv as dicts of str; none if there is no such file."""
    if not path.exists():
        return []
    with open(path, encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def write_rows(path, rows):
    """Write a csv under a temporary name, then rename it."""
    with open(f"{path}.tmp", "w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, rows[0] if rows else ["table"], lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    os.replace(f"{path}.tmp", path)


def read_log(text):
    """Return what the printed lines of a run tell of its machine and settings."""
    device = re.search(r"^Device: \w+[ ,(]+(.+?)\)?, (\d+) threads?, torch (\S+)", text, re.M)
    settings = re.search(r"^Settings: .*(fp32|bf16), (not )?compiled", text, re.M)
    return {"machine": device[1], "torch": device[3], "threads": device[2],
            "precision": settings[1], "compiled": "no" if settings[2] else "yes"}


def read_runs():
    """Return the rows of all runs kept here, as lists by (table, step, variant, seed)."""
    runs = {}
    for row in read_rows(CSV):
        runs.setdefault((row["table"], row["step"], row["variant"], row["seed"]), []).append(row)
    for step, script in SCRIPTS.items():
        for log in HERE.glob(f"{script}-seed*/log.txt"):
            found = read_log(log.read_text(encoding="utf-8"))
            rows = [row | found for row in read_rows(log.with_name("history.csv"))]
            runs["steps", str(step), "as it is", log.parent.name.partition("-seed")[2]] = rows
    return runs


def find_missing(experiments):
    """Return the runs to make, (experiment, seed), seed by seed; drop those of other machines."""
    jobs = {(job.table, str(job.step), job.name, str(seed)): (job, seed)
            for seed in TEN for job in experiments if seed in job.seeds}
    kept = read_runs()
    kinds = {key: (kept[key][-1]["machine"], kept[key][-1]["torch"]) for key in jobs if key in kept}
    if len(kinds) == len(jobs) and len(set(kinds.values())) == 1:
        return []
    others = [key for key, kind in kinds.items() if kind != KIND]
    if others:
        print(f"{len(others)} runs of another kind of machine are made anew", flush=True)
        write_rows(CSV, [row for key, rows in kept.items() for row in rows
                         if key not in others and key[0] != "steps"])
    return [job for key, job in jobs.items() if kinds.get(key) != KIND]


def train(experiment, seed, data_dir):
    """Train one run and keep its rows or its folder."""
    table, step, name, _, edits, flags = experiment
    environment = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONUTF8": "1"}
    if table != "times":
        environment["OMP_NUM_THREADS"] = "1"
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, make_copy(step, edits, folder).name, f"--seed={seed}",
                   f"--data-dir={data_dir}", "--out=runs", "--device=cpu", *flags]
        process = subprocess.run(
            command, cwd=folder, env=environment, capture_output=True, encoding="utf-8")
        if process.returncode:
            raise OSError(process.stderr.strip()[-500:])
        [run] = Path(folder, "runs").iterdir()
        if table == "steps":
            (run / "checkpoint.pt").unlink()
            (run / "log.txt").write_text(process.stdout, encoding="utf-8")
            whole = HERE / f".tmp-{run.name}"  # a kill leaves no half folder under the final name
            for older in (whole, HERE / run.name):
                shutil.rmtree(older, ignore_errors=True)
            shutil.copytree(run, whole)
            whole.rename(HERE / run.name)
            return
        first = {"table": table, "step": step, "variant": name, "seed": seed}
        found = read_log(process.stdout)
        rows = [first | row | found for row in read_rows(run / "history.csv")]
        with LOCK:
            write_rows(CSV, read_rows(CSV) + rows)


def try_to_train(job):
    """Train one run; tell how it ended, and return 1 if it failed: the others go on."""
    words = f"{job[0].table}, step {job[0].step}, {job[0].name}, seed {job[1]}"
    try:
        train(*job)
    except (OSError, ValueError) as error:
        print(f"FAILED: {words}: {error}", flush=True)
        return 1
    print(f"done: {words}", flush=True)
    return 0


def main(argv=None):
    """Train what is missing of the chosen experiments; return 1 if a run failed, else 0."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    tables = ["steps", "ingredients", "plain", "times"]
    add = parser.add_argument
    add("--tables", nargs="+", choices=tables, default=tables, help="of these only")
    add("--steps", nargs="+", type=int, choices=SCRIPTS, default=[4, 3, 2], help="of these only")
    add("--seeds", nargs="+", type=int, default=TEN, help="of these only")
    add("--jobs", type=int, default=2, help="runs at a time, on one thread each (times: one run)")
    add("--data-dir", type=Path, default=ROOT / "data", help="folder that holds MNIST/raw")
    args = parser.parse_args(argv)
    groups = [(step, False) for step in args.steps]
    if 4 in args.steps:
        groups.append((4, True))
    failed = 0
    for step, timed in groups:
        group = [job for job in EXPERIMENTS if job.step == step and (job.table == "times") == timed]
        if not any(job.table in args.tables for job in group):
            continue
        jobs = [(job, seed, args.data_dir.expanduser().resolve())
                for job, seed in find_missing(group)
                if job.table in args.tables and seed in args.seeds]
        print(f"{len(jobs)} runs to make", flush=True)
        pool = ThreadPoolExecutor(1 if timed else args.jobs)
        try:
            failed += sum(pool.map(try_to_train, jobs))
        finally:
            pool.shutdown(cancel_futures=True)  # Ctrl-C: those that run are interrupted too
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
