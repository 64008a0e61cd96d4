"""Run the experiments behind the tables of results/README.md; keep their histories in one csv.

    python results/experiments.py [EXPERIMENT ...] [--only VARIANT ...] [--seeds 1 2 3] [--jobs 2]

Each run is a step of this project in a process of its own, after something was changed in its
module. All variants are run with seed 1, then all with seed 2, and so on. When a run ends, its
rows go into experiments.csv. Runs that are in there are skipped, so after an interruption call
this again. `python results/report.py` then makes the tables.
"""

import argparse
import csv
import importlib
import math
import os
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor, as_completed
from functools import partial
from pathlib import Path
from statistics import fmean
from types import SimpleNamespace
from typing import NamedTuple

from report import EXPERIMENTS_CSV, ROOT, SCRIPTS, read_log, read_rows
from torch import nn, optim
from torch.optim.lr_scheduler import LambdaLR, OneCycleLR, StepLR
from torch.optim.swa_utils import AveragedModel
from torch.utils.data import DataLoader
from torchvision import datasets, transforms

sys.path.insert(0, str(ROOT))
import common  # noqa: E402

KEY = ["experiment", "recipe", "variant", "step", "seed"]  # what tells one run from another
HISTORY = ["epoch", "train_loss", "train_accuracy", "test_loss", "test_accuracy",
           "learning_rate", "seconds"]
COLUMNS = [*KEY, *HISTORY, "machine", "torch", "threads", "precision", "compiled", "data"]

# ---------------------------------------- changes: functions that alter the module of a step


def constants(**values):
    """Return a change: other values under names that the module has."""
    def change(module):
        missing = set(values) - set(vars(module))
        if missing:
            sys.exit(f"{module.__name__}: expected the names {missing}, found none")
        vars(module).update(values)
    return change


def affine(**ranges):
    """Return a change: other ranges of the random affine."""
    def change(module):
        for transform in module.train_transform.transforms:
            if isinstance(transform, common.RandomAffine):
                vars(transform).update(ranges)
    return change


def without_augmentation(module):
    """Train on plain images."""
    module.train_transform = module.test_transform


def schedule(rate, make):
    """Return a change: this learning rate, and for the schedule make(optimizer)."""
    return constants(LEARNING_RATE=rate, OneCycleLR=lambda optimizer, *_, **__: make(optimizer))


def constant(optimizer):
    """Return a schedule that leaves the learning rate as it is."""
    return LambdaLR(optimizer, lambda batch: 1)


def in_bf16(module):
    """Compute in bf16, as a run does by itself on a machine where that is faster."""
    constants(is_bf16_faster=lambda device: True)(common)


def net(edit):
    """Return a change: the network that `edit` makes of the step's."""
    def change(module):
        make = module.Net
        module.Net = lambda: edit(make())
    return change


def layers(kind, make):
    """Return a change: make(layer) in the place of every layer of this kind."""
    def edit(net):
        for parent in list(net.modules()):
            for name, layer in parent.named_children():
                if isinstance(layer, kind):
                    setattr(parent, name, make(layer))
        return net
    return globals()["net"](edit)


def end_in(kernel_size):
    """Return a change: one convolution, 20 to 10, in the place of the last two layers."""
    def edit(net):
        net.layers = net.layers[:-2].append(nn.Conv2d(20, 10, kernel_size, bias=False))
        return net
    return globals()["net"](edit)
