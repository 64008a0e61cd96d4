"""Damage the four data files at random: each set is refused with one line, or read as it now is.

Usage: python tests/fuzz_data.py 500 [SEED]
"""

import random
import struct
import sys
import tempfile
from argparse import Namespace
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # of the steps
from conftest import write_data

from common import MNIST_SHA256, get_loaders

NAMES = tuple(MNIST_SHA256)  # images and labels of training, images and labels of testing


def load(folder, batch_size=128):
    """Return the training and the test loader of a folder, as a step gets them."""
    args = Namespace(data_dir=folder, batch_size=batch_size, smoke=False, device="cpu")
    return get_loaders(args, torch.nn.Identity(), torch.nn.Identity())


def one_line(end):
    """Return the message of a SystemExit, having checked that it is one line and the status 1."""
    # Python prints a text, and exits with 1.
    assert isinstance(end.code, str) and end.code.isprintable(), f"not one line: {end.code!r}"
    return end.code


def flip(content, rng, end):
    """Change one to three of the first `end` bytes."""
    content = bytearray(content)
    for _ in range(rng.randint(1, 3) if content else 0):
        content[rng.randrange(min(end, len(content)))] ^= rng.randint(1, 255)
    return bytes(content)


def damage(files, rng):
    """Change a dict of contents by name in one way, and return the name of that way."""
    name, other = rng.sample(NAMES, 2)
    content = files[name]
    how = rng.choice(("truncated", "extended", "header", "flipped", "swapped", "emptied", "count"))
    if how == "truncated":
        files[name] = content[: rng.randrange(len(content) + 1)]
    elif how == "extended":
        files[name] = content + rng.randbytes(rng.choice((1, 2, 784, 5000)))
    elif how == "header":
        files[name] = flip(content, rng, 16)
    elif how == "flipped":
        files[name] = flip(content, rng, len(content))
    elif how == "swapped":
        files[name], files[other] = files[other], content
    elif how == "emptied":
        files[name] = b""
    elif how == "count":  # the last item goes from both files of a split: fine again
        for name, size in zip(rng.choice((NAMES[:2], NAMES[2:])), (784, 1), strict=True):
            count = int.from_bytes(files[name][4:8], "big") - 1
            header = files[name][:4] + struct.pack(">I", max(count, 0)) + files[name][8:]
            files[name] = header[: max(len(header) - size, 0)]
    return how


def expected(files):
    """Return [images, labels, images, labels] as bytes, or None if the files are no data set."""
    parts = []
    for images, labels in ((files[NAMES[0]], files[NAMES[1]]), (files[NAMES[2]], files[NAMES[3]])):
        count = len(labels) - 8
        pixels = struct.pack(">4I", 2051, max(count, 0), 28, 28)
        fine = images[:16] == pixels and labels[:8] == struct.pack(">2I", 2049, max(count, 0))
        if not fine or count < 1 or len(images) != 16 + 784 * count or max(labels[8:]) > 9:
            return None
        parts += [images[16:], labels[8:]]
    return parts


def compare(raw, files, counts):
    """Load the set in `raw`, which holds `files`, and count it; AssertionError if that is wrong."""
    content = expected(files)
    try:
        loaders = load(raw.parent.parent)
    except SystemExit as end:
        line = one_line(end)
        assert content is None, f"a sound set is refused: {line}"
        assert any(str(raw / name) in line for name in NAMES), f"names no file: {line}"
        counts["refused"] += 1
    else:
        read = [part for each in loaders for part in (each.images, each.labels.byte())]
        assert [part.numpy().tobytes() for part in read] == content, "read as another set"
        counts["read"] += 1


def fuzz(folder, trials, seed=0):
    """Load `trials` damaged sets.

    Args:
        folder (Path): an empty folder for the sets.
        trials (int): how many.
        seed (int): of the damages.

    Returns:
        tuple[dict[str, int], list[str]]: how many were refused and read; the failures.
    """
    rng, counts, failures = random.Random(seed), {"refused": 0, "read": 0}, []
    raw = write_data(folder, train=12, test=8) / "MNIST" / "raw"
    sound = {name: (raw / name).read_bytes() for name in NAMES}
    for trial in range(trials):
        files = dict(sound)
        ways = [damage(files, rng) for _ in range(rng.choice((1, 1, 2)))]
        for name in NAMES:
            (raw / name).write_bytes(files[name])
        try:
            compare(raw, files, counts)
        except Exception as error:
            failures.append(f"damage {trial} ({', '.join(ways)}): {type(error).__name__}: {error}")
    return counts, failures


def main(trials, seed=0):
    with tempfile.TemporaryDirectory() as folder:
        counts, failures = fuzz(Path(folder), trials, seed)
    print(*failures, sep="\n", end="\n" if failures else "")
    print(f"{trials} damaged sets (seed {seed}): {counts['refused']} refused with one line, "
          f"{counts['read']} read as the files now say, {len(failures)} failures")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main(*map(int, sys.argv[1:])) if len(sys.argv) > 1 else __doc__)
