"""The data files: what is read, what is refused and with which words, and how they get there."""

import gzip
import hashlib
import os
import re
import shutil
import threading
from argparse import Namespace
from pathlib import Path
from urllib.error import URLError

import pytest
import torch
from conftest import STEPS, write_data, write_idx
from fuzz_data import NAMES, fuzz, load, one_line
from torchvision import datasets, transforms

import common

TRAIN_IMAGES, TRAIN_LABELS, TEST_IMAGES, TEST_LABELS = NAMES


def refusal(action, *args):
    """Return the one line with which `action` exits with status 1."""
    with pytest.raises(SystemExit) as end:
        action(*args)
    return one_line(end.value)


@pytest.fixture
def raw(tmp_path):
    """The folder of the four files of a small set, to be damaged."""
    return write_data(tmp_path, train=30, test=20) / "MNIST" / "raw"


# ------------------------------------------------------------------------------- damage


def set_bytes(path, at, new):
    """Overwrite the bytes of a file from `at` on."""
    content = bytearray(path.read_bytes())
    content[at : at + len(new)] = new
    path.write_bytes(content)


def swap(path, other):
    """Exchange two files."""
    content = path.read_bytes()
    path.write_bytes(other.read_bytes())
    other.write_bytes(content)


def turn_into_folder(path):
    path.unlink()
    path.mkdir()


def pack(path, name):
    """Replace a file by its gzip archive, called `name`."""
    content = gzip.compress(path.read_bytes())
    path.unlink()
    path.with_name(name).write_bytes(content)


# Each: the file that is named, what is done to it, what the line says was expected and found.
DAMAGES = {
    "missing": (TRAIN_LABELS, Path.unlink, "this file, found only others"),
    "empty": (TEST_LABELS, lambda path: path.write_bytes(b""),
              "a header of 8 bytes, found 0 bytes"),
    "cut in the header": (TRAIN_IMAGES, lambda path: os.truncate(path, 15),
                          "a header of 16 bytes, found 15 bytes"),
    "cut by one byte": (TRAIN_IMAGES, lambda path: os.truncate(path, 16 + 30 * 784 - 1),
                        "23536 bytes for 30 items, found 23535"),
    "cut to the header": (TEST_LABELS, lambda path: os.truncate(path, 8),
                          "28 bytes for 20 items, found 8"),
    "one byte too long": (TEST_IMAGES, lambda path: path.write_bytes(path.read_bytes() + b"\0"),
                          "15696 bytes for 20 items, found 15697"),
    "wrong magic": (TRAIN_LABELS, lambda path: set_bytes(path, 3, b"\x02"), "2049.*found 2050"),
    "wrong byte order": (TRAIN_IMAGES, lambda path: set_bytes(path, 0, b"\x03\x08\0\0"),
                         "magic number 2051.*found"),
    "other size": (TEST_IMAGES, lambda path: set_bytes(path, 8, b"\0\0\0\x0e\0\0\0\x38"),
                   "28x28 pixels, found 14x56"),
    "huge count": (TRAIN_IMAGES, lambda path: set_bytes(path, 4, b"\xff" * 4),
                   "bytes for 4294967295 items"),
    "fewer labels": (TRAIN_LABELS, lambda path: write_idx(path, torch.zeros(29).byte()),
                     "30 labels.*found 29"),
    "more labels": (TEST_LABELS, lambda path: write_idx(path, torch.zeros(21).byte()),
                    "20 labels.*found 21"),
    "label 10": (TRAIN_LABELS, lambda path: set_bytes(path, 8 + 7, b"\x0a"),
                 r"labels 0 to 9, found \D*10\D.*7"),
    "label 255": (TEST_LABELS, lambda path: set_bytes(path, 8 + 19, b"\xff"),
                  r"labels 0 to 9, found \D*255\D.*19"),
    "no images": (TRAIN_IMAGES, lambda path: write_idx(path, torch.zeros(0, 28, 28).byte()),
                  "at least one item, found none"),
    "no labels": (TEST_LABELS, lambda path: write_idx(path, torch.zeros(0).byte()),
                  "at least one item, found none"),
    "images and labels swapped": (TRAIN_IMAGES,
                                  lambda path: swap(path, path.with_name(TRAIN_LABELS)),
                                  "magic number 2051.*found 2049"),
    "labels of train and test swapped": (TRAIN_LABELS,
                                         lambda path: swap(path, path.with_name(TEST_LABELS)),
                                         "30 labels.*found 20"),
    "a folder": (TEST_IMAGES, turn_into_folder, "readable file, found.*directory"),
    "a dangling link": (TRAIN_LABELS, lambda path: (path.unlink(), path.symlink_to("nothing")),
                        "this file, found only others"),
    "gzip under its name": (TRAIN_IMAGES, lambda path: pack(path, TRAIN_IMAGES),
                            "found a gzip archive; gunzip it"),
    "gzip beside": (TEST_LABELS, lambda path: pack(path, f"{TEST_LABELS}.gz"),
                    "found its .gz; gunzip it"),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_damaged_file_is_refused_by_name(raw, name):
    file, damage, words = DAMAGES[name]
    damage(raw / file)
    line = refusal(load, raw.parent.parent)
    assert line.startswith(f"{raw / file}: expected "), line
    assert re.search(words, line), line


def test_all_four_packed(raw):
    for name in NAMES:
        pack(raw / name, f"{name}.gz")
    assert "gunzip it" in refusal(load, raw.parent.parent)


def test_a_stray_file_alone(tmp_path):
    """It would stand in the way of the four, which get their place all at once."""
    stray = tmp_path / "MNIST" / "raw" / ".DS_Store"
    stray.parent.mkdir(parents=True)
    stray.touch()
    assert "this file, found only others; remove them" in refusal(common.get_data, tmp_path)
    assert stray.exists()


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may read all")
def test_unreadable_file_is_refused(raw):
    (raw / TRAIN_IMAGES).chmod(0)
    assert refusal(load, raw.parent.parent).startswith(f"{raw / TRAIN_IMAGES}: expected ")


def test_unreadable_file_is_refused_even_for_root(raw, monkeypatch):
    def refuse(path):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "read_bytes", refuse)
    line = refusal(load, raw.parent.parent)
    assert line.startswith(f"{raw / TRAIN_IMAGES}: ") and "Permission denied" in line


def test_random_damage(tmp_path):
    counts, failures = fuzz(tmp_path, trials=60, seed=1)
    assert not failures, "\n".join(failures)
    assert min(counts.values()) > 0


def test_a_step_refuses_before_its_first_epoch(step, raw, tmp_path, capsys):
    os.truncate(raw / TEST_IMAGES, 1000)
    args = ["--data-dir", str(tmp_path), "--out", str(tmp_path / "out"), "--no-compile"]
    assert str(raw / TEST_IMAGES) in refusal(step.main, args)
    assert "EPOCH" not in capsys.readouterr().out
    assert not (tmp_path / "out").exists()


# ------------------------------------------------------------------------------ loaders


def test_loaders_agree_with_torchvision(step, data_dir):
    to_tensor = transforms.Compose([
        transforms.ToTensor(), transforms.Normalize((0.1307,), (0.3081,)),
    ])
    args = Namespace(data_dir=data_dir, batch_size=64, smoke=False, device="cpu")
    # Step 4 trains on images that are moved at random; its test shows what it makes of them.
    moved = step is STEPS["step4"]
    chosen = step.test_transform if moved else step.train_transform
    loaders = common.get_loaders(args, chosen, step.test_transform)
    for loader, is_train in zip(loaders, (True, False), strict=True):
        reference = datasets.MNIST(data_dir, train=is_train, transform=to_tensor)
        images, labels = map(torch.stack, zip(*((x, torch.tensor(y)) for x, y in reference),
                                              strict=True))
        loader.shuffle = False
        batches = list(loader)
        full, rest = divmod(len(images), 64)
        assert [len(batch) for batch, _ in batches] == [64] * full + [rest]
        assert len(loader) == len(batches)
        torch.testing.assert_close(torch.cat([x for x, _ in batches]), images, rtol=0, atol=1e-5)
        assert torch.equal(torch.cat([y for _, y in batches]), labels)


def test_training_is_shuffled_anew_and_testing_is_not(data_dir):
    train, test = load(data_dir, batch_size=64)
    train.images = torch.arange(len(train.labels)).view(-1, 1, 1, 1)
    epochs = [torch.cat([images for images, _ in train]).flatten() for _ in range(2)]
    assert not torch.equal(*epochs)
    for epoch in epochs:
        assert torch.equal(epoch.sort().values, torch.arange(300))
    assert torch.equal(torch.cat([labels for _, labels in test]), test.labels)


def test_images_stay_with_their_labels(data_dir):
    train, _ = load(data_dir, batch_size=64)
    for images, labels in train:
        for image, label in zip(images, labels.tolist(), strict=True):
            row, column = divmod(label, 4)
            square = image[0, 4 + 7 * row : 10 + 7 * row, 2 + 6 * column : 8 + 6 * column]
            assert (square == 250).all()


def test_fewer_images_than_a_batch(step, tmp_path, capsys):
    write_data(tmp_path, train=5, test=3)
    args = ["--data-dir", str(tmp_path), "--out", str(tmp_path), "--epochs", "2", "--no-compile"]
    assert not step.main(args)
    out = capsys.readouterr().out
    assert out.count("| 1/1 [") == 2 and out.count("/3 (") == 2
    assert len((tmp_path / f"{step.__name__.split('_')[0]}-seed1.csv").read_text().split()) == 3


def test_one_image(tmp_path):
    write_data(tmp_path, train=1, test=1)
    args = ["--data-dir", str(tmp_path), "--out", str(tmp_path), "--epochs", "1", "--no-compile"]
    assert not STEPS["step2"].main(args)


# ----------------------------------------------------------------------------- fetching


@pytest.fixture
def small_mnist(tmp_path_factory, monkeypatch):
    """A folder of four files whose SHA-256 sums are taken for those of MNIST."""
    folder = write_data(tmp_path_factory.mktemp("mirror"), train=30, test=20) / "MNIST" / "raw"
    sums = {name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in NAMES}
    monkeypatch.setattr(common, "MNIST_SHA256", sums)
    return folder


@pytest.fixture
def no_network(monkeypatch):
    """Both fetchers find no network."""
    def fail(*args, **options):
        raise URLError("no route to host")

    monkeypatch.setattr(common.datasets, "MNIST", fail)
    monkeypatch.setattr(common.subprocess, "run", fail)


def fetcher(source, *left_out):
    """Return a function that fetches the files in `source`, but for some."""
    def fetch_copy(folder):
        for name in set(NAMES) - set(left_out):
            shutil.copy(source / name, folder)
        return Path(folder)

    return fetch_copy


def found(data_dir):
    """Return what lies in a data folder, by relative path."""
    return sorted(str(path.relative_to(data_dir)) for path in data_dir.rglob("*") if path.is_file())


IN_PLACE = sorted(f"MNIST/raw/{name}" for name in NAMES)


def test_no_data_and_no_network(step, no_network, tmp_path, capsys):
    line = refusal(step.main, ["--data-dir", str(tmp_path), "--out", str(tmp_path / "out")])
    assert all(name in line for name in NAMES)
    assert str(tmp_path / "MNIST" / "raw") in line
    assert "torchvision" in line and "no route to host" in line and "make data" in line
    assert "EPOCH" not in capsys.readouterr().out
    assert found(tmp_path) == []


def test_every_source_is_named(no_network, tmp_path):
    sources = common.fetch_with_torchvision, common.fetch_with_npm
    line = refusal(common.get_data, tmp_path, sources)
    assert "torchvision" in line and "npm" in line and line.count("no route to host") == 2


def test_files_that_are_there_are_left_alone(no_network, raw):
    before = {name: (raw / name).stat().st_mtime_ns for name in NAMES}
    common.get_data(raw.parent.parent)
    assert before == {name: (raw / name).stat().st_mtime_ns for name in NAMES}


def test_fetched_files_come_to_their_place(small_mnist, tmp_path):
    common.get_data(tmp_path, (fetcher(small_mnist),))
    assert found(tmp_path) == IN_PLACE
    assert len(load(tmp_path)[0].images) == 30


def test_the_next_source_is_tried(small_mnist, no_network, tmp_path):
    common.get_data(tmp_path, (common.fetch_with_torchvision, fetcher(small_mnist)))
    assert found(tmp_path) == IN_PLACE


def test_wrong_sum_is_refused(small_mnist, tmp_path):
    set_bytes(small_mnist / TEST_LABELS, 8, b"\x09\x09\x09")
    line = refusal(common.get_data, tmp_path, (fetcher(small_mnist),))
    assert f"wrong SHA-256 of {TEST_LABELS}" in line
    assert found(tmp_path) == []


def test_half_fetched_never_counts(small_mnist, tmp_path):
    def fetch_and_stop(folder):
        fetcher(small_mnist, TEST_LABELS)(folder)
        raise KeyboardInterrupt

    line = refusal(common.get_data, tmp_path, (fetcher(small_mnist, TRAIN_LABELS, TEST_IMAGES),))
    assert "No such file" in line and found(tmp_path) == []
    with pytest.raises(KeyboardInterrupt):
        common.get_data(tmp_path, (fetch_and_stop,))
    assert found(tmp_path) == []
    common.get_data(tmp_path, (fetcher(small_mnist),))
    assert found(tmp_path) == IN_PLACE


@pytest.mark.parametrize("error", [
    OSError(), TimeoutError(), RuntimeError(""), EOFError("cut short"), StopIteration(),
], ids=repr)
def test_whatever_a_source_raises(error, tmp_path):
    def fetch(folder):
        raise error

    assert "No MNIST in" in refusal(common.get_data, tmp_path, (fetch,))


def test_two_at_once(small_mnist, tmp_path):
    barrier, ended = threading.Barrier(2, timeout=60), []

    def fetch(folder):
        barrier.wait()
        return fetcher(small_mnist)(folder)

    def start():
        common.get_data(tmp_path, (fetch,))
        ended.append(load(tmp_path))

    threads = [threading.Thread(target=start) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(ended) == 2
    assert found(tmp_path) == IN_PLACE


def test_second_comes_while_the_first_puts_in_place(small_mnist, tmp_path, monkeypatch):
    replace, threads, ended = os.replace, [], []

    def slow_replace(source, target):
        replace(source, target)
        if not threads:  # one file is there, three are missing
            threads.append(threading.Thread(target=start))
            threads[0].start()
            threads[0].join(0.3)

    def start():
        try:
            common.get_data(tmp_path, (fetcher(small_mnist),))
            ended.append(len(load(tmp_path)))
        except SystemExit as end:
            ended.append(end.code)

    monkeypatch.setattr(common.os, "replace", slow_replace)
    start()
    threads[0].join()
    assert ended == [2, 2]
