"""What README.md, Makefile and results promise."""

import re
import shutil
import subprocess
import sys

import pytest
from conftest import ROOT, SCRIPTS, STEPS
from helpers import read_all

README = (ROOT / "README.md").read_text(encoding="utf-8")


def call(folder, *command):
    """Run a command in a folder; return its exit status, output and errors."""
    done = subprocess.run(command, cwd=folder, capture_output=True, encoding="utf-8")
    return done.returncode, done.stdout, done.stderr


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A copy of the project in which .venv/bin/python only prints how a step would be run."""
    if not shutil.which("make"):
        pytest.skip("make is not installed")
    for name in ("MAKELEVEL", "MAKEFLAGS", "MFLAGS"):  # as if no make had started the tests
        monkeypatch.delenv(name, raising=False)
    copy = tmp_path / "the project"
    shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(".*", "data", "runs", "*cache*"))
    python = copy / ".venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text(f'#!/bin/sh\ncase $1 in step*) echo "$@" ;; '
                      f"""*) exec '{sys.executable}' "$@" ;; esac\n""")
    python.chmod(0o755)
    return copy


def test_flags_links_and_snippet_of_the_readme(tmp_path, monkeypatch):
    _, shown, _ = call(tmp_path, sys.executable, SCRIPTS["step4"], "--help")
    flags, told = (set(re.findall(r"--\w[\w-]+", text)) for text in (shown, README))
    assert told | {"--help"} == flags
    for file in (ROOT / "README.md", ROOT / "results" / "README.md"):
        for link in re.findall(r"\]\(([^):#]+)\)", file.read_text(encoding="utf-8")):
            assert (file.parent / link).exists(), link
    monkeypatch.chdir(ROOT)
    exec(re.search(r"```python\n(.*?)```", README, re.DOTALL)[1], {})


def test_make(project):
    before, targets = read_all(project), set(re.findall(r"(?:^|`)make (\w+)", README, re.MULTILINE))
    _, shown, _ = call(project, "make")
    for target in {"step4", "test"} | targets:
        assert f" {target} " in shown and call(project, "make", "-n", target)[0] == 0, target
    assert read_all(project) == before
    assert call(project, "make", "diff", "A=1", "B=2")[0] == 0
    status, _, message = call(project, "make", "diff", "A=1", "B=9")
    assert status != 0 and "step9" in message
    shutil.copy(SCRIPTS["step2"], project / "step2_mine.py")  # as a learner may do
    shutil.copytree(ROOT / "results", project / "my runs")  # it has seeds 1 to 5
    status, shown, message = call(project, "make", "seeds", "STEP=2", "SEEDS=1 2", "OUT=my runs",
                                  "ARGS=--epochs 1 --data-dir data")
    assert status == 0 and "seed2" in shown and "seed3" not in shown, message
    for line, seed in zip(shown.splitlines(), (1, 2), strict=False):
        assert line.startswith("step2_skeleton.py ") and "--epochs 1" in line
        assert f"--seed {seed}" in line and "--out my runs" in line


def test_tables_are_those_that_the_report_writes(project):
    before, report = read_all(project), (sys.executable, "results/report.py")
    assert call(project, *report)[0] == 0 and read_all(project) == before
    run = project / "results" / "step2_skeleton-seed1.csv"
    _, shown, _ = call(project, *report, run, shutil.copy(run, run.with_suffix(".previous.csv")))
    assert str(run) in shown and "previous" not in shown


@pytest.mark.mnist
@pytest.mark.skipif(not (ROOT / "data" / "MNIST").exists(), reason="no MNIST in data/")
def test_with_mnist(tmp_path, capsys):
    STEPS["step4"].main(["--evaluate", str(ROOT / "results" / "step4_aug_lr-seed1.pt")])
    rows = (ROOT / "results" / "step4_aug_lr-seed1.csv").read_text().splitlines()
    told = float(re.search(r"\((\S+)%\)", capsys.readouterr().out)[1])
    assert told == pytest.approx(float(rows[-1].split(",")[4]), abs=0.02)
    STEPS["step4"].main(["--epochs", "1", "--out", str(tmp_path)])
    printed = capsys.readouterr().out
    assert "not MNIST" not in printed  # the sum in common.py is right
    assert float(re.search(r"Last Test Accuracy: (\S+)", printed)[1]) >= 98.5
