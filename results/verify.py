"""Test the committed weights and compare with the figures that were committed beside them.

    python results/verify.py

The weights of every stepN-seedS.csv are tested by the step's own code, as `--evaluate` does it.
The count of correct images must be that of the csv's last row: exactly on the kind of machine
that the first line of the log names, within two images elsewhere, where sums may be rounded
otherwise. Step 1 is left out unless its weights are there: they are too large to commit.
"""

import argparse
import contextlib
import importlib
import io
import re
import sys
from pathlib import Path

from table import read_run

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
sys.path.insert(0, str(ROOT))
ELSEWHERE = 2  # images by which another machine may differ


def evaluate(weights, data_dir):
    """Test one file of weights.

    Returns:
        tuple[str, int, int]: the line that names the machine, correct images, all images.
    """
    [script] = ROOT.glob(f"{weights.name.split('-')[0]}_*.py")
    step = importlib.import_module(script.stem)
    with contextlib.redirect_stdout(io.StringIO()) as output:
        step.main(["--evaluate", str(weights), "--data-dir", str(data_dir)])
    text = output.getvalue()
    correct, images = re.search(r"^Test set: .* Accuracy: (\d+)/(\d+) ", text, re.M).groups()
    return text.split("\n", 1)[0], int(correct), int(images)


def verify(weights, data_dir):
    """Compare one file of weights with its csv.

    Returns:
        tuple[bool, str]: whether it gives what was recorded, and the two counts in words.
    """
    try:
        accuracy = read_run(weights.with_suffix(".csv"))["test_accuracy"][-1]
        log = weights.with_suffix(".log").read_text(encoding="utf-8")
        machine, correct, images = evaluate(weights, data_dir)
    except (SystemExit, OSError) as error:  # one line that names the file
        return False, str(error)
    here = machine == log.split("\n", 1)[0]
    recorded = round(accuracy / 100 * images)
    fine = abs(correct - recorded) <= (0 if here else ELSEWHERE)
    where = "this machine" if here else "another machine"
    return fine, f"{correct} of {images} correct, {recorded} recorded on {where}"


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", nargs="?", type=Path, default=HERE, help="results by default")
    parser.add_argument("--data-dir", type=Path, default=ROOT / "data")
    args = parser.parse_args(argv)
    names = {path.stem for path in args.folder.glob("step*-seed*.*") if path.suffix == ".pt"
             or path.suffix == ".csv" and not path.name.startswith("step1")}
    files = [args.folder / f"{name}.pt" for name in names if ".previous" not in name]
    files.sort(key=lambda path: [int(number) for number in re.findall(r"\d+", path.name)])
    if not files:
        sys.exit(f"{args.folder}: expected runs named stepN-seedS, found none")
    misses = 0
    for path in files:
        fine, words = verify(path, args.data_dir)
        misses += not fine
        print(f"{'ok  ' if fine else 'MISS'} {path.name}: {words}", flush=True)
    print(f"{len(files) - misses} of {len(files)} files of weights give what was recorded")
    return 1 if misses else 0


if __name__ == "__main__":
    sys.exit(main())
