"""What a run computes, against a plain training loop, and step 4's augmentation against PIL's."""

import copy
import functools
import runpy
from types import SimpleNamespace

import numpy
import pytest
import torch
from conftest import ROOT, STEPS, write_data
from PIL import Image
from torch import nn
from torch.nn import functional as F
from torch.optim.lr_scheduler import OneCycleLR
from torch.utils.data import DataLoader, TensorDataset

import common

TRAIN, TEST = 7, 7  # images; the last batch of 2 or 3 is a short one
DOCUMENTED = {"LEARNING_RATE": 0.01, "MOMENTUM": 0.9, "DROPOUT": 0.1, "EPOCHS": 2, "BATCH_SIZE": 2}
IN_STEP4 = {"LEARNING_RATE": 0.1, "WARM_UP": 0.15, "WEIGHT_DECAY": 5e-4, "DROPOUT": 0.03}
EDITED = {"LEARNING_RATE": 0.02, "MOMENTUM": 0.6, "DROPOUT": 0.4, "EPOCHS": 1, "BATCH_SIZE": 3,
          "WARM_UP": 0.6, "WEIGHT_DECAY": 0.2}
AMD = {"cpu_name": "AMD EPYC", "avx512_bf16": True}  # faster in bf16
INTEL = {"cpu_name": "Intel(R) Xeon(R)", "avx512_bf16": True}  # faster in bf16 with AMX only


def make_network(step, dropout):
    """Return the network of a step; its weights are drawn in the order of its layers."""
    conv = functools.partial(nn.Conv2d, bias=step == "step1")

    def relu(inputs, outputs, side=3, **options):
        return conv(inputs, outputs, side, **options), nn.ReLU()

    def block(inputs, outputs):
        return *relu(inputs, outputs), nn.BatchNorm2d(outputs), nn.Dropout2d(dropout)

    if step == "step1":
        layers = [*relu(1, 32, padding=1), *relu(32, 64, padding=1), nn.MaxPool2d(2),
                  *relu(64, 128, padding=1), *relu(128, 256, padding=1), nn.MaxPool2d(2),
                  *relu(256, 512), *relu(512, 1024), conv(1024, 10, 3)]
    elif step == "step2":
        layers = [*relu(1, 10), *relu(10, 20), *relu(20, 32), nn.MaxPool2d(2), *relu(32, 10, 1),
                  *relu(10, 20), *relu(20, 32), *relu(32, 10, 1), conv(10, 10, 7)]
    else:
        layers = [*block(1, 10), *block(10, 20), conv(20, 10, 1), nn.MaxPool2d(2), *block(10, 16),
                  *block(16, 16), *block(16, 20), nn.AvgPool2d(6)]
        layers += [conv(20, 10, 1)] if step == "step3" else [conv(20, 22, 1), conv(22, 10, 1)]
    return nn.Sequential(*layers, nn.Flatten())


def augment(images):
    """Return images as step 4 trains on them."""
    maps = torch.eye(2, 3) + 0.12 * (2 * torch.rand(len(images), 2, 3) - 1)
    return F.grid_sample(images, F.affine_grid(maps, images.shape, False), align_corners=False)


def expect(step, folder, bf16, edited):
    """Train a step as documented, or EDITED; return its network and the figures of the csv."""
    its = DOCUMENTED | (IN_STEP4 if step == "step4" else {}) | (EDITED if edited else {})
    rate, size = its["LEARNING_RATE"], its["BATCH_SIZE"]
    images, labels = common.read_split(folder / "MNIST" / "raw", "train")
    test_images, test_labels = common.read_split(folder / "MNIST" / "raw", "t10k")
    torch.manual_seed(5)
    network = make_network(step, its["DROPOUT"])
    network.to(memory_format=torch.channels_last if bf16 else torch.contiguous_format)
    optimizer = torch.optim.SGD(network.parameters(), rate, its["MOMENTUM"])
    change, schedule, figures = nn.Identity(), SimpleNamespace(step=lambda: None), []
    if step == "step4":
        change = augment
        optimizer.param_groups[0].update(nesterov=True, weight_decay=its["WEIGHT_DECAY"])
        schedule = OneCycleLR(optimizer, rate, its["EPOCHS"] * -(-TRAIN // size),
                              pct_start=its["WARM_UP"], cycle_momentum=False)
    for epoch in range(its["EPOCHS"]):
        network.train()
        total_loss = correct = 0
        for chosen in torch.randperm(TRAIN).split(size):
            network.zero_grad()
            inputs = (change(images[chosen] * (1 / 255)) - 0.1307) / 0.3081
            with torch.autocast("cpu", torch.bfloat16, enabled=bf16 and len(chosen) == size):
                output = network(inputs)
            loss = F.nll_loss(F.log_softmax(output.float(), dim=1), labels[chosen])
            loss.backward()
            optimizer.step()
            schedule.step()
            total_loss += loss.item() * len(chosen)
            correct += (output.argmax(dim=1) == labels[chosen]).sum().item()
        output = network.eval()((test_images * (1 / 255) - 0.1307) / 0.3081)
        test_loss = F.nll_loss(F.log_softmax(output, dim=1), test_labels).item()
        test_correct = (output.argmax(dim=1) == test_labels).sum().item()
        figures += [epoch, total_loss / TRAIN, round(100 * correct / TRAIN, 2), test_loss,
                    round(100 * test_correct / TEST, 2), optimizer.param_groups[0]["lr"]]
    return network, figures


@pytest.fixture
def compiler(monkeypatch):
    """In the place of torch.compile: runs captured operations, so that it needs no C++ compiler."""
    told, compile_with = SimpleNamespace(sizes=[], fails=""), torch.compile

    def backend(graph, _):
        def compute(*inputs):
            told.sizes += [len(it) for it in inputs if getattr(it, "shape", ())[1:] == (1, 28, 28)]
            return graph(*inputs)
        assert told.fails != "backend"
        return compute

    def compile_so(model, **_):
        assert told.fails != "torch.compile"
        return compile_with(model, backend=backend)

    monkeypatch.setattr(torch, "compile", compile_so)
    torch._dynamo.reset()  # or it gives up, in silence, after some networks
    return told


@pytest.mark.parametrize(("step", "cpu", "how"), [
    *((step, AMD, how) for step in STEPS for how in ("--plain", "bf16")),
    ("step3", None, "fp32"),  # torch is too old to tell
    ("step3", INTEL, "fp32"), ("step3", INTEL | {"amx_bf16": True}, "bf16"),
    ("step4", AMD, "torch.compile"), ("step4", AMD, "backend")])  # one of these fails
def test_run(step, cpu, how, tmp_path, capsys, monkeypatch, compiler):
    """Full batches are in bf16, where that is faster, and compiled; each setting counts."""
    assert (STEPS[step].EPOCHS, STEPS[step].BATCH_SIZE) == (15, 128)
    for name, value in EDITED.items() if how == "--plain" else ():
        monkeypatch.setattr(STEPS[step], name, value, raising=False)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: cpu, raising=False)
    if cpu is None:
        monkeypatch.delattr(torch.cpu, "get_capabilities")
    monkeypatch.setattr(common, "CPU", runpy.run_path(str(ROOT / "common.py"))["CPU"])
    compiler.fails = how
    write_data(tmp_path, TRAIN, TEST)
    network, expected = expect(step, tmp_path, bf16=how == "bf16", edited=how == "--plain")
    args = [f"--data-dir={tmp_path}", f"--out={tmp_path}", "--device=cpu", "--seed=5"]
    args += ["--plain"] if how == "--plain" else ["--epochs=2", "--batch-size=2"]
    model = STEPS[step].main(args)
    log = capsys.readouterr().out
    path = tmp_path / f"{STEPS[step].__name__}-seed5"
    header, *rows = (path / "history.csv").read_text().splitlines()
    assert header == "epoch,train_loss,train_accuracy,test_loss,test_accuracy,learning_rate,seconds"
    figures = [float(figure) for row in rows for figure in row.split(",")[:-1]]
    # Half of the sixth digit, the last, and as much for sums that round in another order.
    assert figures == pytest.approx(expected, rel=0, abs=1e-6)
    wanted = list(network.state_dict().values())
    for weights in torch.load(path / "weights.pt", weights_only=True), model.state_dict():
        torch.testing.assert_close(list(weights.values()), wanted, atol=1e-5, rtol=0)
    assert f"Device: cpu, {cpu['cpu_name'] if cpu else 'unknown CPU'}, 1 threads" in log
    assert ("may take a minute" in log) == (how != "--plain" and step != "step1")
    compiled = how in ("bf16", "fp32") and step != "step1"
    end = " (" if how in ("torch.compile", "backend") else "\n"  # then it says why
    words = f"{'bf16' if how == 'bf16' else 'fp32'}, {'' if compiled else 'not '}compiled{end}"
    assert f", {words}" in log and set(compiler.sizes) == ({2} if compiled else set())
    assert len(compiler.sizes) >= 2 * (TRAIN // 2) * compiled, "only a trial was compiled"
    assert type(model) is STEPS[step].Net and "forward" not in vars(model)  # to copy and pickle


def test_networks_and_loaders_of_ones_own(compiler, capsys, monkeypatch):
    """Nine in one process, with a frozen layer and a DataLoader of 4, whatever --batch-size is."""
    monkeypatch.setattr(common, "CPU", AMD)
    args = common.parse_args(["--device=cpu", "--epochs=1", "--batch-size=64"], "", 1, 1)
    for _ in range(9):
        model = STEPS["step3"].Net()
        model.layers[0].requires_grad_(False)
        images, labels = torch.rand(10, 1, 28, 28), torch.randint(10, (10,))
        loader = DataLoader(TensorDataset(images, labels), batch_size=4, shuffle=True)
        state, before = torch.get_rng_state(), copy.deepcopy(model.state_dict())
        common.show_summary(model, loader)
        fast = common.speed_up(model, args, loader)
        assert torch.equal(torch.get_rng_state(), state)
        assert all(weights.grad is None for weights in model.parameters())  # of the trial
        assert all(map(torch.equal, before.values(), model.state_dict().values()))
        compiler.sizes.clear()
        common.train(fast, loader, torch.optim.SGD(model.parameters(), 0.01))
        assert set(compiler.sizes) == {4}
        capsys.readouterr()
        loss, _ = common.test(model, loader)
        assert loss == pytest.approx(F.cross_entropy(model(images), labels).item(), abs=1e-5)
        assert "\nTest set: " in capsys.readouterr().out
    compiler.sizes.clear()
    common.speed_up(model, args, [next(iter(loader))])  # a single batch
    common.speed_up(model, args, loader, next_epoch=1)  # a finished run
    assert not compiler.sizes and capsys.readouterr().out.count("not compiled") == 2


def distort(images):
    """Return images (float32, 0 to 1) as step 4 trains on them, but not normalized."""
    return 0.1307 + 0.3081 * STEPS["step4"].train_transform(images)


def measure_maps(count, batches=1):
    """Return six numbers of each image's map, batches×count×2×3: it takes (x, y, 1) to (x', y')."""
    place = torch.linspace(-27 / 28, 27 / 28, 28)  # the centres of the pixels, from -1 to 1
    origins = []
    for image in (place.expand(28, 28), place.expand(28, 28).T):  # a value tells where it is from
        torch.manual_seed(0)
        origins.append(torch.cat([distort(image.repeat(count, 1, 1, 1)) for _ in range(batches)]))
    origins = torch.cat(origins, dim=1).double()  # N×2×28×28
    corner, right, down = origins[..., 9, 9], origins[..., 9, 18], origins[..., 18, 9]
    centre = (right + down) / 2
    maps = torch.stack(((right - corner) * 14 / 9, (down - corner) * 14 / 9, centre), dim=2)
    return maps.view(batches, count, 2, 3)


def test_an_image_becomes_what_the_same_map_makes_of_it_elsewhere():
    images = torch.zeros(20, 1, 28, 28)
    images[..., 5:23, 5:23] = torch.rand(20, 1, 18, 18, generator=torch.Generator().manual_seed(1))
    maps = measure_maps(20)[0].tolist()
    torch.manual_seed(0)
    for image, result, ((a, b, c), (d, e, f)) in zip(images, distort(images), maps, strict=True):
        pixels = a, b, 14 * (c + 1 - a - b), d, e, 14 * (f + 1 - d - e)  # from 0 to 28
        expected = Image.fromarray(image[0].numpy()).transform(
            (28, 28), Image.Transform.AFFINE, pixels, Image.Resampling.BILINEAR)
        numpy.testing.assert_allclose(result[0], expected, atol=1e-5)


def test_amounts_are_uniform_and_independent_and_follow_the_device():
    """Within an image, from one image to the next, and from one batch to the next."""
    amounts = (measure_maps(1000, batches=4) - torch.eye(2, 3)) / 0.12
    amounts = amounts.flatten(2).permute(2, 0, 1)  # 6×4×1000
    quantiles = amounts.flatten(1).sort().values
    assert (quantiles - torch.linspace(-1, 1, 4000)).abs().max() < 0.08
    assert (quantiles[:, [0, -1]] - torch.tensor([-1, 1])).abs().max() < 0.01
    neighbours = torch.cat((amounts, amounts.roll(1, dims=2), amounts.roll(1, dims=1))).flatten(1)
    features = torch.cat((neighbours, neighbours**2))  # the sign may hide what is alike
    assert (features.corrcoef() - torch.eye(36)).abs().max() < 0.1
    # The device "meta" computes nothing, but mixes with no other one, as a GPU.
    images = torch.zeros(8, 1, 28, 28, dtype=torch.uint8, device="meta")
    loader = common.Loader("Training", images, images, distort, 4, shuffle=True)
    assert [part.device.type for batch in loader for part in batch] == ["meta"] * 4
