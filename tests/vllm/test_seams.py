"""The plugin's way into vLLM, in vLLM's environment: shapes, undoing, what happens where they do not fit."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest

from benchmarks.vllm_tools import MISSING, PYTHON, WORKER, is_installed

pytestmark = pytest.mark.vllm


def run(script: str, *arguments: str) -> str:
    """What a script prints there."""
    if not is_installed():
        pytest.skip(MISSING)
    command = [str(PYTHON), "-c", script, *arguments]
    own = {**os.environ, "PYTHONPATH": str(WORKER.parents[1])}
    done = subprocess.run(command, capture_output=True, text=True, env=own, timeout=900)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_the_entry_point_imports_nothing_heavy() -> None:
    script = """
import sys
from importlib.metadata import entry_points
(own,) = [one for one in entry_points(group="vllm.general_plugins") if one.name == "eora"]
own.load()
print(sorted({"torch", "vllm", "transformers", "safetensors"} & set(sys.modules)))
"""
    assert run(script).strip() == "[]"


def test_vllm_has_the_shape_that_is_relied_on_and_gets_it_back() -> None:
    script = """
from gptqmodel_eora_ext.hosts.vllm import seams
from vllm.model_executor.layers import quantization
assert seams.problems() == [], seams.problems()
seams.install()
seams.install()
assert seams.installed() and "eora" in quantization.QUANTIZATION_METHODS
found = seams.list_lora_seams()
assert [one.problem() for one in found] == [None] * 3
before = [vars(one.owner)[one.name] for one in found]
seams.install_loras()
assert all(vars(one.owner)[one.name] is not was for one, was in zip(found, before))
seams.uninstall()
assert [vars(one.owner)[one.name] for one in found] == before
assert "eora" not in quantization.QUANTIZATION_METHODS and not seams.installed()
print("fine")
"""
    assert run(script).splitlines()[-1] == "fine"


def test_a_vllm_that_cannot_be_served_refuses_what_needs_the_plugin(tmp_path: Path) -> None:
    """Stock vLLM would serve 4 bits, and leave the adapter out."""
    entry = {"adapter": {"name": "lora", "path": "eora", "rank": 8}}
    (tmp_path / "quantize_config.json").write_text(json.dumps(entry))
    script = """
import sys
from types import SimpleNamespace
from packaging.version import Version
from gptqmodel_eora_ext.hosts.vllm import seams
seams.OLDEST_HOST = Version("99.0")
seams.install_or_log()
from vllm.model_executor.layers.quantization import get_quantization_config
method = get_quantization_config("eora").override_quantization_method
stock = {"quant_method": "gptq", "bits": 4, "group_size": 64, "sym": True, "desc_act": False}
assert method(stock, None, hf_config=SimpleNamespace(name_or_path="")) is None
try:
    method(stock, None, hf_config=SimpleNamespace(name_or_path=sys.argv[1]))
except ValueError as error:
    print(error)
"""
    assert "needs vllm >= 99.0, found 0.32.0" in run(script, str(tmp_path)).splitlines()[-1]
