"""Measure the suite against the documented recipe and against the machine, in one run.

    python tests/bench.py            writes results/bench.md

Only ratios of times taken side by side, in turn, are claimed; absolute times are noise. Each
subject trains on 60 batches of 128 images in a round, of step 4 unless its row names another.
"""

import argparse
import io
import itertools
import platform
import statistics
import subprocess
import sys
import time
from contextlib import redirect_stdout
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "results")]

import torch  # noqa: E402
import torchvision  # noqa: E402
from times import documented_transform  # noqa: E402
from torch import nn, optim  # noqa: E402
from torch.nn import functional as F  # noqa: E402
from torchvision import datasets  # noqa: E402
from variants import drop_single_values  # noqa: E402

import common  # noqa: E402
import step1_setup  # noqa: E402
import step2_skeleton  # noqa: E402
import step3_bn_gap  # noqa: E402
import step4_aug_lr  # noqa: E402


def batches_of(loader):
    """Yield the batches of a loader for ever, epoch after epoch, full ones only."""
    while True:
        for images, labels in loader:
            if len(images) == 128:
                yield images, labels


class Part:
    """The next few batches of an endless loader, as an epoch of its own."""

    def __init__(self, batches, size):
        self.batches, self.size = batches, size

    def __len__(self):
        return self.size

    def __iter__(self):
        return itertools.islice(self.batches, self.size)


class Suite:
    """Training of one step by the suite's own loop, with all that its `main` puts there.

    Args:
        step (module): one of the four.
        flags (str): of the command line.
        change (Callable): makes something else of the subject before its first batch.
    """

    def __init__(self, step, *flags, change=lambda subject: None):
        self.args = common.parse_args(list(flags), __doc__, 15, 128)
        common.setup(self.args)
        self.model = step.Net()
        self.scheduler = self.average = None
        settings = {"lr": step.LEARNING_RATE, "momentum": step.MOMENTUM}
        if step is step4_aug_lr:
            settings |= {"weight_decay": step.WEIGHT_DECAY, "nesterov": True}
        self.optimizer = optim.SGD(self.model.parameters(), **settings)
        change(self)
        common.prepare(self.model, self.args)
        if step is step4_aug_lr:
            self.scheduler = step.OneCycleLR(self.optimizer, step.LEARNING_RATE, 15 * 469,
                                             pct_start=step.WARM_UP, cycle_momentum=False)
            self.average = step.AveragedModel(self.model, multi_avg_fn=step.move_average,
                                              use_buffers=True)
        train_loader, _ = common.get_loaders(self.args, step.train_transform, step.test_transform)
        self.batches = batches_of(train_loader)

    def run(self, size):
        """Train on so many batches."""
        with redirect_stdout(io.StringIO()):
            common.train(self.model, Part(self.batches, size), self.optimizer, self.args,
                         self.scheduler, self.average)


class DataAlone:
    """The batches of step 4, transformed, and nothing done with them."""

    def __init__(self):
        args = common.parse_args([], __doc__, 15, 128)
        common.setup(args)
        train_loader, _ = common.get_loaders(
            args, step4_aug_lr.train_transform, step4_aug_lr.test_transform)
        self.batches = batches_of(train_loader)

    def run(self, size):
        """Make so many batches."""
        for _ in range(size):
            next(self.batches)


class ConvolutionsAlone:
    """The convolutions of a step on inputs of their own: forward, both gradients, no more."""

    def __init__(self, step, precision):
        dtype = torch.bfloat16 if precision == "bf16" else torch.float32
        layout = torch.channels_last if precision == "bf16" else torch.contiguous_format
        self.pairs, inputs = [], {}
        net = step.Net().eval()
        for layer in net.modules():
            if isinstance(layer, nn.Conv2d):
                layer.register_forward_hook(lambda m, i, o: inputs.update({m: (i[0], o)}))
        net(torch.randn(128, 1, 28, 28))
        for number, (layer, (images, output)) in enumerate(inputs.items()):
            layer._forward_hooks.clear()
            layer.to(dtype=dtype, memory_format=layout)
            images = images.detach().to(dtype=dtype, memory_format=layout)
            images.requires_grad_(number > 0)  # the first needs no gradient of the pixels
            gradient = output.detach().to(dtype=dtype, memory_format=layout)
            self.pairs.append((layer, images, gradient))

    def run(self, size):
        """Run every convolution forward and backward so many times."""
        for _ in range(size):
            for layer, images, gradient in self.pairs:
                images.grad = None
                layer.zero_grad()
                layer(images).backward(gradient)


class Documented:
    """The documented recipe of step 4 as a user would write it."""

    def __init__(self, workers):
        data = datasets.MNIST(ROOT / "data", train=True, transform=documented_transform)
        loader = torch.utils.data.DataLoader(
            data, batch_size=128, shuffle=True, drop_last=True, num_workers=workers,
            persistent_workers=workers > 0)
        self.batches = batches_of(loader)
        self.model = step4_aug_lr.Net()
        drop_single_values(self.model)
        self.optimizer = optim.SGD(self.model.parameters(), lr=0.01, momentum=0.9)

    def run(self, size):
        """Train on so many batches, with the figures of the bar read at each."""
        for images, labels in itertools.islice(self.batches, size):
            self.optimizer.zero_grad()
            output = self.model(images)
            loss = F.nll_loss(output, labels)
            loss.backward()
            self.optimizer.step()
            (output.argmax(dim=1) == labels).sum().item(), loss.item()


def use_the_other_precision(subject):
    """Compute in bf16 where the run chose fp32, and the other way round."""
    subject.args.precision = {"fp32": "bf16", "bf16": "fp32"}[subject.args.precision]


def use_channels_last(subject):
    """Lay out the weights with the channels last; the convolutions follow them."""
    subject.model.to(memory_format=torch.channels_last)


def compile_anyway(subject):
    """Compile a network that the run does not compile."""
    subject.model.compile(dynamic=False)


def fuse_the_optimizer(subject):
    """Take the optimizer's one-kernel implementation."""
    subject.optimizer = optim.SGD(subject.model.parameters(), **subject.optimizer.defaults
                                  | {"fused": True, "foreach": False})


TRIED = [  # what did not help: words, step, change
    ("bf16 for fp32 or the other way round", step1_setup, use_the_other_precision),
    ("bf16 for fp32 or the other way round", step4_aug_lr, use_the_other_precision),
    ("torch.compile", step1_setup, compile_anyway),
    ("channels-last", step4_aug_lr, use_channels_last),
    ("nn.Dropout, not nn.Dropout2d", step4_aug_lr,
     lambda subject: drop_single_values(subject.model)),
    ("SGD with fused=True", step4_aug_lr, fuse_the_optimizer),
]


def alternate(first, second, batches, rounds):
    """Time both in turn; return the milliseconds a batch of each round, of each."""
    times = ([], [])
    for subject in (first, second):  # compile, fill queues and caches
        subject.run(max(2, batches // 4))
    for _ in range(rounds):
        for subject, taken in zip((first, second), times, strict=True):
            start = time.perf_counter()
            subject.run(batches)
            taken.append(1000 * (time.perf_counter() - start) / batches)
    return times


def row(what, first, second, target=""):
    """Return a row of the table: two medians and the ratio, pair by pair, with its range."""
    ratios = sorted(a / b for a, b in zip(first, second, strict=True))
    if target:
        limit, ratio = float(target.split()[-1]), statistics.median(ratios)
        target += "" if (ratio >= limit) == target.startswith("at least") else ": missed"
    return (f"| {what} | {statistics.median(first):.2f} | {statistics.median(second):.2f} | "
            f"{statistics.median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f}) | {target} |")


def peak_memory(code):
    """Return the peak memory in MB of the main process of a Python program (Linux).

    VmHWM, not ru_maxrss: a child's ru_maxrss begins at what its parent had when it started it.
    """
    code += "\nprint(*[line.split()[1] for line in open('/proc/self/status') if 'VmHWM' in line])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True,
                          check=True)
    return int(done.stdout.split()[-1]) / 1024


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a tenth of the work, no file")
    quick = parser.parse_args().quick
    rounds, size = (3, 10) if quick else (5, 60)
    fast = Suite(step4_aug_lr)
    lines = ["| what | first, ms a batch | second, ms a batch | first / second | to reach |",
             "|---|---|---|---|---|"]

    found = {}
    for workers in (0, 1, 2):
        slow = Documented(workers)
        found[workers] = alternate(slow, fast, size, rounds)
        del slow
    best = min(found, key=lambda workers: statistics.median(found[workers][0]))
    for workers, times in found.items():
        mark, plural = " (its best)" if workers == best else "", "" if workers == 1 else "s"
        words = f"(1) documented recipe, {workers} worker{plural}{mark}, against this suite"
        lines.append(row(words, *times, "at least 4" if mark else ""))
    lines.append(row("(2) data and augmentation against the whole step",
                     *alternate(DataAlone(), fast, size, rounds), "at most 0.08"))
    floor = ConvolutionsAlone(step4_aug_lr, fast.args.precision)
    lines.append(row("(3) the step against its convolutions alone",
                     *alternate(fast, floor, size, rounds), "at most 1.3"))
    sizes = {step1_setup: max(2, size // 20)}  # one batch of it takes as long as twenty
    for step, target in ((step1_setup, "at least 2"), (step2_skeleton, ""), (step3_bn_gap, "")):
        pair = Suite(step, "--fp32", "--no-compile"), Suite(step)
        lines.append(row(f"(4) {step.__name__}: fp32 uncompiled against the fast path",
                         *alternate(*pair, sizes.get(step, size), rounds), target))
    alone = peak_memory("import torch, torchvision")
    whole = peak_memory("import step4_aug_lr, tempfile\nwith tempfile.TemporaryDirectory() as out:"
                        "\n    step4_aug_lr.main(['--epochs', '1', '--out', out])")
    lines.append(f"| (5) peak memory in MB: step 4, importing torch alone | {whole:.0f} | "
                 f"{alone:.0f} | {whole / alone:.2f} | first at most 1500 |")
    lines += ["", "Tried, not taken: slower (below 1) or faster by less than the rounds differ:",
              "", "| what | the suite, ms a batch | with it, ms a batch | first / second | |",
              "|---|---|---|---|---|"]
    for words, step, change in TRIED:
        pair = Suite(step), Suite(step, change=change)
        lines.append(row(f"{step.__name__}: {words}",
                         *alternate(*pair, sizes.get(step, size), rounds)))
    cpu = torch.cpu.get_capabilities().get("cpu_name", platform.processor())
    text = "\n".join([
        f"{cpu}, {torch.get_num_threads()} threads, Python {platform.python_version()}, "
        f"torch {torch.__version__}, torchvision {torchvision.__version__}; {rounds} rounds of "
        f"{size} batches in turn. Times are medians, first / second is the median "
        "of the ratios of the rounds, with their range.",
        f"The fast path, which a run chooses by itself, is here {fast.args.precision}, "
        f"{'compiled' if fast.args.compile else 'not compiled'}; networks of the size of step 1 "
        "are never compiled, so in fp32 both sides of its row are the same.", "", *lines, ""])
    print(text)
    if not quick:
        (ROOT / "results" / "bench.md").write_text(text)


if __name__ == "__main__":
    main()
