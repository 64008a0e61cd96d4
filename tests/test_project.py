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
from conftest import NAMES, ROOT, SCRIPTS, STEPS, call, copy_project, flags, read_all, write_data

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
    copy = copy_project(tmp_path / "the user's project")
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
    flag, readme = re.compile(r"--\w[\w-]+"), PAGES["README.md"]
    known = set(flag.findall(capsys.readouterr().out))
    assert known <= set(flag.findall(readme))
    for line in re.findall(r"(?m)^.*(?:ARGS=|python step).*$", readme):
        assert set(flag.findall(line)) <= known, line
    targets = re.findall(r"(?m)^(\w+):.*##", (ROOT / "Makefile").read_text("utf-8"))
    for name, text in PAGES.items():
        code = "\n".join(re.findall("(?s)```.*?```|`[^`]+`", text))
        for target in re.findall(r"\bmake (\w+)", re.sub("#.*", "", code)):
            assert target in targets or re.match(r"step\d_", target), target
        for link in re.findall(r"\]\(([^):#]+)", text):
            assert "http" in link or (ROOT / name).parent.joinpath(link).exists(), link
        empty = re.sub(r"(?s)(<!-- table: .+? -->\n\n.+?\n).*?(<!-- end -->)", r"\1\2", text)
        (project / name).write_text(empty, "utf-8")
    assert call(sys.executable, project / "results" / "report.py")[0] == 0
    assert {name: (project / name).read_text("utf-8") for name in PAGES} == PAGES
    for number, step in enumerate(STEPS.values(), 1):
        runs = experiments.read_runs()["steps", number, "as it is"]
        wrong = float(report.describe(runs.values())["wrong digits"].split()[0])
        assert re.search(rf"\b{wrong:.0f}\b", step.__doc__)
    rows = experiments.read_rows(project / "results" / "activations.csv")
    sizes = [float(row["as it is"]) for row in rows]
    assert f"from {sizes[0]:.2f} to {sizes[8]:.4f}" in PAGES["results/README.md"]
    assert "thousand" in STEPS["step2"].__doc__ and 500 < sizes[0] / sizes[8] < 2000
    [block] = re.findall(r"(?s)```python\n(.*?)```", readme)
    write_data(project / "data", 1, 50)
    status, shown, errors = call(sys.executable, "-c", block, cwd=project)
    wrong = list(map(int, re.findall(r"\d+", shown)))
    assert status == 0 and 25 < len(wrong) <= 50 and max(wrong) < 50, errors


def test_make_calls_what_it_says_and_fails_with_it(project):
    shutil.copy(SCRIPTS["step2"], project / "step2_a_copy.py")  # as a learner may do
    more = "[--epochs][1][--validate]"
    targets = {name[:5]: [f"[{name}.py]{more}"] for name in NAMES}
    targets["step2_a_copy"] = targets["step2_a_copy.py"] = [f"[step2_a_copy.py]{more}"]
    targets["all"] = [calls[0] for calls in list(targets.values())[:4]]
    targets["smoke"] = [f"[{name}.py][--smoke]{more}" for name in NAMES]
    [data] = make(project, "data")[1]
    assert 'HERE / "data"' in data
    targets |= {"test": [f"[-m][pytest]{more}"], "graphs": ["[results/graphs.py][runs/a][runs/b]"],
                "digit": [f"[results/digit.py][my photo.jpg]{more}"],
                "verify": [data, "[results/report.py][--verify]"],
                "bench": [data, f"[tests/bench.py]{more}"], "lint": ["[-m][ruff][check][.]"],
                "results": [data, "[results/graphs.py]", "[results/report.py]"]}
    names, seeds = ("step2_skeleton", "step2_a_copy"), (3, 1)
    runs = [f"[{name}.py]{more}[--seed][{seed}][--out][my out]" for seed in seeds for name in names]
    paths = [f"[my out/{name}-seed{seed}-validation]" for name in names for seed in seeds]
    targets["seeds"] = [*runs, f"[results/report.py]{''.join(paths)}"]
    asked = ("ARGS=--epochs 1 --validate", "STEP=2 2_a_copy", "SEEDS=3 1", "OUT=my out",
             "IMAGE=my photo.jpg", "RUNS=runs/a runs/b")
    for target, calls in targets.items():
        status, shown, errors = make(project, target, *asked)
        made = [line for line in shown if line[0] == "[" and "[pip]" not in line]
        assert status == 0 and made == calls, errors
        for wanted in calls:
            assert make(project, target, *asked, FAIL=wanted)[0] != 0, wanted
    assert len(make(project, "seeds", "STEP=2")[1]) == 5 + 1  # five seeds, and their report
    assert make(project, "graphs")[1][-1] == "[results/graphs.py][runs/*]"  # of all, if any
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
    for args in ([], [f"PYTHON={sys.executable}"]):
        assert make(project, "setup", *args) == (0, [], "")
    status, _, told = make(project, "setup", "PYTHON=my-python")
    assert status == 0 and ".venv is kept" in told and "rm -r .venv" in told
    (project / ".venv" / "bin" / "python").rename(project / "my python")
    shutil.rmtree(project / ".venv")
    assert "[-m][venv][.venv]" in make(project, "setup", "PYTHON=./my python")[1]
    assert "3.10" in make(project, "setup", "PYTHON=false")[2]  # a program that always fails


def test_experiments_fit_their_steps(small, tmp_path):
    for job in filter(lambda job: job.edits, experiments.EXPERIMENTS):
        copy = experiments.make_copy(job.step, job.edits, tmp_path)
        runpy.run_path(str(copy))["main"](flags(small, tmp_path, "--smoke", *job.flags))
    for edit in (("not there", ""), ("v2.Normalize(MEAN, STD)", "")):  # the second is there twice
        with pytest.raises(ValueError):
            experiments.make_copy(4, [edit], tmp_path)


def test_experiments_add_what_is_missing_and_delete_nothing(project):
    results, data = project / "results", write_data(project / "data", 60, 1)
    there = experiments.read_rows(results / "experiments.csv")
    before = [row for row in there if row["table"] == "times"]
    before += [row | {"machine": "Another CPU"} for row in there
               if row["table"] == "pairs" and row["seed"] == "2"]
    experiments.write_rows(results / "experiments.csv", before)
    shutil.rmtree(results / "step2_skeleton-seed1")
    kept = read_all(results)

    def run(step, table):
        status, shown, errors = call(sys.executable, results / "experiments.py", "--steps", step,
                                     "--tables", table, "--seeds", 1, 2)
        assert status == 0 and "FAILED" not in shown, shown + errors
        return shown

    run(2, "steps")
    made = read_all(results / "step2_skeleton-seed1")
    assert made.keys() == {"history.csv", "log.txt", "weights.pt"}
    for path in data.rglob("t10k*"):
        path.unlink()  # with --validate, a flag of these rows, they are not needed
    assert "Another CPU" in run(4, "pairs") and run(4, "pairs") == ""  # first with a warning
    after = experiments.read_rows(results / "experiments.csv")
    assert after[:len(before)] == before and len(after) == len(before) + 2 * 15
    assert {(row["variant"], row["seed"]) for row in after[len(before):]} == {
        ("defaults", "1"), ("--plain", "1")}
    assert dict(kept.items() - read_all(results).items()).keys() == {"experiments.csv"}


@pytest.mark.mnist
@pytest.mark.skipif(len(list(ROOT.glob("data/MNIST/raw/*-ubyte"))) < 4, reason="no MNIST in data/")
def test_with_mnist(tmp_path, capsys):
    STEPS["step4"].main(flags(ROOT / "data", tmp_path, "--epochs", 1, "--batch-size", 128))
    printed = capsys.readouterr().out
    assert "not MNIST" not in printed  # the sum in common.py is right
    assert float(re.search(r"Last Test Accuracy: (\S+)", printed)[1]) >= 98.5
