"""Draw loss, wrong digits and learning rate of some runs, or the pictures of results/.

    python results/graphs.py runs/step4_aug_lr-seed1 ...    curves.png, in the first of the folders
    python results/graphs.py                                the pictures, from the runs kept here

Needs matplotlib; trains nothing. Pictures of digits are drawn only where MNIST is in data/.
"""

import importlib
import sys
from pathlib import Path
from statistics import fmean, median

import torch
from experiments import HERE, ROOT, SCRIPTS
from matplotlib import pyplot as plt
from matplotlib.ticker import LogLocator
from report import STEPS, column, read_folders, runs_of
from torch import nn
from torchvision.datasets import MNIST

STYLES = [("#000000", ":", "s"), ("#8c2d04", "--", "^"), ("#2171b5", "-.", "D"),
          ("#41ab5d", "-", "o")]  # of the four steps: colour, line, marker
PANELS = {  # title: column of the history
    "training loss": "train_loss", "wrong training digits, %": "train_accuracy",
    "learning rate after the epoch": "learning_rate",
    "test loss": "test_loss", "wrong test digits, %": "test_accuracy"}
plt.rcParams.update({"font.size": 9, "axes.grid": True, "grid.alpha": 0.3, "savefig.dpi": 200,
                     "axes.titlesize": 10, "figure.constrained_layout.use": True})


def draw_curves(groups, validation=False):
    """Draw curves of groups of runs: the median, in a band from lowest to highest."""
    figure, axes = plt.subplots(2, 3, figsize=(11, 6.4))
    for axis, (title, name) in zip(axes.flat, PANELS.items(), strict=False):
        for number, (label, runs) in enumerate(groups.items()):
            colour, line, marker = STYLES[number % 4] if number < 4 else (f"C{number}", "-", ".")
            values = [column(run, name) for run in runs]
            if "wrong" in title:
                values = [[max(100 - value, 0.01) for value in run] for run in values]
            epochs = list(zip(*values, strict=True))
            axis.plot(list(map(median, epochs)), line, color=colour, marker=marker, markersize=3.5,
                      label=label)
            axis.fill_between(range(len(epochs)), list(map(min, epochs)), list(map(max, epochs)),
                              color=colour, alpha=0.2, linewidth=0)
        axis.set(title=title.replace("test", "validation") if validation else title,
                 xlabel="epoch")
        axis.xaxis.get_major_locator().set_params(integer=True)
        if name != "learning_rate":
            axis.set_yscale("log")
            axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 3, 5), numticks=20))
            axis.yaxis.set_major_formatter("{x:g}")
            axis.minorticks_off()
    axes[1, 2].axis("off")
    several = max(map(len, groups.values())) > 1
    axes[1, 2].legend(*axes[0, 0].get_legend_handles_labels(), loc="center", alignment="left",
                      title="line: median of the runs\nband: lowest to highest" if several else "")
    return figure


def draw_drilldown():
    """Draw parameters against test accuracy: our runs, and what the course reports."""
    figure, axis = plt.subplots(figsize=(8.5, 4.8))
    corners = [("center", 0, 28), ("left", 12, -22), ("right", -14, 0), ("left", 14, 0)]
    path = []
    for step, style, (side, right, up) in zip(STEPS, STYLES, corners, strict=True):
        last = [column(run, "test_accuracy")[-1] for run in runs_of("steps", step).values()]
        if not last:
            continue
        _, parameters, course = STEPS[step]
        mean = fmean(last)
        path.append((int(parameters.replace(",", "")), mean))
        axis.errorbar(*path[-1], [[mean - min(last)], [max(last) - mean]], color=style[0],
                      marker=style[2], markersize=8, capsize=4, linestyle="none", zorder=3,
                      label=f"step {step}: mean and range of {len(last)} runs")
        [cross] = axis.plot(path[-1][0], float(course), "x", color="#e6007e", markersize=7,
                            markeredgewidth=2, zorder=4)
        words = f"step {step}: {parameters} weights,\n{100 * (100 - mean):.0f} of 10,000 wrong"
        axis.annotate(words, path[-1], xytext=(right, up), textcoords="offset points",
                      va="center", ha=side)
    cross.set_label("the course: best epoch of its one run")
    axis.plot(*zip(*path, strict=True), color="#999999", linewidth=1, zorder=1)
    axis.set(xscale="log", xlim=(1e3, 3e7), xlabel="weights (parameters) of the network, log scale",
             ymargin=0.15, ylabel="test accuracy after the last epoch, %",
             title="In four steps from 6.4 million weights to 9,538, and to fewer wrong digits")
    axis.legend(loc="lower right")
    return figure


def draw_model():
    """Draw the layers of the final model: a stack of feature maps each, and its figures below."""
    figure = plt.figure(figsize=(8.5, 2.1), layout="none")
    axis = figure.add_axes((0, 0, 1, 1), xlim=(-38, 812), ylim=(-135, 75))
    axis.axis("off")
    image = torch.zeros(1, 1, 28, 28)
    field = 1  # receptive field
    stride = 1  # product of all strides so far
    net = importlib.import_module(SCRIPTS[4]).Net().eval()
    for place, layer in enumerate([nn.Identity(), *net.layers]):
        image = layer(image)
        _, channels, side, _ = image.shape
        parts = list(layer) if isinstance(layer, nn.Sequential) else [layer]
        names = [type(part).__name__.replace("2d", "") for part in parts]
        if place == 0:
            names = ["input"]
        else:
            size = torch.tensor(parts[0].kernel_size).max().item()
            field += (size - 1) * stride
            stride *= torch.tensor(parts[0].stride).max().item()
            names[0] += f" {size}×{size}"
        for offset in range(channels, 0, -1):  # the rearmost map first
            corner = (77 * place - 3 - 0.8 * side + 0.6 * offset, 0.6 * offset)
            axis.add_patch(plt.Rectangle(corner, 6 + 1.6 * side, 6 + 1.6 * side, linewidth=0.4,
                                         facecolor="#deebf7", edgecolor="#4a6a94"))
        count = sum(weights.numel() for weights in layer.parameters())
        words = [f"{side}×{side}×{channels}", f"{count:,}\nparameters", f"RF {field}", "", *names]
        axis.text(77 * place, -12, "\n".join(words), ha="center", va="top", fontsize=7.5)
    return figure


def draw_digits(images, titles, columns, title):
    """Draw images N×28×28, black on white, each below its title."""
    rows = -(-len(images) // columns)
    figure, axes = plt.subplots(rows, columns, squeeze=False, figsize=(8.5, 0.5 + 1.1 * rows))
    for axis in axes.flat:
        axis.axis("off")
    for axis, image, words in zip(axes.flat, images, titles, strict=False):
        axis.imshow(image, cmap="Greys")
        axis.set_title(words, fontsize=8)
    figure.suptitle(title, fontsize=10)
    return figure


def draw_augmentation():
    """Draw ten training digits as they are, and as five epochs may see them."""
    step = importlib.import_module(SCRIPTS[4])
    data = MNIST(ROOT / "data")
    chosen = [data.targets.tolist().index(digit) for digit in range(10)]
    images = data.data[chosen].unsqueeze(1)
    torch.manual_seed(1)
    rows = [step.test_transform(images), *(step.train_transform(images) for _ in range(5))]
    return draw_digits(torch.cat(rows)[:, 0], [""] * 60, 10,
                       "Top row: training digits. Below: what five epochs may see instead")


def draw_errors():
    """Draw every test digit that the weights of step 4, seed 1, get wrong."""
    step = importlib.import_module(SCRIPTS[4])
    data = MNIST(ROOT / "data", train=False)
    net = step.Net().eval()
    net.load_state_dict(torch.load(HERE / f"{SCRIPTS[4]}-seed1" / "weights.pt", weights_only=True))
    with torch.inference_mode():
        sure, answers = net(step.test_transform(data.data.unsqueeze(1))).softmax(dim=1).max(dim=1)
    wrong = [number for number in sure.argsort(descending=True).tolist()
             if answers[number] != data.targets[number]]
    titles = [f"{data.targets[number]} read as {answers[number]}\n{100 * sure[number]:.0f} % sure"
              for number in wrong]
    return draw_digits(data.data[wrong], titles, 9,
                       f"The {len(wrong)} test digits of 10,000 that step 4, seed 1, gets wrong")


def main():
    """Draw the runs that the command line names or, if none, the pictures of results/."""
    if sys.argv[1:]:
        paths = [Path(argument).expanduser() for argument in sys.argv[1:]]
        groups = {f"{name}{', unfinished' * ('planned' in run[-1])}": [run]
                  for name, run in read_folders(paths).items()}
        draw_curves(groups, "-validation" in paths[0].resolve().name).savefig(
            paths[0] / "curves.png")
        print(f"Drawn: {paths[0] / 'curves.png'}")
        return
    runs = {step: list(runs_of("steps", step).values()) for step in STEPS}
    pictures = {"curves": draw_curves({f"step {step}, {len(found)} runs": found
                                       for step, found in runs.items() if found}),
                "drilldown": draw_drilldown(), "model": draw_model()}
    if (ROOT / "data" / "MNIST" / "raw").exists():
        pictures |= {"augmentation": draw_augmentation(), "errors": draw_errors()}
    for name, figure in pictures.items():
        figure.savefig(HERE / f"{name}.png", metadata={"Software": None})


if __name__ == "__main__":
    main()
