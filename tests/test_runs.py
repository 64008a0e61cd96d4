"""What happens to runs: resuming, kills, damage, refusals, devices, odd places, own copies."""

import contextlib
import itertools
import os
import pickle
import random
import re
import runpy
import shutil
import time
import types
from pathlib import Path

import pytest
import torch
from conftest import (
    ROOT, SCRIPTS, STEPS, copy_project, flags, history, read_all, refuse, start, write_data,
    write_idx)

import common

STEP2, RUN2, RUN4 = STEPS["step2"], "step2_skeleton-seed1", "step4_aug_lr-seed1"


@pytest.fixture(scope="module")
def finished(small, tmp_path_factory):
    """A folder with a finished run of every step; do not change it."""
    out = tmp_path_factory.mktemp("finished")
    for step in STEPS.values():
        step.main(flags(small, out))
    return out


def interrupt(step, args, tests):
    """Run a step; end it, as Ctrl-C would, after its test number `tests`: that is not saved."""
    saves = iter([common.Run.save] * (tests - 1))
    with pytest.MonkeyPatch.context() as patch, pytest.raises(StopIteration):
        patch.setattr(common.Run, "save", lambda *arguments: next(saves)(*arguments))
        step.main(args)


@pytest.mark.parametrize("step", STEPS.values(), ids=STEPS)
def test_resumed_run_is_the_one_never_stopped(step, small, finished, tmp_path, capsys, monkeypatch):
    run, peace = (folder / f"{step.__name__}-seed1" for folder in (tmp_path, finished))
    whole, args = history(peace), flags(small, tmp_path, "--resume")
    interrupt(step, args, tests=2)  # it starts where nothing is
    saved = history(run)
    os.link(run / "history.csv", tmp_path / "link")
    (run / "history.csv").unlink()  # as if killed between two files
    shutil.copy(peace / "weights.pt", run)
    interrupt(step, args, tests=1)
    assert history(run) == saved
    step.main(args)
    assert history(run) == whole and (tmp_path / "link").read_text().count("\n") == 2
    (run / "history.csv").unlink()
    torch.save({}, run / "weights.pt")
    capsys.readouterr()
    monkeypatch.setattr(step.Net, "cpu", lambda self: self.requires_grad_(False), raising=False)
    model = step.main(args[1:])  # a finished run, not --plain: even so, nothing is compiled
    assert not model.training and not next(model.parameters()).requires_grad  # on the CPU
    assert not re.search("EPOCH|minute", capsys.readouterr().out) and history(run) == whole
    before = read_all(tmp_path)
    if step is STEPS["step4"]:  # its schedule cannot go on
        assert "epochs: 3, now 4" in refuse(step, *args, "--epochs=4")
    for file in ("checkpoint.pt", "weights.pt"):
        loss, accuracy = step.main([*args[:-1], "--evaluate", str(run / file)])
        assert f",{loss:.6f},{accuracy:.2f}," in whole[0].splitlines()[-1]
    assert read_all(tmp_path) == before and len(before) == 4


def test_kill_before_and_after_every_move(small, finished, tmp_path):
    move, args = os.replace, flags(small, "", "--out")
    for length in itertools.count():
        fuse, out = iter(range(length)), tmp_path / str(length)
        shutil.copytree(finished / RUN2, out / RUN2)
        with pytest.MonkeyPatch.context() as patch, contextlib.suppress(StopIteration):
            patch.setattr(os, "replace", lambda *it, fuse=fuse: (next(fuse), move(*it), next(fuse)))
            patch.setattr(shutil, "rmtree", lambda *_, **__: None)  # a kill cleans nothing up
            STEP2.main([*args, str(out)])
            break
        runs = [path for path in out.iterdir() if path.suffix != ".tmp"]
        assert runs and all((run / "checkpoint.pt").exists() for run in runs)
        STEP2.main([*args, str(out), "--resume"])
        assert history(out / RUN2) == history(finished / RUN2)
    assert length > 4


def test_kills_at_random_moments(tmp_path):
    kills, starts = int(os.environ.get("KILLS", 3)), [0]  # KILLS=50 make test: more than three
    args = flags(write_data(tmp_path / "data", 300, 100), tmp_path, "--resume")
    args += [f"--epochs={5 * kills}", "--batch-size=128"]
    STEPS["step4"].main([*args, "--out", str(tmp_path / "peace")])
    for _ in range(kills):
        process = start(SCRIPTS["step4"], *args)
        line = next((line for line in process.stdout if line.startswith("EPOCH")), "9999")
        starts.append(int(line.split()[-1]))
        time.sleep(random.uniform(0, 0.3))  # an epoch takes about 0.1
        process.kill()
        assert process.communicate()[1] == ""
    STEPS["step4"].main(args)
    assert starts == sorted(starts) and len(read_all(tmp_path)) == 4 + 3 + 3  # data and two runs
    assert history(tmp_path / RUN4) == history(tmp_path / "peace" / RUN4)


def test_nothing_is_overwritten(small, finished, tmp_path):
    args, contents = flags(small, tmp_path), []
    runs = [tmp_path / f"{RUN2}{number}" for number in ("", ".1", ".2", ".3", ".4")]
    interrupt(STEP2, args, tests=3)
    for more in ("--epochs=3", "--resume", "--epochs=1", "--epochs=1"):
        if len(contents) < 2:
            (runs[0] / "checkpoint.pt").unlink()  # so it cannot be resumed, but is kept
        contents.append(read_all(runs[0]))
        interrupt(STEP2, [*args, "--epochs=9"], tests=1)
        STEP2.main([*args, more])
    assert [read_all(run) for run in runs[1:]] == contents
    assert [read_all(run)["history.csv"].count(b"\n") for run in runs] == [2, 3, 4, 4, 2]
    assert history(runs[2]) == history(runs[3]) == history(finished / RUN2)


def test_resume_after_changes(small, tmp_path, capsys, monkeypatch):
    script = Path(shutil.copy(SCRIPTS["step2"], tmp_path / "step2_mine (1).py"))
    text, moved = script.read_text("utf-8"), shutil.copytree(small, tmp_path / "moved")
    step = types.SimpleNamespace(main=lambda args: runpy.run_path(str(script))["main"](args))
    args = flags(small, tmp_path / "out", "--batch-size", 64, "--resume")  # too large to compile
    interrupt(step, args, tests=2)
    checkpoint = next(tmp_path.rglob("checkpoint.pt"))
    script.write_text("# Mine.\n" + text.replace("Return a convol", "A convol"), "utf-8")
    step.main([*args[1:], "--data-dir", str(moved)])  # not --plain: rounds otherwise
    step.main([*args, "--epochs=5"])  # at a constant rate it may go on
    printed = capsys.readouterr().out
    assert re.findall(r"EPOCH: (\d)", printed) == list("011234")  # once interrupted
    tested = [float(row.split(",")[4]) for row in history(checkpoint.parent)[0].split()[1:]]
    best = f"Best Test Accuracy: {max(tested):.2f} (Epoch {tested.index(max(tested))})"
    assert printed.endswith(f"{best}\nLast Test Accuracy: {tested[-1]:.2f} (Epoch 4)\n")
    content, before = torch.load(checkpoint), read_all(tmp_path / "out")
    away = checkpoint.parent.rename(f"{checkpoint.parent}-validation")
    other = f"--data-dir={write_data(tmp_path / 'other', 24, 11)}"
    line = refuse(step, *args, "--batch-size=65", other, "--validate")
    assert all(word in line for word in ("64, now 65", "test, now validation", "data"))
    away.rename(checkpoint.parent)
    script.write_text(re.sub("(LEARNING_RATE = ).*", r"\1 0.5", text), "utf-8")
    assert "code" in refuse(step, *args, "--epochs=5")
    script.write_text(text, "utf-8")
    edited = (ROOT / "common.py").read_text("utf-8").replace("optimizer.step()", "pass")
    (tmp_path / "common.py").write_text(edited, "utf-8")
    monkeypatch.setattr(common, "__file__", str(tmp_path / "common.py"))
    assert "code" in refuse(step, *args, "--epochs=5")
    assert read_all(tmp_path / "out") == before
    torch.save(content | {"settings": content["settings"] | {"device": "cuda"}}, checkpoint)
    assert "cuda, now cpu" in refuse(step, *args, "--epochs=5")


def test_a_second_seed_runs_while_the_first_saves(small, finished, tmp_path, monkeypatch):
    def save_late(*args, save=torch.save):
        monkeypatch.setattr(torch, "save", save)
        assert start(SCRIPTS["step2"], *flags(small, tmp_path), "--seed=2").wait() == 0
        save(*args)
    monkeypatch.setattr(torch, "save", save_late)
    STEP2.main(flags(small, tmp_path))
    assert history(tmp_path / RUN2) == history(finished / RUN2) and len(read_all(tmp_path)) == 6


DATA = IMAGES, LABELS = "t10k-images-idx3-ubyte", "train-labels-idx1-ubyte"
SAVED = CHECKPOINT, WEIGHTS = "checkpoint.pt", "weights.pt"
TRAP = type("Trap", (), {"__reduce__": lambda self: (os.mkdir, ("trap",))})()  # when unpickled
DAMAGES = [
    ("missing", (*DATA, WEIGHTS), lambda path: path.unlink()),
    ("packed", DATA, lambda path: path.rename(f"{path}.gz")),
    ("empty", DATA + SAVED, lambda path: path.write_bytes(b"")),
    ("cut", DATA + SAVED, lambda path: path.write_bytes(path.read_bytes()[:-1])),
    ("folder", DATA + SAVED, lambda path: (path.unlink(), path.mkdir())),
    ("code", DATA + SAVED, lambda path: path.write_bytes(pickle.dumps(TRAP, protocol=2))),
    ("magic number", DATA, lambda path: path.write_bytes(b"\1" + path.read_bytes()[1:])),
    ("14x56", [IMAGES], lambda path: write_idx(path, torch.zeros(12, 14, 56).byte())),
    ("too few", [LABELS], lambda path: write_idx(path, torch.zeros(23).byte())),
    ("up to 23", [LABELS], lambda path: write_idx(path, torch.arange(24).byte())),
    ("code in a zip", SAVED, lambda path: torch.save({"weights": TRAP}, path)),
    ("layer missing", SAVED, lambda path: torch.save(torch.load(path) | {"weights": dict(list(
        torch.load(path.with_name(WEIGHTS)).items())[:-1])}, path)),
    ("other step", SAVED, lambda path: torch.save(STEPS["step4"].Net().state_dict(), path)),
    ("not finite", SAVED, lambda path: torch.save(torch.load(path) | {"weights": {
        name: tensor / 0 for name, tensor in torch.load(path.with_name(WEIGHTS)).items()}}, path)),
]


@pytest.mark.parametrize(("file", "damage"), [
    pytest.param(file, damage, id=f"{file} {kind}")
    for kind, files, damage in DAMAGES for file in files])
def test_damaged_file_is_refused(file, damage, small, finished, tmp_path, monkeypatch):
    raw = Path(shutil.copytree(small, tmp_path / "data"), "MNIST", "raw")
    run = shutil.copytree(finished / RUN2, tmp_path / RUN2)
    path = (raw if file in DATA else run) / file
    flag = {CHECKPOINT: "--resume", WEIGHTS: f"--evaluate={path}"}.get(file, "--plain")
    damage(path)
    monkeypatch.chdir(tmp_path)
    before = read_all(tmp_path)
    line = refuse(STEP2, *flags(tmp_path / "data", tmp_path, flag))
    assert re.split("-images|-labels", str(path))[0] in line
    assert all(other.name in line for other in raw.glob("*.*"))  # to be unpacked or renamed
    assert read_all(tmp_path) == before and not Path("trap").exists()


@pytest.mark.parametrize("wrong", [
    "--epochs=0", "--epochs=x", "--batch-size=0", "--seed=-1", f"--seed={2**63}", "--epoch=3",
    "--abacus", "--smoke --resume", "--smoke --evaluate=file", "--resume --evaluate=file",
    "--device=abacus", "--device=cuda:77", "--device=meta", "--out=file", "--out=file/below",
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


def test_notebook_seconds_and_a_loss_that_is_not_finite(small, tmp_path, monkeypatch):
    monkeypatch.setattr("sys.argv", ["kernel", "--epochs=7"])
    assert [common.parse_args(it, "", 1, 1).epochs for it in ([], None)] == [1, 7]
    monkeypatch.setattr(time, "perf_counter", itertools.count(0, 7).__next__)
    model, args = STEP2.Net(), common.parse_args(flags(small, tmp_path), "", 1, 1)
    run = common.Run(SCRIPTS["step2"], args, model, torch.optim.SGD(model.parameters()))
    run.save(1, 10, 1, 10)
    run.save(1, 10, 1, 10)
    assert [row.split(",")[-1] for row in run.rows] == ["7.00", "7.00"]
    before = read_all(tmp_path)
    for train_loss, test_loss in (torch.nan, 1), (1, torch.nan), (torch.inf, 1), (1, torch.inf):
        with pytest.raises(SystemExit, match="LEARNING_RATE"):
            run.save(train_loss, 10, test_loss, 10)
    assert read_all(tmp_path) == before


@pytest.mark.parametrize(("there", "taken"), [("cpu:0", "cpu:0"), ("meta", "cpu"), ("", "cpu")])
def test_auto_takes_an_accelerator_that_works(there, taken, small, monkeypatch, capsys):
    """torch computes on "meta" too, but without numbers: asked for one, it fails."""
    monkeypatch.setattr(torch, "accelerator", types.SimpleNamespace(
        is_available=lambda: there, current_accelerator=lambda: torch.device(there or "cpu")))
    STEP2.main(["--smoke", "--data-dir", str(small)])
    printed = capsys.readouterr().out
    assert f"Device: {taken}," in printed and ("meta" in printed) == (there == "meta")


def test_full_disk(small, finished, tmp_path):
    resource = pytest.importorskip("resource")
    run = shutil.copytree(finished / RUN2, tmp_path / RUN2)
    process = start(SCRIPTS["step2"], *flags(small, tmp_path), preexec_fn=lambda: (
        resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, 30_000))))
    assert "Traceback" in process.communicate()[1] and process.returncode == 1
    assert read_all(run) == read_all(finished / RUN2) and list(tmp_path.iterdir()) == [run]


def test_default_folders_on_an_ascii_output_and_a_copy_that_fails(small, tmp_path):
    checkout = tmp_path / "chøck out"
    shutil.copytree(small, copy_project(checkout, "*") / "data")
    text, mine = SCRIPTS["step2"].read_text("utf-8"), checkout / "step2_mine.py"
    mine.write_text(text.replace("return model", 'return open("digit.png"), model'), "utf-8")
    options = {"cwd": tmp_path, "env": os.environ | {"PYTHONIOENCODING": "ascii"}}
    processes = {script: start(script, "--epochs=1", "--device=cpu", "--plain", **options)
                 for script in sorted(checkout.glob("step*.py"))}
    for script, process in processes.items():
        printed, message = process.communicate()
        assert process.returncode == bool(message) == (script == mine), message
        assert len(read_all(checkout / "runs" / f"{script.stem}-seed1")) == 3
        assert "ch?ck out" in printed
        assert ("Traceback" in message) == ("digit.png" in message) == (script == mine)
    assert list(tmp_path.iterdir()) == [checkout]
