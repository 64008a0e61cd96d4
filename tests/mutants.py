"""Test the tests: make one small change at a time to a copy of the project, and run them there.

    .venv/bin/python tests/mutants.py [--only TEXT] [--jobs N] [-- further arguments of pytest]

Every change makes a user worse off, so a test should fail. Prints each change with the first test
that failed, or that the change survived, and ends with the count. Not part of `make test`.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LIMIT = 900  # seconds for the tests of one change; what takes longer hangs
STEP1, STEP2, STEP3, STEP4 = (path.name for path in sorted(ROOT.glob("step*.py")))
ALL = "common.py"
AFFINE = ("    RandomAffine(degrees=8, shear=4, scale=(0.93, 1.07), translate=0.06),"
          "  # 4 others: none better\n")
NORMALIZE = "    v2.Normalize(MEAN, STD),\n"

CHANGES = [  # (file, a text that is in it once, what takes its place)
    # what is counted and printed
    (ALL, "loss.detach() * len(images)", "loss.detach() * args.batch_size"),
    (ALL, "sum(torch.stack(losses).tolist()) / seen", "loss.item()"),
    (ALL, "/ seen, accuracy, seconds",
     "/ seen, 100 * correct.item() / (n * args.batch_size), seconds"),
    (ALL, "accuracy = 100 * correct.item() / seen\n            figures",
     "accuracy = 100 * correct.item() / (batch + 1) / args.batch_size\n            figures"),
    (ALL, "Batch_id={batch}", "Batch_id={batch + 1}"),
    (ALL, "Loss={loss.item()}", "Loss={loss.item():.4f}"),
    (ALL, "bar:10}", "bar:11}"),
    (ALL, "disable=None", "disable=False"),
    (ALL, "/ seen, 100 * correct.item() / seen", "/ seen, 100 * correct.item() / (seen + 1)"),
    (ALL, "accuracy = loss.item() / seen", "accuracy = loss.item() / len(loader)"),
    (ALL, "train_loss, train_accuracy, test_loss, test_accuracy, lr",
     "test_loss, train_accuracy, train_loss, test_accuracy, lr"),
    (ALL, "epoch,train_loss,train_accuracy,test_loss", "epoch,test_loss,train_accuracy,train_loss"),
    (ALL, 'param_groups[0]["lr"]', 'param_groups[0].get("initial_lr", 0.01)'),
    (ALL, "time.perf_counter() - start", "0.0"),
    (ALL, "(Epoch {tested.index(max(tested))})", "(Epoch {len(tested) - 1})"),
    # the loops
    (ALL, "torch.randperm(len(self.images)) if",
     "torch.randperm(len(self.images), generator=torch.Generator().manual_seed(1)) if"),
    (ALL, 'split == "train"', "False"),
    (ALL, "self.labels[chosen]", "self.labels[chosen - 1]"),
    (ALL, "    model.train()\n", "    model.eval()\n"),
    (ALL, "    model.eval()\n", "    model.train()\n"),
    (ALL, "        optimizer.zero_grad()\n", ""),
    (ALL, "        if scheduler:\n", "        if scheduler and batch == len(loader) - 1:\n"),
    # the random affine
    (ALL, "torch.rand(5, len(images), device=images.device)",
     "torch.rand(5, 1, device=images.device).expand(5, len(images))"),
    (ALL, "torch.stack((dx, dy), dim=1)", "torch.stack((dx, dx), dim=1)"),
    (ALL, "torch.deg2rad(shear * self.shear)", "(angle * self.shear / self.degrees)"),
    (ALL, "offset = -2 * inverse", "offset = -1 * inverse"),
    (ALL, "zoom * (high - low) / 2", "zoom * (high - low)"),
    # the lessons
    (STEP1, "MOMENTUM = 0.9", "MOMENTUM = 0.0"),
    (STEP1, NORMALIZE + "])\n\n", "    v2.Normalize((0.0,), STD),\n])\n\n"),
    (STEP2, ", momentum=MOMENTUM", ""),
    (STEP2, "(0.3081,)", "(0.5,)"),
    (STEP2, "nn.ReLU()", "nn.LeakyReLU()"),
    (STEP2, "EPOCHS, BATCH_SIZE)", "EPOCHS, 64)"),
    (STEP3, "LEARNING_RATE = 0.01", "LEARNING_RATE = 0.001"),
    (STEP3, "DROPOUT = 0.1", "DROPOUT = 0.0"),
    (STEP3, "nn.Dropout2d(", "nn.Dropout("),
    (STEP3, ", momentum=MOMENTUM", ""),
    (STEP3, "EPOCHS = 15", "EPOCHS = 14"),
    (STEP4, AFFINE, ""),
    (STEP4, AFFINE + NORMALIZE, NORMALIZE + AFFINE),
    (STEP4, NORMALIZE + "])\n\n", AFFINE + NORMALIZE + "])\n\n"),
    (STEP4, NORMALIZE + "])\ntest", "    v2.Normalize((0.5,), STD),\n])\ntest"),
    (STEP4, "degrees=8", "degrees=80"),
    (STEP4, "translate=0.06", "translate=0.05"),
    (STEP4, "LEARNING_RATE = 0.1", "LEARNING_RATE = 0.01"),
    (STEP4, "momentum=MOMENTUM", "momentum=0.5"),
    (STEP4, "weight_decay=WEIGHT_DECAY, ", ""),
    (STEP4, ", nesterov=True", ""),
    (STEP4, "pct_start=WARM_UP, cycle_momentum=False", "pct_start=WARM_UP"),
    (STEP4, "pct_start=WARM_UP, ", ""),
    (STEP4, "DROPOUT = 0.03", "DROPOUT = 0.0"),
    (STEP4, "test(average, test_loader)", "test(model, test_loader)"),
    (ALL, "average.module if average else model", "model"),
    (STEP4, "(1 + batches / 10)", "1"),
    (STEP4, "(1 + batches / 10)", "(1 + batches)"),
    (STEP4, "average.update", "scheduler.last_epoch % len(train_loader) or average.update"),
    (STEP4, ", use_buffers=True", ""),
    # the machine
    (ALL, "compiled.compile(dynamic=False)", "pass"),
    (ALL, 'model, args.compile = compiled, "compiled"', 'args.compile = "compiled"'),
    (ALL, "model if len(images) == args.batch_size else model.forward", "model.forward"),
    (ALL, "model if len(images) == args.batch_size else model.forward", "model"),
    (ALL, "compiled.load_state_dict(model.state_dict())", "pass"),
    (ALL, "torch.random.fork_rng(devices=[])", "torch.enable_grad()"),
    (ALL, "> 1_000_000", "> 10_000_000"),
    (ALL, "large or args.no_compile or", "large or"),
    (ALL, "not args.fp32 and not", "not"),
    (ALL, 'args.precision == "bf16"):\n            output = forward',
     "False):\n            output = forward"),
    (ALL, "bool(fast)", "True"),
    (ALL, "and is_bf16_faster(args.device)", ""),
    (ALL, 'if args.device == "auto":', "if True:"),
    (ALL, "torch.manual_seed(args.seed)", "torch.manual_seed(1)"),
    (ALL, "transform, args.batch_size,", "transform, 128,"),
    # resuming
    (ALL, "generator.set_rng_state(state)", "pass"),
    *((ALL, "part.load_state_dict(state)", f'hasattr(part, "{its}") or part.load_state_dict(state)')
      for its in ("layers", "param_groups", "last_epoch", "n_averaged")),
    (ALL, "range(len(self.rows), args.epochs)", "range(args.epochs)"),
    *((ALL, f'"{name}", ', "") for name in (
        "script", "epochs", "batch_size", "device", "threads", "compile")),
    (ALL, ' "data", "torch"]', ' "torch"]'),
    (ALL, ' "precision",\n', "\n"),
    (ALL, ', "torch"]', "]"),
    (ALL, 'raw.glob("*-ubyte")', 'raw.glob("train*-ubyte")'),
    (ALL, 'raw.glob("*-ubyte")', 'raw.glob("*images*-ubyte")'),
    # files, flags and exit statuses
    (ALL, "1 if args.smoke else args.epochs", "args.epochs"),
    (ALL, "part[:limit]", "part"),
    (ALL, "min(args.epochs, args.batch_size) < 1 or", ""),
    (ALL, 'os.replace(temporary, f"{self.prefix}{suffix}")',
     'Path(f"{self.prefix}{suffix}").write_bytes(content)'),
    (ALL, "log.exists() and", "False and"),
    (ALL, "            tempfile.TemporaryFile(dir=args.out).close()", "            pass"),
    (ALL, "        if self.args.smoke:\n", "        if False:\n"),
    (ALL, "Path(script).stem", "Path(script).stem.split('_')[0]"),
    (ALL, "temporary.unlink(missing_ok=True)", "pass"),
    (ALL, "self.stdout.write(", "len("),
    (ALL, "sys.exit(130)", "sys.exit(0)"),
    (ALL, "sys.exit(141 if", "sys.exit(0 if"),
    (ALL, "BrokenPipeError else words", "BrokenPipeError else 0"),
    (ALL, 'sys.exit(f"{words}', 'sys.exit(0 and f"{words}'),
    (ALL, 'sys.exit("The test', 'sys.exit(0 and "The test'),
    (ALL, "not math.isfinite(loss)", "False"),
    *((ALL, f"torch.load({path}, map_location=\"cpu\", weights_only=True)",
       f"torch.load({path}, map_location=\"cpu\", weights_only=False)")
      for path in ("args.evaluate", 'f"{self.prefix}.ckpt"')),
    # data and reports
    (ALL, "args.data == MNIST_SHA256 else", "args.data != MNIST_SHA256 else"),
    ("results/report.py", ' if ".previous" not in path.name', ""),
    (ALL, "5f617ad9", "5f617ad8"),
    (ALL, 'Path(folder, "package", "data")', 'Path(folder, "data")'),
    (ALL, "if hash_files(raw) != MNIST_SHA256:", "if False:"),
    (ALL, 'not any(raw.glob("*-ubyte*"))', "True"),
    (ALL, 'args.data_dir == HERE / "data" and', ""),
    (ALL, "len(labels) != len(images) or ", ""),
    (ALL, " or labels.max() > 9", ""),
    (ALL, "images.shape[1:] != (28, 28)", "False"),
]


def try_change(change, pytest_arguments):
    """Return (kind, words): "killed", "survived" or "ERROR", and by which test or why.

    A `change` of None leaves the project as it is.
    """
    with tempfile.TemporaryDirectory(prefix="mutant-") as folder:
        copy = Path(folder, "project")
        shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(
            ".git", ".venv", "data", "runs", "__pycache__", ".*_cache"))
        if (ROOT / ".venv").exists():
            (copy / ".venv").symlink_to(ROOT / ".venv")
        if change:
            name, old, new = change
            text = (copy / name).read_text(encoding="utf-8")
            if text.count(old) != 1:
                return "ERROR", f"the text is there {text.count(old)} times"
            (copy / name).write_text(text.replace(old, new), encoding="utf-8")
        command = [sys.executable, "-m", "pytest", "-x", "-q", "-rfE", *pytest_arguments]
        environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
        try:
            tests = subprocess.run(command, cwd=copy, env=environment, text=True, encoding="utf-8",
                                   stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=LIMIT)
        except subprocess.TimeoutExpired:
            return "killed", f"the tests took over {LIMIT} s"
        if tests.returncode == 0:
            return "survived", ""
        if tests.returncode != 1:  # pytest could not collect the tests, or there were none
            return "ERROR", "\n".join(tests.stdout.splitlines()[-5:])
        failed = re.search(r"^(?:FAILED|ERROR) (\S+)", tests.stdout, re.MULTILINE)
        return "killed", failed[1] if failed else "?"


def main():
    """Try the changes that the command line asks for; exit with 1 unless all were killed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="only changes with this text in them")
    parser.add_argument("--jobs", type=int, default=1, help="changes tried at the same time")
    parser.add_argument("pytest", nargs="*", help="further arguments of pytest, after --")
    args = parser.parse_args()
    changes = [change for change in CHANGES if any(args.only in text for text in change)]
    kind, words = try_change(None, args.pytest)
    if kind != "survived":
        sys.exit(f"Without a change the tests must pass, but: {words}")
    counts = {"killed": 0, "survived": 0, "ERROR": 0}
    with ThreadPoolExecutor(args.jobs) as pool:
        results = pool.map(lambda change: try_change(change, args.pytest), changes)
        for (name, old, new), (kind, words) in zip(changes, results, strict=True):
            counts[kind] += 1
            print(f"{kind:8} {name}: {old.strip()!r} -> {new.strip()!r}: {words}", flush=True)
    print(", ".join(f"{count} {kind}" for kind, count in counts.items()))
    sys.exit(counts["killed"] != len(changes))


if __name__ == "__main__":
    main()
