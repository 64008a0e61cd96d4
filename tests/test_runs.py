"""What happens to runs: resuming, kills, damage, refusals, devices, odd places, own copies."""

import contextlib
import gzip
import io
import itertools
import math
import os
import pickle
import random
import re
import runpy
import shutil
import signal
import tempfile
import time
import types
from pathlib import Path

import conftest
import pytest
import torch
from conftest import ROOT, SCRIPTS, STEPS, flags, history, read_all, refuse, start, write_idx

import common

STEP2, RUN2, RUN4 = STEPS["step2"], "step2_skeleton-seed1", "step4_aug_lr-seed1"


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A folder with 24 training and 12 test images; do not change it."""
    return conftest.write_data(tmp_path_factory.mktemp("small"), 24, 12)


@pytest.fixture(scope="module")
def finished(small, tmp_path_factory):
    """A folder with a finished run of every step; do not change it."""
    out = tmp_path_factory.mktemp("finished")
    for step in STEPS.values():
        step.main(flags(small, out, "--batch-size", 16))
    return out


def interrupt(step, args, tests):
    """Run a step; press Ctrl-C when it prints its test number `tests`: that epoch is not saved."""
    class Output(io.StringIO):
        def write(self, text):
            nonlocal tests
            tests -= "Average loss" in text
            return super().write(text) if tests else signal.raise_signal(signal.SIGINT)
    with contextlib.redirect_stdout(Output()), pytest.raises(KeyboardInterrupt):
        step.main(args)


@pytest.mark.parametrize("name", STEPS)
def test_resumed_run_is_the_run_never_stopped(name, small, finished, tmp_path, capsys):
    step, args = STEPS[name], flags(small, tmp_path, "--batch-size", 16)
    run, peace = (folder / f"{SCRIPTS[name].stem}-seed1" for folder in (tmp_path, finished))
    whole, args = history(peace), [*args, "--resume"]
    interrupt(step, args, tests=2)  # it starts where nothing is
    saved = history(run)
    os.link(run / "history.csv", tmp_path / "link")
    (run / "history.csv").unlink()  # as if killed between two files
    shutil.copy(peace / "weights.pt", run)
    interrupt(step, args, tests=1)
    assert history(run) == saved and (tmp_path / "link").read_text().count("\n") == 2
    step.main(args)
    assert history(run) == whole and (tmp_path / "link").read_text().count("\n") == 2
    (run / "history.csv").unlink()
    torch.save({}, run / "weights.pt")
    capsys.readouterr()
    step.main(args)  # a finished run
    assert "EPOCH" not in capsys.readouterr().out and history(run) == whole
    before = read_all(tmp_path)
    step.main([*args[:-1], "--smoke"])
    for file in ("checkpoint.pt", "weights.pt"):
        loss, accuracy = step.main([*args[:-1], "--evaluate", str(run / file)])
        assert f",{loss:.6f},{accuracy:.2f}," in whole[0].splitlines()[-1]
    assert read_all(tmp_path) == before and len(before) == 4


def test_kill_before_and_after_every_move(small, tmp_path):
    """A kill is, here, an exception after which nothing is cleaned up. An older run lies there."""
    def burn():
        nonlocal fuse
        fuse -= 1
        if fuse == 0:
            raise KeyboardInterrupt

    move, old, args = os.replace, tmp_path / "old", flags(small, "", "--epochs", 2, "--out")
    STEP2.main([*args, str(tmp_path)])
    interrupt(STEP2, [*args, str(old)], tests=2)
    for length in itertools.count(1):
        fuse, out = length, shutil.copytree(old, tmp_path / str(length))
        with pytest.MonkeyPatch.context() as patch, contextlib.suppress(KeyboardInterrupt):
            patch.setattr(os, "replace", lambda *paths: (burn(), move(*paths), burn()))
            patch.setattr(shutil, "rmtree", lambda *_, **__: None)
            STEP2.main([*args, str(out)])
            break
        runs = [path for path in out.iterdir() if path.suffix != ".tmp"]
        assert runs and all((run / "checkpoint.pt").exists() for run in runs)
        STEP2.main([*args, str(out), "--resume"])
        assert history(out / RUN2) == history(tmp_path / RUN2)
    assert length > 4


def test_kills_and_ctrl_c_at_random_moments(data_dir, tmp_path):
    """KILLS=50 in the environment asks for more than three."""
    numbers = [signal.SIGINT, *[signal.SIGKILL] * int(os.environ.get("KILLS", 3)), 0]
    args, saved = flags(data_dir, tmp_path, "--epochs", 3 * len(numbers), "--resume"), 0
    STEPS["step4"].main([*args, "--out", str(tmp_path / "peace")])
    for number in numbers:
        process, epochs, last = start(SCRIPTS["step4"], *args), [], saved + random.randrange(3)
        while line := process.stdout.readline():
            epochs += [int(epoch) for epoch in re.findall(r"EPOCH: (\d+)", line)]
            if number and line == f"EPOCH: {last}\n":
                time.sleep(random.uniform(0, 0.1))  # an epoch takes about as long
                process.send_signal(number)
        message = process.stderr.read()
        assert process.wait() in {0, -number} and epochs[:1] in ([], [saved], [saved + 1]), message
        saved = max([saved, *epochs])
    assert history(tmp_path / RUN4) == history(tmp_path / "peace" / RUN4)
    assert len(read_all(tmp_path)) == 6


def test_nothing_is_overwritten(small, finished, tmp_path):
    args = flags(small, tmp_path, "--batch-size", 16)
    runs = [tmp_path / f"{RUN2}{number}" for number in ("", ".1", ".2", ".3")]
    interrupt(STEP2, args, tests=3)
    contents = [read_all(runs[0])]
    interrupt(STEP2, args, tests=1)
    for epochs in ("3", "1", "1"):
        STEP2.main([*args, "--epochs", epochs])
        contents.append(read_all(runs[0]))
    assert [read_all(run) for run in (*runs[1:], runs[0])] == contents
    assert [content["history.csv"].count(b"\n") for content in contents] == [3, 4, 2, 2]
    shutil.rmtree(runs[0])
    runs[1].rename(runs[0])
    STEP2.main([*args, "--resume"])  # the first one
    assert history(runs[0]) == history(finished / RUN2)


def test_resume_after_changes(small, tmp_path, capsys):
    """Some change nothing, but perhaps the rounding; the others would make it another run."""
    script = Path(shutil.copy(SCRIPTS["step2"], tmp_path / "step2_mine (1).py"))
    text, moved = script.read_text("utf-8"), shutil.copytree(small, tmp_path / "moved")
    step = types.SimpleNamespace(main=lambda args: runpy.run_path(str(script))["main"](args))
    args = flags(small, tmp_path / "out", "--batch-size", 64, "--resume")  # too large to compile
    interrupt(step, args, tests=2)
    checkpoint = next(tmp_path.rglob("checkpoint.pt"))
    content = torch.load(checkpoint)
    torch.save(content | {"settings": content["settings"] | {"python": "2.7"}}, checkpoint)
    script.write_text(f"# Mine.\n{text}", "utf-8")
    torch.set_num_threads(2)
    step.main([arg for arg in args if arg != "--plain"] + ["--data-dir", str(moved)])
    torch.set_num_threads(1)
    assert re.findall(r"EPOCH: (\d)", capsys.readouterr().out) == ["1", "2"]
    torch.save(content | {"settings": content["settings"] | {"device": "cuda"}}, checkpoint)
    before, other = read_all(tmp_path / "out"), conftest.write_data(tmp_path / "other", 24, 11)
    for change, flag in (("epochs", "--epochs=5"), ("batch size", "--batch-size=65"),
                         ("data", f"--data-dir={other}"), ("device", "--plain"),
                         ("script", "--plain")):
        if change == "script":
            script.write_text(re.sub("(LEARNING_RATE = ).*", r"\1 0.5", text), "utf-8")
        assert change in refuse(step, *args, flag).replace(str(checkpoint), "")
    assert read_all(tmp_path / "out") == before


DATA = IMAGES, LABELS = "t10k-images-idx3-ubyte", "train-labels-idx1-ubyte"
SAVED = CHECKPOINT, WEIGHTS = "checkpoint.pt", "weights.pt"
# What makes a folder `trap` when it is unpickled.
TRAP = type("Trap", (), {"__reduce__": lambda self: (os.mkdir, ("trap",))})()
DAMAGES = [
    ("missing", (*DATA, WEIGHTS), lambda path: path.unlink()),
    ("packed", DATA, lambda path: path.rename(f"{path}.gz")),
    ("dotted", DATA, lambda path: path.rename(str(path).replace("-idx", ".idx"))),
    ("empty", DATA + SAVED, lambda path: path.write_bytes(b"")),
    ("cut", DATA + SAVED, lambda path: path.write_bytes(path.read_bytes()[:-1])),
    ("folder", DATA + SAVED, lambda path: (path.unlink(), path.mkdir())),
    ("gzip", DATA + SAVED, lambda path: path.write_bytes(gzip.compress(path.read_bytes()))),
    ("code", DATA + SAVED, lambda path: path.write_bytes(pickle.dumps(TRAP, protocol=2))),
    ("magic number", DATA, lambda path: path.write_bytes(b"\1" + path.read_bytes()[1:])),
    ("swapped", [IMAGES], lambda path: shutil.copy(path.with_name(LABELS), path)),
    ("14x56", [IMAGES], lambda path: write_idx(path, torch.zeros(12, 14, 56).byte())),
    ("none", [IMAGES], lambda path: write_idx(path, torch.zeros(0, 28, 28).byte())),
    ("too few", [LABELS], lambda path: write_idx(path, torch.zeros(23).byte())),
    ("up to 10", [LABELS], lambda path: write_idx(path, torch.arange(24).remainder(11).byte())),
    ("list", SAVED, lambda path: torch.save([1, 2], path)),
    ("code in a zip", SAVED, lambda path: torch.save({"weights": TRAP}, path)),
    ("other step", SAVED, lambda path: shutil.copy(path.parents[1] / RUN4 / path.name, path)),
    ("not finite", SAVED, lambda path: torch.save(torch.load(path) | {"weights": {
        name: tensor / 0 for name, tensor in torch.load(path.with_name(WEIGHTS)).items()}}, path)),
    ("_orig_mod.", [WEIGHTS], lambda path: torch.save(  # as a compiled model names them
        {f"_orig_mod.{name}": tensor for name, tensor in torch.load(path).items()}, path)),
]


@pytest.mark.parametrize(("file", "damage"), [
    pytest.param(file, damage, id=f"{file} {kind}")
    for kind, files, damage in DAMAGES for file in files])
def test_damaged_file_is_refused(file, damage, small, finished, tmp_path, monkeypatch, capsys):
    raw = Path(shutil.copytree(small, tmp_path / "data"), "MNIST", "raw")
    for name in (RUN2, RUN4):
        shutil.copytree(finished / name, tmp_path / "out" / name)
    path = (raw if file in DATA else tmp_path / "out" / RUN2) / file
    flag = {CHECKPOINT: "--resume", WEIGHTS: f"--evaluate={path}"}.get(file, "--plain")
    damage(path)
    monkeypatch.chdir(tmp_path)
    before = read_all(tmp_path)
    line = refuse(STEP2, *flags(tmp_path / "data", tmp_path / "out", "--batch-size", 16, flag))
    assert re.split("-images|-labels", str(path))[0] in line
    assert all(other.name in line for other in raw.glob("*.*"))  # to be unpacked or renamed
    assert "EPOCH" not in capsys.readouterr().out
    assert read_all(tmp_path) == before and not Path("trap").exists()


@pytest.mark.parametrize("wrong", [
    "--epochs=0", "--epochs=x", "--batch-size=0", "--seed=-1", f"--seed={2**63}", f"--seed={2**64}",
    "--epoch=3", "--batch=16", "--abacus", "--smoke --resume", "--smoke --evaluate=file",
    "--resume --evaluate=file", "--device=abacus", "--device=cuda:77", "--device=meta",
    "--out=file", "--out=file/below",
    "--out=/proc" if Path("/proc/self").exists() else "--out=/"])  # even root cannot write there
def test_wrong_flags(wrong, small, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("file").write_text("mine")
    with pytest.raises(SystemExit) as end:
        STEP2.main([*flags(small, "out"), *wrong.split()])
    printed = capsys.readouterr()
    flag, _, value = wrong.split()[-1].partition("=")
    if flag in ("--device", "--out"):
        assert value in end.value.code and end.value.code.isprintable()  # the status is 1
    else:
        assert end.value.code == 2 and flag in printed.err.splitlines()[-1]
    assert "EPOCH" not in printed.out and read_all(tmp_path) == {"file": b"mine"}


def test_loss_that_is_not_finite(small, tmp_path):
    model, args = STEP2.Net(), common.parse_args(flags(small, tmp_path), "", 1, 1)
    run = common.Run(SCRIPTS["step2"], args, model, torch.optim.SGD(model.parameters()))
    run.save(1, 10, 1, 10)
    before = read_all(tmp_path)
    for train_loss, test_loss in ((math.nan, 1), (1, math.nan), (math.inf, 1), (1, math.inf)):
        with pytest.raises(SystemExit, match="LEARNING_RATE"):
            run.save(train_loss, 10, test_loss, 10)
    assert read_all(tmp_path) == before


@pytest.mark.parametrize(("there", "taken"), [("cpu:0", "cpu:0"), ("meta", "cpu"), ("", "cpu")])
def test_auto_takes_an_accelerator_that_works(there, taken, small, monkeypatch, capsys):
    """torch computes on "meta" too, but without numbers: asked for one, it fails."""
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: there)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device(there))
    STEP2.main(["--smoke", "--data-dir", str(small)])
    printed = capsys.readouterr().out
    assert f"Device: {taken}," in printed and ("meta" in printed) == (there == "meta")


def test_seconds_are_those_of_an_epoch_with_its_test(tmp_path):
    data, start_of_all = conftest.write_data(tmp_path, 9, 800), time.perf_counter()
    STEP2.main(flags(data, tmp_path))
    rows = (tmp_path / RUN2 / "history.csv").read_text().splitlines()[1:]
    seconds = sum(float(row.split(",")[-1]) for row in rows)
    assert seconds < time.perf_counter() - start_of_all < 3 * seconds


def test_full_disk_and_head(small, finished, tmp_path):
    resource = pytest.importorskip("resource")
    shutil.copytree(finished / RUN2, tmp_path / "full" / RUN2)
    full = start(SCRIPTS["step2"], *flags(small, tmp_path / "full"), preexec_fn=lambda: (
        resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, 30_000))))
    head = start(SCRIPTS["step2"], *flags(small, tmp_path / "head", "--epochs", 10**6))
    while head.stdout.readline() not in ("EPOCH: 2\n", ""):
        pass
    head.stdout.close()
    assert "BrokenPipeError" in head.stderr.read() and head.wait()
    assert history(tmp_path / "head" / RUN2)[0].count("\n") >= 3
    assert "Traceback" in full.communicate()[1] and full.returncode == 1
    assert read_all(tmp_path / "full" / RUN2) == read_all(finished / RUN2)
    assert len(read_all(tmp_path)) == 6


def test_elsewhere_with_a_copy_that_fails(small, tmp_path):
    """All at once, on outputs that know ASCII alone, with default folders for data and runs."""
    checkout = tmp_path / "chøck out"
    shutil.copytree(small, checkout / "data")
    for path in (ROOT / "common.py", *SCRIPTS.values()):
        shutil.copy(path, checkout)
    text, mine = SCRIPTS["step2"].read_text("utf-8"), checkout / "step2_mine.py"
    mine.write_text("import sys\n" + text.replace("    return model\n", """
    print(sys.stdout is sys.__stdout__, sys.stdout.isatty(), sys.stdout.fileno())
    open("digit.png")
"""), "utf-8")
    args, environment = ("--epochs=1", "--device=cpu", "--plain"), {"PYTHONIOENCODING": "ascii"}
    scripts = [checkout / path.name for path in (*SCRIPTS.values(), mine)]
    processes = [start(script, *args, cwd=tmp_path, env=os.environ | environment)
                 for script in scripts]
    for script, process in zip(scripts, processes, strict=True):
        printed, message = process.communicate()
        assert process.returncode == (script == mine) and "ch?ck out" in printed, message
        assert len(read_all(checkout / "runs" / f"{script.stem}-seed1")) == 3
    assert "True False 1\n" in printed and "Traceback" in message and "digit.png" in message
    assert list(tmp_path.iterdir()) == [checkout]
