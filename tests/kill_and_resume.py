"""Kill real runs at random moments, resume each, and compare it with a run left in peace.

Usage: python tests/kill_and_resume.py 50 [SEED]
"""

import os
import random
import re
import shutil
import signal
import sys
import tempfile
import time
import traceback
import warnings
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # of the steps
from conftest import STEPS, write_data

EPOCHS = 6


def fork(action, output):
    """Start `action` in a process of its own, and return its number.

    A fork has already imported torch, which takes a new process some seconds.

    Args:
        action (callable): what the process does; it ends as Python would end.
        output (Path): file for its standard output; standard error gets `output`.err.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the threads of the parent do not exist in the child
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        pid = os.fork()
    if pid:
        torch.set_num_threads(threads)
        return pid
    status = 1
    try:
        for number, path in ((1, output), (2, f"{output}.err")):
            os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
        sys.stdout = os.fdopen(1, "w", closefd=False, encoding="utf-8")
        sys.stderr = os.fdopen(2, "w", closefd=False, encoding="utf-8", buffering=1)
        action()
        status = 0
    except SystemExit as end:
        status = end.code
        if isinstance(status, str):
            print(status, file=sys.stderr)
            status = 1
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        os._exit(status or 0)


def wait(pid):
    """Return the exit status of a process when it has ended; negative: the signal."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def wait_until(condition, pid=None, seconds=120):
    """Wait for `condition()`; return whether it came before the process ended or time was up."""
    end = time.monotonic() + seconds
    while not condition():
        ended = pid and os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
        if ended or time.monotonic() > end:
            return condition()
        time.sleep(0.0002)
    return True


def assert_same_run(one, other):
    """Compare csv, weights and log of two runs, given as paths without suffix, but for times."""
    rows = [Path(f"{run}.csv").read_text().splitlines() for run in (one, other)]
    untimed = [[row.rpartition(",")[0] for row in table] for table in rows]
    assert untimed[0] == untimed[1], f"csv: {untimed}"
    weights = [torch.load(f"{run}.pt", weights_only=True) for run in (one, other)]
    assert weights[0].keys() == weights[1].keys()
    for name, tensor in weights[0].items():
        assert torch.equal(tensor, weights[1][name]), f"weights {name} differ"
    logs = [Path(f"{run}.log").read_text(encoding="utf-8") for run in (one, other)]
    logs = [re.sub(r" \[\d+:\d+<.*\]", "", log) for log in logs]
    assert logs[0] == logs[1], f"log:\n{logs[0]}\nand\n{logs[1]}"


def kill_and_resume(folder, kills, seed=0, step="step4"):
    """Train again and again, killing the run at random moments and resuming it each time.

    Args:
        folder (Path): an empty folder for data and outputs.
        kills (int): how many kills to do.
        seed (int): of the moments.
        step (str): which step to train.

    Returns:
        str: a line about what was done. Raises an exception where anything is lost.
    """
    rng, data, out = random.Random(seed), write_data(folder / "data"), folder / "out"
    output, run = folder / "output", out / f"{step}-seed1"
    options = ["--data-dir", data, "--epochs", EPOCHS, "--batch-size", 60, "--no-compile", "--out"]
    checkpoint, writing = run.with_suffix(".ckpt"), run.with_suffix(".tmp")

    def start(out, *more):
        arguments = list(map(str, (*options, out, *more)))
        return fork(lambda: STEPS[step].main(arguments), output)

    def finish(pid):
        status = wait(pid)
        assert status == 0, f"exit status {status}: {Path(f'{output}.err').read_text()}"

    def finished_epochs():
        return len(torch.load(checkpoint, weights_only=True)["rows"]) if checkpoint.exists() else 0

    begin = time.monotonic()
    finish(start(folder / "peace"))
    duration = time.monotonic() - begin
    done = while_writing = runs = 0
    while True:
        before = finished_epochs()
        pid = start(out, *["--resume"] * checkpoint.exists())
        if done == kills:
            finish(pid)
        else:
            moment = time.monotonic() + rng.uniform(0, duration * (1.2 - before / EPOCHS))
            in_writing, pause = rng.random() < 0.5, rng.uniform(0, 0.001)
            ended = wait_until(lambda: time.monotonic() > moment, pid) is False  # noqa: B023
            if in_writing and not ended:
                wait_until(writing.exists, pid)
                time.sleep(pause)
            os.kill(pid, signal.SIGKILL)  # one that has ended does not mind
            status = wait(pid)
            assert status in (0, -signal.SIGKILL), Path(f"{output}.err").read_text()
            if status:
                done += 1
                while_writing += writing.exists()
                epochs = re.findall(r"^EPOCH: (\d+)$", output.read_text(), re.MULTILINE)
                kept, began = finished_epochs(), int(epochs[-1]) if epochs else 0
                assert kept >= max(before, began), f"{began} epochs had ended, {kept} are kept"
                continue
        assert_same_run(run, folder / "peace" / run.name)
        assert not writing.exists()
        runs += 1
        if done == kills:
            return (f"{done} kills (seed {seed}), {while_writing} while files were being written: "
                    f"all {runs} runs ended as the run left in peace")
        shutil.rmtree(out)


def main(kills, seed=0):
    with tempfile.TemporaryDirectory() as folder:
        try:
            print(kill_and_resume(Path(folder), kills, seed))
        except Exception as error:
            return f"Failed: {error!r}"


if __name__ == "__main__":
    sys.exit(main(*map(int, sys.argv[1:])) if len(sys.argv) > 1 else __doc__)
