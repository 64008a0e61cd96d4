"""Draw the runs in the given folders or, without any, the pictures of results/."""

import argparse
import math
import os
import sys
import textwrap
from pathlib import Path
from statistics import fmean

os.environ["MPLBACKEND"] = "agg"  # needs no screen; a notebook's value fails on import

import report
import torch
from experiments import HERE, ROOT, common, write_rows
from matplotlib import pyplot as plt
from PIL import Image

import step4_aug_lr as step4

DARK, LIGHT = "#12355b", "#ee8722"  # in grey too
plt.rcParams.update({
    "font.size": 10, "axes.titlesize": 10, "figure.titlesize": 12, "axes.grid": True,
    "grid.alpha": 0.3, "axes.spines.top": False, "axes.spines.right": False, "savefig.dpi": 160,
    "figure.constrained_layout.use": True, "axes.formatter.min_exponent": 4})


def write(axis, words, place, colour, offset=(8, -4)):
    """Write words beside a place in a panel, `offset` points away."""
    axis.annotate(words, place, offset, textcoords="offset points", color=colour, weight="bold")


def draw_lines(axis, runs, column, colour, style="-"):
    """Draw a thin line for each run, and a thick one for their mean; return the mean."""
    epochs = list(zip(*(report.get_series(run, column) for run in runs), strict=True))
    mean = list(map(fmean, epochs))
    axis.plot(epochs, style, color=colour, linewidth=0.7, markersize=0, alpha=0.6)
    axis.plot(mean, style, color=colour, linewidth=2, markersize=4)
    return mean


def draw_dots(axis, rows):
    """Draw rows, (name, runs, colour), of dots: wrong digits of each run, their mean as a tick."""
    for number, (_, runs, colour) in enumerate(rows):
        wrong = report.count_wrong(runs)
        axis.plot(wrong, [number] * len(wrong), "o", color=colour, markersize=4)
        axis.plot(fmean(wrong), number, "|", color=colour, markersize=20, markeredgewidth=3)
        write(axis, f"{fmean(wrong):.0f}", (fmean(wrong), number), colour, (-7, 12))
    axis.set_yticks(range(len(rows)), [name for name, _, _ in rows])
    axis.set(ylim=(len(rows) - 0.5, -0.8), xlabel="wrong digits of 10,000")
    axis.set_xlim(0, 1.05 * axis.get_xlim()[1])
    axis.grid(axis="y", visible=False)


def draw_steps():
    """Draw how training and test part in step 1, and all steps' weights and wrong digits."""
    found = {job.step: runs for job, runs in report.find_runs(report.STEPS, ["steps"])}
    figure, axes = plt.subplots(1, 2, num="step1", figsize=(8, 3.9))
    figure.suptitle("Step 1 learns its training digits by heart: on them it goes on improving,\n"
                    "but after epoch 5 it hardly improves on test digits")
    for axis, column, title in ((axes[0], "loss", "loss"),
                                (axes[1], "accuracy", "wrong digits of 10,000, as logged")):
        for part, words, colour, style in (("train", "training digits", DARK, "o-"),
                                           ("test", "test digits", LIGHT, "s--")):
            mean = draw_lines(axis, found[1], f"{part}_{column}", colour, style)
            write(axis, words, (8, mean[8]), colour, (4, 10))
        axis.set(title=f"{title}, log scale", xlabel="epoch", yscale="log")
        axis.yaxis.set_major_formatter("{x:g}")

    figure, axis = plt.subplots(num="drilldown", figsize=(8, 4.5))
    figure.suptitle("From 6.4 million weights to 9,538: first more digits are wrong, then fewer")
    for step, runs in found.items():
        weights, course = report.STEPS[step]
        wrong = report.count_wrong(runs)
        axis.plot([weights] * len(wrong), wrong, "o", color=DARK, markersize=4)
        axis.plot(weights, fmean(wrong), "o", color=DARK, markersize=10)
        crosses = axis.plot(weights, course, "x", color=LIGHT, markersize=9, markeredgewidth=2.5)
        write(axis, f"step {step}: {weights:,} weights,\n{fmean(wrong):.0f} wrong digits",
              (weights, fmean(wrong)), DARK, (14 if step > 1 else -160, -9))
    axis.legend(crosses, ["the course: best epoch of its one run"], loc="lower right")
    axis.set(xscale="log", xlim=(3e3, 2e7), ylim=(0, None), xlabel="weights, log scale",
             ylabel="wrong digits of 10,000, last epoch:\neach run, and their mean")
    axis.xaxis.set_major_formatter("{x:,.0f}")


def draw_normalization():
    """Draw how large step 2's values are after each layer, and what parts of step 3 are worth."""
    rows = report.measure_activations()
    write_rows(HERE / "activations.csv", rows)
    figure, axis = plt.subplots(num="step2", figsize=(8, 4.2))
    figure.suptitle("Before training, step 2's values shrink a thousandfold on their way;\n"
                    "He initialization or batch normalization keeps them up")
    for name, colour, style in (("as it is", DARK, "o-"), ("He initialization", LIGHT, "s--"),
                                ("batch normalization", "black", "^:")):
        values = [float(row[name]) for row in rows]
        axis.plot(values, style, color=colour, linewidth=2)
        write(axis, name, (8, values[-1]), colour)
    axis.set(xlim=(-0.3, 10.5), yscale="log",
             ylabel="size of the values (root mean square), log scale")
    axis.yaxis.set_major_formatter("{x:g}")
    axis.set_xticks(range(9), ["input", *range(1, 8), "layer 8"])

    figure, axis = plt.subplots(num="step3", figsize=(8, 4.4))
    figure.suptitle("Of the parts tried, batch normalization is what counts: with it (dark blue)\n"
                    "both networks get far fewer digits wrong than without it (orange)")
    rows = []
    for job, runs in report.find_runs([2, 3], ["steps", "ingredients"]):
        with_it = (job.step == 3) != ("batch normalization" in job.name)  # a name tells a change
        rows.append((f"step {job.step}:\n{job.name}", runs, DARK if with_it else LIGHT))
    draw_dots(axis, rows)


def draw_step4():
    """Draw four schedules of the learning rate, and what augmentation saves."""
    tables = ["steps", "ingredients", "digits"]
    found = {job.name: runs for job, runs in report.find_runs([4], tables)}
    figure, axes = plt.subplots(2, 3, num="step4", figsize=(8, 5.8))
    figure.suptitle("A high rate that falls gets the fewest digits wrong;\n"
                    "augmentation helps where there are few digits to learn from")
    for axis, name, title, colour, style in (
            (axes[0, 0], "constant 0.01", "a constant 0.01", DARK, ":"),
            (axes[0, 1], "constant 0.1", "a constant 0.1", LIGHT, ":"),
            (axes[1, 0], "peak 0.01", "0.01, falling", DARK, "-"),
            (axes[1, 1], "as it is", "0.1, falling (step 4)", LIGHT, "-")):
        mean = draw_lines(axis, found[name], "test_accuracy", colour)
        write(axis, f"{mean[-1]:.0f}", (len(mean) - 1, mean[-1]), colour, (3, -4))
        draw_lines(axes[0, 2], found[name][:1], "learning_rate", colour, style)
        axis.set(title=title, ylim=(0, 250), xlim=(-0.5, 17), xlabel="epoch",
                 ylabel="wrong test digits of 10,000" if axis in axes[:, 0] else "")
    axes[0, 2].set(title="the rates (dotted: constant)", xlabel="after epoch")
    draw_dots(axes[1, 2], [
        ("3,000,\nas they are", found["3,000 digits, no augmentation"], "grey"),
        ("3,000,\naugmented", found["3,000 digits"], "black"),
        ("all,\nas they are", found["no augmentation"], "grey"),
        ("all,\naugmented", found["as it is"], "black")])
    axes[1, 2].set_title("3,000 or all training digits")


def draw_digits():
    """Draw training digits as five epochs may see them, and test digits that step 4 gets wrong."""
    images, labels = common.read_split(ROOT / "data/MNIST/raw", "train")
    chosen = images[[labels.tolist().index(digit) for digit in range(10)]]
    torch.manual_seed(1)
    rows = [step4.test_transform(chosen), *(step4.train_transform(chosen) for _ in range(5))]
    most = step4.AUGMENTATION
    network = step4.Net()
    common.load_weights(network, HERE / "step4_aug_lr-seed1" / "weights.pt")
    images, labels = common.read_split(ROOT / "data/MNIST/raw", "t10k")
    wrong = report.find_wrong(network, step4.test_transform, images, labels)
    for name, shown, title in (
            ("augmentation", [(image, "") for image in torch.cat(rows)],
             "Top row: training digits. Below: what five epochs may see instead, turned, slanted,\n"
             f"stretched and shifted, each alone by at most {math.degrees(math.atan(most)):.0f} "
             f"degrees, {100 * most:.0f} %, {14 * most:.1f} pixels"),
            ("wrong", [(images[index], f"{label} → {answer}") for index, label, answer in wrong],
             f"The {len(wrong)} test digits that step 4 (seed 1) gets wrong: "
             "label → the network's answer")):
        lines = math.ceil(len(shown) / 10)
        plt.figure(name, figsize=(8, 0.95 * lines + 0.6)).suptitle(title)
        for number, (image, words) in enumerate(shown, 1):
            axis = plt.subplot(lines, 10, number, title=words)
            axis.imshow(image[0], cmap="gray")
            axis.axis("off")


def draw_folders(runs):
    """Draw loss, wrong digits and rate, a column a run; of more than four the tests, in one."""
    many = len(runs) > 4
    figure, axes = plt.subplots(3, 1 if many else len(runs), num="curves", figsize=(8, 8),
                                squeeze=False, sharex=True, sharey="row")
    shown = {}  # a line for each label
    for number, (path, run) in enumerate(runs.items()):
        folder = path.resolve()
        tested = "validation" if "-validation" in folder.name else "test"
        head = f"{folder.parent.name}/{folder.name}, epochs: {run[-1]['epochs']}"
        lines = [("test", tested, LIGHT, "s--"), ("train", "training, as logged", DARK, "o-")]
        if many:
            lines = [("test", f"{head} ({tested})", f"C{number}", "osv^D"[number % 5] + "-")]
        column = axes[:, 0 if many else number]
        for part, label, colour, style in lines:
            draw_lines(column[0], [run], f"{part}_loss", colour, style)
            draw_lines(column[1], [run], f"{part}_accuracy", colour, style)
            shown[label] = column[0].lines[-1]
        draw_lines(column[2], [run], "learning_rate", colour, style)
        column[0].set_title("" if many else textwrap.fill(head, 84 // len(runs)))
        column[2].set_xlabel("epoch")
        column[2].xaxis.get_major_locator().set_params(integer=True)
    axes[0, 0].set(ylabel="loss", yscale="log")
    axes[1, 0].set_yscale("symlog", linthresh=10)  # it can show 0
    axes[1, 0].set(ylabel="wrong digits of 10,000", ylim=(0, None))
    axes[2, 0].set(ylabel="learning rate", ylim=(0, None))
    figure.legend(shown.values(), shown, loc="outside lower center")


def main():
    """Draw, save, and say where; return 1 if a folder cannot be drawn."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folders", nargs="*", type=Path, help="folders of runs")
    folders = parser.parse_args().folders
    runs, status = {}, 0
    for folder in folders:
        try:
            runs |= report.read_folders([folder])
        except SystemExit as error:
            print(error, file=sys.stderr)
            status = 1
    if runs:
        draw_folders(runs)
    elif not folders:
        for draw in (draw_steps, draw_normalization, draw_step4, draw_digits):
            draw()
    for name in plt.get_figlabels():
        path = next(iter(runs), HERE) / f"{name}.png"
        plt.figure(name).savefig(path, metadata={"Software": None})
        Image.open(path).convert("RGB").quantize(64).save(path)  # a third of the bytes
        print(f"Drawn: {path}")
    return status


if __name__ == "__main__":
    sys.exit(main())
