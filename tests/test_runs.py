"""What may befall a run: interrupts, kills, resuming, full disks, bad settings, odd places."""

import os
import pickle
import re
import resource
import shutil
import signal
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT, STEPS, command, write_data
from fuzz_data import one_line
from kill_and_resume import assert_same_run

import common

EPOCHS = 3
OUTPUTS = (".csv", ".log", ".pt")


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """One thread is faster than two on networks and batches this small."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def arguments(data_dir, tmp_path):
    """Return the arguments of a short run into `tmp_path`/out, as a function of further ones."""
    def join(*more):
        options = ("--data-dir", data_dir, "--out", tmp_path / "out", "--no-compile",
                   "--epochs", EPOCHS, *more)
        return [str(option) for option in options]

    return join


@pytest.fixture(scope="module")
def finished_runs(data_dir, tmp_path_factory):
    """A folder with a finished run of steps 2 and 4; do not change it."""
    out = tmp_path_factory.mktemp("finished")
    for step in ("step2", "step4"):
        STEPS[step].main(["--data-dir", str(data_dir), "--out", str(out), "--no-compile",
                          "--epochs", str(EPOCHS)])
    return out


@pytest.fixture
def out(finished_runs, tmp_path):
    """`tmp_path`/out with the two finished runs in it."""
    return Path(shutil.copytree(finished_runs, tmp_path / "out"))


def contents(folder):
    """Return the bytes of all files in a folder, by name."""
    return {str(path.relative_to(folder)): path.read_bytes()
            for path in folder.rglob("*") if path.is_file()}


def refusal(step, args):
    """Return the one line with which a run of a step exits with status 1."""
    with pytest.raises(SystemExit) as end:
        STEPS[step].main(args)
    return one_line(end.value)


def start(args, **options):
    """Start a real command line, in one thread; return the process."""
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE} | options
    options["env"] = os.environ | {"OMP_NUM_THREADS": "1"} | options.get("env", {})
    return subprocess.Popen(args, **options)


def signal_in_epoch(monkeypatch, step, epoch, number=signal.SIGINT):
    """Make the step's process get a signal just before the test pass of an epoch."""
    test, calls = STEPS[step].test, []

    def test_or_signal(*args):
        calls.append(1)
        if len(calls) == epoch + 1:
            os.kill(os.getpid(), number)
        return test(*args)

    monkeypatch.setattr(STEPS[step], "test", test_or_signal)


def interrupted(monkeypatch, step, args, epoch):
    """Run a step until it is interrupted in an epoch."""
    with monkeypatch.context() as patch, pytest.raises(SystemExit) as end:
        signal_in_epoch(patch, step, epoch)
        STEPS[step].main(args)
    assert end.value.code == 130


# ----------------------------------------------------------------------------- resuming


@pytest.mark.parametrize("name", ["step3", "step4"])
def test_resumed_run_is_the_uninterrupted_run(name, arguments, tmp_path, monkeypatch):
    STEPS[name].main(arguments("--out", tmp_path / "peace"))
    interrupted(monkeypatch, name, arguments(), epoch=1)
    interrupted(monkeypatch, name, arguments("--resume"), epoch=1)  # epoch 2, the last
    assert not STEPS[name].main(arguments("--resume"))
    assert_same_run(tmp_path / "out" / f"{name}-seed1", tmp_path / "peace" / f"{name}-seed1")


def test_resumed_run_is_the_uninterrupted_run_compiled(data_dir, tmp_path, monkeypatch, capsys):
    args = ["--data-dir", str(data_dir), "--epochs", "2", "--out"]
    STEPS["step3"].main([*args, str(tmp_path / "peace")])
    if ", not compiled" in capsys.readouterr().out:
        pytest.skip("torch.compile does not work here")
    interrupted(monkeypatch, "step3", [*args, str(tmp_path / "out")], epoch=1)
    STEPS["step3"].main([*args, str(tmp_path / "out"), "--resume"])
    assert_same_run(tmp_path / "out" / "step3-seed1", tmp_path / "peace" / "step3-seed1")


def test_random_kills():
    """In a process of its own: a fork needs a parent in which torch has no threads yet."""
    tool = start([sys.executable, str(ROOT / "tests" / "kill_and_resume.py"), "3"])
    printed, message = tool.communicate(timeout=300)
    assert tool.returncode == 0 and printed.startswith(b"3 kills"), message.decode()


def test_outputs_are_brought_back_in_step(out, arguments, tmp_path, monkeypatch):
    """A kill fell between the files: some are of an epoch ago, or are not there."""
    interrupted(monkeypatch, "step4", arguments("--seed", 2), epoch=1)
    for suffix in (".csv", ".pt"):
        shutil.copy(out / f"step4-seed1{suffix}", out / f"step4-seed2{suffix}")
    (out / "step4-seed2.log").unlink()
    interrupted(monkeypatch, "step4", arguments("--seed", 2, "--resume"), epoch=0)
    assert len((out / "step4-seed2.csv").read_text().splitlines()) == 2
    assert (out / "step4-seed2.log").read_text().count("Test set") == 1
    STEPS["step4"].main(arguments("--seed", 2, "--resume"))
    STEPS["step4"].main(arguments("--seed", 2, "--out", tmp_path / "peace"))
    assert_same_run(out / "step4-seed2", tmp_path / "peace" / "step4-seed2")
    assert not list(out.glob("*.previous.*"))


def test_resume_of_a_finished_run(out, arguments, capsys):
    before = contents(out)
    assert not STEPS["step4"].main(arguments("--resume"))
    printed = capsys.readouterr().out
    assert "EPOCH" not in printed
    block = before["step4-seed1.log"].decode().partition("Parameters: ")[2]
    assert printed.endswith(f"Parameters: {block}")
    after = contents(out)
    assert after.keys() == before.keys()
    assert all(after[f"step4-seed1{suffix}"] == before[f"step4-seed1{suffix}"]
               for suffix in (".csv", ".log"))


def test_resume_without_a_checkpoint(arguments, tmp_path):
    line = refusal("step4", arguments("--resume"))
    assert line.startswith(f"{tmp_path / 'out' / 'step4-seed1.ckpt'}: expected a checkpoint")


def test_resume_of_another_run_is_refused(out, arguments, monkeypatch, tmp_path):
    ckpt = shutil.copy(out / "step4-seed1.ckpt", out / "step4-seed2.ckpt")
    shutil.copy(out / "step2-seed1.ckpt", out / "step3-seed1.ckpt")
    data = tmp_path / "other data"
    shutil.copytree(arguments()[1], data)
    labels = data / "MNIST" / "raw" / "train-labels-idx1-ubyte"
    labels.write_bytes(labels.read_bytes()[:-1] + b"\x03")
    before, found = contents(out), f"{out / 'step4-seed1.ckpt'}: expected "

    line = refusal("step4", arguments("--resume", "--epochs", 5))
    assert line == f"{found}epochs 5, as in this run, found 3"
    line = refusal("step4", arguments("--resume", "--batch-size", 64))
    assert line == f"{found}batch_size 64, as in this run, found 128"
    assert line != refusal("step4", arguments("--resume", "--data-dir", data))
    assert f"{found}data " in refusal("step4", arguments("--resume", "--data-dir", data))
    assert refusal("step4", arguments("--resume", "--seed", 2)) == (
        f"{ckpt}: expected seed 2, as in this run, found 1")
    assert refusal("step3", arguments("--resume")) == (
        f"{out / 'step3-seed1.ckpt'}: expected step step3, as in this run, found step2")

    torch.set_num_threads(2)
    line = refusal("step4", arguments("--resume"))
    torch.set_num_threads(1)
    assert line == f"{found}threads 2, as in this run, found 1"

    precision = {"fp32": "bf16", "bf16": "fp32"}
    ours = torch.load(ckpt, weights_only=True)["settings"]["precision"]
    monkeypatch.setattr(common, "is_bf16_faster", lambda device: ours == "fp32")
    assert refusal("step4", arguments("--resume")) == (
        f"{found}precision {precision[ours]}, as in this run, found {ours}")
    assert contents(out) == before


@pytest.mark.parametrize("damage", [
    lambda path: path.write_bytes(b""),
    lambda path: path.write_bytes(path.read_bytes()[:5000]),
    lambda path: path.write_bytes(b"no checkpoint"),
    lambda path: torch.save({"settings": 3}, path),
    lambda path: torch.save([1, 2], path),
    lambda path: (path.unlink(), path.mkdir()),
], ids=["empty", "cut", "text", "settings", "list", "folder"])
def test_damaged_checkpoint_is_refused(damage, out, arguments):
    damage(out / "step4-seed1.ckpt")
    before = contents(out)
    assert refusal("step4", arguments("--resume")).startswith(f"{out / 'step4-seed1.ckpt'}: ")
    assert contents(out) == before


# --------------------------------------------------------------------- earlier outputs


def test_earlier_outputs_live_until_an_epoch_has_ended(out, arguments, monkeypatch):
    earlier = contents(out)
    interrupted(monkeypatch, "step4", arguments("--batch-size", 50), epoch=0)
    assert contents(out) == earlier
    interrupted(monkeypatch, "step4", arguments("--batch-size", 50), epoch=1)
    after = contents(out)
    for suffix in OUTPUTS:
        assert after[f"step4-seed1.previous{suffix}"] == earlier[f"step4-seed1{suffix}"]
    # What is kept is the last finished run; neither the interrupted one nor a resume counts.
    STEPS["step4"].main(arguments("--batch-size", 50, "--resume"))
    second = contents(out)
    for suffix in OUTPUTS:
        name = f"step4-seed1.previous{suffix}"
        assert second[name] == earlier[f"step4-seed1{suffix}"]
    STEPS["step4"].main(arguments())
    third = contents(out)
    for suffix in OUTPUTS:
        assert third[f"step4-seed1.previous{suffix}"] == second[f"step4-seed1{suffix}"]
    assert {name for name in third if "step2" in name} == {n for n in earlier if "step2" in n}


def test_help_tells_what_is_replaced(capsys):
    with pytest.raises(SystemExit) as end:
        STEPS["step4"].main(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert end.value.code == 0 and "replaces" in text and ".previous." in text


def test_smoke_and_evaluate_leave_nothing(out, arguments, tmp_path):
    before = contents(out)
    STEPS["step4"].main(arguments("--smoke"))
    STEPS["step4"].main(arguments("--evaluate", out / "step4-seed1.pt"))
    STEPS["step4"].main(arguments("--smoke", "--out", tmp_path / "none"))
    assert contents(out) == before and not (tmp_path / "none").exists()


# ------------------------------------------------------------- interrupts and full disks


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signal_ends_within_two_batches(number, out, arguments, monkeypatch, capsys):
    before, cut, batches = contents(out), common.Loader.__iter__, []

    def cut_and_signal(loader):
        for batch in cut(loader):
            batches.append(1)
            if len(batches) == 3:
                os.kill(os.getpid(), number)
            yield batch

    monkeypatch.setattr(common.Loader, "__iter__", cut_and_signal)
    with pytest.raises(SystemExit) as end:
        STEPS["step4"].main(arguments("--batch-size", 10))
    assert end.value.code == 128 + number
    assert len(batches) <= 5
    line = capsys.readouterr().err.strip()
    assert line.startswith("Interrupted. ") and line.isprintable() and "untouched" in line
    assert contents(out) == before


def test_signals_end_real_processes(arguments, tmp_path):
    numbers = signal.SIGINT, signal.SIGTERM
    runs = [start(command("step4", *arguments("--epochs", 10**6, "--seed", int(number))))
            for number in numbers]
    for number, run in zip(numbers, runs, strict=True):
        assert any(line == b"EPOCH: 1\n" for line in run.stdout)
        run.send_signal(number)
        message = run.communicate(timeout=300)[1].decode().strip()
        assert run.returncode == 128 + number
        path = tmp_path / "out" / f"step4-seed{number:d}"
        last = len(path.with_suffix(".csv").read_text().splitlines()) - 2
        assert message == (f"Interrupted. Epochs 0 to {last} are in {path}.*; "
                           "go on with --resume.")
    assert not list((tmp_path / "out").glob("*.tmp"))


@pytest.fixture
def fill_disk():
    """Return a function from which on the system refuses to write longer files."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, limits[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@pytest.mark.parametrize("ended", [0, 1])
def test_full_disk(ended, out, arguments, fill_disk, monkeypatch, tmp_path):
    """The disk fills before the first epoch is written, or the second."""
    before, save = contents(out), common.Run.save

    def save_on_full_disk(run):
        if run.kept == ended:
            fill_disk()
        save(run)

    with monkeypatch.context() as patch:
        patch.setattr(common.Run, "save", save_on_full_disk)
        line = refusal("step4", arguments())
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.getrlimit(resource.RLIMIT_FSIZE)[1],) * 2)
    assert line.startswith(f"{out / 'step4-seed1.'}") and "File too large" in line
    assert not list(out.glob("*.tmp"))
    if not ended:
        assert "untouched" in line and contents(out) == before
        return
    assert "Epochs 0 to 0 are in" in line
    assert len((out / "step4-seed1.csv").read_text().splitlines()) == 2
    assert (out / "step4-seed1.previous.csv").read_bytes() == before["step4-seed1.csv"]
    STEPS["step4"].main(arguments("--resume"))
    STEPS["step4"].main(arguments("--out", tmp_path / "peace"))
    assert_same_run(out / "step4-seed1", tmp_path / "peace" / "step4-seed1")


# ------------------------------------------------------------------------ bad settings


@pytest.mark.parametrize("bad", [
    "--epochs 0", "--epochs -1", "--epochs 1.5", "--batch-size 0", "--batch-size -1",
    "--seed x", "--seed 1.5", "--seed -1", f"--seed {2**64}", "--no-such-flag", "--resume --smoke",
    "--evaluate", "extra",
])
def test_bad_settings(bad, step, capsys):
    with pytest.raises(SystemExit) as end:
        step.main(bad.split())
    assert end.value.code == 2
    printed = capsys.readouterr()
    assert printed.out == "" and printed.err.startswith("usage: ")
    assert ": error: " in printed.err.splitlines()[-1]


@pytest.mark.parametrize("device", ["cuda:77", "mps", "xpu", "meta", "hpu", "abacus", "", "cpu:x"])
def test_device_that_is_not_there(device, arguments, tmp_path):
    assert refusal("step2", arguments("--device", device)).startswith(f"--device {device} cannot")
    assert not (tmp_path / "out").exists()


class Evil:
    """Makes a folder when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize(("dump", "load"), [
    (torch.save, lambda path: torch.load(path, weights_only=False)),
    (lambda content, path: path.write_bytes(pickle.dumps(content, protocol=2)),
     lambda path: pickle.loads(path.read_bytes())),
], ids=["zip", "pickle"])
def test_code_in_a_pickle_does_not_run(dump, load, arguments, tmp_path):
    trap, file = tmp_path / "trap", tmp_path / "out" / "step2-seed1.ckpt"
    file.parent.mkdir()
    dump({"layers.0.0.weight": Evil(trap)}, file)
    for more in (("--evaluate", file), ("--resume",)):
        assert refusal("step2", arguments(*more)).startswith(f"{file}: expected ")
        assert not trap.exists()
    load(file)  # but it would have run
    assert trap.exists()


@pytest.mark.parametrize("make", [
    lambda path, out: shutil.copy(out / "step4-seed1.pt", path),
    lambda path, out: shutil.copy(out / "step2-seed1.ckpt", path),
    lambda path, out: path.write_text("no weights"),
    lambda path, out: path.write_bytes((out / "step2-seed1.pt").read_bytes()[:-2000]),
    lambda path, out: torch.save(torch.zeros(3), path),
    lambda path, out: path.mkdir(),
    lambda path, out: None,
], ids=["other step", "checkpoint", "text", "cut", "tensor", "folder", "none"])
def test_weights_that_are_none(make, finished_runs, arguments, tmp_path, capsys):
    make(tmp_path / "weights.pt", finished_runs)
    line = refusal("step2", arguments("--evaluate", tmp_path / "weights.pt"))
    assert line.startswith(f"{tmp_path / 'weights.pt'}: expected weights")
    assert "Test set" not in capsys.readouterr().out


# -------------------------------------------------------------------- outputs in the way


@pytest.mark.parametrize("place", ["file", "file/below"])
def test_out_is_a_file(place, arguments, tmp_path, capsys):
    (tmp_path / "file").write_text("mine")
    line = refusal("step2", arguments("--out", tmp_path / place))
    assert str(tmp_path / place) in line
    assert "EPOCH" not in capsys.readouterr().out
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.skipif(not Path("/proc/version").exists(), reason="no folder that nobody can write")
def test_out_cannot_be_created(arguments, capsys):
    assert "/proc/" in refusal("step2", arguments("--out", "/proc/none"))
    assert "EPOCH" not in capsys.readouterr().out


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write all")
def test_out_is_read_only(arguments, tmp_path, capsys):
    (tmp_path / "out").mkdir(mode=stat.S_IRUSR | stat.S_IXUSR)
    assert str(tmp_path / "out") in refusal("step2", arguments())
    assert "EPOCH" not in capsys.readouterr().out


@pytest.mark.parametrize("suffix", [".ckpt", ".csv", ".pt", ".log", ".tmp"])
def test_something_is_in_the_place_of_an_output(suffix, arguments, tmp_path):
    place = tmp_path / "out" / f"step2-seed1{suffix}"
    place.parent.mkdir()
    place.write_text("mine") if suffix == ".tmp" else place.mkdir()
    assert f"{tmp_path / 'out' / 'step2-seed1'}" in refusal("step2", arguments())
    assert place.exists()


# --------------------------------------------------------------------------- divergence


def test_divergence_in_the_first_epoch(step, arguments, tmp_path, monkeypatch, capsys):
    args = arguments("--batch-size", 10, "--data-dir", write_data(tmp_path, train=40, test=10))
    monkeypatch.setattr(step, "LEARNING_RATE", 1e30)
    line = refusal(step.__name__.split("_")[0], args)
    assert re.search(r"not finite from epoch 0, (batch \d|its last batch) on\b", line), line
    assert "LEARNING_RATE" in line and "untouched" in line
    assert "Test set: Average loss: 0" not in capsys.readouterr().out
    assert list((tmp_path / "out").iterdir()) == []


def test_divergence_later_leaves_the_last_good_checkpoint(arguments, tmp_path, monkeypatch):
    train, calls = STEPS["step2"].train, []

    def train_too_fast(model, loader, optimizer, *rest):
        calls.append(1)
        if len(calls) == 2:
            optimizer.param_groups[0]["lr"] = 1e30
        return train(model, loader, optimizer, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(STEPS["step2"], "train", train_too_fast)
        line = refusal("step2", arguments("--batch-size", 50))
    assert "not finite from epoch 1, batch 1 on" in line
    assert "Epochs 0 to 0 are in" in line and "--resume" in line
    STEPS["step2"].main(arguments("--batch-size", 50, "--resume"))
    STEPS["step2"].main(arguments("--batch-size", 50, "--out", tmp_path / "peace"))
    assert_same_run(tmp_path / "out" / "step2-seed1", tmp_path / "peace" / "step2-seed1")


@pytest.mark.parametrize("error", [
    MemoryError(),
    RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 64 bytes"),
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB"),
])
def test_out_of_memory(error, arguments, monkeypatch):
    def train(*_):
        raise error

    monkeypatch.setattr(STEPS["step4"], "train", train)
    assert "--batch-size" in refusal("step4", arguments())


# ----------------------------------------------------------------------- odd surroundings


def test_nobody_reads_on_and_full_device(arguments, tmp_path):
    """`| head -3` and `> /dev/full`."""
    args = arguments("--epochs", 500)
    read = start(command("step4", *args))
    head = [read.stdout.readline() for _ in range(3)]
    read.stdout.close()
    args = arguments("--out", tmp_path / "full")
    full = Path("/dev/full").exists()
    if full:
        with open("/dev/full", "wb") as device:
            full = start(command("step4", *args), stdout=device)
        message = full.communicate(timeout=300)[1].decode()
        assert full.returncode == 1 and message.strip().isprintable(), message
        assert message.startswith("standard output: No space left on device")
    assert all(head) and read.stderr.read() == b"" and read.wait(timeout=300) == 128 + 13
    read.stderr.close()


def test_two_seeds_at_once_from_a_read_only_checkout(data_dir, tmp_path):
    """In folders with spaces, from elsewhere by absolute path, on an output that knows ASCII."""
    checkout, out, elsewhere = (tmp_path / name for name in ("read only", "out put", "else"))
    checkout.mkdir()
    elsewhere.mkdir()
    for name in ("common.py", "step4_aug_lr.py"):
        shutil.copy(ROOT / name, checkout)
    (tmp_path / "da ta").symlink_to(data_dir)
    checkout.chmod(0o555)
    before = contents(checkout)
    environment = {"PYTHONIOENCODING": "ascii", "LANG": "C", "LC_ALL": "C",
                   "PYTHONDONTWRITEBYTECODE": "1"}
    runs = [start([sys.executable, str(checkout / "step4_aug_lr.py"), "--no-compile", "--epochs",
                   "2", "--seed", str(seed), "--data-dir", str(tmp_path / "da ta"), "--out",
                   str(out)], cwd=elsewhere, env=environment) for seed in (1, 2)]
    for seed, run in zip((1, 2), runs, strict=True):
        printed, message = run.communicate(timeout=300)
        assert run.returncode == 0 and message == b"", message.decode()
        assert re.search(r"100%\|#{10}\| 3/3 \[", printed.decode("ascii"))
        assert len((out / f"step4-seed{seed}.csv").read_text().splitlines()) == 3
    assert len(list(out.iterdir())) == 8 and not list(elsewhere.iterdir())
    assert contents(checkout) == before
