"""What README.md, the Makefile and results/ promise, tried in copies of the project's own files."""

import os
import re
import runpy
import shlex
import shutil
import sys

import experiments
import pytest
import report
from conftest import NAMES, ROOT, SCRIPTS, STEPS, call, flags, read_all, refuse, write_data
from PIL import Image, ImageDraw

PAGES = {name: (ROOT / name).read_text("utf-8") for name in ("README.md", "results/README.md")}
# It answers questions about itself; of other calls it prints the arguments, and PIP_USER if not 1.
PYTHON = f"""#!/bin/sh
case "$1 $2" in "-c import common"*) ;; -c*) exec {shlex.quote(sys.executable)} "$@" ;; esac
call=$(printf '[%s]' "$@")
case "$call" in *"$FAIL"*) exit 1 ;; esac
echo "$call${{PIP_USER#1}}"
"""


@pytest.fixture
def project(tmp_path):
    """A copy of the project, with this .venv, in a folder with an awkward name."""
    copy = tmp_path / "the user's project"
    shutil.copytree(ROOT / "results", copy / "results", ignore=shutil.ignore_patterns("[._]*"))
    for name in ("common.py", "Makefile", "README.md", "requirements.txt", *SCRIPTS.values()):
        shutil.copy(ROOT / name, copy)
    python = copy / ".venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text(PYTHON)
    python.chmod(0o755)
    shutil.copy(copy / "requirements.txt", copy / ".venv")  # as after an install
    return copy


def make(project, *args, **environment):
    """Run make in a copy of the project; return its exit status, printed lines and errors."""
    if not shutil.which("make"):
        pytest.skip("make is not installed")
    own = {"FAIL": "no call", "PIP_USER": "1", "GIT_CONFIG_GLOBAL": os.devnull}
    status, shown, errors = call("make", *args, cwd=project, env=os.environ | own | environment)
    return status, shown.splitlines(), errors


def test_flags_targets_links_figures_and_python_of_the_pages(project, capsys):
    with pytest.raises(SystemExit):
        STEPS["step4"].main(["--help"])
    known, told = (set(re.findall(r"--\w[\w-]+", text))
                   for text in (capsys.readouterr().out, PAGES["README.md"]))
    assert told | {"--help"} == known
    targets = re.findall(r"(?m)^(\w+):.*##", (ROOT / "Makefile").read_text("utf-8"))
    for name, text in PAGES.items():
        code = "\n".join(re.findall("(?s)```.*?```|`[^`]+`", text))
        for target in re.findall(r"\bmake (\w+)", re.sub("#.*", "", code)):
            assert target in targets or re.match(r"step\d_", target), target
        for link in re.findall(r"\]\(([^):#]+)", text):
            assert "http" in link or (ROOT / name).parent.joinpath(link).exists(), link
        empty = re.sub("(?s)(<!-- table: .+? -->).*?<!-- end -->", r"\1<!-- end -->", text)
        (project / name).write_text(empty, "utf-8")
    assert call(sys.executable, project / "results" / "report.py")[0] == 0
    assert {name: (project / name).read_text("utf-8") for name in PAGES} == PAGES
    for number, step in enumerate(STEPS.values(), 1):
        runs = experiments.read_runs()["steps", number, "as it is"]
        wrong = float(report.describe(runs.values())["wrong digits"].split()[0])
        assert re.search(rf"\b{wrong:.0f}\b", step.__doc__)
    [block] = re.findall(r"(?s)```python\n(.*?)```", PAGES["README.md"])
    picture = Image.new("RGB", (300, 200), (190, 190, 190))
    ImageDraw.Draw(picture).line([(115, 40), (105, 160)], fill=(40, 40, 40), width=16)
    picture.save(project / "digit.png")
    status, shown, errors = call(sys.executable, "-c", block, cwd=project)
    assert status == 0 and shown.startswith("1 "), errors


def test_make_calls_what_it_says_and_fails_with_it(project):
    shutil.copy(SCRIPTS["step2"], project / "step2_a_copy.py")  # as a learner may do
    more = "[--epochs][1][--validate]"
    targets = {name[:5]: [f"[{name}.py]{more}"] for name in NAMES}
    targets["step2_a_copy"] = targets["step2_a_copy.py"] = [f"[step2_a_copy.py]{more}"]
    targets["smoke"] = [f"[{name}.py][--smoke]{more}" for name in NAMES]
    targets["test"] = [f"[-m][pytest]{more}"]
    targets["verify"] = [*make(project, "data")[1], "[results/report.py][--verify]"]
    runs = [f"[step2_skeleton.py]{more}[--seed][{seed}][--out][my runs]" for seed in (3, 1)]
    folders = "".join(f"[my runs/step2_skeleton-seed{seed}-validation]" for seed in (3, 1))
    targets["seeds"] = [*runs, f"[results/report.py]{folders}"]
    asked = "ARGS=--epochs 1 --validate", "STEP=2", "SEEDS=3 1", "OUT=my runs"
    for target, calls in targets.items():
        status, shown, errors = make(project, target, *asked)
        assert status == 0 and [line for line in shown if line[0] == "["] == calls, errors
        for wanted in calls:
            assert make(project, target, *asked, FAIL=wanted)[0] != 0, wanted
    for args in (["step9"], ["diff", "B=9"], ["seeds", "STEP=9"]):
        status, shown, errors = make(project, *args)
        assert status != 0 and not shown and errors.count("\n") == 1 and "step9" in errors


def test_make_diff_shows_the_code_first(project, tmp_path):
    three, four = (SCRIPTS[step].read_text("utf-8") for step in ("step3", "step4"))
    docs, code = ({f"+{line}" for line in set(part.splitlines()[1:]) - set(three.splitlines())}
                  for part in four.split('"""', 2)[1:])
    for tool in ("make", "sh", "awk", "diff", "mktemp", "rm"):
        (tmp_path / tool).symlink_to(shutil.which(tool) or "missing")
    for path in (os.environ["PATH"], str(tmp_path)):  # the second has no git
        status, shown, errors = make(project, "diff", PATH=path)
        assert status == 0 and code <= set(shown) and not docs & set(shown), errors
    assert docs | code <= set(make(project, "diff", "DOCS=1")[1])


def test_make_n_changes_nothing_setup_installs_once_and_clean_keeps_it(project):
    (project / "requirements.txt").write_text("pytest\n")
    for name in ("runs", "data", ".pytest_cache"):
        shutil.copytree(project / "results", project / name)
    before = read_all(project)
    for target in re.findall(r"(?m)^  (\w+) ", "\n".join(make(project)[1])):
        assert make(project, "-n", target)[0] == 0, target
    assert read_all(project) == before
    assert make(project, "setup", FAIL="[pip][install]")[0] != 0
    install, step = make(project, "step4")[1]
    assert "[pip][install]" in install and install.endswith("[-r][requirements.txt]0")
    assert make(project, "clean")[0] == 0
    assert {name[:13] for name in before.keys() - read_all(project).keys()} == {".pytest_cache"}
    assert make(project, "setup") == (0, [], "")
    (project / ".venv" / "bin" / "python").rename(project / "my python")
    shutil.rmtree(project / ".venv")
    assert "[-m][venv][.venv]" in make(project, "setup", "PYTHON=./my python")[1]
    assert "3.10" in make(project, "setup", "PYTHON=false")[2]  # a program that always fails


def test_report_on_runs(small, tmp_path, capsys):
    STEPS["step2"].main(flags(small, tmp_path, "--epochs", 2, "--seed", 9))
    unfinished = tmp_path / "step2_skeleton-seed9"
    head, first, _ = (unfinished / "history.csv").read_text().splitlines()
    (unfinished / "history.csv").write_text(f"{head}\n{first}\n")  # as after the first epoch
    runs = [tmp_path / last / "step2_skeleton-seed1" for last in ("99.10", "99.20", "99.30")]
    for run in runs:
        run.mkdir(parents=True)
        (run / "history.csv").write_text(f"{head}\n{first}\n1,0.5,90,0.5,{run.parent.name},0.1,1\n")
    report.main([f"{runs[0]}/../step2_skeleton-seed1", *map(str, runs), str(unfinished)])
    shown = capsys.readouterr().out
    assert all(shown.count(f"| {run} ") == 1 for run in (*runs, unfinished))
    assert len(re.findall(r" 99\.20* ± 0\.10* ", shown)) == 1  # it were 0.08 if divided by n
    held_out = shutil.copytree(runs[0], tmp_path / "step2_skeleton-seed1-validation")
    for paths in ([tmp_path / "missing"], [runs[0], small], [runs[0], held_out]):
        refuse(report, *paths)


def test_experiments_fit_their_steps_and_verify_knows_them_from_others(project, small, tmp_path):
    for job in [job for job in experiments.EXPERIMENTS if job.edits]:
        copy = experiments.make_copy(job.step, job.edits, tmp_path)
        runpy.run_path(str(copy))["main"](flags(small, tmp_path, "--smoke", *job.flags))
    for edit in (("not there", ""), ("v2.Normalize(MEAN, STD)", "")):  # the second is there twice
        with pytest.raises(ValueError):
            experiments.make_copy(4, [edit], tmp_path)
    results, run = project / "results", project / "results" / "step2_skeleton-seed1"
    for path in (*results.glob("step*/*"), *results.glob("*.csv")):
        path.unlink()
    write_data(project / "data", train=100, test=1000)
    verify = sys.executable, results / "report.py", "--verify"
    made = call(sys.executable, results / "experiments.py", "--steps", 2, "--seeds", 1,
                "--tables", "steps", "ingredients")
    assert made[0] == 0 and experiments.read_rows(results / "experiments.csv"), made
    assert call(*verify)[0] == 0
    *rows, accuracy, rate, time = (run / "history.csv").read_text().split(",")
    accuracy = f"{float(accuracy) - 0.1:.2f}"  # one image less
    (run / "history.csv").write_text(",".join([*rows, accuracy, rate, time]))
    assert call(*verify)[0] == 1


@pytest.mark.mnist
@pytest.mark.skipif(len(list(ROOT.glob("data/MNIST/raw/*-ubyte"))) < 4, reason="no MNIST in data/")
def test_with_mnist(tmp_path, capsys):
    STEPS["step4"].main(flags(ROOT / "data", tmp_path, "--epochs", 1))
    printed = capsys.readouterr().out
    assert "not MNIST" not in printed  # the sum in common.py is right
    assert float(re.search(r"Last Test Accuracy: (\S+)", printed)[1]) >= 98.5
