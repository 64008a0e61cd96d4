"""Train the runs behind the tables of results/README.md.

An experiment is a step with edits: a copy of its file, in which a new text replaces an old one.
It runs as a script, and its history goes into experiments.csv; a step as it is keeps its folder.
What is there is skipped and never deleted: to train runs anew, delete their rows or folders first.
"""

import argparse
import csv
import itertools
import os
import re
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
SCRIPTS = {1: "step1_setup", 2: "step2_skeleton", 3: "step3_bn_gap", 4: "step4_aug_lr"}
LOG = re.compile(  # what the first lines of a run tell
    r"^Device: cpu\W+(?P<machine>.+?)\)?, (?P<threads>\d+) threads?, torch (?P<torch>\S+)$"
    r".*?^Settings: .*?(?P<precision>fp32|bf16), (?P<compiled>(not )?compiled)", re.M | re.S)

SCHEDULER = """OneCycleLR(  # counts batches, not epochs; so would any other, StepLR say
        optimizer, LEARNING_RATE, args.epochs * len(train_loader),
        pct_start=WARM_UP, cycle_momentum=False)"""
NO_SCHEDULE = (SCHEDULER, "None")  # an edit: old text, new text
NO_AUGMENTATION = ("    augment,\n", "")
FEW_DIGITS = ("    model = Net().to(args.device)", """\
    train_loader.images = train_loader.images[:3000].repeat(20, 1, 1, 1)
    train_loader.labels = train_loader.labels[:3000].repeat(20)
    model = Net().to(args.device)""")
LOW_RATE = ("LEARNING_RATE = 0.1", "LEARNING_RATE = 0.01")
PLAIN_MOMENTUM = ("""momentum=MOMENTUM,
                          nesterov=True, weight_decay=WEIGHT_DECAY)""", "momentum=MOMENTUM)")
NORMALIZATION = ("nn.ReLU(),", "nn.ReLU(), nn.BatchNorm2d(out_channels),")
NO_NORMALIZATION = ("        nn.BatchNorm2d(out_channels),", "")
HE_INITIALIZATION = ("    model = Net().to(args.device)", """\
    model = Net().to(args.device)
    for weights in model.parameters():
        nn.init.kaiming_uniform_(weights)""")
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
    ("ingredients", 2, "batch normalization", FIVE, [NORMALIZATION]),
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
    ("ingredients", 4, "constant 0.01", FIVE, [LOW_RATE, NO_SCHEDULE]),
    ("ingredients", 4, "constant 0.1", FIVE, [NO_SCHEDULE]),
    ("ingredients", 4, "peak 0.01", FIVE, [LOW_RATE]),
    ("ingredients", 4, "no augmentation", FIVE, [NO_AUGMENTATION]),
    ("digits", 4, "3,000 digits", FIVE, [FEW_DIGITS]),
    ("digits", 4, "3,000 digits, no augmentation", FIVE, [FEW_DIGITS, NO_AUGMENTATION]),
    ("pairs", 4, "defaults", THREE, [], ["--validate"]),
    ("pairs", 4, "--plain", THREE, [], ["--validate", "--plain"]),
    *(("times", 4, f"{count} epochs", THREE, [], [f"--epochs={count}"]) for count in (3, 5, 8, 15)),
    ("times", 4, "the course's recipe", range(1, 3), COURSE_RECIPE, ["--plain"]),
)]
TABLES = list(dict.fromkeys(job.table for job in EXPERIMENTS))


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
        folder = HERE / f"{SCRIPTS[step]}-seed{seed}"
        if folder.exists():
            told = LOG.search((folder / "log.txt").read_text(encoding="utf-8")).groupdict()
            rows = read_rows(folder / "history.csv")
            runs["steps", step, "as it is"][seed] = [row | told for row in rows]
    return runs


def find_kind(row):
    """Return what a row was made on: CPU, torch, threads, precision, compiled or not."""
    return "{machine}, torch {torch}, threads {threads}, {precision}, {compiled}".format(**row)


def foresee_kind(job):
    """Return the kind of the rows that a run of this experiment would have here."""
    plain = "--plain" in job.flags
    bf16 = common.is_bf16_faster(common.torch.device("cpu")) and not plain
    return find_kind({
        "machine": common.CPU.get("cpu_name", "unknown CPU"), "torch": common.torch.__version__,
        "threads": os.cpu_count() if job.table == "times" else 1,
        "precision": "bf16" if bf16 else "fp32",
        "compiled": "not compiled" if plain or job.step == 1 else "compiled"})


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
            made.rename(HERE / made.name)
            return []
        first = {"table": job.table, "step": str(job.step), "variant": job.name, "seed": seed}
        told = LOG.search(process.stdout).groupdict()
        return [first | row | told for row in read_rows(made / "history.csv")]


def main(argv=None):
    """Train what is missing of the chosen experiments; return 1 if a run failed, else 0."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--tables", nargs="+", choices=TABLES, default=TABLES)
    parser.add_argument("--steps", nargs="+", type=int, choices=SCRIPTS, default=[4, 3, 2])
    parser.add_argument("--seeds", nargs="+", type=int, default=TEN)
    args = parser.parse_args(argv)
    status = 0
    for step, table in itertools.product(args.steps, args.tables):
        found = read_runs()
        missing = []
        for job in [job for job in EXPERIMENTS if (job.table, job.step) == (table, step)]:
            seeds = [seed for seed in job.seeds if seed in set(args.seeds) - set(found[job[:3]])]
            missing += [(job, seed) for seed in seeds]
            beside = [run for other in EXPERIMENTS for run in found[other[:3]].values()
                      if (other.step, other.flags) == (step, job.flags)]
            others = {find_kind(run[-1]) for run in beside} - {foresee_kind(job)}
            if seeds and others:
                print(f"WARNING: {job[:3]} will be {foresee_kind(job)}, others are {others}",
                      flush=True)
        missing.sort(key=lambda run: run[1])  # every experiment with seed 1, then with seed 2
        with ThreadPoolExecutor(1 if table == "times" else 2) as pool:
            for rows in pool.map(train, missing):
                status |= rows is None
                if rows:
                    write_rows(CSV, read_rows(CSV) + rows)
    return status


if __name__ == "__main__":
    sys.exit(main())
