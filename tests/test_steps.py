"""The four steps: networks, comments, logs, the lesson between two of them."""

import ast
import difflib
import io
import os
import pty
import random
import re
import select
import tokenize

import pytest
import torch
import torchinfo
from conftest import SCRIPTS, STEPS, command, run
from torch import nn

import common

PARAMETERS = {"step1": 6_379_786, "step2": 20_750, "step3": 9_078, "step4": 9_538}
SHAPE_COMMENT = re.compile(r"# (\d+)x(\d+)x(\d+) \| RF (\d+)$")
BAR = r"Loss=\d+\.\d+(e-\d+)? Batch_id=BATCH Accuracy=\d+\.\d\d: 100%\|██████████\| N/N "
BAR += r"\[\d\d:\d\d<00:00, +\d+\.\d\d(it/s|s/it)\]"


def code_lines(path):
    """Return the lines of a script without docstrings and blank ones."""
    source = path.read_text(encoding="utf-8")
    hidden = set()
    for node in ast.walk(ast.parse(source)):
        documented = isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef))
        if documented and ast.get_docstring(node):
            hidden |= set(range(node.body[0].lineno, node.body[0].end_lineno + 1))
    lines = enumerate(source.splitlines(), start=1)
    return [line for number, line in lines if number not in hidden and line.strip()]


def epoch_pattern(epoch, batches, images):
    """Return what one epoch must look like, line by line."""
    bar = BAR.replace("BATCH", str(batches - 1)).replace("N/N", f"{batches}/{batches}")
    result = rf"Test set: Average loss: \d+\.\d{{4}}, Accuracy: \d+/{images} \(\d+\.\d\d%\)"
    return [f"EPOCH: {epoch}", bar, "", result, ""]


def check_log(text, epochs, batches, images):
    """Compare all lines of a log from the first epoch on with the documented format."""
    lines = text.splitlines()
    lines = lines[lines.index("EPOCH: 0") :]
    wanted = sum((epoch_pattern(epoch, batches, images) for epoch in range(epochs)), [])
    wanted += [r"Parameters: [\d,]+"]
    wanted += [rf"{kind} Accuracy: \d+\.\d\d \(Epoch \d+\)"
               for kind in ("Best Training", "Best Test", "Last Test")]
    wanted += [rf"Last {min(epochs, 5)} Epochs: mean \d+\.\d\d, lowest \d+\.\d\d"]
    assert len(lines) == len(wanted), text
    for line, pattern in zip(lines, wanted, strict=True):
        assert re.fullmatch(pattern, line), f"{line!r} is not like {pattern!r}"


@pytest.mark.parametrize("name", STEPS)
def test_smoke_from_the_shell(name, data_dir, tmp_path):
    done = run(name, "--smoke", "--data-dir", data_dir, "--out", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    assert "\r" not in done.stdout
    assert done.stdout.startswith("Device: ")
    assert f"Total params: {PARAMETERS[name]:,}" in done.stdout
    check_log(done.stdout, epochs=1, batches=1, images=100)
    assert not (tmp_path / "out").exists()


def test_log_of_two_epochs(data_dir, tmp_path, capsys, monkeypatch):
    STEPS["step2"].main(["--epochs", "2", "--data-dir", str(data_dir), "--out", str(tmp_path),
                         "--no-compile"])
    printed = capsys.readouterr().out
    check_log(printed, epochs=2, batches=3, images=100)
    assert (tmp_path / "step2-seed1.log").read_text(encoding="utf-8") == printed
    rows = (tmp_path / "step2-seed1.csv").read_text().splitlines()
    assert rows[0] == ("epoch,train_loss,train_accuracy,test_loss,test_accuracy,"
                       "learning_rate,seconds")
    for epoch, row in enumerate(rows[1:]):
        assert re.fullmatch(rf"{epoch},\d\.\d{{6}},\d+\.\d\d,\d\.\d{{6}},\d+\.\d\d,0\.01,\d+\.\d\d",
                            row)
    weights = torch.load(tmp_path / "step2-seed1.pt", weights_only=True)
    net = STEPS["step2"].Net()
    net.load_state_dict(weights)
    monkeypatch.setattr(common, "is_bf16_faster", lambda device: True)
    STEPS["step2"].main(["--evaluate", str(tmp_path / "step2-seed1.pt"), "--data-dir",
                         str(data_dir), "--out", str(tmp_path / "none")])
    line, evaluated = re.findall("Test set: .*", printed)[-1], capsys.readouterr().out
    assert re.findall("Test set: .*", evaluated) == [line]
    assert ", fp32, not compiled" in evaluated
    assert not (tmp_path / "none").exists()


def read_terminal(args, columns):
    """Run a command in a pseudo-terminal and return all that it wrote."""
    pid, terminal = pty.fork()
    if pid == 0:
        os.environ.update(COLUMNS=str(columns), PYTHONIOENCODING="utf-8")
        os.execv(args[0], args)
    import fcntl
    import struct
    import termios

    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("4H", 24, columns, 0, 0))
    output = b""
    while select.select([terminal], [], [], 120)[0]:
        try:
            piece = os.read(terminal, 65536)
        except OSError:
            break
        if not piece:
            break
        output += piece
    assert os.waitpid(pid, 0)[1] == 0, output
    return output.decode()


def test_moving_bar_in_a_narrow_terminal(data_dir, tmp_path):
    output = read_terminal(command("step1", "--epochs", "1", "--batch-size", "10", "--data-dir",
                                   data_dir, "--out", tmp_path), columns=40)
    text = re.sub(r"\x1b\[[0-9;]*[A-Za-z]", "", output).replace("\r\n", "\n")
    bars = [part for line in text.splitlines() for part in line.split("\r") if "Batch_id" in part]
    final = [bar for bar in bars if re.fullmatch(BAR.replace("BATCH", "29").replace("N/N", "30/30"),
                                                 bar.strip())]
    assert len(bars) > 1, "the bar does not move"
    assert len(final) == 1
    assert all(len(bar) <= 40 for bar in bars if bar not in final)
    assert "\r" not in (tmp_path / "step1-seed1.log").read_text(encoding="utf-8")


@pytest.mark.parametrize("name", STEPS)
def test_parameters(name):
    assert sum(p.numel() for p in STEPS[name].Net().parameters()) == PARAMETERS[name]


def test_weights_that_the_docstrings_count():
    """Each number of weights in them is that of the layers which it is said of."""
    convolutions = {name: [layer.weight.numel() for layer in step.Net().modules()
                           if isinstance(layer, nn.Conv2d)] for name, step in STEPS.items()}
    large, pooled = sum(sorted(convolutions["step1"])[-2:]), convolutions["step3"][-1]
    narrower = sum(convolutions["step2"][:-1]) - sum(convolutions["step3"][:-1])
    normalization = PARAMETERS["step3"] - sum(convolutions["step3"])
    assert PARAMETERS["step2"] / 2 < 2 * 20 * 32 * 9
    told = {
        "step1": [f"{PARAMETERS['step1'] // 60_000} weights for every one",
                  f"hold {100 * large / PARAMETERS['step1']:.0f} % of them"],
        "step2": [f"takes {32 * 10} weights", f"{10 * 20 * 9:,}", f"{32 * 20 * 9:,}",
                  f"whole image, {convolutions['step2'][-1]:,}"],
        "step3": [f"{convolutions['step2'][-1]:,} in all", f"takes {pooled}", f"{narrower:,}",
                  f"normalization adds {normalization}", f"has {20 * 10 * 36:,}",
                  f"{20 * 10 * 36 - pooled:,}"],
        "step4": [f"{PARAMETERS['step4'] - PARAMETERS['step3']} parameters"],
    }
    for name, step in STEPS.items():
        words = " ".join(step.__doc__.split())
        assert all(piece in words for piece in told[name]), told[name]
        known = " ".join((f"{PARAMETERS[name]:,}", "10,000", "60,000", *told[name]))
        assert set(re.findall(r"\d+,\d{3}", words)) <= set(re.findall(r"\d+,\d{3}", known))


def test_log_probabilities(step):
    output = step.Net().eval()(torch.randn(3, 1, 28, 28))
    assert output.shape == (3, 10)
    torch.testing.assert_close(output.exp().sum(dim=1), torch.ones(3))


def spatial_layers(net):
    """Return (output shape HxWxC, receptive field) after every line of the network.

    The field grows by (kernel - 1) * jump, the jump is multiplied by the stride.
    """
    sizes, field, jump, images = [], 1, 1, torch.zeros(1, 1, 28, 28)
    for line in net.eval().layers:
        images = line(images)
        for layer in line.modules():
            if isinstance(layer, (nn.Conv2d, nn.MaxPool2d, nn.AvgPool2d)):
                kernel, stride = layer.kernel_size, layer.stride
                kernel = kernel[0] if isinstance(kernel, tuple) else kernel
                field += (kernel - 1) * jump
                jump *= stride[0] if isinstance(stride, tuple) else stride
        sizes.append((*images.shape[2:], images.shape[1], field))
    return sizes


@pytest.mark.parametrize("name", STEPS)
def test_shapes_and_receptive_fields_in_the_comments(name):
    source = SCRIPTS[name].read_text(encoding="utf-8")
    body = source[source.index("self.layers") : source.index("def forward")].splitlines()[1:-2]
    found = [SHAPE_COMMENT.search(line) for line in body if line.strip() != ")"]
    assert all(found), body
    comments = [tuple(map(int, match.groups())) for match in found]
    assert comments == spatial_layers(STEPS[name].Net())


def test_summary_leaves_the_model_alone():
    model = STEPS["step3"].Net().train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    state = torch.get_rng_state()
    common.print_summary(model)
    assert model.training
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert not any(module._forward_hooks for module in model.modules())


def test_summary_is_that_of_torchinfo(capsys):
    common.print_summary(STEPS["step4"].Net())
    assert f"Total params: {torchinfo.summary(STEPS['step4'].Net(), verbose=0).total_params:,}" in (
        capsys.readouterr().out)


def test_equal_seeds_give_equal_runs(data_dir, tmp_path):
    for folder, seed in (("a", 5), ("b", 5), ("c", 6)):
        STEPS["step4"].main(["--epochs", "2", "--seed", str(seed), "--data-dir", str(data_dir),
                             "--out", str(tmp_path / folder), "--no-compile"])
        random.random()  # what others draw must not matter
    csv = {folder: [row.rsplit(",", 1)[0] for row in next(
        (tmp_path / folder).glob("*.csv")).read_text().splitlines()] for folder in "abc"}
    assert csv["a"] == csv["b"] != csv["c"]
    a, b = (torch.load(tmp_path / folder / "step4-seed5.pt") for folder in "ab")
    assert all(torch.equal(tensor, b[name]) for name, tensor in a.items())


def test_training_learns(data_dir, tmp_path, capsys):
    """The classes of the small set are plain to see; a broken loop would not find them."""
    STEPS["step3"].main(["--epochs", "8", "--batch-size", "16", "--data-dir", str(data_dir),
                         "--out", str(tmp_path), "--no-compile"])
    best = float(re.search(r"Best Test Accuracy: (\S+)", capsys.readouterr().out)[1])
    assert best > 90


def test_compiled_run_agrees_with_the_uncompiled(data_dir, tmp_path, monkeypatch):
    """Full batches compiled, the last one not: the losses differ by rounding alone."""
    step, losses = STEPS["step3"], {}
    monkeypatch.setattr(step, "DROPOUT", 0.0)
    for flag in ("--no-compile", "--fp32"):
        out = tmp_path / flag.strip("-")
        step.main(["--epochs", "1", "--fp32", flag, "--data-dir", str(data_dir), "--out", str(out)])
        losses[flag] = float((out / "step3-seed1.csv").read_text().splitlines()[1].split(",")[1])
        settings = (out / "step3-seed1.log").read_text(encoding="utf-8").splitlines()[1]
        assert ("not compiled" in settings) == (flag == "--no-compile") or not common.can_compile(
            torch.device("cpu"))
    assert losses["--no-compile"] == pytest.approx(losses["--fp32"], rel=1e-3)


@pytest.mark.parametrize("name, limit", [*((name, 100) for name in SCRIPTS), ("common", 400)])
def test_length(name, limit):
    path = SCRIPTS.get(name, SCRIPTS["step1"].parent / "common.py")
    lines = code_lines(path)
    assert len(lines) <= limit
    assert max(map(len, path.read_text(encoding="utf-8").splitlines())) <= 100


@torch.no_grad()
def test_size_of_values_before_training():
    """The docstrings of steps 2 and 3 tell it: one shrinks them, the other keeps their size."""
    torch.manual_seed(1)
    images = torch.randn(64, 1, 28, 28)
    factors, reached = [], {}
    for name in ("step2", "step3"):
        values = images
        for layer in STEPS[name].Net().layers:
            sizes = [values.square().mean().sqrt()]
            values = layer(values)
            sizes.append(values.square().mean().sqrt())
            if name == "step2" and isinstance(layer, nn.Sequential):
                factors.append(float(sizes[1] / sizes[0]))
        reached[name] = float(sizes[1])
    assert 0.2 < sum(factors) / len(factors) < 0.6, factors
    assert reached["step2"] < 0.005 < 0.05 < reached["step3"]


def test_length_of_the_first_gradient():
    """The docstring of step 2 tells it: that of step 1 is over ten times as long."""
    for seed in (1, 2, 3):
        lengths = []
        for name in ("step1", "step2"):
            torch.manual_seed(seed)
            net, labels = STEPS[name].Net(), torch.randint(10, (64,))
            nn.functional.nll_loss(net(torch.randn(64, 1, 28, 28)), labels).backward()
            lengths.append(sum(p.grad.square().sum() for p in net.parameters()).sqrt())
        assert lengths[0] > 10 * lengths[1]


@pytest.mark.parametrize("first, second", [(1, 2), (2, 3), (3, 4)])
def test_only_the_lesson_changes(first, second):
    """Outside docstrings at most 40 lines of a step differ from those of the step before."""
    a, b = code_lines(SCRIPTS[f"step{first}"]), code_lines(SCRIPTS[f"step{second}"])
    changed = [line for line in difflib.ndiff(a, b) if line[0] in "+-"]
    assert len(changed) <= 40, "\n".join(changed)


def test_steps_have_one_order(step):
    names = [node.name for node in ast.parse(SCRIPTS[step.__name__.split("_")[0]].read_text()).body
             if isinstance(node, (ast.FunctionDef, ast.ClassDef))]
    assert [name for name in names if name != "move_average"] == ["block", "Net", "main"]


def test_functions_over_50_lines_have_a_docstring():
    for path in (*SCRIPTS.values(), SCRIPTS["step1"].parent / "common.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            public = isinstance(node, (ast.FunctionDef, ast.ClassDef)) and node.name[0] != "_"
            if public and path.name == "common.py" and node.name not in ("parse", "figures"):
                assert ast.get_docstring(node), f"{path.name}: {node.name}"
            if isinstance(node, ast.FunctionDef):
                first = node.body[0].end_lineno if ast.get_docstring(node) else node.lineno
                assert node.end_lineno - first <= 50, node.name


def test_comments_do_not_narrate():
    """A comment stands for a reason, a shape or a field; none repeats the name it stands beside."""
    for path in SCRIPTS.values():
        source = io.StringIO(path.read_text(encoding="utf-8"))
        for token in tokenize.generate_tokens(source.readline):
            if token.type == tokenize.COMMENT:
                assert not re.match("# (get|set|create|define|load|import|loop) ", token.string)
