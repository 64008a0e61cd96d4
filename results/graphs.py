"""Draw the curves of the given runs into the first one's folder, or the pictures of results/."""

import sys
from pathlib import Path
from statistics import fmean

import torch
from experiments import HERE, ROOT, common, read_runs
from matplotlib import pyplot as plt
from matplotlib.ticker import LogLocator
from report import STEPS, read_folders

from step4_aug_lr import test_transform, train_transform

PANELS = {"logged training loss": "train_loss", "logged wrong training digits, %": "train_accuracy",
          "learning rate after the epoch": "learning_rate", "test loss": "test_loss",
          "wrong test digits, %": "test_accuracy"}  # title: column of the history
COLOURS = plt.cycler(color=["black", "#d95f02", "#2171b5", "#41ab5d", "purple", "brown", "grey"])
plt.rcParams.update({"font.size": 9, "axes.titlesize": 10, "axes.grid": True, "grid.alpha": 0.3,
                     "figure.constrained_layout.use": True, "axes.prop_cycle": COLOURS})


def draw_curves(groups, tested="test"):
    """Draw a curve for each run of groups of runs; a group has one colour."""
    _, axes = plt.subplots(2, 3, num="curves", figsize=(11, 6.4))
    for axis, (title, name) in zip(axes.flat, PANELS.items(), strict=False):
        for number, (label, runs) in enumerate(groups.items()):
            for run in runs:
                values = [float(row[name]) for row in run]
                if "wrong" in title:
                    values = [max(100 - value, 0.01) for value in values]
                axis.plot(values, ".-", color=f"C{number}", linewidth=0.8, markersize=4,
                          label=label if run is runs[0] else None)
        axis.set(title=title.replace("test", tested), xlabel="epoch")
        axis.xaxis.get_major_locator().set_params(integer=True)
        if name != "learning_rate":
            axis.set_yscale("log")
            axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5), numticks=20))
            axis.yaxis.set_major_formatter("{x:g}")
            axis.minorticks_off()
    axes[1, 2].axis("off")
    axes[1, 2].legend(*axes[0, 0].get_legend_handles_labels(), loc="center",
                      title="each line is a run")


def draw_drilldown(groups):
    """Draw parameters against test accuracy: our runs, and what the course reports."""
    _, axis = plt.subplots(num="drilldown", figsize=(8.5, 4.8))
    for step, (_, weights, course) in STEPS.items():
        last = [float(run[-1]["test_accuracy"]) for run in groups[f"step {step}"]]
        mean = fmean(last)
        label = f"step {step}: {weights:,} weights, {100 * (100 - mean):.0f} of 10,000 digits wrong"
        axis.errorbar(weights, mean, [[mean - min(last)], [max(last) - mean]], capsize=4,
                      color=f"C{step - 1}", marker="o", markersize=8, label=label)
        axis.plot(weights, course, "x", color="#e6007e", markersize=7, markeredgewidth=2,
                  zorder=4, label="the course: best epoch of its one run" if step == 4 else None)
    axis.set(xscale="log", xlim=(3e3, 2e7), xlabel="weights (parameters) of the network, log scale",
             ylabel="test accuracy, last epoch, %: mean and range of the runs",
             title="In four steps from 6.4 million weights to 9,538, and to fewer wrong digits")
    axis.legend(loc="lower right")


def draw_augmentation():
    """Draw ten training digits as they are, and as five epochs may see them."""
    images, labels = common.read_split(ROOT / "data/MNIST/raw", "train")
    chosen = images[[labels.tolist().index(digit) for digit in range(10)]]
    torch.manual_seed(1)
    rows = [test_transform(chosen), *(train_transform(chosen) for _ in range(5))]
    figure, axes = plt.subplots(6, 10, num="augmentation", figsize=(8.5, 5.5))
    for axis, image in zip(axes.flat, torch.cat(rows)[:, 0], strict=True):
        axis.imshow(image, cmap="gray")
        axis.axis("off")
    figure.suptitle("Top row: training digits. Below: what five epochs may see instead")


def main():
    """Draw the runs that the command line names or, if none, the pictures of results/."""
    paths = [Path(argument) for argument in sys.argv[1:]]
    if paths:
        tested = "validation" if "-validation" in paths[0].resolve().name else "test"
        draw_curves({f"{path}, {len(run)} of {run[-1].get('planned', len(run))} epochs": [run]
                     for path, run in read_folders(paths).items()}, tested)
    else:
        runs = read_runs()
        groups = {f"step {step}": list(runs["steps", step, "as it is"].values()) for step in STEPS}
        draw_curves(groups)
        draw_drilldown(groups)
        draw_augmentation()
    for name in plt.get_figlabels():
        path = (paths or [HERE])[0] / f"{name}.png"
        plt.figure(name).savefig(path, dpi=200, metadata={"Software": None})
        print(f"Drawn: {path}")


if __name__ == "__main__":
    main()
