"""How much each step overfits: its last weights, tested on training and test images alike.

    python results/overfitting.py [--folder results]

The training accuracy in a log is counted while the weights change, with dropout and on augmented
images. Here the last weights of every run in results/ are tested on both splits alike. A step
keeps the row it has where weights of it are missing: those of step 1, which a run leaves in runs/,
are too large for the repository.
"""

import argparse
import importlib
import sys
from pathlib import Path
from statistics import fmean, stdev

import torch
from table import read_runs

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
sys.path.insert(0, str(ROOT))

import common  # noqa: E402


def test_both(module, weights, splits):
    """Return mean loss and accuracy in per cent on training images, then both on test images."""
    net, found = module.Net(), []
    net.load_state_dict(torch.load(weights, weights_only=True))
    for images, labels in splits:
        loader = common.Loader(images, labels, module.test_transform, 128, shuffle=False)
        found += common.test(net, loader)
    return found


def test_run(module, step, seed, run, folders, splits):
    """Return test_both of the weights that a run left in one of some folders, None without."""
    for file in (folder / f"{step}-seed{seed}.pt" for folder in folders):
        if file.exists():
            row = test_both(module, file, splits)
            if abs(row[3] - run["test_accuracy"][-1]) < 0.03:  # else those of another run
                return row
    return None


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", nargs="+", type=Path, default=[HERE, ROOT / "runs"],
                        help="where the weights are; the first that has them counts")
    parser.add_argument("--data-dir", type=Path, default=ROOT / "data")
    args = parser.parse_args(argv)
    report = HERE / "overfitting.md"
    text = report.read_text(encoding="utf-8") if report.exists() else ""
    before = {row[2]: row for row in text.splitlines() if row[2:3].isdigit()}
    splits = [common.read_split(args.data_dir, prefix) for prefix in ("train", "t10k")]
    lines = [
        "# How much each step overfits",
        "",
        "The last weights of every run, tested on plain images of both splits: no augmentation, no "
        "dropout. Means over the runs, accuracy in per cent. Made by `results/overfitting.py`.",
        "",
        "| step | runs | training: loss | accuracy | test: loss | accuracy | train − test | "
        "deviation |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for script in sorted(ROOT.glob("step*.py")):
        step, module = script.stem.split("_")[0], importlib.import_module(script.stem)
        found = [test_run(module, step, seed, run, args.folder, splits)
                 for seed, run in read_runs(step).items()]
        if not found or None in found:
            print(f"step {step[-1]} keeps the row it had: weights are missing", file=sys.stderr)
            lines += [before[step[-1]]] if step[-1] in before else []
            continue
        differences = [row[1] - row[3] for row in found]
        deviation = f"{stdev(differences):.2f}" if len(found) > 1 else ""
        lines.append("| {} | {} | {:.4f} | {:.2f} | {:.4f} | {:.2f} | {:.2f} | {} |".format(
            step[-1], len(found), *map(fmean, zip(*found, strict=True)), fmean(differences),
            deviation))
    text = "\n".join([*lines, ""])
    report.write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
