"""The four steps: the log, the bar, the networks, real compilation."""

import os
import re
import select
import subprocess
import threading

import pytest
import torch
from conftest import SCRIPTS, STEPS, write_data
from helpers import finish, flags, read_all, start

PARAMETERS = {"step1": 6_379_786, "step2": 20_750, "step3": 9_078, "step4": 9_538}


@pytest.fixture(scope="module", autouse=True)
def compiling(data_dir, tmp_path_factory):
    """A folder, a function that starts a compiled run in one, and the process of the first run."""
    def begin(out, *more):
        args = [arg for arg in flags(data_dir, out, *more) if arg != "--no-compile"]
        return start(out, SCRIPTS["step2"], *args, TORCHINDUCTOR_CACHE_DIR=str(folder / "cache"),
                     TORCHINDUCTOR_COMPILE_THREADS="1", TORCHINDUCTOR_VEC_ISA_OK="0")  # faster

    folder = tmp_path_factory.mktemp("compiling")
    return folder, begin, begin(folder)  # beside the first tests, because it takes longest


def check_log(text, epochs, batches):
    """Compare a log, from its first epoch on, with the documented format, byte for byte."""
    bar = (rf"Loss=\d+\.\d+(e-\d+)? Batch_id={batches - 1} Accuracy=\d+\.\d\d: 100%\|█{{10}}\| "
           rf"{batches}/{batches} \[\d\d:\d\d<00:00, +\d+\.\d\d(it/s|s/it)\]")
    test = r"Test set: Average loss: \d+\.\d{4}, Accuracy: \d+/100 \(\d+\.\d\d%\)"
    wanted = "".join(f"EPOCH: {epoch}\n{bar}\n\n{test}\n\n" for epoch in range(epochs))
    wanted += "".join(rf"{it} Test Accuracy: \d+\.\d\d \(Epoch \d\)\n" for it in ("Best", "Last"))
    assert re.fullmatch(wanted, text[text.index("EPOCH: "):]), text


@pytest.mark.parametrize("name", STEPS)
def test_smoke_from_the_shell(name, data_dir, tmp_path):
    process = start(tmp_path, SCRIPTS[name], *flags(data_dir, tmp_path / "out", "--smoke"))
    status, printed, message = finish(process, tmp_path)
    assert (status, message) == (0, "")
    assert re.search(rf"\b{PARAMETERS[name]:,}\b", printed)
    check_log(printed, epochs=1, batches=1)
    assert set(read_all(tmp_path)) == {"stdout", "stderr"}


def test_log_is_what_was_printed(data_dir, tmp_path, capsys, monkeypatch):
    """Also when `main` runs in a thread."""
    step, accuracies, test = STEPS["step2"], iter((10, 30, 20)), STEPS["step2"].test
    monkeypatch.setattr(step, "test", lambda *args: (test(*args)[0], next(accuracies)))
    thread = threading.Thread(target=step.main, args=[flags(data_dir, tmp_path)])
    thread.start()
    thread.join()
    printed = capsys.readouterr().out
    check_log(printed, epochs=3, batches=3)
    assert (tmp_path / "step2_skeleton-seed1.log").read_text(encoding="utf-8") == printed
    assert re.findall(r"(\S+) \(Epoch (\d)\)", printed) == [("30.00", "1"), ("20.00", "2")]


@pytest.mark.skipif(not hasattr(os, "openpty"), reason="no pseudo-terminals here")
def test_moving_bar(tmp_path):
    """It is on the terminal, and fits; standard output gets only its final line, whole."""
    terminal, line = os.openpty()
    subprocess.run(["stty", "rows", "24", "cols", "80"], stdin=line, check=True)
    args = flags(write_data(tmp_path, 60, 100), tmp_path, "--epochs", 1, "--batch-size", 5)
    process, drawn = start(tmp_path, SCRIPTS["step1"], *args, stderr=os.ttyname(line)), b""
    while process.is_alive() or select.select([terminal], [], [], 0)[0]:
        if select.select([terminal], [], [], 0.1)[0]:
            drawn += os.read(terminal, 65536)
    bars = re.findall(r"Loss=[^\r\n]*Batch_id=[^\r\n]*", drawn.decode())
    assert len(bars) > 1
    assert all(len(bar) <= 80 and re.search(r"%\|.{10}\| \d+/12", bar) for bar in bars)
    check_log((tmp_path / "stdout").read_text("utf-8"), epochs=1, batches=12)


@pytest.mark.parametrize("name", STEPS)
def test_shapes_and_receptive_fields_in_the_comments(name):
    net, values, field, jump, found = STEPS[name].Net().eval(), torch.zeros(1, 1, 28, 28), 1, 1, []
    for line in net.layers:
        values = line(values)
        for layer in line.modules():
            kernel, stride = (getattr(layer, key, 1) for key in ("kernel_size", "stride"))
            field += ((kernel[0] if isinstance(kernel, tuple) else kernel) - 1) * jump
            jump *= stride[0] if isinstance(stride, tuple) else stride
        _, channels, height, width = values.shape
        found.append(f"# {height}x{width}x{channels} | RF {field}")
    assert re.findall(r"# \d+x\d+x\d+ \| RF \d+", SCRIPTS[name].read_text("utf-8")) == found


def test_compiler_and_its_broken_cache(compiling, data_dir, tmp_path):
    """A run killed while it compiles leaves empty files in the cache."""
    def losses(out):
        rows = (out / "step2_skeleton-seed1.csv").read_text().split()[1:]
        return [float(row.split(",")[1]) for row in rows]

    STEPS["step2"].main(flags(data_dir, tmp_path))
    (folder, begin, process), plain = compiling, losses(tmp_path)
    status, printed, _ = finish(process, folder)
    assert status == 0 and losses(folder) == pytest.approx(plain, rel=1e-3), printed
    if ", not compiled" in printed:
        pytest.skip("torch.compile does not work here; it needs a C++ compiler")
    max(folder.rglob("*.so"), key=lambda path: path.stat().st_mtime_ns).write_bytes(b"")
    resumed, new = begin(folder, "--resume"), begin(tmp_path / "new")
    status, _, message = finish(resumed, folder)
    assert status == 1 and "Traceback" not in message and str(folder) in message.splitlines()[-1]
    status, printed, _ = finish(new, tmp_path / "new")
    assert status == 0 and ", not compiled" in printed and losses(tmp_path / "new") == plain
