"""Train the runs behind the tables of results/README.md.

An experiment is a step with edits: a copy of its file, in which a new text replaces an old one.
It runs as a script, and its history goes into experiments.csv; a step as it is keeps its folder.
What is there is skipped, unless its table is unfinished and another kind of machine made it.
"""

import argparse
import csv
import itertools
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections import defaultdict, namedtuple
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
sys.path.insert(0, str(ROOT))
import common  # noqa: E402

CSV = HERE / "experiments.csv"
KIND = (common.CPU.get("cpu_name", "unknown CPU"), str(common.torch.__version__))
SCRIPTS = {1: "step1_setup", 2: "step2_skeleton", 3: "step3_bn_gap", 4: "step4_aug_lr"}
LOG = re.compile(  # what the first lines of a run tell
    r"^Device: cpu\W+(?P<machine>.+?)\)?, (?P<threads>\d+) threads?, torch (?P<torch>\S+)$"
    r".*?^Settings: .*?(?P<precision>fp32|bf16), (?P<compiled>(not )?compiled)", re.M | re.S)

SCHEDULER = """OneCycleLR(optimizer, LEARNING_RATE, args.epochs * len(train_loader),
                           pct_start=WARM_UP, cycle_momentum=False)"""
NO_SCHEDULE = (SCHEDULER, "None")  # an edit: old text, new text
LOW_RATE = ("LEARNING_RATE = 0.1", "LEARNING_RATE = 0.01")
PLAIN_MOMENTUM = ("""momentum=MOMENTUM,
                          nesterov=True, weight_decay=WEIGHT_DECAY)""", "momentum=MOMENTUM)")
NORMALIZATION = ("nn.ReLU(),", "nn.ReLU(), nn.BatchNorm2d(out_channels),")
NO_NORMALIZATION = ("        nn.BatchNorm2d(out_channels),", "")
HE_INITIALIZATION = ("    model = Net().to(args.device)", """\
    model = Net().to(args.device)
    for layer in model.modules():
        if isinstance(layer, nn.Conv2d):
            nn.init.kaiming_uniform_(layer.weight, nonlinearity="relu")""")
SINGLE_VALUES = ("nn.Dropout2d(DROPOUT)", "nn.Dropout(DROPOUT)")
COURSE_RECIPE = [
    LOW_RATE, PLAIN_MOMENTUM, SINGLE_VALUES,
    (SCHEDULER, "optim.lr_scheduler.StepLR(optimizer, 8 * len(train_loader), 0.1)"),
    ("    train_loader, test_loader = get_loaders(args, train_transform, test_transform)", """\
    transform = v2.Compose([
        v2.ToPILImage(), v2.ColorJitter(0.4),
        v2.RandomAffine(7, shear=10, translate=(0.1, 0.1), scale=(0.8, 1.2)), v2.RandomRotation(7),
        v2.PILToTensor(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(MEAN, STD),
    ])
    train_loader, test_loader = get_loaders(
        args, lambda images: torch.stack(list(map(transform, images))), test_transform)"""),
]

# Table "steps": the steps as they are; "times": alone on the machine, on all cores.
Experiment = namedtuple("Experiment", "table step name seeds edits flags", defaults=[(), ()])
THREE, FIVE, TEN = range(1, 4), range(1, 6), range(1, 11)  # seeds
EXPERIMENTS = [Experiment(*fields) for fields in (
    ("steps", 1, "as it is", range(1, 3)),  # hours: only with --steps 1
    ("steps", 2, "as it is", FIVE),
    ("ingredients", 2, "He initialization", FIVE, [HE_INITIALIZATION]),
    ("steps", 3, "as it is", FIVE),
    ("ingredients", 3, "no batch normalization", FIVE, [NO_NORMALIZATION]),
    ("ingredients", 3, "He initialization, no batch normalization", FIVE, [
        HE_INITIALIZATION, NO_NORMALIZATION]),
    ("ingredients", 3, "no dropout", FIVE, [("DROPOUT = 0.1", "DROPOUT = 0.0")]),
    ("ingredients", 3, "6x6 convolution in place of GAP and 1x1", FIVE, [
        ("            nn.AvgPool2d(6),", "            nn.Conv2d(20, 10, 6, bias=False),"),
        ("            nn.Conv2d(20, 10, 1, bias=False),  # 1x1x10", "            # 1x1x10")]),
    ("steps", 4, "as it is", TEN),
    ("ingredients", 4, "no augmentation", TEN, [
        ("    RandomAffine(degrees=8, shear=4, scale=(0.93, 1.07), translate=0.06),", "")]),
    ("ingredients", 4, "peak 0.01", FIVE, [LOW_RATE]),
    ("ingredients", 4, "constant 0.01", FIVE, [LOW_RATE, NO_SCHEDULE]),
    ("ingredients", 4, "constant 0.1", FIVE, [NO_SCHEDULE]),
    ("ingredients", 4, "plain momentum: no Nesterov, no weight decay", FIVE, [PLAIN_MOMENTUM]),
    ("ingredients", 4, "dropout 0.1", FIVE, [("DROPOUT = 0.03", "DROPOUT = 0.1")]),
    ("ingredients", 4, "one 1x1, 20 to 10", FIVE, [
        ("            nn.Conv2d(20, 22, 1, bias=False),", ""),
        ("            nn.Conv2d(22, 10, 1,", "            nn.Conv2d(20, 10, 1,")]),
    ("ingredients", 4, "average of the weights", FIVE, [  # over about the last tenth of the batches
        ("    run = Run(__file__, args, model, optimizer, scheduler)", """\
    average = optim.swa_utils.AveragedModel(
        model, avg_fn=lambda old, new, batches: old + (new - old) / (1 + batches / 10),
        use_buffers=True)
    optimizer.register_step_post_hook(lambda *_: average.update_parameters(model))
    run = Run(__file__, args, average.module, optimizer, scheduler)"""),
        ("accuracy = test(model, test_loader)", "accuracy = test(average, test_loader)")]),
    ("pairs", 2, "as it is", THREE),
    ("pairs", 2, "batch normalization", THREE, [NORMALIZATION]),
    ("pairs", 4, "defaults", THREE, [], ["--validate"]),
    ("pairs", 4, "--plain", THREE, [], ["--validate", "--plain"]),
    *(("times", 4, f"{count} epochs", THREE, [], [f"--epochs={count}"]) for count in (3, 5, 8, 15)),
    ("times", 4, "the course's recipe", range(1, 3), COURSE_RECIPE, ["--plain"]),
)]


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
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    return list(csv.DictReader(lines))


def write_rows(path, rows):
    """Write a csv under a temporary name, then rename it."""
    with open(f"{path}.tmp", "w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, rows[0], lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    os.replace(f"{path}.tmp", path)


def read_runs():
    """Return the runs kept here, lists of rows, by (table, step, name) and then by seed."""
    runs = defaultdict(lambda: defaultdict(list))
    for row in read_rows(CSV):
        runs[row["table"], int(row["step"]), row["variant"]][int(row["seed"])].append(row)
    for step, seed in itertools.product(SCRIPTS, TEN):
        log = HERE / f"{SCRIPTS[step]}-seed{seed}" / "log.txt"
        if log.exists():
            told = LOG.search(log.read_text(encoding="utf-8")).groupdict()
            rows = read_rows(log.with_name("history.csv"))
            runs["steps", step, "as it is"][seed] = [row | told for row in rows]
    return runs


def find_kind(run):
    """Return the CPU and the torch that made a run; None if it is empty."""
    return (run[-1]["machine"], run[-1]["torch"]) if run else None


def train(run):
    """Train a run, (experiment, seed); return its rows for the csv, None if it failed."""
    job, seed = run
    threads = {} if job.table == "times" else {"OMP_NUM_THREADS": "1"}
    environment = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONUTF8": "1"} | threads
    with tempfile.TemporaryDirectory(dir=HERE, prefix=".tmp") as folder:
        command = [sys.executable, make_copy(job.step, job.edits, folder).name, f"--seed={seed}",
                   f"--data-dir={ROOT / 'data'}", "--out=runs", "--device=cpu", *job.flags]
        process = subprocess.run(
            command, cwd=folder, env=environment, capture_output=True, encoding="utf-8")
        if process.returncode:
            print("FAILED", *job[:3], seed, process.stderr[-500:], flush=True)
            return None
        print("done", *job[:3], seed, flush=True)
        [made] = Path(folder, "runs").iterdir()
        if job.table == "steps":  # the folder is kept
            (made / "checkpoint.pt").unlink()
            (made / "log.txt").write_text(process.stdout, encoding="utf-8")
            shutil.rmtree(HERE / made.name, ignore_errors=True)
            made.rename(HERE / made.name)
            return []
        first = {"table": job.table, "step": str(job.step), "variant": job.name, "seed": seed}
        told = LOG.search(process.stdout).groupdict()
        return [first | row | told for row in read_rows(made / "history.csv")]


def main(argv=None):
    """Train what is missing of the chosen experiments; return 1 if a run failed, else 0."""
    tables = ["steps", "ingredients", "pairs", "times"]
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--tables", nargs="+", choices=tables, default=tables)
    parser.add_argument("--steps", nargs="+", type=int, choices=SCRIPTS, default=[4, 3, 2])
    parser.add_argument("--seeds", nargs="+", type=int, default=TEN)
    args = parser.parse_args(argv)
    status = 0
    groups = [["steps", "ingredients"], ["pairs"], ["times"]]  # compared: of one kind of machine
    for step, group in itertools.product(args.steps, groups):
        found = read_runs()
        jobs = [job for job in EXPERIMENTS if job.step == step and job.table in group]
        runs = [(job, seed) for seed in TEN for job in jobs if seed in job.seeds]
        kinds = [find_kind(found[job[:3]][seed]) for job, seed in runs]
        if len(set(kinds)) == 1 and None not in kinds:
            continue  # complete, and of one kind
        missing = [(job, seed) for (job, seed), kind in zip(runs, kinds, strict=True)
                   if kind != KIND and job.table in args.tables and seed in args.seeds]
        with ThreadPoolExecutor(1 if "times" in group else 2) as pool:
            for rows in pool.map(train, missing):
                status = 1 if rows is None else status
                if rows:  # those of this table that another kind of machine made go
                    kept = [row for row in read_rows(CSV) if find_kind([row]) == KIND
                            or (row["table"], row["step"]) != (rows[0]["table"], str(step))]
                    write_rows(CSV, kept + rows)
    return status


if __name__ == "__main__":
    sys.exit(main())
