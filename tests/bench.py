"""Measure the speed of the suite: ratios of times that were taken in turn, in one run.

    python tests/bench.py            writes results/bench.md
    python tests/bench.py --quick    a few batches each; writes nothing

Every subject trains on batches of 128 images. Only ratios are claimed: absolute times change
from machine to machine and from minute to minute.
"""

import argparse
import io
import itertools
import platform
import statistics
import sys
import time
from contextlib import redirect_stdout
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
import torchvision  # noqa: E402
from torch import nn, optim  # noqa: E402
from torch.nn import functional as F  # noqa: E402
from torchvision import datasets, transforms  # noqa: E402

import common  # noqa: E402
import step1_setup  # noqa: E402
import step2_skeleton  # noqa: E402
import step3_bn_gap  # noqa: E402
import step4_aug_lr  # noqa: E402

DOCUMENTED = transforms.Compose([
    transforms.ColorJitter(0.4),
    transforms.RandomAffine(7, shear=10, translate=(0.1, 0.1), scale=(0.8, 1.2)),
    transforms.RandomRotation(7),
    transforms.ToTensor(),
    transforms.Normalize(step4_aug_lr.MEAN, step4_aug_lr.STD),
])


def full_batches(loader):
    """Yield batches of 128 images for ever, epoch after epoch."""
    while True:
        yield from (batch for batch in loader if len(batch[1]) == 128)


class Batches:
    """The next few batches of an endless loader, in the form of a loader of one epoch."""

    def __init__(self, batches, count):
        self.batches, self.count = batches, count

    def __len__(self):
        return self.count

    def __iter__(self):
        return itertools.islice(self.batches, self.count)


def suite(step, *flags, dropout=nn.Dropout2d):
    """Return a function that trains a step (a module) on so many batches, with these flags.

    It leaves out the schedule. `dropout` takes the place of nn.Dropout2d.
    """
    args = common.parse_args(list(flags), "", 15, 128)
    common.setup(args)
    loader, _ = common.get_loaders(args, step.train_transform, step.test_transform)
    net = step.Net()
    for block in net.layers:
        if isinstance(block, nn.Sequential) and isinstance(block[-1], nn.Dropout2d):
            block[-1] = dropout(block[-1].p)
    model = common.prepare(net, args)
    optimizer = optim.SGD(model.parameters(), lr=0.01, momentum=step.MOMENTUM)
    batches = full_batches(loader)
    return lambda count: common.train(model, Batches(batches, count), optimizer, args)


def documented(workers):
    """Return a function that trains step 4 by the documented recipe, as a user would write it."""
    data = datasets.MNIST(ROOT / "data", transform=DOCUMENTED)
    loader = torch.utils.data.DataLoader(data, 128, shuffle=True, num_workers=workers,
                                         persistent_workers=workers > 0)
    model, batches = step4_aug_lr.Net(), full_batches(loader)
    for block in model.layers:
        if isinstance(block, nn.Sequential):
            block[-1] = nn.Dropout(block[-1].p)
    optimizer = optim.SGD(model.parameters(), lr=0.01, momentum=0.9)

    def run(count):
        for images, labels in itertools.islice(batches, count):
            optimizer.zero_grad()
            output = model(images)
            loss = F.nll_loss(output, labels)
            loss.backward()
            optimizer.step()
            loss.item(), (output.argmax(dim=1) == labels).sum().item()  # for the bar

    return run


def compare(words, first, second, count, rounds):
    """Time two subjects in turn; return a row: medians in ms a batch, median ratio and range."""
    times = {first: [], second: []}
    for subject in times:  # fill queues and caches
        subject(max(2, count // 4))
    for _ in range(rounds):
        for subject, taken in times.items():
            start = time.perf_counter()
            subject(count)
            taken.append(1000 * (time.perf_counter() - start) / count)
    ratios = sorted(a / b for a, b in zip(*times.values(), strict=True))
    medians = " | ".join(f"{statistics.median(taken):.2f}" for taken in times.values())
    return (f"| {words} | {medians} | {statistics.median(ratios):.2f} "
            f"({ratios[0]:.2f} to {ratios[-1]:.2f}) |")


def main():
    """Measure and print the table; without --quick also write it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--quick", action="store_true", help="a few batches each, no file")
    quick = parser.parse_args().quick
    rounds, count = (2, 5) if quick else (5, 60)
    with redirect_stdout(io.StringIO()) as told:
        fast, rows = suite(step4_aug_lr), []
        for workers in (0, 1, 2):
            rows.append(compare(f"step 4: documented recipe, {workers} workers, against this suite",
                                documented(workers), fast, count, rounds))
        rows.append(compare("step 4: nn.Dropout against nn.Dropout2d",
                            suite(step4_aug_lr, dropout=nn.Dropout), fast, count, rounds))
        for step in (step1_setup, step2_skeleton, step3_bn_gap, step4_aug_lr):
            size = max(2, count // 20) if step is step1_setup else count  # its batches take long
            rows.append(compare(f"{step.__name__}: `--fp32 --no-compile` against the defaults",
                                suite(step, "--fp32", "--no-compile"), suite(step), size, rounds))
    chosen = next(line for line in told.getvalue().splitlines() if line.startswith("Settings"))
    cpu = common.CPU.get("cpu_name", platform.processor())
    text = "\n".join([
        f"{cpu}, {torch.get_num_threads()} threads, Python {platform.python_version()}, "
        f"torch {torch.__version__}, torchvision {torchvision.__version__}. Step 4 chose here: "
        f"{chosen.partition('seed 1, ')[2]}. Times are medians of {rounds} rounds of {count} "
        "batches; the ratio is the median of the rounds, with their range.", "",
        "| what | first, ms a batch | second, ms a batch | first / second |", "|---|---|---|---|",
        *rows, ""])
    print(text)
    if not quick:
        (ROOT / "results" / "bench.md").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
