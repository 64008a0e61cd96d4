"""Small data to train on, the steps as modules, and how tests start them and see the results."""

import importlib
import os
import re
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
NAMES = ["step1_setup", "step2_skeleton", "step3_bn_gap", "step4_aug_lr"]
SCRIPTS = {name[:5]: ROOT / f"{name}.py" for name in NAMES}
STEPS = {name[:5]: importlib.import_module(name) for name in NAMES}
torch.set_num_threads(1)  # faster than two on networks and batches this small
os.environ["OMP_NUM_THREADS"] = "1"  # in processes that tests start
for variable in ("FORCE_COLOR", "MAKELEVEL", "MAKEFLAGS", "MFLAGS"):  # as if started by hand
    os.environ.pop(variable, None)


def write_idx(path, items):
    """Write a uint8 tensor N×28×28 or N as an IDX file."""
    header = struct.pack(f">{1 + items.ndim}I", 2048 + items.ndim, *items.shape)
    path.write_bytes(header + items.numpy().tobytes())


def write_data(folder, train, test):
    """Write a set in which each class is a bright square in a place of its own; return folder."""
    raw = folder / "MNIST" / "raw"
    raw.mkdir(parents=True)
    generator = torch.Generator().manual_seed(0)
    for prefix, count in (("train", train), ("t10k", test)):
        labels = torch.randint(10, (count,), generator=generator)
        images = torch.randint(60, (count, 28, 28), generator=generator)
        for image, label in zip(images, labels.tolist(), strict=True):
            row, column = divmod(label, 4)
            image[4 + 7 * row : 10 + 7 * row, 2 + 6 * column : 8 + 6 * column] = 250
        write_idx(raw / f"{prefix}-images-idx3-ubyte", images.byte())
        write_idx(raw / f"{prefix}-labels-idx1-ubyte", labels.byte())
    return folder


def copy_project(folder, *without):
    """Copy the project, but nothing of results/ that matches `without`; return the new folder."""
    ignored = shutil.ignore_patterns("[._]*", *without)
    shutil.copytree(ROOT / "results", folder / "results", ignore=ignored)
    for name in ("common.py", "Makefile", "README.md", "requirements.txt", *SCRIPTS.values()):
        shutil.copy(ROOT / name, folder)
    return folder


@pytest.fixture(scope="session")
def small(tmp_path_factory):
    """A folder with 24 training and 12 test images; do not change it."""
    return write_data(tmp_path_factory.mktemp("small"), 24, 12)


def flags(data_dir, out, *more):
    """Return the flags of three short epochs, --plain first; of two equal ones the later counts."""
    args = ["--plain", "--epochs", 3, "--batch-size", 16, "--device", "cpu"]
    return [str(arg) for arg in (*args, "--data-dir", data_dir, "--out", out, *more)]


def start(script, *args, **options):
    """Start a script, as a shell does; return its subprocess.Popen, with text pipes by default."""
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "encoding": "utf-8"}
    return subprocess.Popen([sys.executable, script, *args], **pipes | options)


def call(*command, **options):
    """Run a command to its end; return its exit status, output and errors (str)."""
    done = subprocess.run(list(map(str, command)), capture_output=True, encoding="utf-8", **options)
    return done.returncode, done.stdout, done.stderr


def refuse(step, *args):
    """Return the one line with which a step, a module, ends with status 1."""
    with pytest.raises(SystemExit) as end:
        step.main([str(arg) for arg in args])
    line = end.value.code  # Python prints a text, and exits with 1
    assert isinstance(line, str) and line.isprintable(), line
    return line


def read_all(folder):
    """Return the bytes of all files in a folder, by their paths in it."""
    return {str(path.relative_to(folder)): path.read_bytes()
            for path in folder.rglob("*") if path.is_file()}


def history(run):
    """Return the csv, without its times, and the weights of a run's folder."""
    csv = re.sub(r"(?m),[^,\n]*$", "", (run / "history.csv").read_text())
    weights = torch.load(run / "weights.pt", weights_only=True)
    return csv, {name: tensor.numpy().tobytes() for name, tensor in weights.items()}
