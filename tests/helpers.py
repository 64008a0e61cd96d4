"""Run steps, here or in processes of their own, and look at what they leave."""

import multiprocessing
import os
import re
import sys
from pathlib import Path

import pytest
import torch

# A process is a fork of a server that has imported torch, which takes seconds; Windows has no fork.
PROCESSES = multiprocessing.get_context("spawn" if os.name == "nt" else "forkserver")
PROCESSES.set_forkserver_preload(["torch", "torchinfo", "torchvision.transforms.v2"])


def flags(data_dir, out, *more):
    """Return the command line of three short epochs; of two equal flags the later one counts."""
    args = "--data-dir", data_dir, "--out", out, "--epochs", 3, "--fp32", "--no-compile", *more
    return [str(arg) for arg in args]


def refuse(step, *args):
    """Return the one line with which a step ends, with status 1."""
    with pytest.raises(SystemExit) as end:
        step.main([str(arg) for arg in args])
    line = end.value.code  # Python prints a text, and exits with 1
    assert isinstance(line, str) and line.isprintable(), line
    return line


def read_all(folder):
    """Return the bytes of all files in a folder, by name."""
    return {str(path.relative_to(folder)): path.read_bytes()
            for path in folder.rglob("*") if path.is_file()}


def history(run):
    """Return csv, log (both without times) and weights of a run, given as a path without suffix."""
    csv = re.sub(r",[^,\n]*$", "", Path(f"{run}.csv").read_text(), flags=re.MULTILINE)
    log = re.sub(r" \[\d+:\d+<.*\]", "", Path(f"{run}.log").read_text(encoding="utf-8"))
    weights = torch.load(f"{run}.pt", weights_only=True)
    return csv, log, {name: tensor.tolist() for name, tensor in weights.items()}


def start(folder, script, *args, stdout=None, stderr=None, limit=None, **variables):
    """Start a script and return its process; `limit`: bytes that a file may have.

    It prints to `stdout` and `stderr`, or to files of these names in `folder`.
    """
    folder.mkdir(exist_ok=True)
    for name in ("stdout", "stderr"):
        (folder / name).write_text("")
    outputs = stdout or folder / "stdout", stderr or folder / "stderr"
    process = PROCESSES.Process(target=be_script, args=(script, args, *outputs, limit, variables))
    process.start()
    return process


def be_script(script, args, stdout, stderr, limit, variables):
    """Be the process that runs a script, as with PYTHONOPTIMIZE=2: there are no docstrings."""
    os.environ.update(variables)
    torch.set_num_threads(1)
    if limit:
        import resource
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
    target, encoding = getattr(stdout, "fileno", lambda: stdout), variables.get("PYTHONIOENCODING")
    sys.stdout = open(target(), "w", encoding=encoding or "utf-8")  # noqa: SIM115
    sys.stderr = open(stderr, "w", encoding="utf-8", buffering=1)  # noqa: SIM115
    sys.argv[:] = [str(script), *map(str, args)]
    sys.path.insert(0, str(script.parent))
    names = {"__name__": "__main__", "__file__": str(script)}
    exec(compile(script.read_bytes(), script, "exec", optimize=2), names)


def finish(process, folder):
    """Wait for a process; return its exit status and what it printed to files in `folder`."""
    process.join()
    return process.exitcode, *((folder / it).read_text("utf-8") for it in ("stdout", "stderr"))
