"""One oracle: a plain training loop that must give what a real run of each step gives.

Settings, transforms and networks are written out once more, so that one that changes by accident
is noticed. Only the random affine of step 4 comes from common.py; test_augmentation.py tests it.
"""

import copy
import functools
import importlib.util
import re
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, STEPS, write_data
from torch import nn
from torch.nn import functional as F

import common

SEED, EPOCHS, BATCH = 5, 2, 4
TRAIN, TEST, BATCHES = 30, 14, 8  # images, training batches; both splits end with a short batch
OPTIMIZERS = {
    "step1": {"lr": 0.01, "momentum": 0.9},
    "step2": {"lr": 0.01, "momentum": 0.9},
    "step3": {"lr": 0.01, "momentum": 0.9},
    "step4": {"lr": 0.1, "momentum": 0.9, "weight_decay": 5e-4, "nesterov": True},
}
DROPOUT = {"step3": 0.1, "step4": 0.03}


def make_network(step):
    """Return the network of a step; its weights are drawn in the order of its layers."""
    def relu(inputs, outputs, size=3, **options):
        return [nn.Conv2d(inputs, outputs, size, **options), nn.ReLU()]

    def block(inputs, outputs):
        return [*relu(inputs, outputs, bias=False), nn.BatchNorm2d(outputs),
                nn.Dropout2d(DROPOUT[step])]

    plain = functools.partial(nn.Conv2d, bias=False)
    if step == "step1":
        layers = [*relu(1, 32, padding=1), *relu(32, 64, padding=1), nn.MaxPool2d(2),
                  *relu(64, 128, padding=1), *relu(128, 256, padding=1), nn.MaxPool2d(2),
                  *relu(256, 512), *relu(512, 1024), nn.Conv2d(1024, 10, 3)]
    elif step == "step2":
        relu = functools.partial(relu, bias=False)
        layers = [*relu(1, 10), *relu(10, 20), *relu(20, 32), nn.MaxPool2d(2), *relu(32, 10, 1),
                  *relu(10, 20), *relu(20, 32), *relu(32, 10, 1), plain(10, 10, 7)]
    else:
        layers = [*block(1, 10), *block(10, 20), plain(20, 10, 1), nn.MaxPool2d(2),
                  *block(10, 16), *block(16, 16), *block(16, 20), nn.AvgPool2d(6)]
        layers += [plain(20, 10, 1)] if step == "step3" else [plain(20, 22, 1), plain(22, 10, 1)]
    return nn.Sequential(*layers, nn.Flatten())


def read(folder, prefix):
    """Return a split that conftest wrote: images uint8 N×1×28×28, labels int64 N."""
    images, labels = ((folder / "MNIST" / "raw" / f"{prefix}-{name}").read_bytes()
                      for name in ("images-idx3-ubyte", "labels-idx1-ubyte"))
    images = torch.frombuffer(bytearray(images[16:]), dtype=torch.uint8).view(-1, 1, 28, 28)
    return images, torch.tensor(list(labels[8:]))


def transform(images, augment=None):
    """Return uint8 images as the network takes them: 0 to 1, augmented, normalized."""
    images = images.float() * (1 / 255)
    images = augment(images) if augment else images
    return (images - 0.1307) / 0.3081


def count_correct(output, labels):
    """Return how many rows of the output are highest at their label."""
    return (output.argmax(dim=1) == labels).sum().item()


@functools.cache
def expect(step, folder, bf16=False):
    """Train a step as documented; return what its run must leave.

    That is the weights and, in flat lists, the figures of csv, final bars and test lines.
    """
    torch.manual_seed(SEED)
    network = make_network(step)
    if bf16:
        network.to(memory_format=torch.channels_last)
    images, labels = read(folder, "train")
    optimizer = torch.optim.SGD(network.parameters(), **OPTIMIZERS[step])
    augment, schedule, kept, batch = None, None, network, 0
    if step == "step4":
        augment = common.RandomAffine(degrees=8, shear=4, scale=(0.93, 1.07), translate=0.06)
        schedule = torch.optim.lr_scheduler.OneCycleLR(
            optimizer, 0.1, total_steps=EPOCHS * BATCHES, pct_start=0.15, cycle_momentum=False)
        kept = copy.deepcopy(network)
    told = SimpleNamespace(csv=[], bars=[], test_lines=[], weights=kept.state_dict().values())
    for epoch in range(EPOCHS):
        network.train()
        total_loss = correct = 0
        for chosen in torch.randperm(TRAIN).split(BATCH):
            network.zero_grad()
            inputs = transform(images[chosen], augment)
            with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
                logits = network(inputs)
            output = F.log_softmax(logits.float(), dim=1)
            loss = F.nll_loss(output, labels[chosen])
            loss.backward()
            optimizer.step()
            if step == "step4":
                schedule.step()
                follow(kept, network, reach=1 + batch / 10)
            batch += 1
            total_loss += loss.item() * len(chosen)
            correct += count_correct(output, labels[chosen])
        test_loss, test_correct = evaluate(kept, folder)
        accuracy, test_accuracy = (round(100 * part, 2) for part in
                                   (correct / TRAIN, test_correct / TEST))
        rate = float(f"{optimizer.param_groups[0]['lr']:.6g}")
        told.csv += [epoch, total_loss / TRAIN, accuracy, test_loss, test_accuracy, rate]
        told.bars += [loss.item(), BATCHES - 1, accuracy, BATCHES, BATCHES]
        told.test_lines += [round(test_loss, 4), test_correct, TEST, test_accuracy]
    return told


def follow(average, network, reach):
    """Move the average of the weights towards those of the network; the first are its start."""
    pairs = zip(average.state_dict().values(), network.state_dict().values(), strict=True)
    for mean, now in pairs:
        mean.copy_(mean + (now - mean) / reach if reach > 1 else now)


@torch.no_grad()
def evaluate(network, folder):
    """Return the loss on the test set and how many of its images are classified correctly."""
    images, labels = read(folder, "t10k")
    network.eval()
    output = F.log_softmax(network(transform(images)), dim=1)
    return F.nll_loss(output, labels).item(), count_correct(output, labels)


def check_run(step, folder, out, told, *flags):
    """Run a step and compare its csv, log and weights with what is told; return the log."""
    STEPS[step].main(["--epochs", str(EPOCHS), "--batch-size", str(BATCH), "--seed", str(SEED),
                      "--data-dir", str(folder), "--out", str(out), *flags])
    csv, log, weights = (next(out.glob(f"{step}_*-seed{SEED}.{kind}"))
                         for kind in ("csv", "log", "pt"))
    header, *rows = (row.split(",") for row in csv.read_text().splitlines())
    assert header == ["epoch", "train_loss", "train_accuracy", "test_loss", "test_accuracy",
                      "learning_rate", "seconds"]
    assert all(float(row.pop()) > 0 for row in rows)
    log = log.read_text(encoding="utf-8")
    bar = r"Loss=(\S+) Batch_id=(\d+) Accuracy=(\S+): 100%\|█{10}\| (\d+)/(\d+) \["
    test_line = r"Test set: Average loss: (\S+), Accuracy: (\d+)/(\d+) \((\S+)%\)"
    for printed, wanted in ((rows, told.csv), (re.findall(bar, log), told.bars),
                            (re.findall(test_line, log), told.test_lines)):
        figures = [float(figure) for row in printed for figure in row]
        # Half of the sixth digit, the last, and as much for sums that round in another order.
        assert figures == pytest.approx(wanted, rel=0, abs=1e-6)
    torch.testing.assert_close(list(torch.load(weights).values()), list(told.weights),
                               atol=1e-5, rtol=0)
    return log


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with TRAIN training and TEST test images."""
    return write_data(tmp_path_factory.mktemp("oracle"), TRAIN, TEST)


@pytest.fixture
def compiled(monkeypatch):
    """The sizes of the batches that go through compiled code, in a list that grows.

    The compiler is replaced by one that runs the captured operations as they are. So no C++
    compiler is needed, and random numbers are drawn as without compilation.
    """
    sizes, compile_with = [], torch.compile

    def backend(graph, _):
        def call(*inputs):
            sizes.extend(len(images) for images in inputs if
                         getattr(images, "shape", ())[1:] == (1, 28, 28))
            return graph(*inputs)
        return call

    monkeypatch.setattr(torch, "compile", lambda *args, **options: compile_with(
        *args, **options | {"backend": backend}))
    torch.compiler.reset()
    yield sizes
    torch.compiler.reset()


@pytest.mark.parametrize("step", STEPS)
def test_plain_run(step, folder, tmp_path, monkeypatch, compiled):
    """In fp32 and not compiled, as the flags say, though bf16 is said to be faster."""
    monkeypatch.setattr(common, "is_bf16_faster", lambda device: True)
    log = check_run(step, folder, tmp_path, expect(step, folder), "--fp32", "--no-compile")
    assert ", fp32, not compiled" in log
    assert not compiled


@pytest.mark.parametrize(("step", "bf16"), [*((step, True) for step in STEPS), ("step3", False)])
def test_fast_run(step, bf16, folder, tmp_path, monkeypatch, compiled):
    """In bf16 where that is faster, but tested in fp32.

    Full batches are compiled, the short last one and the large network are not.
    """
    monkeypatch.setattr(common, "is_bf16_faster", lambda device: bf16)
    told, plain = expect(step, folder, bf16), expect(step, folder)
    log = check_run(step, folder, tmp_path, told)
    assert (", bf16, " if bf16 else ", fp32, ") in log
    changes = [(a - b).abs().max() for a, b in zip(told.weights, plain.weights, strict=True)]
    assert max(changes) > 2e-5 or not bf16, "a run in fp32 would pass as one in bf16"
    if step == "step1":
        assert not compiled and ", not compiled" in log
    else:
        assert set(compiled) == {BATCH} and ", compiled" in log
        assert len(compiled) >= EPOCHS * (TRAIN // BATCH), "only a trial was compiled"


@pytest.mark.parametrize(("facts", "faster"), [
    ({"cpu_name": "AMD EPYC", "avx2": True}, False),
    ({"cpu_name": "AMD EPYC", "avx512_bf16": True}, True),
    ({"cpu_name": "Intel(R) Xeon(R)", "avx512_bf16": True}, False),
    ({"cpu_name": "Intel(R) Xeon(R)", "avx512_bf16": True, "amx_bf16": True}, True),
])
def test_cpus_that_are_faster_in_bf16(facts, faster, monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: facts, raising=False)
    spec = importlib.util.spec_from_file_location("common_on_another_cpu", ROOT / "common.py")
    fresh = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(fresh)
    assert fresh.is_bf16_faster(torch.device("cpu")) is faster


@pytest.mark.parametrize("step", STEPS)
def test_defaults(step, capsys):
    with pytest.raises(SystemExit):
        STEPS[step].main(["--help"])
    text = capsys.readouterr().out
    for flag, value in (("epochs", 15), ("batch-size", 128), ("seed", 1)):
        assert re.search(rf"--{flag} [A-Z_]+\s[^()]+\(default:\s+{value}\)", text), flag
