"""The four steps: log, bar, networks, real compilation; their data (test_runs.py damages it)."""

import hashlib
import os
import re
import select
import shutil
import socket
import subprocess
import sys
import time

import pytest
import torch
from conftest import (
    ROOT, SCRIPTS, STEPS, call, flags, history, read_all, refuse, start, write_data, write_idx)
from torch import nn
from torchvision.datasets import MNIST, mnist
from torchvision.transforms import v2

import common

STEP2, STEP4 = STEPS["step2"], STEPS["step4"]
SMOKE = ["--smoke", "--device", "cpu"]  # with the default folders


def check_log(text, batches):
    """Compare all that a run of one epoch has printed with the documented format."""
    head = r"Device: .*\nData: .*\n=+\n(?s:.*)\n=+\n(Saving to .*\n)?Settings: .*, seed 1, .*\n"
    bar = (rf"Loss=\d+\.\d+(e-\d+)? Batch_id={batches - 1} Accuracy=\d+\.\d\d: 100%\|█{{10}}\| "
           rf"{batches}/{batches} \[\d\d:\d\d<00:00, +\d+\.\d\d(it/s|s/it)\]")
    test = r"Test set: Average loss: \d+\.\d{4}, Accuracy: \d+/\d+ \(\d+\.\d\d%\)"
    last = r"Best Test Accuracy: \d+\.\d\d \(Epoch 0\)\nLast Test Accuracy: \d+\.\d\d \(Epoch 0\)\n"
    assert re.fullmatch(rf"{head}EPOCH: 0\n{bar}\n\n{test}\n\n{last}", text), text


@pytest.mark.parametrize("step", STEPS)
def test_smoke_and_the_numbers_in_the_text(step, small, tmp_path, capsys):
    network, text = STEPS[step].Net().eval(), SCRIPTS[step].read_text("utf-8")
    count = f"{sum(weights.numel() for weights in network.parameters()):,}"
    assert count in STEPS[step].__doc__ and count in (ROOT / "README.md").read_text("utf-8")
    values, field, jump, found = torch.zeros(1, 1, 28, 28), 1, 1, []
    for line in network.layers:
        values = line(values)
        for layer in line.modules():
            field += (torch.tensor(getattr(layer, "kernel_size", 1)).max().item() - 1) * jump
            jump *= torch.tensor(getattr(layer, "stride", 1)).max().item()
        found.append("# {2}x{3}x{1} | RF {4}".format(*values.shape, field))
    assert re.findall(r"# \d+x\d+x\d+ \| RF \d+", text) == found
    STEPS[step].main(flags(small, tmp_path / "out", "--smoke", "--batch-size", 9)[1:])
    printed, message = capsys.readouterr()
    assert (message, read_all(tmp_path), printed.count("Total params: ")) == ("", {}, 1)
    assert "(M)" in printed and "Units." not in printed and "fp32, not compiled\n" in printed
    assert "[1, 10]" in printed  # the summary is that of one image
    check_log(printed, batches=1)


def test_ten_values_of_images_of_any_shape(small, tmp_path, monkeypatch, capsys):
    for layers, gives in (
            ([nn.Conv2d(1, 10, 14, stride=14), nn.Flatten()], "40"),  # padded by a learner, say
            ([nn.Conv2d(1, 10, 28)], "10x1x1"), ([nn.Flatten(), nn.Linear(784, 9)], "9")):
        monkeypatch.setattr(STEP2, "Net", lambda layers=layers: nn.Sequential(*layers))
        line = refuse(STEP2, *flags(small, tmp_path / "out"))
        assert f" {gives} " in line and " 10" in line and not (tmp_path / "out").exists()
    # A copy may resize, or repeat the channel, for a network that wants it.
    bigger = v2.Compose([STEP2.test_transform, v2.Resize(32), lambda it: it.repeat(1, 3, 1, 1)])
    monkeypatch.setattr(STEP2, "train_transform", bigger)
    monkeypatch.setattr(STEP2, "test_transform", bigger)
    monkeypatch.setattr(STEP2, "Net", lambda: nn.Sequential(nn.Flatten(), nn.Linear(3072, 10)))
    STEP2.main(flags(small, tmp_path))
    assert "[1, 3072]" in capsys.readouterr().out


@pytest.mark.skipif(not hasattr(os, "openpty"), reason="no pseudo-terminals here")
def test_log_in_a_pipe_and_bar_on_a_terminal(tmp_path, monkeypatch):
    monkeypatch.delenv("PYTHONUNBUFFERED", raising=False)  # a user has not set it
    terminal, line = os.openpty()
    subprocess.run(["stty", "rows", "24", "cols", "80"], stdin=line, check=True)
    args = flags(write_data(tmp_path, 600, 300), tmp_path, "--epochs", 1, "--batch-size", 1)
    process = start(SCRIPTS["step2"], *args, stderr=line)
    pipe = process.stdout.fileno()
    read = {pipe: b"", terminal: b""}
    while not re.search(rb"Last .*\n", read[pipe]):
        for source in select.select([pipe, terminal], [], [])[0]:
            text = os.read(source, 65536)
            assert text and not (b"100%" in text and b"Test set" in text), "the first came late"
            read[source] += text
    assert process.wait() == 0
    check_log(read[pipe].decode(), batches=600)
    bars = re.findall(r"Loss=[^\r\n]*", read[terminal].decode())
    assert max(map(len, bars)) <= 80 and re.search(r"%\|.{10}\| \d+/600", bars[0])


@pytest.mark.parametrize("terminal", [False, True])
def test_figures_and_a_line_a_minute_where_no_bar_moves(terminal, monkeypatch, capsys):
    """A batch takes a second here; the network stays as it is, so its figures are known."""
    def slow(images):
        clock.append(len(clock))
        return images / 255
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal, raising=False)
    clock, images, labels = [0], torch.randint(256, (130, 1, 28, 28)), torch.randint(10, (130,))
    monkeypatch.setattr(time, "perf_counter", lambda: clock[-1])
    model = nn.Sequential(nn.Flatten(), nn.Linear(784, 10))
    loader = common.Loader("Training", images, labels, slow, batch_size=1)
    common.train(model, loader, torch.optim.SGD(model.parameters(), lr=0))
    printed, output, kept = capsys.readouterr(), model(images / 255), []
    model.register_forward_hook(lambda *called: kept.append(called[-1].requires_grad))
    common.test(model, loader)
    assert kept == [False] * 130
    right = output.argmax(dim=1) == labels
    accuracies = 100 * right.cumsum(0) / torch.arange(1, 131)
    losses = nn.functional.cross_entropy(output, labels, reduction="none")
    words = rf"loss: (.+), Accuracy: {right.sum()}/130 \({accuracies[-1]:.2f}%\)"
    [loss] = re.findall(words, capsys.readouterr().out)
    assert float(loss) == pytest.approx(losses.mean().item(), abs=6e-5)
    lines = re.sub(".*\r", "", "".join(printed))  # without the bar that moves
    figures = re.findall(r"Loss=(\S+) Batch_id=(\S+) Accuracy=(\S+): .*130", lines)
    for loss, batch, accuracy in figures:
        assert float(accuracy) == pytest.approx(accuracies[int(batch)].item(), abs=0.006)
        assert float(loss) == pytest.approx(losses[int(batch)].item(), abs=1e-5)
    assert sorted(int(batch) // 60 for _, batch, _ in figures) == ([2] if terminal else [1, 2, 2])
    assert printed.err.count("\n") == (0 if terminal else 2)
    assert printed.out.count("\n") == 1 and "130/130 [02:10<00:00,  1.00it/s]" in printed.out


def test_compiler_and_its_broken_cache(small, tmp_path):
    environment = os.environ | {
        "PYTHONPATH": str(ROOT), "TORCHINDUCTOR_CACHE_DIR": str(tmp_path),
        "TORCHINDUCTOR_COMPILE_THREADS": "1", "TORCHINDUCTOR_VEC_ISA_OK": "0"}  # faster
    layers = "nn.Sequential(nn.Flatten(), nn.Linear(784, 10), nn.Tanh())"  # compiled in seconds
    step2, script = SCRIPTS["step2"].read_text("utf-8"), tmp_path / "mine.py"
    script.write_text(re.sub(r"(?s)nn\.Sequential\(  # h.*?\n        \)", layers, step2), "utf-8")
    command, losses = [sys.executable, script, *flags(small, tmp_path, "--batch-size=9")[1:]], []
    for words in (", compiled\n", ", fp32, not compiled ("):
        status, printed, message = call(*command, env=environment)
        if not losses and ", not compiled" in printed:
            pytest.skip("torch.compile does not work here; it needs a C++ compiler")
        losses.append([float(loss) for loss in re.findall("Average loss: (.+),", printed)])
        assert status == 0 and words in printed, message
        for path in tmp_path.rglob("*.so"):
            path.write_bytes(b"")  # as a run may leave it that is killed while it compiles
    assert losses[0] == pytest.approx(losses[1], rel=0.02)


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
