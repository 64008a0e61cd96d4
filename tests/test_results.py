"""What results/ says of runs: comparisons, tables, checks of weights, what the pictures show."""

import importlib
import re
import sys

import experiments
import pytest
import report
import torch
from conftest import STEPS, copy_project, write_data


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
