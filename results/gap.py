"""The generalization gap: the weights of each step on training images as a test sees images.

    python results/gap.py [--folder results]

The training accuracy in a log is counted while the weights change, with dropout and on augmented
images. Here the last weights of seed 1 are tested on both splits alike. Step 1's weights are not
in the repository: its row is made where they are (a run leaves them in runs/).
"""

import argparse
import importlib
import sys
from pathlib import Path

import torch

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
sys.path.insert(0, str(ROOT))

import common  # noqa: E402


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", nargs="+", type=Path, default=[HERE, ROOT / "runs"],
                        help="where the weights are; the first that has them counts")
    parser.add_argument("--data-dir", type=Path, default=ROOT / "data")
    args = parser.parse_args(argv)
    lines = [
        "# The generalization gap",
        "",
        "The last weights of seed 1, tested on plain images of both splits: no augmentation, no "
        "dropout. Accuracy in per cent. Made by `results/gap.py`.",
        "",
        "| step | training: loss | accuracy | test: loss | accuracy | gap in accuracy |",
        "|---|---|---|---|---|---|",
    ]
    for script in sorted(ROOT.glob("step*.py")):
        step, module = script.stem.split("_")[0], importlib.import_module(script.stem)
        places = [folder / f"{step}-seed1.pt" for folder in args.folder]
        weights = next((place for place in places if place.exists()), None)
        if not weights:
            print(f"step {step[-1]} is left out: no {places[0].name}", file=sys.stderr)
            continue
        net, found = module.Net(), []
        net.load_state_dict(torch.load(weights, weights_only=True))
        for prefix in ("train", "t10k"):
            images, labels = common.read_split(args.data_dir, prefix)
            loader = common.Loader(images, labels, module.test_transform, 128, shuffle=False)
            found += common.test(net, loader)
        lines.append(f"| {step[-1]} | {found[0]:.4f} | {found[1]:.2f} | {found[2]:.4f} | "
                     f"{found[3]:.2f} | {found[1] - found[3]:.2f} |")
    text = "\n".join([*lines, ""])
    (HERE / "gap.md").write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
