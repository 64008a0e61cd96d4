"""Small IDX folders to train on, and the four steps as modules."""

import importlib
import signal
import struct
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = {path.name.split("_")[0]: path for path in sorted(ROOT.glob("step*.py"))}
STEPS = {name: importlib.import_module(path.stem) for name, path in SCRIPTS.items()}
torch.set_num_threads(1)  # faster than two on networks and batches this small
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's `make test &` ignores it


def write_idx(path, items):
    """Write a uint8 tensor N×28×28 or N as an IDX file."""
    header = struct.pack(f">{1 + items.ndim}I", 2048 + items.ndim, *items.shape)
    path.write_bytes(header + items.numpy().tobytes())


def write_data(folder, train=300, test=100):
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


@pytest.fixture(scope="session")
def data_dir(tmp_path_factory):
    """A folder with 300 training and 100 test images; do not change it."""
    return write_data(tmp_path_factory.mktemp("data"))
