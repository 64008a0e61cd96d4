"""What each ingredient of steps 3 and 4 is worth: three seeds without it.

    python results/variants.py [--only NAME]

A variant is the step itself, run as `--seed S --out results/variants/NAME`, after a function
has swapped one thing in its module. Every run is a process of its own, so nothing of one
variant can reach the next. Finished runs are skipped: call again after an interruption.
results/variants/README.md is written anew each time, from all runs that are finished.
"""

import argparse
import importlib
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

from table import is_finished, read_run, read_runs, show_deviation, summarize
from torch import nn, optim
from torch.optim.lr_scheduler import LambdaLR

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
sys.path.insert(0, str(ROOT))
SEEDS = (1, 2, 3)


def new_net(change):
    """Return a swap: the step's Net, after `change` was made to it."""
    def swap(module):
        class Net(module.Net):
            def __init__(self):
                super().__init__()
                change(self)
        module.Net = Net
    return swap


def constants(**values):
    """Return a swap: the step's module with other values under names that it has."""
    def swap(module):
        missing = set(values) - set(vars(module))
        if missing:
            sys.exit(f"{module.__name__}: expected the names {missing}, found none")
        vars(module).update(values)
    return swap


def replace(net, kind, make):
    """Put make(layer) in the place of every layer of a kind."""
    for module in list(net.modules()):
        for name, layer in module.named_children():
            if isinstance(layer, kind):
                setattr(module, name, make(layer))


def drop_single_values(net):
    """Put nn.Dropout in the place of nn.Dropout2d."""
    replace(net, nn.Dropout2d, lambda layer: nn.Dropout(layer.p))


def without_batch_norm(net):
    """Leave out batch normalization."""
    replace(net, nn.BatchNorm2d, lambda layer: nn.Identity())


def end_in(kernel_size):
    """Return a change: one convolution, 20 to 10, in the place of the last two layers."""
    def change(net):
        net.layers = net.layers[:-2].append(nn.Conv2d(20, 10, kernel_size, bias=False))
    return change


def without_augmentation(module):
    """Train on what the test is made on."""
    module.train_transform = module.test_transform


def constant_rate(rate):
    """Return a swap: this learning rate from the first batch to the last."""
    def steady(optimizer, *_, **__):
        return LambdaLR(optimizer, lambda step: 1)
    return constants(LEARNING_RATE=rate, OneCycleLR=steady)


def averaged_over(most):
    """Return a swap: an average of weights that reaches back so many batches at most."""
    def move_average(averages, weights, batches):
        reach = min(most, 1 + batches / 10)
        for average, current in zip(averages, weights, strict=True):
            average.copy_(average + (current - average) / reach)
    return constants(move_average=move_average)


def without_nesterov(module):
    """Train with momentum alone."""
    def make(parameters, nesterov, **others):
        return optim.SGD(parameters, **others)
    constants(optim=SimpleNamespace(SGD=make))(module)


def both(*swaps):
    """Return a swap that makes several."""
    def swap(module):
        for one in swaps:
            one(module)
    return swap


VARIANTS = {  # name: (step, what it is called in the table, the swap)
    "step3-as-it-is": ("step3", "as it is", lambda module: None),
    "step3-no-batch-norm": ("step3", "no batch normalization", new_net(without_batch_norm)),
    "step3-no-dropout": ("step3", "no dropout", constants(DROPOUT=0.0)),
    "step3-no-gap": ("step3", "6x6 convolution, no GAP, no 1x1", new_net(end_in(6))),
    "step4-as-it-is": ("step4", "as it is", lambda module: None),
    "step4-no-augmentation": ("step4", "no augmentation", without_augmentation),
    "step4-no-schedule": ("step4", "no schedule: 0.01 as in step 3", constant_rate(0.01)),
    "step4-no-schedule-0.1": ("step4", "no schedule: 0.1, its peak", constant_rate(0.1)),
    "step4-no-decay": ("step4", "no weight decay", constants(WEIGHT_DECAY=0.0)),
    "step4-no-nesterov": ("step4", "no Nesterov", without_nesterov),
    "step4-no-average": ("step4", "no average of weights", averaged_over(1)),
    "step4-neither": ("step4", "no schedule: 0.1, no average of weights",
                      both(constant_rate(0.1), averaged_over(1))),
    "step4-dropout-0.1": ("step4", "dropout 0.1", constants(DROPOUT=0.1)),
    "step4-one-1x1": ("step4", "one 1x1 20 to 10, no second", new_net(end_in(1))),
}


def load_step(step):
    """Return the module of a step, "step1" to "step4", without what a swap has changed in it."""
    [script] = ROOT.glob(f"{step}_*.py")
    return importlib.reload(importlib.import_module(script.stem))


def train_variant(name, argv):
    """Run one variant in this process, with the arguments of its step."""
    step, _, swap = VARIANTS[name]
    module = load_step(step)
    swap(module)
    module.main(argv)


def run_all(jobs, workers=1):
    """Make those of some runs that are not finished; keep their csv and log alone.

    Args:
        jobs (list[tuple]): step, seed, folder of the outputs, and the command of each run,
            to which `--seed S --out FOLDER` is added.
        workers (int): how many to make at a time; if more than one, with one thread each.
    """
    environment = os.environ | ({"OMP_NUM_THREADS": "1"} if workers > 1 else {})

    def make(job):
        step, seed, folder, command = job
        start, outputs = time.perf_counter(), ["--seed", str(seed), "--out", str(folder)]
        subprocess.run([sys.executable, *command, *outputs], env=environment, check=True,
                       stdout=subprocess.DEVNULL)
        for suffix in (".pt", ".ckpt"):
            Path(folder, f"{step}-seed{seed}{suffix}").unlink(missing_ok=True)
        last = read_run(Path(folder, f"{step}-seed{seed}.csv"))["test_accuracy"][-1]
        seconds = time.perf_counter() - start
        print(f"{folder.name}, seed {seed}: last epoch {last:.2f}, {seconds:.0f} s", flush=True)

    missing = [job for job in jobs if not is_finished(*job[:3])]
    print(f"{len(jobs) - len(missing)} of {len(jobs)} runs are finished", flush=True)
    pool = ThreadPoolExecutor(workers)
    try:
        list(pool.map(make, missing))
    except KeyboardInterrupt:
        sys.exit("\nInterrupted. What was finished is kept; call again to go on.")
    except subprocess.CalledProcessError as error:
        sys.exit(f"A run failed: {error}")
    finally:
        pool.shutdown(cancel_futures=True)


def make_report(folder):
    """Return the text of README.md: each step as it is, and below it its variants."""
    lines = [
        "# What each ingredient is worth",
        "",
        f"Test accuracy in per cent, seeds {', '.join(map(str, SEEDS))}, all else equal. Two runs "
        "at a time on one thread each: the number of threads changes the rounding and so the run, "
        "which is why these are not the runs of the steps themselves. Read a difference against "
        "the deviations. Made by `results/variants.py`.",
        "",
        "| step | variant | runs | last epoch: mean | difference | deviation | last five: mean |",
        "|---|---|---|---|---|---|---|",
    ]
    means = {}
    for name, (step, words, _) in VARIANTS.items():
        place = folder / name
        runs = read_runs(step, place, SEEDS) if place.exists() else {}
        if not runs:
            lines.append(f"| {step[-1]} | {words} | 0 | | | | |")
            continue
        found = summarize(runs.values())
        difference = found["mean"] - means.setdefault(step, found["mean"])
        deviation = show_deviation(found)
        lines.append(f"| {step[-1]} | {words} | {found['runs']} | {found['mean']:.3f} | "
                     f"{difference:+.3f} | {deviation} | {found['last_five']:.3f} |")
    return "\n".join([*lines, ""])


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", choices=VARIANTS, metavar="NAME",
                        help=f"make the runs of this one: {', '.join(VARIANTS)}")
    parser.add_argument("--workers", type=int, default=2, help="runs at a time, one thread each")
    parser.add_argument("--out", type=Path, default=HERE / "variants")
    args, rest = parser.parse_known_args(argv)  # the rest is for the step
    if rest[:1] == ["--run"]:
        return train_variant(rest[1], [*rest[2:], "--out", str(args.out)])
    jobs = [(VARIANTS[name][0], seed, args.out / name, [__file__, "--run", name, *rest])
            for seed in SEEDS for name in VARIANTS if args.only in (None, name)]
    run_all(jobs, args.workers)
    args.out.mkdir(parents=True, exist_ok=True)
    report = make_report(args.out)
    Path(args.out, "README.md").write_text(report, encoding="utf-8")
    print(report)


if __name__ == "__main__":
    main()
