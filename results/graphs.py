"""Draw the pictures of results/ from the committed runs and weights: python results/graphs.py

Needs matplotlib; trains nothing. Digits are drawn only where MNIST is.
"""

import importlib
import sys
from statistics import fmean, median

import torch
from matplotlib import pyplot as plt
from report import DOCUMENTED, HERE, ROOT, SCRIPTS, rows_of, to_groups
from torch import nn
from torchvision.datasets import MNIST

sys.path.insert(0, str(ROOT))
STEPS = {step: importlib.import_module(script) for step, script in SCRIPTS.items()}
RUNS = {step: list(runs.values()) for step, runs in to_groups(rows_of("results"), ["step"]).items()}
STYLES = {"1": ("#000000", ":", "s"), "2": ("#8c2d04", "--", "^"),  # colour, line, marker;
          "3": ("#2171b5", "-.", "D"), "4": ("#41ab5d", "-", "o")}  # in grey from dark to light
plt.rcParams.update({"font.size": 9, "axes.grid": True, "grid.alpha": 0.3, "savefig.dpi": 200,
                     "axes.titlesize": 10, "figure.constrained_layout.use": True})


def draw_curves():
    """Draw loss and errors by epoch: the median of the seeds, in a band from lowest to highest."""
    figure, axes = plt.subplots(2, 2, figsize=(8.5, 6.6), sharex=True)
    panels = {"train_loss": (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1, 3),  # column: ticks
              "test_loss": (0.01, 0.02, 0.05, 0.1, 0.2),
              "train_accuracy": (0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10),
              "test_accuracy": (0.2, 0.5, 1, 2, 5, 10)}
    for axis, (column, ticks) in zip(axes.flat, panels.items(), strict=True):
        for step, runs in RUNS.items():
            errors = "accuracy" in column
            epochs = [[max(100 - value, 0.01) if errors else value for value in values]
                      for values in zip(*(run[column] for run in runs), strict=True)]
            colour, line, marker = STYLES[step]
            axis.plot([median(values) for values in epochs], line, color=colour, marker=marker,
                      markersize=3.5, label=f"step {step}, seeds: {len(runs)}")
            axis.fill_between(range(len(epochs)), list(map(min, epochs)), list(map(max, epochs)),
                              color=colour, alpha=0.2, linewidth=0)
        words = column.replace("_", " ").replace("train", "training")
        axis.set(title=words.replace("accuracy", "errors, %"), xlabel="epoch", yscale="log")
        axis.set_yticks(ticks, map(str, ticks))
        axis.set_ylim(ticks[0], ticks[-1])
        axis.minorticks_off()
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=4)
    return figure


def draw_drilldown():
    """Draw parameters against test accuracy, measured (filled) and by the course (hollow)."""
    figure, axis = plt.subplots(figsize=(8.5, 4.6))
    for step, runs in RUNS.items():
        size = sum(weights.numel() for weights in STEPS[step].Net().parameters())
        last, (colour, _, marker) = [run["test_accuracy"][-1] for run in runs], STYLES[step]
        mean, side = fmean(last), -1 if step in "13" else 1  # on which side the words are
        axis.errorbar(size, mean, [[mean - min(last)], [max(last) - mean]], color=colour,
                      marker=marker, markersize=8, capsize=4)
        axis.plot(size * 0.83**side, DOCUMENTED[step], marker, color=colour, markersize=8,
                  markerfacecolor="none")
        axis.annotate(f"step {step}\n{size:,} parameters\n{mean:.2f} (n = {len(last)})",
                      (size, mean), xytext=(14 * side, 0), textcoords="offset points",
                      va="center", ha="left" if side > 0 else "right")
    axis.set(xscale="log", xlim=(1e3, 2e7), xlabel="parameters (log scale)", ymargin=0.12,
             ylabel="test accuracy, %", title="filled: last epoch, mean and range of the seeds; "
             "hollow, drawn beside: course, best epoch of one run")
    return figure


def draw_model():
    """Draw the layers of the final model: a stack of feature maps each, and its figures below."""
    figure, net = plt.figure(figsize=(8.5, 2.1), layout="none"), STEPS["4"].Net().eval()
    axis = figure.add_axes((0, 0, 1, 1), xlim=(-38, 812), ylim=(-135, 75))
    axis.axis("off")
    image, field, jump = torch.zeros(1, 1, 28, 28), 1, 1
    for column, layer in enumerate([nn.Identity(), *net.layers]):
        parts = list(layer) if isinstance(layer, nn.Sequential) else [layer]
        size, stride = (torch.tensor(getattr(parts[0], name, 1)).max().item()
                        for name in ("kernel_size", "stride"))
        field, jump, image = field + (size - 1) * jump, jump * stride, layer(image)
        (channels, side), count = image.shape[1:3], sum(p.numel() for p in layer.parameters())
        for offset in range(channels, 0, -1):  # the rearmost map first
            corner = 77 * column - 3 - 0.8 * side + 0.6 * offset, 0.6 * offset
            axis.add_patch(plt.Rectangle(corner, 6 + 1.6 * side, 6 + 1.6 * side, linewidth=0.4,
                                         facecolor="#deebf7", edgecolor="#4a6a94"))
        names = [type(part).__name__.replace("2d", "") for part in parts] if column else ["input"]
        names[0] += f" {size}×{size}" * (column > 0)
        words = [f"{side}×{side}×{channels}", f"{count:,}\nparameters", f"RF {field}", "", *names]
        axis.text(77 * column, -12, "\n".join(words), ha="center", va="top", fontsize=7.5)
    return figure


def show_digits(images, titles, columns, title):
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
    step, data = STEPS["4"], MNIST(ROOT / "data")
    chosen = [data.targets.tolist().index(digit) for digit in range(10)]
    images, _ = data.data[chosen].unsqueeze(1), torch.manual_seed(1)
    rows = [step.test_transform(images), *(step.train_transform(images) for _ in range(5))]
    return show_digits(torch.cat(rows)[:, 0], [""] * 60, 10,
                       "training digits as they are, and below as five epochs may see them")


def draw_errors():
    """Draw every test digit that the weights of step 4, seed 1, get wrong."""
    step, data = STEPS["4"], MNIST(ROOT / "data", train=False)
    net = step.Net().eval()
    net.load_state_dict(torch.load(HERE / f"{SCRIPTS['4']}-seed1.pt", weights_only=True))
    with torch.inference_mode():
        sure, answers = net(step.test_transform(data.data.unsqueeze(1))).exp().max(dim=1)
    wrong = [number for number in sure.argsort(descending=True).tolist()
             if answers[number] != data.targets[number]]
    titles = [f"{data.targets[number]} as {answers[number]}, {100 * sure[number]:.0f}%"
              for number in wrong]
    title = f"step 4, seed 1: {len(wrong)} wrong; above each its label, the answer, how sure it is"
    return show_digits(data.data[wrong], titles, 9, title)


def main():
    """Draw all pictures, those of digits only where MNIST is."""
    draw = {"curves": draw_curves, "drilldown": draw_drilldown, "model": draw_model}
    if (ROOT / "data" / "MNIST" / "raw").exists():
        draw |= {"augmentation": draw_augmentation, "errors": draw_errors}
    for name, make in draw.items():
        make().savefig(HERE / f"{name}.png", metadata={"Software": None})


if __name__ == "__main__":
    main()
