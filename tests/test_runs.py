"""What happens to runs: resuming, refusals, interrupts, outputs that fail, odd places."""

import functools
import gzip
import itertools
import os
import pickle
import random
import re
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch
from conftest import ROOT, SCRIPTS, STEPS, write_data, write_idx
from helpers import PROCESSES, finish, flags, history, read_all, refuse, start

import common

STEP2, RUN2, RUN4 = STEPS["step2"], "step2_skeleton-seed1", "step4_aug_lr-seed1"
unix = pytest.mark.skipif(os.name == "nt", reason="Windows has no such thing")


@pytest.fixture(scope="module")
def finished(data_dir, tmp_path_factory):
    """A folder with a finished run of steps 2 and 4; do not change it."""
    out = tmp_path_factory.mktemp("finished")
    for name in ("step2", "step4"):
        STEPS[name].main(flags(data_dir, out))
    return out


@pytest.fixture
def out(finished, tmp_path):
    """`tmp_path`/out with the two finished runs in it."""
    return Path(shutil.copytree(finished, tmp_path / "out"))


def interrupt(step, args, epochs=0):
    """Run a step; press Ctrl-C after `epochs` epochs and the training of another one."""
    tests = [lambda *_: signal.raise_signal(signal.SIGINT), *[step.test] * epochs]
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit, match="^130$"):
        patch.setattr(step, "test", lambda *args: tests.pop()(*args))
        step.main(args)


@pytest.mark.parametrize("name", ["step3", "step4"])
def test_resumed_run_is_the_run_never_stopped(name, data_dir, tmp_path):
    step, args = STEPS[name], flags(data_dir, tmp_path / "out")
    run, peace = (tmp_path / it / f"{SCRIPTS[name].stem}-seed1" for it in ("out", "peace"))
    step.main([*args, "--out", str(peace.parent)])
    interrupt(step, args, epochs=1)
    before, csv = history(run), Path(f"{run}.csv").read_bytes()
    os.link(f"{run}.csv", tmp_path / "link")
    Path(f"{run}.log").unlink()  # as if killed between two files
    shutil.copy(f"{peace}.pt", f"{run}.pt")
    interrupt(step, [*args, "--resume"])
    assert history(run) == before
    step.main([*args, "--resume"])
    assert history(run) == history(peace)
    assert (tmp_path / "link").read_bytes() == csv


@unix
def test_kills_and_ctrl_c_at_random_moments(data_dir, tmp_path):
    """KILLS=50 in the environment asks for more than three."""
    numbers = [signal.SIGINT, *[signal.SIGKILL] * int(os.environ.get("KILLS", 3)), None]
    run, peace, least = tmp_path / "out" / RUN4, tmp_path / "peace" / RUN4, 0
    args = flags(data_dir, run.parent, "--epochs", 2 * len(numbers))
    STEPS["step4"].main([*args, "--out", str(peace.parent)])
    for number in numbers:
        resume = ["--resume"] * Path(f"{run}.ckpt").exists()
        process = start(tmp_path, SCRIPTS["step4"], *args, *resume)
        begun = f"EPOCH: {least + random.randrange(3)}\n"
        while number and process.is_alive() and begun not in (tmp_path / "stdout").read_text():
            time.sleep(0.001)
        process.join(random.uniform(0, 0.1) if number else None)  # an epoch takes about as long
        if process.is_alive():
            os.kill(process.pid, number)
        status, printed, message = finish(process, tmp_path)
        assert status == {None: 0, signal.SIGINT: 130, signal.SIGKILL: -9}[number], message
        assert number != signal.SIGINT or (str(run) in message and message.strip().isprintable())
        epochs = [int(epoch) for epoch in re.findall(r"EPOCH: (\d+)", printed)]
        assert epochs[0] >= least, message
        least = epochs[-1]
    assert history(run) == history(peace) and len(read_all(run.parent)) == 4


@pytest.mark.parametrize("change", [
    "--epochs=5", "--batch-size=64", "--seed=2", "--data-dir=other", "--fp32", "--no-compile",
    "threads", "torch", "device"])
def test_resume_of_another_run_is_refused(change, data_dir, out, tmp_path, monkeypatch):
    args, ckpt = flags(data_dir, out, "--resume"), out / f"{RUN2}.ckpt"
    STEP2.main(args)  # without the change
    monkeypatch.chdir(tmp_path)
    write_data(tmp_path / "other", test=99)
    shutil.copy(ckpt, out / "step2_skeleton-seed2.ckpt")
    monkeypatch.setattr(common, "is_bf16_faster", lambda device: True)
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    if change[0] == "-":  # a flag that is there goes
        args = [arg for arg in args if arg != change] if change in args else [*args, change]
    elif change == "threads":
        monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    elif change == "torch":
        monkeypatch.setattr(torch, "__version__", type(torch.__version__)("99.0"))
    else:
        checkpoint = torch.load(ckpt)
        checkpoint["settings"]["device"] = "cuda:77"
        torch.save(checkpoint, ckpt)
    before, line = read_all(out), refuse(STEP2, *args)
    assert str(out / "step2_skeleton-seed") in line and (change != "device" or "cuda:77" in line)
    assert read_all(out) == before


# What makes a folder `trap` when it is unpickled.
TRAP = type("Trap", (), {"__reduce__": lambda self: (os.mkdir, ("trap",))})()
FILES = IMAGES, LABELS, CKPT, PT = (
    "t10k-images-idx3-ubyte", "train-labels-idx1-ubyte", f"{RUN2}.ckpt", f"{RUN2}.pt")
DAMAGES = {  # to any of them
    "missing": lambda path: path.unlink(),
    "empty": lambda path: path.write_bytes(b""),
    "cut": lambda path: path.write_bytes(path.read_bytes()[:-1]),
    "folder": lambda path: (path.unlink(), path.mkdir()),
    "gzip": lambda path: path.write_bytes(gzip.compress(path.read_bytes())),
    "code": lambda path: path.write_bytes(pickle.dumps(TRAP, protocol=2)),
}
SPECIAL = {  # to one of them
    (IMAGES, "14x56"): lambda path: write_idx(path, torch.zeros(100, 14, 56).byte()),
    (IMAGES, "none"): lambda path: write_idx(path, torch.zeros(0, 28, 28).byte()),
    (IMAGES, "swapped"): lambda path: shutil.copy(path.with_name("t10k-labels-idx1-ubyte"), path),
    (LABELS, "too few"): lambda path: write_idx(path, torch.zeros(299).byte()),
    (LABELS, "of 10"): lambda path: write_idx(path, torch.full((300,), 10).byte()),
    (LABELS, "magic number"): lambda path: path.write_bytes(b"\1" + path.read_bytes()[1:]),
    (CKPT, "other step"): lambda path: shutil.copy(path.with_name(f"{RUN4}.ckpt"), path),
    (CKPT, "other content"): lambda path: torch.save([1, 2], path),
    (CKPT, "code in a zip"): lambda path: torch.save({"settings": TRAP}, path),
    (PT, "code in a zip"): lambda path: torch.save({"layers": TRAP}, path),
    (PT, "other step"): lambda path: shutil.copy(path.with_name(f"{RUN4}.pt"), path),
    (PT, "not finite"): lambda path: torch.save(
        {name: tensor / 0 for name, tensor in torch.load(path).items()}, path),
    (PT, "checkpoint"): lambda path: shutil.copy(path.with_suffix(".ckpt"), path),
    (PT, "_orig_mod."): lambda path: torch.save(  # as a compiled model names them
        {f"_orig_mod.{name}": tensor for name, tensor in torch.load(path).items()}, path),
}


@pytest.mark.parametrize(("file", "kind"), [*itertools.product(FILES, DAMAGES), *SPECIAL])
def test_damaged_file_is_refused(file, kind, out, data_dir, tmp_path, monkeypatch, capsys):
    data = shutil.copytree(data_dir, tmp_path / "data")
    path = next(tmp_path.rglob(file))
    flag = {".ckpt": "--resume", ".pt": f"--evaluate={path}"}.get(path.suffix, "--fp32")
    monkeypatch.chdir(tmp_path)
    SPECIAL.get((file, kind), DAMAGES.get(kind))(path)
    before = read_all(tmp_path)
    line = refuse(STEP2, *flags(data, out, flag))
    assert str(path) in line or kind == "not finite"
    assert "_orig_mod." in line or kind != "_orig_mod."
    assert "EPOCH" not in capsys.readouterr().out
    assert read_all(tmp_path) == before and not Path("trap").exists()


def test_finished_run_survives_other_ones(data_dir, out, capsys):
    before, args, last = read_all(out), flags(data_dir, out), out / f"{RUN2}.previous"
    told, first = re.findall("Test set.*", before[f"{RUN2}.log"].decode()), history(out / RUN2)
    STEP2.main([*args, "--evaluate", str(out / f"{RUN2}.pt")])
    assert re.findall("Test set.*", capsys.readouterr().out) == told[-1:]
    STEP2.main([*args, "--smoke"])
    assert read_all(out) == before
    for epochs in (0, 1):
        interrupt(STEP2, [*args, "--batch-size", "50"], epochs)
        assert history(last) == first
    STEP2.main([*args, "--batch-size", "50", "--resume"])
    second = history(out / RUN2)
    STEP2.main(args)
    assert history(last) == second and history(out / RUN2) == first


def test_divergence(data_dir, tmp_path, monkeypatch):
    monkeypatch.setattr(STEP2, "LEARNING_RATE", 1e30)
    assert "LEARNING_RATE" in refuse(STEP2, *flags(data_dir, tmp_path, "--batch-size", 10))
    assert not read_all(tmp_path)


@pytest.mark.parametrize(("flag", "value"), [
    ("--epochs", "0"), ("--batch-size", "0"), ("--seed", "-1"), ("--epoch", "3"),
    ("--device", "cuda:77"), ("--device", "abacus"), ("--out", "file"), ("--out", "file/below"),
    pytest.param("--out", "/proc", marks=unix)])
def test_bad_settings(flag, value, data_dir, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("file").write_text("mine")
    with pytest.raises(SystemExit) as end:
        STEP2.main(flags(data_dir, "out", flag, value))
    printed, status = capsys.readouterr(), end.value.code
    line = printed.err.splitlines()[-1] if status == 2 else status
    assert (flag in line or value in line) and line.isprintable()
    assert "EPOCH" not in printed.out and read_all(tmp_path) == {"file": b"mine"}


@unix
def test_outputs_that_fail(data_dir, out, tmp_path):
    """On a full disk, with `> /dev/full`, and with `| head`."""
    before, args = read_all(out), flags(data_dir, tmp_path / "new", "--epochs", 10**6)
    cases = [(flags(data_dir, out), {"limit": 30_000}, str(out / RUN2))]
    if Path("/dev/full").exists():
        cases.append((args, {"stdout": "/dev/full"}, "output"))
    for args, options, name in cases:
        process = start(tmp_path, SCRIPTS["step2"], *args, **options)
        status, _, message = finish(process, tmp_path)
        assert status == 1 and message.strip().isprintable() and name in message
    assert sorted(read_all(out).values()) == sorted(before.values())  # moved, if anything
    reader, writer = PROCESSES.Pipe(duplex=False)
    process = start(tmp_path, SCRIPTS["step2"], *args, stdout=writer)
    writer.close()
    assert os.read(reader.fileno(), 1)
    reader.close()
    assert finish(process, tmp_path) == (141, "", "")


def test_copy_of_a_step_is_a_run_of_its_own(data_dir, tmp_path):
    """Two seeds at once, in a read-only folder, odd paths, on outputs that know ASCII alone."""
    out, checkout, processes = tmp_path / "ø ut", tmp_path / "chëck out", {}
    checkout.mkdir()
    shutil.copy(ROOT / "common.py", checkout)
    copy = Path(shutil.copy(SCRIPTS["step2"], checkout / "step2_mine.py"))
    checkout.chmod(0o555)
    for seed in ("1", "2"):
        args = flags(data_dir, out, "--seed", seed)
        processes[seed] = start(tmp_path / seed, copy, *args, PYTHONIOENCODING="ascii")
    assert [finish(processes[seed], tmp_path / seed)[::2] for seed in "12"] == [(0, "")] * 2
    assert len(read_all(out)) == 8 and (out / "step2_mine-seed2.csv").exists()
    text, args = copy.read_text("utf-8"), flags(data_dir, out, "--seed", 2, "--resume")
    copy.write_text(f"# A comment.\n{text}", "utf-8")
    assert finish(start(tmp_path, copy, *args), tmp_path)[0] == 0
    copy.write_text(re.sub("(LEARNING_RATE = ).*", r"\1 0.5", text), "utf-8")
    status, _, message = finish(start(tmp_path, copy, *args), tmp_path)
    assert status == 1 and message.strip().isprintable() and "step2_mine" in message
