"""The start of a process: active by `import gptqmodel` alone, nearly free, silent, and with a switch."""

from __future__ import annotations

import subprocess
import sys
from importlib.metadata import entry_points
from pathlib import Path

import pytest

import gptqmodel_eora_ext
from gptqmodel_eora_ext.autoload import OFF_SWITCH

ACTIVE = "from gptqmodel.adapter.adapter import ADAPTER_MAPPING; print('active:', 'eora' in ADAPTER_MAPPING)"
# A bound against regressions of kind, such as importing torch; the time itself is a benchmark (autoload.py). The last
# two cost milliseconds that every process would pay.
HEAVY = ("torch", "gptqmodel", "transformers", "peft", "safetensors", "numpy", "typer", "rich", "typing", "pathlib")


def run(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    import os

    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, **environment}, timeout=300
    )


def test_the_entry_point_names_the_adapter() -> None:
    (adapter,) = entry_points(group="gptqmodel.adapters", name="eora")
    assert adapter.load().name() == "eora"


@pytest.mark.parametrize("imports", ["import gptqmodel", "import torch, gptqmodel", "from gptqmodel import GPTQModel"])
def test_import_of_the_host_alone_is_enough(imports: str) -> None:
    done = run(f"{imports}; {ACTIVE}")
    assert "active: True" in done.stdout, done.stderr


@pytest.mark.parametrize("imports", ["import auto_round", "from gptqmodel_eora_ext import EoRAConfig"])
def test_import_of_autoround_alone_is_enough(imports: str) -> None:
    done = run(f"{imports}; from auto_round.algorithms.registry import resolve_alg_config as r; print(r('eora'))")
    assert "EoRAConfig(rank=32" in done.stdout and "not active" not in done.stderr, done.stderr


def test_the_switch_turns_it_off() -> None:
    done = run(f"import gptqmodel; {ACTIVE}", **{OFF_SWITCH: "1"})
    assert "active: False" in done.stdout, done.stderr


def test_without_it_the_import_of_eora_is_enough() -> None:
    done = run(f"from gptqmodel_eora_ext import EoRA; {ACTIVE}", **{OFF_SWITCH: "1"})
    assert "active: True" in done.stdout, done.stderr


def test_import_torch_does_not_import_the_host() -> None:
    done = run("import torch, sys; print('gptqmodel' in sys.modules, 'gptqmodel_eora_ext.hosts' in sys.modules)")
    assert done.stdout.split() == ["False", "False"], done.stderr


def test_autoload_imports_nothing_heavy() -> None:
    report = f"print([name for name in {HEAVY} if name in sys.modules])"
    # Without `site`, whose files of other packages import what they like.
    root = Path(gptqmodel_eora_ext.__file__).parents[1]
    load = "from gptqmodel_eora_ext.autoload import autoload; autoload()"
    code = f"import sys; sys.path.append({str(root)!r}); {load}; {report}"
    done = subprocess.run([sys.executable, "-S", "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stderr


@pytest.mark.parametrize(
    "breakage",
    [
        "import gptqmodel_eora_ext.autoload as a; a._arrange = lambda: 1 / 0; a.autoload()",
        "import gptqmodel_eora_ext.autoload as a, sys; sys.meta_path = None; a.autoload()",
    ],
)
def test_never_raises(breakage: str) -> None:
    done = run(f"{breakage}; print('alive')")
    assert done.stdout.strip() == "alive" and "gptqmodel-eora-ext is not active" in done.stderr


def test_a_host_that_fails_to_import_fails_as_ever(tmp_path: object) -> None:
    """An exception inside `import gptqmodel` is the host's own; nothing is installed into half a module."""
    code = f"""
import sys
sys.path.insert(0, {str(tmp_path)!r})
open({str(tmp_path)!r} + "/gptqmodel.py", "w").write("import torch; raise RuntimeError('broken host')")
try:
    import gptqmodel
except RuntimeError as error:
    print(error, 'gptqmodel' in sys.modules)
"""
    assert run(code).stdout.strip() == "broken host False"
