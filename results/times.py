"""Accuracy against time: step 4 in 3, 5, 8 and 15 epochs, beside the documented recipe.

    python results/times.py

The runs of 15 epochs are those in results/. The documented recipe trains the same network as
its notebook did: every image transformed by PIL, in two processes, fp32, not compiled. Runs
are made one at a time; finished ones are skipped. Outputs: results/times/, with a README.md.
"""

import argparse
import sys
from pathlib import Path
from statistics import fmean

from table import BAR, read_runs, show_deviation, summarize
from torch import optim
from torch.utils.data import DataLoader
from torchvision import datasets, transforms
from variants import HERE, ROOT, drop_single_values, run_all

import step4_aug_lr as step4  # variants has put the root on the path
from common import Run, get_loaders, parse_args, prepare, setup, test, train

EPOCHS = (3, 5, 8)
SEEDS = (1, 2, 3)

documented_transform = transforms.Compose([
    transforms.ColorJitter(0.4),
    transforms.RandomAffine(7, shear=10, translate=(0.1, 0.1), scale=(0.8, 1.2)),
    transforms.RandomRotation(7),
    transforms.ToTensor(),
    transforms.Normalize(step4.MEAN, step4.STD),
])


class OnDevice(DataLoader):
    """A DataLoader whose batches are moved to `device`."""

    device = None

    def __iter__(self):
        for images, labels in super().__iter__():
            yield images.to(self.device), labels.to(self.device)


def train_documented(argv):
    """Train by the documented recipe, with the arguments and the outputs of step 4."""
    args = parse_args(["--fp32", "--no-compile", *argv], __doc__, epochs=15, batch_size=128)
    with Run("step4", args) as run:
        setup(args)
        _, test_loader = get_loaders(args, None, step4.test_transform)
        dataset = datasets.MNIST(args.data_dir, train=True, transform=documented_transform)
        train_loader = OnDevice(dataset, args.batch_size, shuffle=True, num_workers=2,
                                persistent_workers=True)
        train_loader.device = args.device
        net = step4.Net()  # with a dropout of 0.03, as documented
        drop_single_values(net)
        model = prepare(net, args)
        optimizer = optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
        scheduler = optim.lr_scheduler.StepLR(optimizer, 8, 0.1)
        for epoch in run.epochs(model, optimizer, scheduler):
            print(f"EPOCH: {epoch}")
            train_loss, train_accuracy, seconds = train(model, train_loader, optimizer, args)
            test_loss, test_accuracy = test(model, test_loader)
            run.record(train_loss, train_accuracy, seconds, test_loss, test_accuracy)
            scheduler.step()


def find_first(run):
    """Return (epoch, seconds of training) of the first test at 99.40 or more, None without one."""
    for epoch, accuracy in enumerate(run["test_accuracy"]):
        if accuracy >= BAR:
            return epoch, sum(run["seconds"][: epoch + 1])
    return None


def make_report(folder):
    """Return the text of README.md; runs of 15 epochs are looked for in the parent of `folder`."""
    lines = [
        "# Accuracy against time",
        "",
        "Test accuracy in per cent; seconds of training alone, mean of the runs; epochs are "
        "counted from 0; \"first\" is the mean of the runs that got there. Documented: PIL "
        "transforms on every image in two processes (none are a little faster here, see bench.md), "
        "StepLR, nn.Dropout(0.03), fp32, not compiled. Made by `results/times.py`.",
        "",
        f"| recipe | epochs | runs | last epoch: mean | deviation | seconds | first {BAR:.2f} |",
        "|---|---|---|---|---|---|---|",
    ]
    places = [("step 4", folder / f"epochs-{epochs}", SEEDS) for epochs in EPOCHS]
    places += [("step 4", folder.parent, SEEDS), ("documented", folder / "documented", (1,))]
    for recipe, place, seeds in places:
        runs = list(read_runs("step4", place, seeds).values()) if place.exists() else []
        if not runs:
            lines.append(f"| {recipe}, {place.name} | | 0 | | | | |")
            continue
        found = summarize(runs)
        deviation = show_deviation(found)
        reached = [first for first in map(find_first, runs) if first]
        words = "never"
        if reached:
            epoch, seconds = map(fmean, zip(*reached, strict=True))
            words = f"epoch {epoch:.3g}, {seconds:.0f} s"
            words += f" ({len(reached)} of {len(runs)} runs)" if len(runs) > 1 else ""
        lines.append(f"| {recipe} | {len(runs[0]['epoch'])} | {len(runs)} | {found['mean']:.3f} | "
                     f"{deviation} | {found['seconds']:.0f} | {words} |")
    return "\n".join([*lines, ""])


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=HERE / "times")
    args, rest = parser.parse_known_args(argv)  # the rest is for the step
    if rest[:1] == ["--documented"]:
        return train_documented([*rest[1:], "--out", str(args.out)])
    jobs = [("step4", seed, args.out / f"epochs-{epochs}",
             [str(ROOT / "step4_aug_lr.py"), *rest, "--epochs", str(epochs)])
            for seed in SEEDS for epochs in EPOCHS]
    jobs.append(("step4", 1, args.out / "documented", [__file__, "--documented", *rest]))
    run_all(jobs)
    args.out.mkdir(parents=True, exist_ok=True)
    report = make_report(args.out)
    Path(args.out, "README.md").write_text(report, encoding="utf-8")
    print(report)


if __name__ == "__main__":
    sys.exit(main())
