"""What Makefile, README and requirements promise, and the frame that the project keeps to."""

import ast
import os
import re
import shutil
import subprocess
import sys
import time

import pytest
from conftest import ROOT, SCRIPTS, STEPS

README = (ROOT / "README.md").read_text(encoding="utf-8")
MAKEFILE = (ROOT / "Makefile").read_text(encoding="utf-8")
TARGETS = set(re.findall(r"^([a-z0-9]+):.*## ", MAKEFILE, re.M))
PACKAGES = {"torch", "torchvision", "tqdm", "torchinfo", "pytest"}


def imports_of(path):
    """Return the first names of all modules that a script imports."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {name.name.split(".")[0] for name in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add(node.module.split(".")[0])
    return names


def test_top_level_keeps_to_the_frame():
    files = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if files.returncode:
        pytest.skip("not a git checkout")
    allowed = {path.name for path in SCRIPTS.values()} | {
        "common.py", "tests", "results", "Makefile", "README.md", "requirements.txt"}
    found = {line.split("/")[0] for line in files.stdout.splitlines()}
    assert not {name for name in found if name[0] != "."} - allowed


def test_requirements_are_the_five_packages():
    lines = (ROOT / "requirements.txt").read_text().split()
    assert {re.match(r"[a-z]+", line)[0] for line in lines} == PACKAGES
    assert all(re.fullmatch(r"[a-z]+>=[\d.]+,<[\d.]+", line) for line in lines)


def test_only_the_five_packages_are_imported():
    local = {path.stem for path in ROOT.rglob("*.py") if ".venv" not in path.parts}
    allowed = PACKAGES | set(sys.stdlib_module_names) | local
    for path in (*ROOT.glob("*.py"), *(ROOT / "tests").glob("*.py")):
        assert not imports_of(path) - allowed, path.name


def test_importing_a_step_runs_nothing():
    for path in SCRIPTS.values():
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            assert isinstance(node, (ast.Import, ast.ImportFrom, ast.Assign, ast.FunctionDef,
                                     ast.ClassDef, ast.If, ast.Expr)), ast.dump(node)
            if isinstance(node, ast.If):
                assert ast.unparse(node.test) == "__name__ == '__main__'"
            if isinstance(node, ast.Expr):
                assert isinstance(node.value, ast.Constant)


@pytest.mark.skipif(not shutil.which("make"), reason="make is not installed")
def test_make_alone_prints_every_target():
    printed = subprocess.run(["make"], cwd=ROOT, capture_output=True, text=True).stdout
    phony = re.search(r"\.PHONY: ((?:.*\\\n)*.*)", MAKEFILE)[1].replace("\\", " ").split()
    assert set(phony) - {"FORCE"} == TARGETS
    for target in TARGETS:
        assert re.search(rf"^  {target} +\S", printed, re.M), target


@pytest.mark.skipif(not shutil.which("make"), reason="make is not installed")
def test_what_make_calls(tmp_path):
    """Nothing is installed twice, and arguments, interpreter and outputs are the user's."""
    def make(*arguments):
        log.write_text("")
        done = subprocess.run(["make", *arguments], cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return log.read_text(), done.stdout

    log, requirements = tmp_path / "calls", tmp_path / "requirements.txt"
    for name in ("interpreter", "other", ".venv/bin/python", "runs/log", "results/log"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f'#!/bin/sh\necho {name} "$@" >> {log}\n')
        path.chmod(0o755)
    shutil.copy(ROOT / "Makefile", tmp_path)
    requirements.touch()

    calls, _ = make("step4", f"PYTHON={tmp_path}/interpreter", "ARGS=--epochs 1")
    assert "interpreter -m venv" in calls and "pip install" in calls
    assert "step4_aug_lr.py --epochs 1\n" in calls
    calls, printed = make("step1")
    assert "venv --clear" not in calls and "pip install" not in calls
    assert "step1_setup.py\n" in calls and "hour" in printed
    os.utime(requirements, (time.time() + 5,) * 2)
    assert "pip install" in make("test")[0]
    assert "other -m venv" in make("setup", f"PYTHON={tmp_path}/other")[0]
    (tmp_path / "data").mkdir()
    make("distclean")
    assert not (tmp_path / "data").exists() and not (tmp_path / ".venv").exists()
    assert (tmp_path / "runs/log").exists() and (tmp_path / "results/log").exists()


@pytest.mark.skipif(not shutil.which("make"), reason="make is not installed")
@pytest.mark.parametrize("a, b", [(1, 2), (2, 3), (3, 4)])
def test_make_diff_shows_the_lesson(a, b):
    done = subprocess.run(["make", "diff", f"A={a}", f"B={b}"], cwd=ROOT, capture_output=True,
                          text=True)
    assert done.returncode == 0, done.stderr
    assert f"+++ b/{SCRIPTS[f'step{b}'].name}" in done.stdout


def test_targets_and_files_that_the_readme_names_exist():
    named = set(re.findall(r"`make ([a-z0-9]+)|^make ([a-z0-9]+)", README, re.M))
    assert {target for pair in named for target in pair if target} <= TARGETS
    for name in re.findall(r"\]\(([^)#:]+)\)", README):
        assert (ROOT / name).exists(), name
    for name in re.findall(r"`([a-z0-9_/]+\.(?:py|txt|md))`", README):
        assert any(ROOT.rglob(name.split("/")[-1])), name


def test_readme_names_the_flags(capsys):
    helps = set()
    for step in STEPS.values():
        with pytest.raises(SystemExit) as stopped:
            step.main(["--help"])
        assert stopped.value.code == 0
        text = capsys.readouterr().out
        helps.add(text[text.index("options:") :])
        assert "(default: 15)" in text
        assert "(default: 128)" in text
        assert step.__doc__.splitlines()[0] in " ".join(text.split())
    assert len(helps) == 1, "the command line is not the same for all four"
    flags = set(re.findall(r"--[a-z0-9-]+", helps.pop())) - {"--help"}
    assert flags <= set(re.findall(r"--[a-z0-9-]+", README))


def test_table_of_the_final_model():
    """Shapes and fields are those of the comments in step 4, and every sum in it comes out."""
    comments = re.findall(r"# (\d+x\d+x\d+) \| RF (\d+)$", SCRIPTS["step4"].read_text(), re.M)
    [table] = re.findall(r"^\| input \|.*?\n((?:\|.*\n)+)", README, re.M)
    field, jump, counted = 1, 1, 0
    for line, (shape, expected) in zip(table.splitlines(), comments, strict=True):
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        name, output, parameters, kernel, told_jump, sum_ = cells
        assert output == shape
        if told_jump:
            assert int(told_jump) == jump
        if "=" in sum_:
            assert sum_.startswith(f"{field} + {int(kernel) - 1}·{jump} = "), line
            field += (int(kernel) - 1) * jump
        assert sum_.split()[-1] == str(field) == expected, line
        jump *= 2 if name == "max-pool 2" else 1
        counted += sum(int(part.replace(",", "")) for part in parameters.split("+") if part)
    assert counted == 9538


def test_readme_is_short():
    assert len(README.splitlines()) <= 155


def test_snippet_of_the_readme_runs():
    [snippet] = re.findall(r"```python\n(.*?)```", README, re.S)
    if not (ROOT / "results" / "step4-seed1.pt").exists():
        pytest.skip("no weights")
    exec(snippet.replace('"results/', f'"{ROOT.as_posix()}/results/'), {})
