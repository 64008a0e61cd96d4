"""Write results/README.md: every run behind a figure, and where the other tables are.

    python results/report.py
"""

from pathlib import Path

from table import HERE, make_table, read_runs

TITLES = {
    "step1": "Step 1: set-up",
    "step2": "Step 2: skeleton",
    "step3": "Step 3: batch normalization, dropout, global average pooling",
    "step4": "Step 4: augmentation and learning-rate schedule",
}
TABLES = ("variants/README.md", "times/README.md", "search/README.md", "overfitting.md")
REPORTS = {
    "fastpath/README.md": "Whether the fast path costs accuracy",
    "bench.md": "Speed, in ratios taken side by side",
}
PICTURES = {
    "curves.png": "Loss and accuracy of the four steps: median and range of the seeds",
    "model.png": "The final model",
    "augmentation.png": "Training digits before and after augmentation",
    "errors.png": "Every test digit that the weights of step 4, seed 1, get wrong",
}


def make_report():
    """Return the text of README.md."""
    lines = [
        "# Results",
        "",
        "Each run of steps 1 to 4 left `stepN-seedS.log` (what it printed, with the machine and "
        "the version of torch in the first line), `.csv` (its history) and `.pt` (weights of the "
        "last epoch; step 1's are too large to keep here). `make verify` tests the weights. "
        "Accuracies are in per cent of the 10,000 test images. They were tested after every "
        "epoch of these runs, which tells the best epochs and chose no setting.",
    ]
    for step, title in TITLES.items():
        runs = read_runs(step)
        if runs:
            names = {f"[seed {seed}]({step}-seed{seed}.log)": run for seed, run in runs.items()}
            lines += ["", f"## {title}", "", make_table(names)]
    for name in TABLES:
        if (HERE / name).exists():
            lines += ["", f"#{(HERE / name).read_text(encoding='utf-8').rstrip()}"]
    lines += ["", "## Speed", ""]
    lines += [f"- [{words}]({name})" for name, words in REPORTS.items() if (HERE / name).exists()]
    for name, words in PICTURES.items():
        if (HERE / name).exists():
            lines += ["", f"## {words}", "", f"![{words}]({name})"]
    return "\n".join([*lines, ""])


def main():
    Path(HERE, "README.md").write_text(make_report(), encoding="utf-8")


if __name__ == "__main__":
    main()
