"""The four steps: the log, the bar, batches, the networks, real compilation."""

import os
import re
import select
import subprocess
import sys
import time

import pytest
import torch
from conftest import ROOT, SCRIPTS, STEPS, call, flags, read_all, refuse, start, write_data
from torch import nn
from torchvision.transforms import v2

import common


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
    step = STEPS["step2"]
    for layers, gives in (
            ([nn.Conv2d(1, 10, 14, stride=14), nn.Flatten()], "40"),  # padded by a learner, say
            ([nn.Conv2d(1, 10, 28)], "10x1x1"), ([nn.Flatten(), nn.Linear(784, 9)], "9")):
        monkeypatch.setattr(step, "Net", lambda layers=layers: nn.Sequential(*layers))
        line = refuse(step, *flags(small, tmp_path / "out"))
        assert f" {gives} " in line and " 10" in line and not (tmp_path / "out").exists()
    # A copy may resize, or repeat the channel, for a network that wants it.
    bigger = v2.Compose([step.test_transform, v2.Resize(32), lambda it: it.repeat(1, 3, 1, 1)])
    monkeypatch.setattr(step, "train_transform", bigger)
    monkeypatch.setattr(step, "test_transform", bigger)
    monkeypatch.setattr(step, "Net", lambda: nn.Sequential(nn.Flatten(), nn.Linear(3072, 10)))
    step.main(flags(small, tmp_path))
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
