"""What a run does where no flag says otherwise."""

import importlib.util
import re

import pytest
import torch
from conftest import ROOT, STEPS


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
