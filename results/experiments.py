"""Run the experiments behind the tables of results/README.md; keep their histories in one csv.

    python results/experiments.py [EXPERIMENT ...] [--only VARIANT ...] [--seeds 1 2 3] [--jobs 2]

Each run is a step of this project in a process of its own, with something changed in its module:
all variants with seed 1, then all with seed 2, and so on. Runs that are in experiments.csv already
are skipped. (Its `search` and `fastpath` were made with recipe D, by code in the git history.)
"""

import argparse
import importlib
import io
import multiprocessing
import os
import signal
import sys
import tempfile
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import NamedTuple

import torch
from report import EXPERIMENTS, ROOT, SCRIPTS, read_log, read_rows, write_rows
from torch import nn
from torch.optim.lr_scheduler import LambdaLR
from torchvision import transforms

sys.path.insert(0, str(ROOT))
import common  # noqa: E402

# ------------------------------------------------ changes: functions that alter a step's module


def constants(**values):
    """Return a change: other values under names that the module has."""
    def change(module):
        assert values.keys() <= vars(module).keys(), f"{module.__name__} lacks one of {[*values]}"
        vars(module).update(values)
    return change


def edited(name, edit):
    """Return a change: edit(what the module's function or class of this name returns)."""
    def change(module):
        make = vars(module)[name]
        vars(module)[name] = lambda *args: edit(make(*args))
    return change


def hold_out(loaders):
    """Train on the first 5/6 of the training images, 50,000, and test on the other 10,000."""
    images, labels = loaders[0].images, loaders[0].labels
    size = len(labels) * 5 // 6
    loaders[0].images, loaders[1].images = images[:size], images[size:]
    loaders[0].labels, loaders[1].labels = labels[:size], labels[size:]
    return loaders


def leave_plain(module):
    """Train on images as they are tested, without augmentation."""
    module.train_transform = module.test_transform


def transform_slowly(module):
    """Let PIL transform the training images one by one, as in the course."""
    transform = transforms.Compose([
        transforms.ToPILImage(),
        transforms.ColorJitter(0.4),
        transforms.RandomAffine(7, shear=10, translate=(0.1, 0.1), scale=(0.8, 1.2)),
        transforms.RandomRotation(7),
        transforms.ToTensor(),
        transforms.Normalize(module.MEAN, module.STD),
    ])
    module.train_transform = lambda images: torch.stack([transform(image) for image in images])


def end_in(kernel_size):
    """Return an edit: one convolution, 20 to 10, instead of a network's last two layers."""
    def edit(net):
        net.layers = net.layers[:-2].append(nn.Conv2d(20, 10, kernel_size, bias=False))
        return net
    return edit


def initialize(layer):
    """Draw the weights of a convolution as He et al. (2015) do where a ReLU follows."""
    if isinstance(layer, nn.Conv2d):
        nn.init.kaiming_uniform_(layer.weight, nonlinearity="relu")


def schedule(rate, factor=lambda batch: 1):
    """Return a change: the learning rate is rate * factor(batch)."""
    return constants(LEARNING_RATE=rate, OneCycleLR=lambda optimizer, *_, **__: LambdaLR(
        optimizer, factor))


def recipe(weight_decay, averaged, nesterov):
    """Return a change: train step 4 with these settings of SGD; test its average or the network."""
    def change(module):
        network = []

        def train(model, loader, optimizer, *others):
            network[:] = [model]
            optimizer.param_groups[0].update(weight_decay=weight_decay, nesterov=nesterov)
            return common.train(model, loader, optimizer, *others)

        constants(train=train, test=lambda average, loader: common.test(
            average if averaged else network[0], loader))(module)
    return change


class Variant(NamedTuple):
    """One line of a table: the table, its name there, and which runs with which changes make it."""

    experiment: str
    name: str
    step: int
    seeds: range
    changes: tuple = ()
    flags: tuple = ()
    recipe: str = "D"  # of step 4, by its letter; D is the script's own


RECIPES = {"A": recipe(0.0, False, False), "B": recipe(5e-4, False, False),
           "C": recipe(5e-4, True, False), "D": recipe(5e-4, True, True)}
THREE, FIVE = range(1, 4), range(1, 6)  # seeds
HELD_OUT = edited("get_loaders", hold_out)
DROP_VALUES = edited("block", lambda block: nn.Sequential(*block[:3], nn.Dropout(block[3].p)))
DOCUMENTED = (RECIPES["A"], transform_slowly, DROP_VALUES,
              schedule(0.01, lambda batch: 0.1 ** (batch // (8 * 469))))  # after eight epochs
NO_AVERAGE = recipe(5e-4, False, True)
INGREDIENTS = [  # step, what is left out or put in its place
    *((step, "as it is") for step in (2, 3, 4)),
    (2, "He initialization", edited("Net", lambda net: net.apply(initialize))),
    (3, "no batch normalization", edited("block", lambda old: nn.Sequential(*old[:2], old[3]))),
    (3, "no dropout", constants(DROPOUT=0.0)),
    (3, "6x6 convolution, no GAP, no 1x1", edited("Net", end_in(6))),
    (4, "no augmentation", leave_plain),
    (4, "no schedule: 0.01 as in step 3", schedule(0.01)),
    (4, "no schedule: 0.1, its peak", schedule(0.1)),
    (4, "no weight decay", recipe(0.0, True, True)),
    (4, "no Nesterov", RECIPES["C"]),
    (4, "no average of weights", NO_AVERAGE),
    (4, "no schedule: 0.1, no average of weights", schedule(0.1), NO_AVERAGE),
    (4, "dropout 0.1", constants(DROPOUT=0.1)),
    (4, "one 1x1 20 to 10, no second", edited("Net", end_in(1))),
]
VARIANTS = [
    *(Variant("candidates", letter, 4, range(1, 13), (HELD_OUT, change), recipe=letter)
      for letter, change in RECIPES.items()),
    *(Variant("ingredients", name, step, FIVE, changes) for step, name, *changes in INGREDIENTS),
    *(Variant("precision", name, step, THREE, (HELD_OUT,), flags) for step in (3, 4)
      for name, flags in (("as it chooses", ()), ("fp32", ("--fp32",)))),
    *(Variant("times", f"{epochs} epochs", 4, THREE, (), (f"--epochs={epochs}",))
      for epochs in (3, 5, 8)),
    Variant("times", "documented", 4, range(1, 2), DOCUMENTED,
            ("--fp32", "--no-compile"), "A"),
]
NAMES = list(dict.fromkeys(variant.experiment for variant in VARIANTS))


def key_of(variant, seed):
    """Return what identifies this run in its rows: a dict of str by column."""
    letter = variant.recipe if variant.step == 4 else ""
    return {"experiment": variant.experiment, "recipe": letter, "variant": variant.name,
            "step": str(variant.step), "seed": str(seed)}


def make_run(job):
    """Train one run in a process that runs nothing else; job: index in VARIANTS, seed, data folder.

    Returns how it ended (str) and its rows for the csv (list of dicts, empty if it failed).
    """
    number, seed, data_dir = job
    variant, output = VARIANTS[number], io.StringIO()
    key = key_of(variant, seed)
    module = importlib.import_module(SCRIPTS[key["step"]])
    for change in variant.changes:
        change(module)
    with tempfile.TemporaryDirectory() as folder, redirect_stdout(output), redirect_stderr(output):
        flags = *variant.flags, f"--seed={seed}", f"--data-dir={data_dir}", f"--out={folder}"
        try:
            module.main(flags)
        except (Exception, SystemExit) as error:  # the other runs go on
            return f"{', '.join(key.values())}: FAILED: {error!r}", []
        [path] = Path(folder).glob("*.csv")
        logged = read_log(path.with_suffix(".log").read_text("utf-8"))
        logged["data"] = "heldout" if HELD_OUT in variant.changes else "full"
        rows = [key | row | logged for row in read_rows(path)]
    return f"{', '.join(key.values())}: last epoch {rows[-1]['test_accuracy']}", rows


def main():
    """Read the command line, make the runs and add each to the csv."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    add = parser.add_argument
    add("experiments", nargs="*", default="all", choices=[*NAMES, "all"], help="tables")
    add("--only", nargs="+", metavar="VARIANT", help="names of variants")
    add("--seeds", nargs="+", type=int, metavar="SEED", help="some of those of the list")
    add("--jobs", type=int, default=2, help="runs at a time, on one thread each")
    add("--data-dir", type=Path, default=ROOT / "data", help="folder that holds MNIST/raw")
    args = parser.parse_args()
    done = [{name: row[name] for name in key_of(VARIANTS[0], 1)} for row in read_rows(EXPERIMENTS)]
    for timed, workers in ((False, args.jobs), (True, 1)):  # timed: one at a time, on all cores
        jobs = [(number, seed, args.data_dir) for seed in args.seeds or range(1, 13)
                for number, variant in enumerate(VARIANTS) if seed in variant.seeds
                and (variant.experiment in args.experiments or "all" in args.experiments)
                and variant.name in (args.only or [variant.name])
                and (variant.experiment == "times") == timed and key_of(variant, seed) not in done]
        print(f"{len(jobs)} runs to make, {workers} at a time", flush=True)
        os.environ["OMP_NUM_THREADS"] = str(torch.get_num_threads()) if timed else "1"
        ignore_ctrl_c = signal.signal, (signal.SIGINT, signal.SIG_IGN)
        with multiprocessing.get_context("spawn").Pool(workers, *ignore_ctrl_c, 1) as pool:
            for words, rows in pool.imap_unordered(make_run, jobs):
                print(words, flush=True)
                if rows:
                    write_rows(EXPERIMENTS, read_rows(EXPERIMENTS) + rows)


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:  # what is finished is in the csv
        sys.exit(130)
