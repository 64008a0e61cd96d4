"""What README.md, the Makefile and results/ promise, tried in copies of the project's files."""

import importlib
import os
import re
import runpy
import shlex
import shutil
import sys

import digit
import experiments
import pytest
import report
import torch
from conftest import NAMES, ROOT, SCRIPTS, STEPS, call, copy_project, flags, read_all, write_data
from PIL import Image, ImageDraw
from torch.nn import functional as F
from torchvision.transforms.v2.functional import pil_to_tensor, to_pil_image

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


@pytest.fixture
def copied(tmp_path, monkeypatch):
    """A copy of the project without runs, with small data; and its own report.py as a module."""
    folder = copy_project(tmp_path / "copy", "step*", "*.csv", "*.png")
    write_data(folder / "data", train=150, test=4)
    monkeypatch.syspath_prepend(folder / "results")
    for name in ("report", "experiments", "common", *(step.__name__ for step in STEPS.values())):
        monkeypatch.delitem(sys.modules, name)
    return folder, importlib.import_module("report")


def write_run(folder, *accuracies, planned=2):
    """Write a run with these test accuracies, planned for so many epochs; return its folder."""
    folder.mkdir(parents=True)
    experiments.write_rows(folder / "history.csv", [
        {"train_loss": 1 / (epoch + 1), "train_accuracy": 50 + epoch, "test_loss": 0.5,
         "test_accuracy": accuracy, "learning_rate": epoch / 10, "seconds": 9}
        for epoch, accuracy in enumerate(accuracies)])
    torch.save({"settings": {"epochs": planned}}, folder / "checkpoint.pt")
    (folder / "log.txt").write_text("Device: cpu A1, 1 thread, torch 2\nSettings: fp32, compiled\n")
    return folder


def test_comparison_of_scripts(tmp_path, capsys):
    first = torch.tensor([100, 200, 300, 400, 500.0])  # of two such the standard error is 100
    tenth, few = first.repeat(2) / 10, first[:4] + 900
    errors = [(first.var() / 5 + it.var() / len(it)).sqrt().item() for it in (tenth, few)]
    groups = [("first", first, "", ""), ("same", first, "0.0 ± 100.0 more", "may be chance"),
              ("near", first + 249, "249.0 ± 100.0 more", "may be chance"),
              ("far", first + 251, "251.0 ± 100.0 more", "hardly chance"),
              ("step3-seedless", tenth, f"270.0 ± {errors[0]:.1f} fewer", "hardly chance"),
              ("few", few, f"850.0 ± {errors[1]:.1f} more", "too few runs to tell"),
              ("single", few[:1], "700.0 more", "too few runs to tell")]
    paths = [write_run(tmp_path / f"{name}-seed{seed}", 90, 100 - number / 100)
             for name, wrong, *_ in groups for seed, number in enumerate(wrong.tolist())]
    (paths[0] / "checkpoint.pt").unlink()  # as in results/: it counts as finished
    paths.append(write_run(tmp_path / "near-seed9", 10))  # does not count
    paths += [write_run(tmp_path / f"new-seed{n}", *[99, 98, 97][:n], planned=9) for n in (1, 2, 3)]
    groups.append(("new", first[:3], "100.0 ± 91.3 fewer", "too few runs to tell"))
    report.main([str(path) for path in [*paths, *paths[::-1]]])
    parts = capsys.readouterr().out.strip().split("\n\n")
    assert "| **3 unfinished runs** |" in parts[7] and "| 2 of 9, unfinished |" in parts[7]
    for table, (_, wrong, *_) in zip(parts[:7], groups[:7], strict=True):
        assert len(wrong) == 1 or f"| **{len(wrong)} runs**" in table.splitlines()[-1]
    for line, (name, _, figures, verdict) in zip(parts[8:], groups[1:], strict=True):
        assert line.startswith(f"{name} against first: {figures} ") and line.endswith(verdict)


def test_tables_and_captions(copied):
    folder, module = copied
    for name in [f"{step.__name__}-seed{seed}" for step in STEPS.values() for seed in (1, 2)]:
        write_run(folder / "results" / name, 99.5)
    [other] = sys.modules["experiments"].read_runs()["steps", 4, "as it is"][1]
    names = ["table", "step", "variant", "seed", "test_accuracy", "precision"]
    experiments.write_rows(folder / "results" / "experiments.csv", [
        other | dict(zip(names, row, strict=False)) for row in (  # most are in fp32, as the other
            ("ingredients", 4, "peak 0.01", 1, 99.4), ("ingredients", 4, "peak 0.01", 2, 99.4),
            ("ingredients", 3, "He initialization, no batch normalization", 1, 97, "bf16"),
            ("pairs", 4, "--plain", 1, 9), ("pairs", 4, "defaults", 1, 9, "bf16"))])
    same, pairs, mixed, steps = (
        module.make_table("run | runs | wrong digits | more wrong digits", *words.split())
        for words in ("ingredients 4", "pairs", "ingredients", "steps"))
    assert "| peak 0.01 | 2 | 60.0 ± 0.0 | 10.0 ± 0.0 |" in same
    assert [text.count("A1") for text in (same, steps)] == [1, 1] and "He init" not in same
    assert "more than one kind" in mixed and "more than one kind" not in same
    for table, plain, fast in ((mixed, "peak 0.01", "He init"), (pairs, "--plain", "defaults")):
        assert re.search(f"fp32.*{plain}", table) and re.search(f"bf16.*{fast}", table)
    heads = "script | lesson | weights | wrong digits | the course's best"
    lines = module.make_table(heads, "steps").splitlines()[2:]  # without a caption
    for line, step, course in zip(lines, STEPS.values(), ("74", "131", "84", "48"), strict=True):
        script, lesson, *others = line.strip("| ").split(" | ")
        assert f"({step.__name__}.py)" in script and lesson in step.__doc__.splitlines()[0]
        weights = sum(weight.numel() for weight in step.Net().parameters())
        assert others == [f"{weights:,}", "50.0 ± 0.0", course]


def test_what_pictures_show(tmp_path, small):
    run = experiments.read_rows(write_run(tmp_path / "run", 98.5, 99.37) / "history.csv")
    series = {"test_accuracy": [150, 63], "train_accuracy": [5000, 4900], "train_loss": [1, 0.5],
              "learning_rate": [0, 0.1]}
    assert series == {column: report.get_series(run, column) for column in series}
    images, labels = 1 - torch.eye(10)[[3] * 5], torch.tensor([3, 1, 3, 3, 9])
    wrong = report.find_wrong(torch.nn.Identity(), torch.neg, images, labels)  # it always says 3
    assert wrong == [(1, 1, 3), (4, 9, 3)]
    rows = report.measure_activations(small)
    torch.manual_seed(1)
    values, sizes = report.common.read_split(small / "MNIST" / "raw", "train")[0], []
    for layer in [STEPS["step2"].test_transform, *STEPS["step2"].Net().layers]:
        values = layer(values)
        sizes.append(values.square().mean().sqrt().item())
    del sizes[4]  # the pool's: it is no layer
    assert [float(row["as it is"]) for row in rows] == pytest.approx(sizes, rel=0.01)
    assert all(float(row["batch normalization"]) == pytest.approx(1, rel=0.1) for row in rows[1:8])
    assert float(rows[8]["He initialization"]) > 100 * sizes[8]


def test_verify_finds_damage_that_only_training_digits_show(copied):
    folder, module = copied
    torch.manual_seed(1)
    tested, trained = (report.common.read_split(folder / "data/MNIST/raw", split)[1].tolist()
                       for split in ("t10k", "train"))
    answers = sorted(set(range(10)) - set(tested), key=trained.count)  # wrong in every test
    wrong, network = 150 - trained.count(answers[0]), STEPS["step2"].Net()
    run = write_run(folder / "results" / "step2_skeleton-seed1", 99.96)  # as if 4 were wrong
    for answer, misses in ((answers[0], 0), (answers[0], 0), (answers[-1], 1)):
        network.layers[-1].weight.data.zero_()[answer] = 1
        torch.save(network.state_dict(), run / "weights.pt")
        assert module.verify() == misses
        [recorded] = experiments.read_rows(folder / "results" / "verified.csv")
        assert recorded["wrong_of_6000"] == str(wrong)
        assert float(recorded["train_accuracy"]) == pytest.approx(100 - wrong / 1.5, abs=1e-4)


STROKES = {1: [(270, 120), (250, 300)], 7: [(190, 130), (310, 120), (240, 300)],
           4: [(220, 120), (190, 230), (310, 230), (285, 230), (290, 140), (280, 310)]}


def draw(number, ink="#222", paper="#ddc", mode="RGB", size=(500, 400)):
    """Return a page with a digit on it."""
    picture = Image.new(mode, size, paper)
    ImageDraw.Draw(picture).line(STROKES[number], fill=ink, width=20, joint="curve")
    return picture


@pytest.mark.parametrize("number", STROKES)
def test_pictures_of_many_kinds_get_the_right_answer(number, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    flat, clear, exif = draw(number), draw(number, "#000", "#0000", "RGBA"), Image.Exif()
    shade = 1 - 0.5 * (torch.linspace(-30, 20, 500) + torch.linspace(-9, 9, 400)[:, None]).sigmoid()
    exif[0x0112] = 6  # to be turned by a quarter
    flat.rotate(90, expand=True).save("turned.jpg", exif=exif)
    Image.fromarray(pil_to_tensor(flat)[0].numpy().astype("uint16") * 257).save("16 bits.png")
    for name, picture in {
            "flat.jpg": flat, "palette.gif": flat.convert("P"), "clear.png": clear,
            "grey.png": clear.convert("LA"), "small.png": draw(number, size=(1000, 1100)),
            "white.png": draw(number, "#fff", "#fff0", "RGBA"),
            "light.webp": draw(number, "#eee", "#243"), "hue.png": draw(number, "#c44", "#5a5"),
            "shadow.jpg": to_pil_image((pil_to_tensor(flat) * shade).byte())}.items():
        picture.save(name)
    paths = [f"./{path.name}" for path in tmp_path.iterdir()]
    assert digit.main(paths) == 0
    shown, errors = capsys.readouterr()
    assert [path for path in paths if f"\n{path}: {number} (" not in shown] == [] and not errors


def test_what_cannot_be_read_gets_a_line_and_the_others_an_answer(tmp_path):
    draw(7).save(tmp_path / "7 é.png")
    Image.new("RGB", (300, 200), "white").save(tmp_path / "blank.png")
    to_pil_image(torch.randint(160, 240, (3, 300, 400)).byte()).save(tmp_path / "noise.png")
    Image.radial_gradient("L").save(tmp_path / "shade.png")
    (tmp_path / "text.png").write_text("7")
    (tmp_path / "photo.heic").write_bytes(bytes(4) + b"ftypheic")
    bad = ["./missing.png", "blank.png", "noise.png", "shade.png", "text.png", "photo.heic"]
    status, shown, errors = call(sys.executable, digit.__file__, *bad, "./7 é.png", cwd=tmp_path,
                                 env=os.environ | {"PYTHONIOENCODING": "ascii"})
    assert status == 1 and "\n./7 ?.png: 7 (" in shown and "export it as JPEG" in errors
    assert [line.partition(": ")[0] for line in errors.splitlines()] == bad, errors


def test_two_digits_are_told_weights_are_chosen_and_mnists_own_is_taken_as_it_is(tmp_path, capsys):
    pair, own = str(tmp_path / "two.png"), str(tmp_path / "own.pt")
    to_pil_image(torch.cat([pil_to_tensor(draw(number)) for number in (1, 7)], dim=2)).save(pair)
    torch.save({name: 0 * each for name, each in digit.Net().state_dict().items()}, own)
    assert digit.main([pair, "--weights", own]) == 0
    assert "10 % sure" in (told := "".join(capsys.readouterr())) and "one digit" in told
    (tmp_path / "own.pt").write_text("no weights")
    with pytest.raises(SystemExit, match=r"^.*own.pt: .+$"):
        digit.main([pair, "--weights", own])
    image = F.pad(torch.arange(200, 251, dtype=torch.uint8).view(1, 17, 3), (17, 8, 3, 8))
    assert digit.prepare(to_pil_image(image)).equal(image)
