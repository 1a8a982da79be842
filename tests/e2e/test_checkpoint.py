"""Saving and loading: three ways in with the same logits, folders that move, and adapters that do not fit."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from gptqmodel import AWQConfig, GPTQModel, QuantizeConfig
from safetensors.torch import load_file, save_file

from gptqmodel_eora_ext import AdapterError, EoRA
from gptqmodel_eora_ext.autoload import OFF_SWITCH
from gptqmodel_eora_ext.formats.names import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from gptqmodel_eora_ext.hosts.gptqmodel.checkpoint.load import adapters_off
from gptqmodel_eora_ext.hosts.terminal import quiet

from .helpers import Batches, Made, distances, kernels, load, measured_errors, quantize

pytestmark = pytest.mark.e2e

# PEFT multiplies factors in float32, GPTQModel in bfloat16: two layers of a bfloat16 model apart. By root mean squares:
# one unit in the last place of the largest logits is a sixteenth of their rms.
PEFT_TOLERANCE = 0.01

STOCK = """
import sys, torch
from gptqmodel import BACKEND, GPTQModel
assert "gptqmodel_eora_ext" not in sys.modules or "gptqmodel_eora_ext.hosts" not in sys.modules
model = GPTQModel.load(sys.argv[1], backend=BACKEND.GPTQ_TORCH).model
with torch.inference_mode():
    torch.save(model(torch.tensor([eval(sys.argv[3])])).logits, sys.argv[2])
"""


@pytest.fixture(scope="module")
def made(two_layers: Path, calibration: Batches, tmp_path_factory: pytest.TempPathFactory) -> Made:
    """Ranks that differ, among them 0."""
    folder = tmp_path_factory.mktemp("checkpoint") / "model"
    dynamic = {r"+:.*down_proj": {"adapter": {"rank": 4}}, r"+:.*layers\.1\..*k_proj": {"adapter": {"rank": 0}}}
    return quantize(two_layers, folder, QuantizeConfig(bits=2, group_size=64, dynamic=dynamic), calibration)


@pytest.fixture
def copy(made: Made, tmp_path: Path) -> Path:
    """The checkpoint, to be damaged."""
    return Path(shutil.copytree(made.folder, tmp_path / "model"))


@pytest.fixture(scope="module")
def prompt(token_ids: list[int]) -> list[int]:
    return token_ids[2000:2100]


def logits(model: Any, prompt: list[int]) -> torch.Tensor:
    with torch.inference_mode():
        result: torch.Tensor = model(input_ids=torch.tensor([prompt])).logits
    return result


def test_with_plugin_without_plugin_and_peft_agree(made: Made, prompt: list[int], tmp_path: Path) -> None:
    ours = logits(load(made.folder), prompt)
    environment = {**os.environ, OFF_SWITCH: "1", "GPTQMODEL_CPU_WORKERS": "2"}
    command = [sys.executable, "-c", STOCK, str(made.folder), str(tmp_path / "logits.pt"), str(prompt)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    assert torch.equal(ours, torch.load(tmp_path / "logits.pt", weights_only=True))

    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(made.folder)
    through_peft = logits(PeftModel.from_pretrained(base, made.folder / "eora"), prompt)
    assert (ours.float() - through_peft.float()).norm() < PEFT_TOLERANCE * ours.float().norm()


def test_the_adapter_brings_the_model_nearer(
    made: Made, copy: Path, two_layers: Path, calibration: Batches, prompt: list[int]
) -> None:
    model = load(made.folder)
    adapted, alone = distances(two_layers, model, calibration)
    assert adapted < 0.9 * alone
    before = logits(model, prompt)
    with adapters_off(model):
        without = logits(model, prompt)
    assert torch.equal(before, logits(model, prompt))
    # Off means as if the checkpoint named no adapter.
    config = json.loads((copy / "quantize_config.json").read_text())
    del config["adapter"]
    (copy / "quantize_config.json").write_text(json.dumps(config))
    assert torch.equal(without, logits(load(copy), prompt))


def test_saved_twice_elsewhere_moved_and_read_only(made: Made, prompt: list[int], tmp_path: Path) -> None:
    expected = logits(load(made.folder), prompt)
    with quiet():
        made.host.save(str(tmp_path / "again"))
        made.host.save(str(tmp_path / "again"))
    (tmp_path / "again").rename(tmp_path / "moved")
    for path in (tmp_path / "moved").rglob("*"):
        path.chmod(0o555 if path.is_dir() else 0o444)
    (tmp_path / "moved").chmod(0o555)
    try:
        assert torch.equal(logits(load(tmp_path / "moved"), prompt), expected)
    finally:
        for path in [tmp_path / "moved", *(tmp_path / "moved").rglob("*")]:
            path.chmod(0o755)


def test_a_loaded_model_is_saved_with_its_adapter(made: Made, prompt: list[int], tmp_path: Path) -> None:
    expected = logits(load(made.folder), prompt)
    with quiet():
        host = GPTQModel.load(str(made.folder), backend="gptq_torch")
        host.save(str(tmp_path / "saved"))
    assert torch.equal(logits(load(tmp_path / "saved"), prompt), expected)
    details = json.loads((tmp_path / "saved" / "eora" / "eora.json").read_text())
    assert details["objective"] == "eora" and details["modules"]


def test_explicit_path_and_relative_paths(
    two_layers: Path, calibration: Batches, made: Made, prompt: list[int], tmp_path: Path
) -> None:
    expected = logits(load(made.folder), prompt)
    shutil.copytree(made.folder / "eora", tmp_path / "elsewhere")
    assert torch.equal(logits(load(made.folder, adapter=EoRA(path=tmp_path / "elsewhere")), prompt), expected)
    nested = quantize(
        two_layers, tmp_path / "nested", QuantizeConfig(bits=4, group_size=64), calibration[:4],
        adapter=EoRA(rank=4, path="adapters/r4"),
    )  # fmt: skip
    assert (nested.folder / "adapters" / "r4" / ADAPTER_WEIGHTS).is_file()
    assert json.loads((nested.folder / "quantize_config.json").read_text())["adapter"] == {
        "name": "lora", "path": "adapters/r4", "rank": 4,
    }  # fmt: skip
    assert kernels(load(nested.folder))["model.layers.0.mlp.up_proj"].adapter.rank == 4


def test_partial_adapters_load(copy: Path, prompt: list[int]) -> None:
    weights = copy / "eora" / ADAPTER_WEIGHTS
    kept = {key: value for key, value in load_file(weights).items() if ".layers.1." in key}
    save_file(kept, weights)
    model = load(copy)
    found = kernels(model)
    assert found["model.layers.0.mlp.up_proj"].adapter.lora_A is None
    assert found["model.layers.1.mlp.up_proj"].adapter.lora_A is not None
    assert torch.isfinite(logits(model, prompt)).all()


def _other_names(folder: Path) -> None:
    stored = load_file(folder / ADAPTER_WEIGHTS)
    tensors = {key.replace("self_attn", "attention"): value for key, value in stored.items()}
    save_file(tensors, folder / ADAPTER_WEIGHTS)


def _other_shapes(folder: Path) -> None:
    tensors = load_file(folder / ADAPTER_WEIGHTS)
    for key, value in tensors.items():
        if "up_proj.lora_A" in key:
            tensors[key] = torch.cat([value, value], dim=1)
    save_file(tensors, folder / ADAPTER_WEIGHTS)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_other_names, "no quantised module of this model"),
        (_other_shapes, r"up_proj .* is for a weight of out × in = 1536 × 1152, but the checkpoint's is 1536 × 576"),
        (lambda folder: os.truncate(folder / ADAPTER_WEIGHTS, 5000), "truncated or corrupted"),
        (lambda folder: (folder / ADAPTER_CONFIG).unlink(), "has no adapter_config.json"),
    ],
)
def test_adapters_that_do_not_fit(copy: Path, damage: Any, message: str, prompt: list[int]) -> None:
    damage(copy / "eora")
    with pytest.raises(AdapterError, match=message):
        load(copy, adapter=EoRA(path=copy / "eora"))
    # A failed load leaves nothing behind that breaks the next.
    shutil.rmtree(copy / "eora")


def test_a_failed_load_does_not_poison_the_next(made: Made, copy: Path, prompt: list[int]) -> None:
    expected = logits(load(made.folder), prompt)
    _other_shapes(copy / "eora")
    with pytest.raises(AdapterError):
        load(copy)
    shutil.rmtree(copy / "eora")
    shutil.copytree(made.folder / "eora", copy / "eora")
    assert torch.equal(logits(load(copy), prompt), expected)


@pytest.fixture(scope="module")
def plain(
    two_layers: Path, calibration: Batches, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[dict[str, Path]]:
    """Checkpoints without adapters, GPTQ with a module left in 16 bits, and AWQ."""
    folder = tmp_path_factory.mktemp("plain")
    skipped = {r"-:.*layers\.0\..*o_proj": {}}
    configs = {
        "gptq": QuantizeConfig(bits=3, group_size=64, dynamic=skipped),
        "awq": AWQConfig(bits=4, group_size=64),
    }
    with quiet():
        for name, config in configs.items():
            host = GPTQModel.load(str(two_layers), config)
            host.quantize(calibration, batch_size=4)
            host.save(str(folder / name))
    yield {name: folder / name for name in configs}


@pytest.mark.parametrize("method", ["gptq", "awq"])
def test_generate_for_a_finished_checkpoint(
    method: str, plain: dict[str, Path], two_layers: Path, calibration: Batches, prompt: list[int], tmp_path: Path
) -> None:
    checkpoint = Path(shutil.copytree(plain[method], tmp_path / "model"))
    before = logits(load(checkpoint, backend="auto"), prompt)
    with quiet():
        GPTQModel.adapter.generate(
            adapter=EoRA(rank=16),
            model_id_or_path=str(two_layers),
            quantized_model_id_or_path=str(checkpoint),
            calibration_dataset=calibration,
            batch_size=4,
        )
    report = json.loads((checkpoint / "eora" / "eora.json").read_text())["modules"]
    assert len(report) == (13 if method == "gptq" else 14)
    for name, module in report.items():
        assert module["error_after"] < module["error_before"] < 0.1 * module["signal"], name
    model = load(checkpoint, backend="auto")
    assert not torch.equal(logits(model, prompt), before)
    if method == "gptq":
        found = measured_errors(two_layers, load(checkpoint), calibration)
        for name, module in report.items():
            assert found[name] == pytest.approx(module["error_after"], rel=0.05), name


def test_generate_under_a_budget(
    plain: dict[str, Path], two_layers: Path, calibration: Batches, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    checkpoint = Path(shutil.copytree(plain["gptq"], tmp_path / "model"))
    with quiet():
        GPTQModel.adapter.generate(
            adapter=EoRA("auto", budget="r8"),
            model_id_or_path=str(two_layers),
            quantized_model_id_or_path=str(checkpoint),
            calibration_dataset=calibration,
            batch_size=4,
        )
    content = json.loads((checkpoint / "eora" / "eora.json").read_text())
    modules = content["modules"]
    assert 0.9 * content["allocation"]["budget"] < content["allocation"]["spent"] <= content["allocation"]["budget"]
    stored = safetensors.torch.load_file(checkpoint / "eora" / "adapter_model.safetensors")
    assert content["allocation"]["spent"] == sum(tensor.nbytes for tensor in stored.values())
    found = measured_errors(two_layers, load(checkpoint), calibration)
    for name, module in modules.items():
        assert found[name] == pytest.approx(module["error_after"], rel=0.05), name


def test_generate_leaves_padding_out(
    plain: dict[str, Path], two_layers: Path, token_ids: list[int], tmp_path: Path
) -> None:
    lengths = (64, 40, 51)
    data = [{"input_ids": token_ids[:length], "attention_mask": [1] * length} for length in lengths]
    with quiet():
        GPTQModel.adapter.generate(
            adapter=EoRA(rank=4, path=tmp_path / "adapter"),
            model_id_or_path=str(two_layers),
            quantized_model_id_or_path=str(plain["gptq"]),
            calibration_dataset=data,
            batch_size=len(data),
        )
    report = json.loads((tmp_path / "adapter" / "eora.json").read_text())["modules"]
    assert {module["tokens"] for module in report.values()} == {sum(lengths)}


def test_generate_refuses_another_base(
    plain: dict[str, Path], smollm2: Path, calibration: Batches, tmp_path: Path
) -> None:
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(vocab_size=49152, hidden_size=64, intermediate_size=128, num_hidden_layers=2,
                         num_attention_heads=4, num_key_value_heads=2)  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(smollm2).save_pretrained(tmp_path)
    with quiet(), pytest.raises(ValueError, match=r"is not the model that .* was quantised from"):
        GPTQModel.adapter.generate(
            adapter=EoRA(rank=4, path=tmp_path / "adapter"),
            model_id_or_path=str(tmp_path),
            quantized_model_id_or_path=str(plain["gptq"]),
            calibration_dataset=calibration,
        )


@pytest.mark.parametrize(
    ("adapter", "data", "message"),
    [
        (EoRA(rank=4), [], "dataset is empty"),
        (EoRA(objective="svd"), [[1]], "Name a rank, or leave the objective out"),
        (EoRA(rank=4, rounds=2), [[1]], "rounds=2 is not possible: the checkpoint is quantised already"),
    ],
)
def test_generate_checks_before_loading(adapter: EoRA, data: list[Any], message: str, tmp_path: Path) -> None:
    with pytest.raises((ValueError, NotImplementedError), match=message):
        GPTQModel.adapter.generate(
            adapter=adapter,
            model_id_or_path="missing",
            quantized_model_id_or_path=str(tmp_path),
            calibration_dataset=data,
        )
