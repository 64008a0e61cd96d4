"""What results/ says of runs: comparisons, tables, checks of weights, what the pictures show."""

import importlib
import itertools
import re
import shutil
import sys

import experiments
import pytest
import report
import torch
from conftest import ROOT, SCRIPTS, STEPS, write_data
from torch import nn

STEP2 = STEPS["step2"]


@pytest.fixture
def copied(tmp_path, monkeypatch):
    """A copy of the project without runs, with small data; and its own report.py as a module."""
    shutil.copytree(ROOT / "results", tmp_path / "copy" / "results",
                    ignore=shutil.ignore_patterns("step*", "[._]*", "*.csv", "*.png"))
    for path in (ROOT / "common.py", *SCRIPTS.values()):
        shutil.copy(path, tmp_path / "copy")
    write_data(tmp_path / "copy" / "data", train=150, test=4)
    monkeypatch.syspath_prepend(tmp_path / "copy" / "results")
    for name in ("report", "experiments", "common", *(step.__name__ for step in STEPS.values())):
        monkeypatch.delitem(sys.modules, name)
    return tmp_path / "copy", importlib.import_module("report")


def write_run(folder, *accuracies, planned=None, kind=()):
    """Write a run with these test accuracies, with the log of a kind of machine; return it."""
    folder.mkdir(parents=True)
    experiments.write_rows(folder / "history.csv", [
        {"epoch": epoch, "train_loss": 1 / (epoch + 1), "train_accuracy": 50 + epoch,
         "test_loss": 0.5, "test_accuracy": f"{accuracy:.2f}", "learning_rate": epoch / 10,
         "seconds": 9} for epoch, accuracy in enumerate(accuracies)])
    if planned:
        torch.save({"settings": {"epochs": planned}}, folder / "checkpoint.pt")
    if kind:
        (folder / "log.txt").write_text("Device: cpu, {}, {} threads, torch {}\nSettings: {}, {}\n"
                                        .format(kind[0], kind[2], kind[1], *kind[3:]))
    return folder


def write_runs(folder, script, *wrong, planned=None):
    """Write a run for each number of wrong digits of 10,000 in the second of two epochs."""
    return [write_run(folder / f"{script}-seed{seed}", 90, 100 - number / 100, planned=planned)
            for seed, number in enumerate(wrong, 1)]


def write_csv(folder, *rows):
    """Write experiments.csv; a row has table, step, variant, seed, accuracy, machine, precision."""
    names = ["table", "step", "variant", "seed", "test_accuracy", "machine", "precision"]
    others = {"epoch": 0, "train_loss": 2, "train_accuracy": 88, "test_loss": 0.5, "seconds": 7,
              "torch": "2", "threads": 1, "compiled": "compiled"}
    experiments.write_rows(folder / "results" / "experiments.csv", [
        dict(zip(names, row, strict=True)) | others for row in rows])


def test_comparison_of_scripts(tmp_path, capsys):
    groups = {"step4": [50, 52, 54, 56, 58], "step4_mine": [55, 57, 53, 56, 59],
              "step3-seedless": [40, 41, 42, 43, 39, 41]}
    paths = [path for script, wrong in groups.items()
             for path in write_runs(tmp_path, script, *wrong, planned=2)]
    paths.append(write_run(tmp_path / "step4_mine-seed6", 10, planned=2))  # does not count
    report.main([str(path) for path in [*paths, *paths[::-1]]])
    *tables, mine, other = capsys.readouterr().out.strip().split("\n\n")
    assert [table.count("-seed1 ") for table in tables] == [1, 1, 1]
    for table, count in zip(tables, "556", strict=True):
        assert table.splitlines()[-1].startswith(f"| **{count} runs** |")
    before, *others = [torch.tensor(wrong).double() for wrong in groups.values()]
    for line, name, wrong, more in ((mine, "step4_mine", others[0], "more"),
                                    (other, "step3-seedless", others[1], "fewer")):
        error = (before.var() / len(before) + wrong.var() / len(wrong)).sqrt()
        assert line.startswith(f"{name} against step4: {(wrong.mean() - before.mean()).abs():.1f} "
                               f"± {error:.1f} {more} wrong digits: ")
    assert mine.endswith("may be chance") and other.endswith("hardly chance")


def test_verdict_of_a_comparison(tmp_path):
    spread = [100, 200, 300, 400, 500]  # of two such groups the standard error is exactly 100
    first, same, near, far, few, single = (
        write_runs(tmp_path, name, *(number + more for number in spread[:count]))
        for name, more, count in (("first", 0, 5), ("same", 0, 5), ("near", 249, 5),
                                  ("far", 251, 5), ("few", 900, 4), ("single", 900, 1)))
    young = [write_run(tmp_path / f"young-seed{epochs}", *[99, 98, 97][:epochs], planned=9)
             for epochs in (1, 2, 3)]
    shown = report.tell([*first, *same, *near, *far, *few, *single, *young])
    for line in ("same against first: 0.0 ± 100.0 more .* may be chance",
                 "near .* 249.0 ± 100.0 more .* may be chance", "far .* 251.0 .* hardly chance",
                 r"few against first: 850.0 ± \S+ more .* too few runs to tell",
                 "single against first: 700.0 more wrong digits: too few runs to tell",
                 "young, after 1 epoch, against first: 200.0 .* fewer .* too few runs to tell"):
        assert re.search(f"(?m)^{line}$", shown), line
    assert "| **3 runs, after 1 epoch** |" in shown and "| 2 of 9, unfinished |" in shown


def test_tables_and_captions(copied):
    folder, module = copied
    falling, constant = ("ingredients", 4, "peak 0.01"), ("ingredients", 4, "constant 0.1")
    write_csv(folder, (*constant, 1, 99.1, "CPU A", "fp32"), (*falling, 1, 99.4, "CPU A", "fp32"),
              (*falling, 2, 99.4, "CPU A", "fp32"), ("pairs", 4, "--plain", 1, 9, "A", "fp32"),
              ("pairs", 4, "defaults", 1, 9, "A", "bf16"))
    table = module.make_table("ingredients", "4")
    assert re.search(r"\| peak 0.01 \| 2 \|.* 60.0 ± 0.0 \|", table) and table.count("CPU A") == 1
    assert not any("more than one kind" in text  # two precisions on purpose
                   for text in (table, module.make_table("pairs", "4")))
    write_csv(folder, (*falling, 1, 99, "CPU A", "fp32"), (*constant, 1, 99, "CPU A", "bf16"))
    table = module.make_table("ingredients", "4")
    assert "made on more than one kind of machine or precision" in table.lower()
    assert re.search(r"fp32.*peak 0.01", table) and re.search("bf16.*constant 0.1", table)
    kind = ("CPU B", "2", "1", "fp32", "compiled")
    for step in STEPS.values():
        write_run(folder / f"results/{step.__name__}-seed1", 99.5, kind=kind)
    head, _, *lines = module.make_table("steps").splitlines()
    assert head.count("|") == 6 and "CPU" not in str(lines)
    for line, step, course in zip(lines, STEPS.values(), ("74", "131", "84", "48"), strict=True):
        script, lesson, *others = line.strip("| ").split(" | ")
        assert f"({step.__name__}.py)" in script and lesson in step.__doc__.splitlines()[0]
        weights = sum(weight.numel() for weight in step.Net().parameters())
        assert others == [f"{weights:,}", "50 (1 run)", course]
    assert "CPU B" in module.make_table("headline")


def test_what_pictures_show(copied):
    folder, module = copied
    run = experiments.read_rows(write_run(folder / "a-seed1", 98.5, 99.37) / "history.csv")
    assert report.get_series(run, "test_accuracy") == [150, 63] == [150, *report.count_wrong([run])]
    assert report.get_series(run, "train_accuracy") == [5000, 4900]
    assert report.get_series(run, "train_loss") == [1, 0.5]
    assert report.get_series(run, "learning_rate") == [0, 0.1]
    names = ["3,000 digits", "3,000 digits, no augmentation"]
    write_csv(folder, *(("digits", 4, name, 3, accuracy, "CPU", "fp32")
                        for name, accuracy in zip(names, (99, 98), strict=True)),
              ("ingredients", 3, "no dropout", 1, 97, "CPU", "fp32"))
    found = {job.name: module.count_wrong(runs) for job, runs in module.find_runs([4], ["digits"])}
    assert found == dict(zip(names, ([100], [200]), strict=True))
    answers = nn.Sequential(nn.AvgPool2d(28), nn.Flatten(), nn.Linear(1, 10, bias=False))
    answers[2].weight.data = -(torch.arange(10.0) - 3).abs().unsqueeze(1)  # it always says 3
    images, labels = torch.ones(5, 1, 28, 28).byte(), torch.tensor([3, 1, 3, 3, 9])
    assert report.find_wrong(answers, torch.Tensor.float, images, labels) == [(1, 1, 3), (4, 9, 3)]


def test_sizes_of_values_before_training(copied):
    rows = report.measure_activations(copied[0] / "data")
    torch.manual_seed(1)
    network = STEP2.Net()
    images, _ = report.common.read_split(copied[0] / "data" / "MNIST" / "raw", "train")
    values = STEP2.test_transform(images)
    sizes = [values.square().mean().sqrt().item()]
    for layer in network.layers:
        values = layer(values)
        if not isinstance(layer, nn.MaxPool2d):
            sizes.append(values.square().mean().sqrt().item())
    assert [float(row["as it is"]) for row in rows] == pytest.approx(sizes, rel=0.01)
    assert all(float(row["batch normalization"]) == pytest.approx(1, rel=0.1) for row in rows[1:8])
    assert float(rows[8]["He initialization"]) > 100 * sizes[8]


def test_verify_finds_damage_that_only_training_digits_show(copied):
    folder, module = copied
    job = next(job for job in experiments.EXPERIMENTS if job[:2] == ("steps", 2))
    torch.manual_seed(1)
    network = STEP2.Net()
    tested, trained = (report.common.read_split(folder / "data" / "MNIST" / "raw", split)
                       for split in ("t10k", "train"))
    wrong = len(report.find_wrong(network, STEP2.test_transform, *tested))
    run = write_run(folder / "results" / "step2_skeleton-seed1", 100 - 25 * wrong,
                    kind=experiments.foresee_kind(job))

    def save_with_swapped_answers(one, other):
        weight = network.layers[-1].weight.data
        weight[[one, other]] = weight[[other, one]]
        torch.save(network.state_dict(), run / "weights.pt")
        return len(report.find_wrong(network, STEP2.test_transform, *trained))

    before = save_with_swapped_answers(0, 0)
    assert module.verify() == 0
    recorded = (folder / "results" / "verified.csv").read_text()
    assert re.search(rf"{100 - before / 1.5:.4f}\d*,{before}\n", recorded)
    assert module.verify() == 0
    absent = set(range(10)) - set(tested[1].tolist())  # swapped, they are as wrong as before
    assert any(abs(save_with_swapped_answers(*pair) - before) > 2
               for pair in itertools.combinations(absent, 2))
    assert module.verify() == 1
    assert (folder / "results" / "verified.csv").read_text() == recorded
