"""What happens to runs: resuming, refusals, interrupts, outputs that fail, odd places."""

import functools
import gzip
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
    torch.set_num_threads(1)
    for name in ("step2", "step4"):
        STEPS[name].main(flags(data_dir, out))
    return out


@pytest.fixture
def out(finished, tmp_path):
    """`tmp_path`/out with the two finished runs in it."""
    return Path(shutil.copytree(finished, tmp_path / "out"))


def interrupt(step, args, epochs=0):
    """Run a step; press Ctrl-C after `epochs` epochs and the training of another one."""
    left, test = [None] * epochs, step.test

    def stop_or_test(*args):
        if not left:
            raise KeyboardInterrupt
        left.pop()
        return test(*args)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit, match="^130$"):
        patch.setattr(step, "test", stop_or_test)
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


def test_kills_at_random_moments(data_dir, tmp_path):
    """Half of them hit a run that is writing. KILLS=50 in the environment asks for more than 3."""
    script, args = SCRIPTS["step4"], flags(data_dir, tmp_path / "out", "--batch-size", 30)
    run, peace = tmp_path / "out" / RUN4, tmp_path / "peace" / RUN4
    for more in (["--smoke"], ["--out", peace.parent]):  # the first starts the server
        begin = time.monotonic()
        status, *_ = finish(start(tmp_path, script, *args, *more), tmp_path)
    duration, least, kills, wanted = time.monotonic() - begin, 0, 0, int(os.environ.get("KILLS", 3))
    while status or kills < wanted:
        resume = ["--resume"] * Path(f"{run}.ckpt").exists()
        process = start(tmp_path, script, *args, *resume)
        process.join(random.uniform(0, duration) if kills < wanted else None)
        in_writing = random.random() < 0.5
        while in_writing and process.is_alive() and not list(run.parent.glob("*.tmp")):
            time.sleep(0.0005)
        process.kill()  # one that has ended does not mind
        status, printed, message = finish(process, tmp_path)
        epochs = [int(epoch) for epoch in re.findall(r"EPOCH: (\d+)", printed)]
        assert status <= 0 and min(epochs, default=least) >= least, message
        kills, least = kills + (status < 0), max(epochs, default=least)
        if status == 0:
            assert history(run) == history(peace) and len(read_all(run.parent)) == 4
            shutil.rmtree(run.parent)
            least = 0


@pytest.mark.parametrize("change", [
    "--epochs=5", "--batch-size=64", "--seed=2", "--data-dir=other", "--fp32", "--no-compile",
    "threads", "torch", "cuda:77"])
def test_resume_of_another_run_is_refused(change, data_dir, out, tmp_path, monkeypatch):
    args, ckpt = flags(data_dir, out, "--resume"), out / f"{RUN2}.ckpt"
    STEP2.main(args)  # without the change
    monkeypatch.chdir(tmp_path)
    write_data(tmp_path / "other", test=99)
    shutil.copy(ckpt, out / "step2_skeleton-seed2.ckpt")
    monkeypatch.setattr(common, "is_bf16_faster", lambda device: True)
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    if change == "threads":
        torch.set_num_threads(2)
    elif change == "torch":
        monkeypatch.setattr(torch, "__version__", type(torch.__version__)("99.0"))
    elif change == "cuda:77":
        checkpoint = torch.load(ckpt)
        checkpoint["settings"]["device"] = change
        torch.save(checkpoint, ckpt)
    else:
        args = [arg for arg in args if arg != change] if change in args else [*args, change]
    before, line = read_all(out), refuse(STEP2, *args)
    assert str(out / "step2_skeleton-seed") in line and (change in line or change != "cuda:77")
    assert read_all(out) == before


class Trap:
    """Makes a folder `trap` when it is unpickled."""

    def __reduce__(self):
        return os.mkdir, ("trap",)


FILES = {  # that a run reads: where they are, and the flag
    "images": ("data/MNIST/raw/t10k-images-idx3-ubyte", "--fp32"),
    "labels": ("data/MNIST/raw/train-labels-idx1-ubyte", "--fp32"),
    "checkpoint": (f"out/{RUN2}.ckpt", "--resume"),
    "weights": (f"out/{RUN2}.pt", f"--evaluate=out/{RUN2}.pt"),
}
DAMAGES = {  # to any of them
    "missing": lambda path: path.unlink(),
    "empty": lambda path: path.write_bytes(b""),
    "cut": lambda path: path.write_bytes(path.read_bytes()[:-1]),
    "folder": lambda path: (path.unlink(), path.mkdir()),
    "gzip": lambda path: path.write_bytes(gzip.compress(path.read_bytes())),
    "code": lambda path: path.write_bytes(pickle.dumps(Trap(), protocol=2)),
}
SPECIAL = {  # to one of them
    "images, 14x56": lambda path: write_idx(path, torch.zeros(100, 14, 56).byte()),
    "images, none": lambda path: write_idx(path, torch.zeros(0, 28, 28).byte()),
    "images, swapped": lambda path: shutil.copy(path.with_name("t10k-labels-idx1-ubyte"), path),
    "labels, too few": lambda path: write_idx(path, torch.zeros(299).byte()),
    "labels, of 10": lambda path: write_idx(path, torch.full((300,), 10).byte()),
    "labels, magic number": lambda path: path.write_bytes(b"\1" + path.read_bytes()[1:]),
    "checkpoint, other step": lambda path: shutil.copy(path.with_name(f"{RUN4}.ckpt"), path),
    "checkpoint, other content": lambda path: torch.save([1, 2], path),
    "checkpoint, code": lambda path: torch.save({"settings": Trap()}, path),
    "weights, code": lambda path: torch.save({"layers": Trap()}, path),
    "weights, other step": lambda path: shutil.copy(path.with_name(f"{RUN4}.pt"), path),
    "weights, checkpoint": lambda path: shutil.copy(path.with_suffix(".ckpt"), path),
    "weights, module.": lambda path: torch.save(
        {f"module.{name}": tensor for name, tensor in torch.load(path).items()}, path),
    "weights, _orig_mod.": lambda path: torch.save(
        {f"_orig_mod.{name}": tensor for name, tensor in torch.load(path).items()}, path),
}


@pytest.mark.parametrize("case", [*(f"{file}, {it}" for file in FILES for it in DAMAGES), *SPECIAL])
def test_damaged_file_is_refused(case, out, data_dir, tmp_path, monkeypatch, capsys):
    file, damage = case.split(", ")
    name, flag = FILES[file]
    shutil.copytree(data_dir, tmp_path / "data")
    monkeypatch.chdir(tmp_path)
    SPECIAL.get(case, DAMAGES.get(damage))(tmp_path / name)
    before = read_all(tmp_path)
    line = refuse(STEP2, *flags(tmp_path / "data", out, flag))
    assert name in line and (damage in line or damage[-1] != ".")  # a prefix is named too
    assert "EPOCH" not in capsys.readouterr().out
    assert read_all(tmp_path) == before and not Path("trap").exists()


def test_finished_run_survives_other_ones(data_dir, out):
    first, args = history(out / RUN2), flags(data_dir, out, "--batch-size", 50)
    for epochs in (0, 1):
        interrupt(STEP2, args, epochs)
        assert history(out / f"{RUN2}.previous") == first
    STEP2.main([*args, "--resume"])
    second = history(out / RUN2)
    STEP2.main(flags(data_dir, out))
    assert history(out / f"{RUN2}.previous") == second and history(out / RUN2) == first


def test_evaluate_and_smoke_leave_nothing(data_dir, out, tmp_path, capsys):
    before, log = read_all(tmp_path), (out / f"{RUN4}.log").read_text(encoding="utf-8")
    STEPS["step4"].main(flags(data_dir, tmp_path / "none", "--evaluate", out / f"{RUN4}.pt"))
    told = re.findall("Test set: .*", capsys.readouterr().out)
    assert told == re.findall("Test set: .*", log)[-1:]
    STEPS["step4"].main(flags(data_dir, out, "--smoke"))
    assert read_all(tmp_path) == before and not (tmp_path / "none").exists()


def test_divergence(data_dir, tmp_path, monkeypatch):
    monkeypatch.setattr(STEP2, "LEARNING_RATE", 1e30)
    assert "LEARNING_RATE" in refuse(STEP2, *flags(data_dir, tmp_path, "--batch-size", 10))
    assert not read_all(tmp_path)
    weights = {name: tensor / 0 for name, tensor in STEP2.Net().state_dict().items()}
    torch.save(weights, tmp_path / "weights")
    refuse(STEP2, *flags(data_dir, tmp_path, "--evaluate", tmp_path / "weights"))


@pytest.mark.parametrize("bad", ["--epochs 0", "--batch-size 0", "--seed -1", "--epoch 3"])
def test_bad_settings(bad, capsys):
    with pytest.raises(SystemExit, match="^2$"):
        STEP2.main(bad.split())
    assert bad.split()[0] in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize(("flag", "value"), [
    ("--device", "cuda:77"), ("--device", "abacus"), ("--out", "file"), ("--out", "file/below"),
    pytest.param("--out", "/proc/none", marks=unix)])
def test_device_or_folder_that_cannot_be(flag, value, data_dir, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("file").write_text("mine")
    assert value in refuse(STEP2, *flags(data_dir, "out", flag, value))
    assert "EPOCH" not in capsys.readouterr().out and read_all(tmp_path) == {"file": b"mine"}


@unix
def test_ctrl_c(data_dir, tmp_path):
    run, args = tmp_path / "out" / RUN2, flags(data_dir, tmp_path / "out", "--epochs", 10**6)
    process = start(tmp_path, SCRIPTS["step2"], *args)
    while process.is_alive() and not Path(f"{run}.log").exists():
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGINT)
    status, printed, message = finish(process, tmp_path)
    assert status == 130 and message.strip().isprintable()
    assert str(run) in message and "--resume" in message
    rows = len(Path(f"{run}.csv").read_text().splitlines()) - 1
    assert rows >= max(1, int(re.findall(r"EPOCH: (\d+)", printed)[-1]))
    assert len(read_all(run.parent)) == 4


@unix
def test_outputs_that_fail(data_dir, out, tmp_path):
    """As with `| head`, on a full disk, and with `> /dev/full`."""
    reader, writer = PROCESSES.Pipe(duplex=False)
    args, before = flags(data_dir, tmp_path / "new", "--epochs", 10**6), read_all(out)
    process = start(tmp_path, SCRIPTS["step2"], *args, stdout=writer)
    writer.close()
    assert os.read(reader.fileno(), 1)
    reader.close()
    assert finish(process, tmp_path) == (141, "", "")
    disk = start(tmp_path, SCRIPTS["step4"], *flags(data_dir, out), limit=30_000)
    status, _, message = finish(disk, tmp_path)
    assert status == 1 and message.strip().isprintable() and str(out / RUN4) in message
    assert sorted(read_all(out).values()) == sorted(before.values())  # moved, if anything
    if Path("/dev/full").exists():
        process = start(tmp_path, SCRIPTS["step2"], *args, stdout=Path("/dev/full"))
        status, _, message = finish(process, tmp_path)
        assert status == 1 and message.strip() and message.strip().isprintable()


def test_copy_of_a_step_is_a_run_of_its_own(data_dir, tmp_path):
    """Two seeds at once, in a read-only folder, odd paths, on outputs that know ASCII alone."""
    out, checkout, *folders = (tmp_path / name for name in ("ø ut", "chëck out", "1", "2"))
    checkout.mkdir()
    shutil.copy(ROOT / "common.py", checkout)
    copy = Path(shutil.copy(SCRIPTS["step2"], checkout / "step2_mine.py"))
    checkout.chmod(0o555)
    processes = [start(folder, copy, *flags(data_dir, out, "--seed", folder.name),
                       PYTHONIOENCODING="ascii") for folder in folders]
    for process, folder in zip(processes, folders, strict=True):
        assert finish(process, folder)[::2] == (0, "")
    assert len(read_all(out)) == 8 and (out / "step2_mine-seed2.csv").exists()
    text, args = copy.read_text("utf-8"), flags(data_dir, out, "--seed", 2, "--resume")
    copy.write_text(f"# A comment.\n{text}", "utf-8")
    assert finish(start(tmp_path, copy, *args), tmp_path)[0] == 0
    copy.write_text(re.sub("(LEARNING_RATE = ).*", r"\1 0.5", text), "utf-8")
    status, _, message = finish(start(tmp_path, copy, *args), tmp_path)
    assert status == 1 and message.strip().isprintable() and "step2_mine" in message
