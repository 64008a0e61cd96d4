"""The four steps: the log, the bar, batches, the networks, real compilation."""

import os
import re
import select
import subprocess
import sys
import time

import pytest
import torch
from conftest import ROOT, SCRIPTS, STEPS, call, flags, read_all, start, write_data
from torch import nn

import common

PARAMETERS = {"step1": "6,379,786", "step2": "20,750", "step3": "9,078", "step4": "9,538"}


def check_log(text, epochs, batches):
    """Compare all that a run has printed with the documented format, byte for byte."""
    bar = (rf"Loss=\d+\.\d+(e-\d+)? Batch_id={batches - 1} Accuracy=\d+\.\d\d: 100%\|█{{10}}\| "
           rf"{batches}/{batches} \[\d\d:\d\d<00:00, +\d+\.\d\d(it/s|s/it)\]")
    test = r"Test set: Average loss: \d+\.\d{4}, Accuracy: \d+/\d+ \(\d+\.\d\d%\)"
    wanted = r"Device: .*\nData: .*\n=+\n(?s:.*)\n=+\nSettings: .*, seed 1, .*\n(Saving to .*\n)?"
    wanted += "".join(f"EPOCH: {epoch}\n{bar}\n\n{test}\n\n" for epoch in range(epochs))
    wanted += "".join(rf"{it} Test Accuracy: \d+\.\d\d \(Epoch \d\)\n" for it in ("Best", "Last"))
    assert re.fullmatch(wanted, text), text


@pytest.mark.parametrize("step", STEPS)
def test_smoke_from_the_shell(step, data_dir, tmp_path):
    """No file, no warning, and one summary."""
    args = flags(data_dir, tmp_path / "out", "--smoke")
    status, printed, message = call(sys.executable, SCRIPTS[step], *args)
    assert (status, message, read_all(tmp_path)) == (0, "", {})
    assert re.findall(r"Total params: (\S+)", printed) == [PARAMETERS[step]]
    assert "(M)" in printed and "Units." not in printed
    check_log(printed, epochs=1, batches=1)


@pytest.mark.skipif(not hasattr(os, "openpty"), reason="no pseudo-terminals here")
def test_log_in_a_pipe_and_bar_on_a_terminal(tmp_path, monkeypatch):
    """A line is there when it is known; the bar moves, and fits, also when the window shrinks."""
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
            if re.search(rb"Batch_id=[3-5]\d\d", text):
                subprocess.run(["stty", "cols", "40"], stdin=line, check=True)
            read[source] += text
    assert process.wait() == 0
    check_log(read[pipe].decode(), epochs=1, batches=600)
    bars = re.findall(r"Loss=[^\r\n]*", read[terminal].decode())
    assert max(map(len, bars)) <= 80 and len(bars[-1]) <= 40
    assert re.search(r"%\|.{10}\| \d+/600", bars[0])
    assert len(set(re.findall(r"Loss=(\S+) Batch_id=\d+", "\n".join(bars)))) > 2


def test_figures_and_a_line_a_minute_where_no_bar_moves(monkeypatch, capsys):
    """A batch takes a second here; the network stays as it is, so its figures are known."""
    def slow(images):
        clock.append(len(clock))
        return images / 255

    clock, images, labels = [0], torch.randint(256, (130, 1, 28, 28)), torch.randint(10, (130,))
    monkeypatch.setattr(time, "perf_counter", lambda: clock[-1])
    model = nn.Sequential(nn.Flatten(), nn.Linear(784, 10))
    loader = common.Loader("Training", images, labels, slow, batch_size=1)
    common.train(model, loader, torch.optim.SGD(model.parameters(), lr=0))
    printed, output = capsys.readouterr(), model(images / 255)
    correct = (output.argmax(dim=1) == labels).cumsum(0)
    figures = re.findall(r"Loss=(.+) Batch_id=(.+) Accuracy=(.+): .*130", "".join(printed))
    minutes = []
    for loss, batch, accuracy in figures:
        number = int(batch)
        minutes.append((number + 1) // 60)
        assert float(accuracy) == round(100 * correct[number].item() / (number + 1), 2)
        expected = nn.functional.cross_entropy(output[number], labels[number]).item()
        assert float(loss) == pytest.approx(expected, abs=1e-5)
    assert printed.err.count("\n") == 2 and sorted(minutes) == [1, 2, 2]
    assert printed.out.count("\n") == 1 and "130/130 [02:10<00:00,  1.00it/s]" in printed.out


@pytest.mark.parametrize("step", STEPS)
def test_shapes_and_receptive_fields_in_the_comments(step):
    values, field, jump, found = torch.zeros(1, 1, 28, 28), 1, 1, []
    for line in STEPS[step].Net().eval().layers:
        values = line(values)
        for layer in line.modules():
            field += (torch.tensor(getattr(layer, "kernel_size", 1)).max().item() - 1) * jump
            jump *= torch.tensor(getattr(layer, "stride", 1)).max().item()
        _, channels, height, width = values.shape
        found.append(f"# {height}x{width}x{channels} | RF {field}")
    assert re.findall(r"# \d+x\d+x\d+ \| RF \d+", SCRIPTS[step].read_text("utf-8")) == found


def test_compiler_and_its_broken_cache(data_dir, tmp_path):
    """A run that is killed while it compiles may leave empty files in the cache."""
    environment = os.environ | {
        "PYTHONPATH": str(ROOT), "TORCHINDUCTOR_CACHE_DIR": str(tmp_path),
        "TORCHINDUCTOR_COMPILE_THREADS": "1", "TORCHINDUCTOR_VEC_ISA_OK": "0"}  # faster
    layers = "nn.Sequential(nn.Flatten(), nn.Linear(784, 10), nn.Tanh())"  # compiled in seconds
    text = re.sub(r"nn\.Sequential\(  # height.*?\n        \)", layers,
                  SCRIPTS["step2"].read_text("utf-8"), flags=re.DOTALL)
    (tmp_path / "small.py").write_text(text, "utf-8")
    args = [arg for arg in flags(data_dir, tmp_path, "--batch-size=9") if arg != "--plain"]
    losses = []
    for words in (", compiled\n", ", fp32, not compiled ("):
        status, printed, message = call(
            sys.executable, tmp_path / "small.py", *args, env=environment)
        assert status == 0, message
        if not losses and ", not compiled" in printed:
            pytest.skip("torch.compile does not work here; it needs a C++ compiler")
        rows = (tmp_path / "small-seed1" / "history.csv").read_text().split()[1:]
        losses.append([float(row.split(",")[1]) for row in rows])
        for path in tmp_path.rglob("*.so"):
            path.write_bytes(b"")
        assert words in printed and losses[-1] == pytest.approx(losses[0], rel=0.02)
