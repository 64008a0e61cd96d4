"""Every figure in README and docstrings is read back from the runs in results/."""

import re
from statistics import fmean

import fastpath
import pytest
import report
import search
import table
import times
import torch
import variants
import verify
from conftest import ROOT, STEPS

RESULTS = ROOT / "results"
DOCUMENTED = {  # the figures of the documented exercise: parameters, best training, best test
    "step1": ("99.94", "99.26"),
    "step2": ("98.85", "98.69"),
    "step3": ("99.06", "99.16"),
    "step4": ("98.49", "99.52"),
}
OVERFITTING = (RESULTS / "overfitting.md").read_text(encoding="utf-8")
RUNS = {name: table.read_runs(name) for name in STEPS}
FIGURE = re.compile(r"(?<![\d.])\d\d\.\d\d(?![\d.])")


def known_figures():
    """Return all figures with two decimals that the evidence holds, as they would be written."""
    known = {figure for pair in DOCUMENTED.values() for figure in pair} | {f"{table.BAR:.2f}"}
    for runs in RUNS.values():
        for run in runs.values():
            for column in ("train_accuracy", "test_accuracy"):
                known |= {f"{value:.2f}" for value in run[column]}
            known.add(f"{table.summarize([run])['last_five']:.2f}")
        if runs:
            row = table.summarize(runs.values())
            known |= {f"{row[key]:.2f}" for key in ("mean", "last_five", "lowest", "best")}
            known.add(f"{fmean(run['train_accuracy'][-1] for run in runs.values()):.2f}")
            epochs = zip(*(run["test_accuracy"] for run in runs.values()), strict=True)
            known |= {f"{fmean(epoch):.2f}" for epoch in epochs}
    for path in RESULTS.rglob("*.md"):
        if path.parent != RESULTS or path.name in ("bench.md", "overfitting.md"):
            numbers = re.findall(r"\d+\.\d+", path.read_text(encoding="utf-8"))
            known |= {f"{float(number):.2f}" for number in numbers}
    return known


def figure_lines():
    """Return (name, line) of every line with a figure in README and docstrings."""
    texts = {"README.md": (ROOT / "README.md").read_text(encoding="utf-8")}
    texts |= {name: step.__doc__ for name, step in STEPS.items()}
    texts["results/README.md"] = (RESULTS / "README.md").read_text(encoding="utf-8")
    return [(name, line) for name, text in texts.items() for line in text.splitlines()
            if FIGURE.search(line)]


@pytest.mark.parametrize("script", [fastpath, search, times, variants])
def test_report_is_made_of_the_runs(script):
    folder = RESULTS / script.__name__
    assert (folder / "README.md").read_text(encoding="utf-8") == script.make_report(folder)


def test_results_readme_is_made_of_the_runs():
    assert (RESULTS / "README.md").read_text(encoding="utf-8") == report.make_report()


@pytest.mark.parametrize("name, line", figure_lines())
def test_figure_was_measured(name, line):
    """A line of a log stands in that log; any other figure is one of the evidence."""
    if line.startswith(("Loss=", "Test set:", "Best ", "Last ")):
        assert any(line in path.read_text(encoding="utf-8") for path in RESULTS.glob("*.log"))
        return
    assert set(FIGURE.findall(line)) <= known_figures(), f"{name}: {line}"


@pytest.mark.parametrize("name", STEPS)
def test_row_of_the_readme(name):
    """The table's row of a step is made from its runs."""
    row = table.summarize(RUNS[name].values())
    spread = f" ± {row['deviation']:.2f}" if row["runs"] > 1 else ""
    cells = (f"| {row['mean']:.2f}{spread} | {row['runs']} | {row['best']:.2f} | "
             f"{DOCUMENTED[name][1]} |")
    lines = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    assert any(line.startswith(f"| [{name[-1]}]") and cells in line for line in lines), cells


@pytest.mark.parametrize("name", STEPS)
def test_docstring_says_what_the_runs_gave(name):
    """The docstring of a step has its last-epoch mean, best epochs and number of runs."""
    row = table.summarize(RUNS[name].values())
    train = max(max(run["train_accuracy"]) for run in RUNS[name].values())
    words = " ".join(STEPS[name].__doc__.split())
    for figure in (f"{row['mean']:.2f}", f"{row['best']:.2f}", f"{train:.2f}"):
        assert figure in words, figure
    assert re.search(rf"\b{row['runs']} (run|seed)", words) or (
        row["runs"] == 1 and "seed 1" in words)


def test_docstrings_tell_the_first_epochs():
    """Steps 2 and 3 give the range of the first epoch's loss, and how many runs were stuck."""
    ranges = []
    for name in ("step2", "step3"):
        losses = [run["train_loss"][0] for run in RUNS[name].values()]
        ranges.append(f"{min(losses):.2f} to {max(losses):.2f}")
    words = [" ".join(STEPS[name].__doc__.split()) for name in ("step2", "step3")]
    assert ranges[0] in words[0]
    assert f"{ranges[1]}, where step 2 had {ranges[0]}" in words[1]
    stuck = {seed: sum(round(loss, 2) == 2.30 for loss in run["train_loss"])
             for seed, run in RUNS["step2"].items()}
    assert {seed: epochs for seed, epochs in stuck.items() if epochs} == {2: 3}
    assert "one of the five runs (seed 2) stayed at that loss for three epochs" in words[0]


def test_differences_in_percentage_points():
    """Price of step 2 and ahead in the docstrings are those of the runs."""
    rows = re.findall(r"^\| (\d) \|(.*)\|$", OVERFITTING, re.M)
    ahead = {step: cells.split(" | ")[5] for step, cells in rows}
    means = [table.summarize(RUNS[name].values())["mean"] for name in ("step1", "step2")]
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert f"about {means[0] - means[1]:.1f} points" in " ".join(STEPS["step2"].__doc__.split())
    for name, step in STEPS.items():
        words = " ".join(step.__doc__.split())
        assert ahead[name[-1]] in words
        assert re.search(rf"^\| \[{name[-1]}\].*\| {ahead[name[-1]]} \|", readme, re.M)
        points = re.findall(r"(?<![\d.])(\d\.\d\d) (?:percentage )?points", words)
        assert set(points) <= set(ahead.values())


def test_readme_tells_the_results():
    """The sentences above and below the table, from the same runs."""
    words = " ".join((ROOT / "README.md").read_text(encoding="utf-8").split())
    rows = {name: table.summarize(runs.values()) for name, runs in RUNS.items()}
    errors = [round(100 * (100 - rows[name]["mean"])) for name in ("step1", "step4")]
    assert f"its errors on 10,000 test images from {errors[0]} to {errors[1]} on average" in words
    row = rows["step4"]
    best = [max(run["test_accuracy"]) for run in RUNS["step4"].values()]
    assert (f"Step 4 ends at {row['mean']:.2f} ± {row['deviation']:.2f}; the last five epochs of "
            f"its {row['runs']} runs have a mean of {row['last_five']:.2f}, and none of these "
            f"{row['tail']} lies under {row['lowest']:.2f}.") in words
    assert f"the figure that others quote, is {max(best):.2f};" in words
    assert f"theirs between {min(best):.2f} and {max(best):.2f}." in words
    for name, row in rows.items():
        assert re.search(rf"\[Step {name[-1]}\].*?\*Result:\* {row['mean']:.2f}\b", words), name
    for name, sentence in (("step3-no-batch-norm", "the mean is {:.2f}. Pooling"),
                           ("step4-neither", "the mean is {:.2f}. Augmentation")):
        runs = table.read_runs(name[:5], RESULTS / "variants" / name)
        assert sentence.format(table.summarize(runs.values())["mean"]) in words


def test_step1_tells_how_it_overfits():
    words = " ".join(STEPS["step1"].__doc__.split())
    runs = RUNS["step1"].values()
    assert all(run["test_loss"].index(min(run["test_loss"])) == 5 for run in runs)
    for column in ("train_loss", "test_loss"):
        start, end = (fmean(run[column][epoch] for run in runs) for epoch in (5, 14))
        assert f"({start:.4f} to {end:.4f})" in words
        assert column == "test_loss" or 7 < start / end < 8
    assert "training loss falls to less than a seventh" in words
    [trained] = re.findall(r"^\| 1 \|.*?\|.*?\| (\S+) \|", OVERFITTING, re.M)
    assert f"it knows {trained} % of its training images" in words


def test_step2_tells_how_its_loss_settles():
    epochs = [fmean(run["test_loss"][epoch] for run in RUNS["step2"].values())
              for epoch in range(10, 15)]
    end = fmean(run["test_loss"][-1] for run in RUNS["step1"].values())
    words = " ".join(STEPS["step2"].__doc__.split())
    assert f"stays between {min(epochs):.3f} and {max(epochs):.3f}" in words
    assert f"higher than step 1 ends, at {end:.3f}," in words


def test_accuracy_against_time():
    """README compares 8 epochs of step 4 with the documented recipe as results/times does."""
    eight, documented = (
        table.summarize(table.read_runs("step4", RESULTS / "times" / name).values())
        for name in ("epochs-8", "documented"))
    words = " ".join((ROOT / "README.md").read_text(encoding="utf-8").split())
    assert f"In 8 epochs three seeds reach {eight['mean']:.2f} on average, in less than a" in words
    assert f"run here once for 15 epochs, takes to reach {documented['mean']:.2f}." in words
    assert 6 < documented["seconds"] / eight["seconds"] < 7


@pytest.mark.parametrize("name", ["step3", "step4"])
def test_docstrings_tell_what_each_ingredient_is_worth(name):
    """The table in the docstring has the last epochs of the step and of all its variants."""
    rows = {}
    for variant, (step, words, _) in variants.VARIANTS.items():
        if step != name:
            continue
        place = RESULTS / "variants" / variant
        row = table.summarize(table.read_runs(name, place, variants.SEEDS).values())
        assert row["runs"] == len(variants.SEEDS), words
        rows[words] = f"{row['mean']:.2f} ± {row['deviation']:.2f} %"
    told = re.findall(r"^ {8}(\S.*?) {2,}(\S.* %)$", STEPS[name].__doc__, re.M)
    assert dict(told) == rows


def test_step3_tells_how_its_variants_went():
    """The first losses and the last training accuracy are those of the variants' runs."""
    words = " ".join(STEPS["step3"].__doc__.split())
    runs = {name: table.read_runs("step3", RESULTS / "variants" / f"step3-{name}").values()
            for name in ("no-batch-norm", "no-dropout", "no-gap")}
    assert all(round(run["train_loss"][0], 2) == 2.30 for run in runs["no-batch-norm"])
    losses = [run["train_loss"][0] for run in runs["no-gap"]]
    assert f"a loss of {min(losses):.2f} to {max(losses):.2f}" in words
    trained = fmean(run["train_accuracy"][-1] for run in runs["no-dropout"])
    assert f"without dropout it ends at {trained:.2f} %" in words


def test_step4_tells_how_its_variants_went():
    """Epoch 5 with and without the average, and the end without average and schedule."""
    words = " ".join(STEPS["step4"].__doc__.split())
    runs = {name: table.read_runs("step4", RESULTS / "variants" / f"step4-{name}").values()
            for name in ("as-it-is", "no-average", "neither")}
    for epoch, text in ((5, "tests at {:.2f} % in the mean of its three runs"),
                        (9, "At epoch 9 it is at {:.2f} %"), (14, "have caught up, at {:.2f} %")):
        figure = fmean(run["test_accuracy"][epoch] for run in runs["as-it-is"])
        assert text.format(figure) in words
    assert f"with the rate still at {RUNS['step4'][1]['learning_rate'][5]:.2f}" in words
    row = table.summarize(RUNS["step4"].values())
    assert (f"the last five epochs of all runs the mean is {row['last_five']:.2f} %, "
            f"the lowest {row['lowest']:.2f} %") in words
    without = fmean(run["test_accuracy"][5] for run in runs["no-average"])
    assert f"where those without it are at {without:.2f} %" in words
    step3 = table.summarize(RUNS["step3"].values())
    assert table.summarize(runs["neither"])["mean"] < step3["mean"]


@pytest.mark.parametrize("name", [
    pytest.param("step1", marks=pytest.mark.xfail(
        strict=True, reason="best epochs 99.25 in testing and 99.92 in training")),
    "step2", "step3", "step4",
])
def test_documented_figures_are_reached_by_seed_1(name):
    assert_documented(name, [RUNS[name][1]])


@pytest.mark.parametrize("name", STEPS)
def test_documented_figures_are_reached(name):
    assert_documented(name, RUNS[name].values())


def assert_documented(name, runs):
    """Assert that the best epochs of some runs are at or above the documented ones.

    The training accuracy of steps 3 and 4 is no aim: it falls as regularization rises.
    """
    for column, figure in zip(("train_accuracy", "test_accuracy"), DOCUMENTED[name], strict=True):
        if column == "test_accuracy" or name in ("step1", "step2"):
            assert max(max(run[column]) for run in runs) >= float(figure)


def test_step4_is_consistent():
    """The last five epochs of every run have a mean of 99.45 at least."""
    assert min(table.summarize([run])["last_five"] for run in RUNS["step4"].values()) >= 99.45


def test_every_run_has_its_log():
    """Each csv is that of a finished run whose log ends with the same figures."""
    for path in RESULTS.glob("step*-seed*.csv"):
        run = table.read_run(path)
        log = path.with_suffix(".log").read_text(encoding="utf-8")
        logged = re.findall(r"^Test set: .*\((\d+\.\d+)%\)", log, re.M)
        assert [float(value) for value in logged] == run["test_accuracy"], path.name
        assert "Last Test Accuracy" in log


@pytest.mark.mnist
@pytest.mark.skipif(not (ROOT / "data" / "MNIST" / "raw" / "t10k-images-idx3-ubyte").exists(),
                    reason="the real MNIST is not in data/")
def test_committed_weights_give_the_committed_figures():
    assert verify.main([]) == 0


def break_csv(out):
    """Record another accuracy than the run had."""
    path = out / "step3-seed1.csv"
    *rows, last = path.read_text().splitlines()
    cells = last.split(",")
    cells[4] = f"{float(cells[4]) - 3:.2f}"  # 100 images: three of them
    path.write_text("\n".join([*rows, ",".join(cells), ""]))


def break_weights(out):
    """Put noise in the place of the weights."""
    path = out / "step3-seed1.pt"
    state = torch.load(path, weights_only=True)
    torch.save({name: torch.randn_like(value.float()) for name, value in state.items()}, path)


BROKEN = {"nothing": lambda out: None, "figure": break_csv, "weights": break_weights,
          "missing": lambda out: (out / "step3-seed1.pt").unlink(),
          "cut": lambda out: (out / "step3-seed1.pt").write_bytes(b"PK")}


@pytest.mark.parametrize("what", BROKEN)
def test_verify_finds_what_does_not_agree(what, data_dir, tmp_path, capsys):
    STEPS["step3"].main(["--data-dir", str(data_dir), "--out", str(tmp_path), "--no-compile",
                         "--epochs", "2"])
    capsys.readouterr()
    BROKEN[what](tmp_path)
    assert verify.main([str(tmp_path), "--data-dir", str(data_dir)]) == (what != "nothing")
    [line, end] = capsys.readouterr().out.splitlines()
    assert line.startswith("ok   step3" if what == "nothing" else "MISS step3")
    assert end.startswith(f"{int(what == 'nothing')} of 1 ")
