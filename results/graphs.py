"""Draw the graphs of results/ from what is committed there.

    python results/graphs.py

A graph whose inputs are missing is skipped with one line. Everything stays legible in grey:
steps differ in line and marker, not in colour alone.
"""

import argparse
import importlib
import sys
from pathlib import Path
from statistics import fmean, median

import matplotlib
import torch
from table import read_runs
from torch import nn

matplotlib.use("Agg")
from matplotlib import pyplot as plt  # noqa: E402 - once it is known that there is no window
from matplotlib.patches import Rectangle  # noqa: E402

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
sys.path.insert(0, str(ROOT))
from common import RandomAffine, read_split  # noqa: E402

MODULES = {path.name.split("_")[0]: importlib.import_module(path.stem)
           for path in sorted(ROOT.glob("step*_*.py"))}
STYLES = {  # colour, line, marker: dark to light, so that grey keeps the order
    "step1": ("#000000", ":", "s"),
    "step2": ("#8c2d04", "--", "^"),
    "step3": ("#2171b5", "-.", "D"),
    "step4": ("#41ab5d", "-", "o"),
}
DOCUMENTED = {"step1": 99.26, "step2": 98.69, "step3": 99.16, "step4": 99.52}  # best test epoch
WIDTH = 8.5  # inches; README shows 850 pixels, so 1 point is 1.4 of them
plt.rcParams.update({
    "font.size": 9.5, "axes.grid": True, "grid.alpha": 0.3, "axes.titlesize": 10.5,
    "figure.constrained_layout.use": True, "axes.spines.top": False, "axes.spines.right": False,
    "savefig.dpi": 200,
})


class Missing(Exception):
    """What a graph is made of is not there."""


def all_runs(folder):
    """Return the finished runs of every step; raise Missing where a step has none."""
    runs = {step: list(read_runs(step, folder).values()) for step in MODULES}
    absent = [step for step, found in runs.items() if not found]
    if absent:
        raise Missing(f"finished runs of {', '.join(absent)}")
    return runs


def read_digits(data_dir, prefix):
    """Return one split of MNIST; raise Missing where it is not there."""
    if not Path(data_dir, "MNIST", "raw", f"{prefix}-images-idx3-ubyte").exists():
        raise Missing(f"MNIST in {data_dir}")
    return read_split(data_dir, prefix)


def draw_curves(args):
    """Loss and accuracy of training and test; the line is the median, the band all seeds.

    Accuracy is drawn by its mistakes: from 90 to 99 % is as far as from 99 to 99.9 %. The test
    loss has a scale of its own, on which it can be seen to settle or to rise.
    """
    runs = all_runs(args.folder)
    figure, axes = plt.subplots(2, 2, figsize=(WIDTH, 6.6), sharex=True)
    axes[1, 1].sharey(axes[1, 0])
    for row, quantity in zip(axes, ("loss", "accuracy"), strict=True):
        for axis, split in zip(row, ("training", "test"), strict=True):
            axis.set_title(f"{split} {quantity}")
            axis.set_yscale("log")
            for step, found in runs.items():
                columns = [run[f"{split.removesuffix('ing')}_{quantity}"] for run in found]
                if quantity == "accuracy":
                    columns = [[max(100 - value, 0.01) for value in run] for run in columns]
                epochs = list(zip(*columns, strict=True))  # of each, the values of all seeds
                x, (colour, line, marker) = range(len(epochs)), STYLES[step]
                axis.plot(x, list(map(median, epochs)), line, color=colour, marker=marker,
                          markersize=3.5, linewidth=1.4,
                          label=f"step {step[-1]} ({len(found)} seed{'s' * (len(found) > 1)})")
                axis.fill_between(x, list(map(min, epochs)), list(map(max, epochs)),
                                  color=colour, alpha=0.2, linewidth=0)
    axes[0, 0].axhline(2.303, color="grey", linewidth=0.8)
    axes[0, 0].text(14, 2.0, "2.303: guessing", ha="right", va="top", color="dimgrey", fontsize=9)
    axes[0, 0].set_ylabel("loss (log scale)")
    axes[0, 1].set_ylim(0.012, 0.25)
    axes[0, 1].minorticks_off()
    axes[0, 1].set_yticks(losses := (0.02, 0.05, 0.1, 0.2), map(str, losses))
    axes[1, 0].set_ylabel("accuracy, % (log scale of mistakes)")
    axes[1, 0].set_ylim(12, 0.02)
    mistakes = (10, 5, 2, 1, 0.5, 0.2, 0.1, 0.05, 0.02)
    axes[1, 0].set_yticks(mistakes, [f"{100 - value:g}" for value in mistakes])
    for axis in axes[1]:
        axis.minorticks_off()
        axis.set_xlabel("epoch")
        axis.set_xticks(range(0, 15, 2))
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=4,
                  frameon=False)
    return figure


def draw_drilldown(args):
    """Parameters against last-epoch test accuracy, beside the documented best epochs."""
    runs = all_runs(args.folder)
    figure, axis = plt.subplots(figsize=(WIDTH, 4.6))
    for step, found in runs.items():
        size = sum(p.numel() for p in MODULES[step].Net().parameters())
        last = [run["test_accuracy"][-1] for run in found]
        mean, colour, marker = fmean(last), STYLES[step][0], STYLES[step][2]
        axis.errorbar(size, mean, [[mean - min(last)], [max(last) - mean]], color=colour,
                      marker=marker, markersize=8, capsize=4)
        left = step in ("step1", "step3")  # on which side the words are
        axis.plot(size * (1.2 if left else 0.83), DOCUMENTED[step], marker, markersize=8,
                  markerfacecolor="none", color=colour)  # beside, so that none hides the other
        words = f"step {step[-1]}\n{size:,} parameters\n{mean:.2f} (n = {len(last)})"
        axis.annotate(words, (size, mean), xytext=(-14 if left else 14, 0), va="center",
                      textcoords="offset points", ha="right" if left else "left")
    axis.plot([], [], "ko", markersize=8, label="last epoch: mean, lowest and highest of the seeds")
    axis.plot([], [], "ko", markersize=8, markerfacecolor="none",
              label="documented: best epoch of one run")
    axis.legend(loc="lower right", frameon=False)
    axis.set_xscale("log")
    axis.set_xlim(1e3, 2e7)
    axis.margins(y=0.12)
    lasts = [run["test_accuracy"][-1] for found in runs.values() for run in found]
    axis.set_ylim(bottom=min([*DOCUMENTED.values(), *lasts]) - 0.1)
    axis.set_xlabel("parameters (log scale)")
    axis.set_ylabel("test accuracy, %")
    return figure


def describe(net):
    """Follow one image through the layers of a net.

    Returns:
        list[tuple]: for the input and each layer: words, shape (channels, height, width),
        parameters, receptive field.
    """
    image, field, jump = torch.zeros(1, 1, 28, 28), 1, 1
    rows = [(["input"], tuple(image.shape[1:]), 0, field)]
    for layer in net.eval().layers:
        words = []
        for part in layer.modules():
            size = getattr(part, "kernel_size", None)
            if size:
                size, stride = (pair if isinstance(pair, int) else pair[0]
                                for pair in (size, part.stride))
                field, jump = field + (size - 1) * jump, jump * stride
            name = {nn.Conv2d: f"{size}×{size} conv", nn.MaxPool2d: f"max\npool {size}",
                    nn.AvgPool2d: f"average\npool {size}", nn.ReLU: "ReLU",
                    nn.BatchNorm2d: "batch\nnorm"}.get(type(part))
            dropout = isinstance(part, (nn.Dropout, nn.Dropout2d)) and part.p
            words += [name] if name else [f"dropout\n{part.p:g}"] if dropout else []
        image = layer(image)
        count = sum(p.numel() for p in layer.parameters())
        rows.append((words, tuple(image.shape[1:]), count, field))
    return rows


def draw_model(args):
    """The final model: each stage as a stack of feature maps, with its figures."""
    rows = describe(MODULES["step4"].Net())
    words = ["\n".join(row[0]) for row in rows]
    below = 155 + 15 * max(text.count("\n") for text in words)  # in pixels of README, as all here
    figure = plt.figure(figsize=(WIDTH, (below + 75) / 100), layout="none")
    axis = figure.add_axes((0, 0, 1, 1), xlim=(0, 850), ylim=(below + 75, 0))
    axis.axis("off")
    for y, name in ((12, "shape"), (37, "parameters"), (62, "receptive field")):
        axis.text(8, below + y, name, va="center", fontsize=8.5)
        axis.axhline(below + y - 12, color="lightgrey", linewidth=0.6)
    for column, (_, (channels, side, side), count, field) in enumerate(rows):
        x, size = 133 + 68 * column, 6 + 44 * side / 28
        for k in reversed(range(channels)):  # the rearmost first
            shift = 0.6 * (k - channels / 2)
            axis.add_patch(Rectangle(
                (x - size / 2 + shift, 85 - size / 2 - shift), size, size, linewidth=0.35,
                facecolor="#deebf7" if column else "white", edgecolor="#4a6a94"))
        axis.text(x, 128, words[column], ha="center", va="top", fontsize=8.5)
        for y, text in ((12, f"{side}×{side}×{channels}"), (37, f"{count:,}"), (62, str(field))):
            axis.text(x, below + y, text, ha="center", va="center", fontsize=8)
    axis.text(425, 22, f"step 4: {sum(row[2] for row in rows):,} parameters", ha="center",
              fontsize=10.5)
    return figure


def draw_augmentation(args):
    """Training digits as they are, and as five epochs may see them."""
    images, labels = read_digits(args.data_dir, "train")
    step = MODULES["step4"]
    chosen = torch.stack([(labels == digit).nonzero()[0, 0] for digit in range(10)])
    torch.manual_seed(1)
    rows = [step.test_transform(images[chosen])]
    rows += [step.train_transform(images[chosen]) for _ in range(5)]
    figure, axes = plt.subplots(len(rows), 10, figsize=(WIDTH, 5.4))
    for row, batch, name in zip(axes, rows, ["as it is", *["augmented"] * 5], strict=True):
        for axis, image in zip(row, batch, strict=True):
            show(axis, image, rows[0].min(), rows[0].max())
        row[0].set_ylabel(name)
    [affine] = (part for part in step.train_transform.transforms if isinstance(part, RandomAffine))
    low, high = affine.scale
    figure.suptitle(f"rotation up to {affine.degrees}°, shear up to {affine.shear}°, scale "
                    f"{low:g} to {high:g}, shift up to {affine.translate:g} of the side",
                    fontsize=10.5)
    return figure


def draw_errors(args):
    """Every test digit that the seed-1 weights of step 4 get wrong."""
    weights = args.folder / "step4-seed1.pt"
    if not weights.exists():
        raise Missing(weights)
    images, labels = read_digits(args.data_dir, "t10k")
    step = MODULES["step4"]
    net = step.Net().eval()
    net.load_state_dict(torch.load(weights, map_location="cpu", weights_only=True))
    with torch.inference_mode():
        output = torch.cat([net(step.test_transform(part)) for part in images.split(1000)])
    probability, answer = output.exp().max(dim=1)
    wrong = (answer != labels).nonzero().flatten()
    wrong = wrong[probability[wrong].argsort(descending=True)]
    columns = 9
    lines = -(-len(wrong) // columns)
    figure, axes = plt.subplots(lines, columns, squeeze=False, figsize=(WIDTH, 0.6 + 1.15 * lines))
    for axis in axes.flat[len(wrong):]:
        axis.axis("off")
    for axis, index in zip(axes.flat, wrong.tolist(), strict=False):
        show(axis, images[index], 0, 255)
        sure = ">99" if probability[index] > 0.995 else f"{100 * probability[index]:.0f}"
        axis.set_xlabel(f"{labels[index]} as {answer[index]}, {sure}%", fontsize=9, labelpad=2)
    figure.suptitle(f"step 4, seed 1: {len(wrong)} wrong of {len(images):,}. Below each digit: "
                    "label, prediction, its probability", fontsize=10.5)
    return figure


def show(axis, image, low, high):
    """Draw one digit 1×28×28, black on white, without ticks."""
    axis.imshow(image[0], cmap="Greys", vmin=low, vmax=high)
    axis.set(xticks=[], yticks=[])
    axis.grid(False)
    axis.spines[:].set(visible=True, color="lightgrey")


GRAPHS = {"curves": draw_curves, "drilldown": draw_drilldown, "model": draw_model,
          "augmentation": draw_augmentation, "errors": draw_errors}


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", nargs="?", type=Path, default=HERE, help="results by default")
    parser.add_argument("--data-dir", type=Path, default=ROOT / "data")
    args = parser.parse_args(argv)
    for name, draw in GRAPHS.items():
        try:
            figure = draw(args)
        except Missing as missing:
            print(f"{name}.png: skipped, missing: {missing}")
            continue
        figure.savefig(args.folder / f"{name}.png", metadata={"Software": None})
        plt.close(figure)
        print(args.folder / f"{name}.png")


if __name__ == "__main__":
    main()
