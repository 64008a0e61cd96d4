"""Draw loss, wrong digits and learning rate of some runs, or the pictures of results/.

    python results/graphs.py runs/step4_aug_lr-seed1 ...    curves.png, in the first of the folders
    python results/graphs.py                                the pictures, from the runs kept here

Needs matplotlib; trains nothing. The picture of digits needs MNIST in data/.
"""

import importlib
import sys
from pathlib import Path
from statistics import fmean

import torch
from experiments import HERE, ROOT, SCRIPTS
from matplotlib import pyplot as plt
from matplotlib.ticker import LogLocator
from report import STEPS, column, read_folders, runs_of
from torchvision.datasets import MNIST

COLOURS = ["black", "#d95f02", "#2171b5", "#41ab5d"]  # of the four steps
PANELS = {  # title: column of the history
    "training loss": "train_loss", "wrong training digits, %": "train_accuracy",
    "learning rate after the epoch": "learning_rate",
    "test loss": "test_loss", "wrong test digits, %": "test_accuracy"}
plt.rcParams.update({"font.size": 9, "axes.grid": True, "grid.alpha": 0.3, "savefig.dpi": 200,
                     "axes.titlesize": 10, "figure.constrained_layout.use": True})


def draw_curves(groups, tested="test"):
    """Draw a curve for each run of groups of runs; a group has one colour."""
    figure, axes = plt.subplots(2, 3, figsize=(11, 6.4))
    for axis, (title, name) in zip(axes.flat, PANELS.items(), strict=False):
        for number, (label, runs) in enumerate(groups.items()):
            colour = COLOURS[number] if number < 4 else f"C{number}"
            for run in runs:
                values = column(run, name)
                if "wrong" in title:
                    values = [max(100 - value, 0.01) for value in values]
                axis.plot(values, ".-", color=colour, linewidth=0.8, markersize=4,
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
    return figure


def draw_drilldown():
    """Draw parameters against test accuracy: our runs, and what the course reports."""
    figure, axis = plt.subplots(figsize=(8.5, 4.8))
    for step, colour in zip(STEPS, COLOURS, strict=True):
        last = [column(run, "test_accuracy")[-1] for run in runs_of("steps", step).values()]
        if not last:
            continue
        _, parameters, course = STEPS[step]
        place = int(parameters.replace(",", ""))
        mean = fmean(last)
        axis.errorbar(place, mean, [[mean - min(last)], [max(last) - mean]], color=colour,
                      marker="o", markersize=8, capsize=4, label=f"step {step}: {parameters} "
                      f"weights, {100 * (100 - mean):.0f} of 10,000 digits wrong")
        axis.plot(place, float(course), "x", color="#e6007e", markersize=7, markeredgewidth=2,
                  zorder=4, label="the course: best epoch of its one run" if step == 4 else None)
    axis.set(xscale="log", xlim=(3e3, 2e7), xlabel="weights (parameters) of the network, log scale",
             ylabel="test accuracy, last epoch, %: mean and range of the runs",
             title="In four steps from 6.4 million weights to 9,538, and to fewer wrong digits")
    axis.legend(loc="lower right")
    return figure


def draw_augmentation():
    """Draw ten training digits as they are, and as five epochs may see them."""
    step = importlib.import_module(SCRIPTS[4])
    data = MNIST(ROOT / "data")
    chosen = [data.targets.tolist().index(digit) for digit in range(10)]
    images = data.data[chosen].unsqueeze(1)
    torch.manual_seed(1)
    rows = [step.test_transform(images), *(step.train_transform(images) for _ in range(5))]
    figure, axes = plt.subplots(6, 10, figsize=(8.5, 5.5))
    for axis, image in zip(axes.flat, torch.cat(rows)[:, 0], strict=True):
        axis.imshow(image, cmap="Greys")
        axis.axis("off")
    figure.suptitle("Top row: training digits. Below: what five epochs may see instead")
    return figure


def main():
    """Draw the runs that the command line names or, if none, the pictures of results/."""
    pictures = {}  # figures by the paths of their files
    paths = [Path(argument) for argument in sys.argv[1:]]
    if paths:
        tested = "validation" if "-validation" in paths[0].resolve().name else "test"
        groups = {f"{path}, {len(run)} of {run[-1].get('planned', len(run))} epochs": [run]
                  for path, run in read_folders(paths).items()}
        pictures[paths[0] / "curves.png"] = draw_curves(groups, tested)
    else:
        runs = {f"step {step}": list(runs_of("steps", step).values()) for step in STEPS}
        pictures[HERE / "curves.png"] = draw_curves(runs)
        pictures[HERE / "drilldown.png"] = draw_drilldown()
        if (ROOT / "data" / "MNIST" / "raw").exists():
            pictures[HERE / "augmentation.png"] = draw_augmentation()
    for path, figure in pictures.items():
        figure.savefig(path, metadata={"Software": None})
        print(f"Drawn: {path}")


if __name__ == "__main__":
    main()
