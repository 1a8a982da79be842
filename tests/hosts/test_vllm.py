"""What vLLM's layers are made of, without vLLM: checkpoints read and refused, parts cut as its processes cut them.

That vLLM itself serves them is tested in `tests/vllm`.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from gptqmodel_eora_ext.adapter.errors import AdapterError
from gptqmodel_eora_ext.adapter.factors import ModuleFactors
from gptqmodel_eora_ext.adapter.save import save_adapter
from gptqmodel_eora_ext.formats.factors import Factors
from gptqmodel_eora_ext.formats.packed_weights import PackedWeight
from gptqmodel_eora_ext.hosts.vllm.checkpoint import (
    PACKED,
    Checkpoint,
    CheckpointError,
    is_gptq,
    needs_plugin,
    read_checkpoint,
)
from gptqmodel_eora_ext.hosts.vllm.parts import Part, share_of
from gptqmodel_eora_ext.hosts.vllm.served import ServedLinear
from gptqmodel_eora_ext.kernels.reference import linear
from tests.kernels.cases import packed_weight, random_factors, random_input
from tests.triton_process import assert_passes

CONFIG: dict[str, Any] = {"quant_method": "gptq", "bits": 2, "group_size": 32, "sym": False,
                          "checkpoint_format": "gptq"}  # fmt: skip
IN, WIDTHS = 192, (256, 64, 64)
CPU = torch.device("cpu")


def named(leaf: str) -> str:
    return f"model.layers.0.self_attn.{leaf}"


@pytest.fixture(params=(16, 4), ids=("plain", "packed"))
def made(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Path, dict[str, PackedWeight], dict[str, Factors]]:
    """A checkpoint of three modules that read one input, of other bits, groups and ranks each, and its adapter."""
    weights = {
        named("q_proj"): packed_weight(2, WIDTHS[0], IN, 32, sym=False, version_1=True, seed=1),
        named("k_proj"): packed_weight(4, WIDTHS[1], IN, 32, version_1=True, seed=2),
        named("v_proj"): packed_weight(3, WIDTHS[2], IN, 64, desc_act=True, version_1=True, seed=3),
    }
    factors = {name: random_factors(weight, rank, request.param, seed=rank)
               for (name, weight), rank in zip(list(weights.items())[:2], (12, 5), strict=True)}  # fmt: skip
    folder = tmp_path / "out"
    folder.mkdir()
    tensors = {f"{name}.{part}": getattr(weight, part) for name, weight in weights.items() for part in PACKED}
    save_file(tensors, folder / "model.safetensors")
    (folder / "quantize_config.json").write_text(json.dumps({**CONFIG, "adapter": {"name": "lora", "path": "eora"}}))
    adapter = {name: ModuleFactors.of_unknown_error(pair.down, pair.up) for name, pair in factors.items()}
    save_adapter(folder / "eora", adapter, base_model="base", module_names=list(weights), details={})
    return folder, weights, factors


def take(checkpoint: Checkpoint, weight: PackedWeight, part: Part) -> Part:
    """Hand a part its tensors, as vLLM reads them."""
    for kind in PACKED:
        part.take(checkpoint, kind, getattr(weight, kind))
    part.require_whole()
    return part


def test_headers_tell_bits_groups_and_features(made: tuple) -> None:
    folder, weights, _ = made
    checkpoint = read_checkpoint(folder, CONFIG)
    assert checkpoint.adapter == folder / "eora"
    for name, weight in weights.items():
        found = checkpoint.modules[name]
        assert (found.bits, found.in_features, found.out_features) == (weight.bits, IN, weight.out_features)
        assert found.group_size == weight.group_size


@pytest.mark.parametrize("processes", (1, 2, 4))
def test_a_joined_layer_is_cut_by_outputs(made: tuple, processes: int) -> None:
    """Each process keeps its heads of q, k and v, as vLLM's column-parallel layers do; together they are the whole."""
    folder, weights, factors = made
    checkpoint = read_checkpoint(folder, CONFIG)
    x = random_input(5, IN)
    pieces: list[list[torch.Tensor]] = []
    for rank in range(processes):
        parts = []
        for name, weight in weights.items():
            share = share_of([weight.out_features], [weight.out_features // processes], [rank], (0, IN))
            parts.append(take(checkpoint, weight, Part(name, share, CPU)))
        y = ServedLinear(checkpoint, parts, None)(x)
        pieces.append(list(y.split([width // processes for width in WIDTHS], dim=1)))
    for place, (name, weight) in enumerate(weights.items()):
        expected = linear(x, weight, factors.get(name))
        found = torch.cat([piece[place] for piece in pieces], dim=1)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("processes", (1, 2, 3))
def test_a_layer_is_cut_by_inputs(made: tuple, processes: int) -> None:
    """Each process keeps some inputs, as vLLM's row-parallel layers do; what they compute adds up to the whole."""
    folder, weights, factors = made
    checkpoint = read_checkpoint(folder, CONFIG)
    x = random_input(5, IN)
    for name, weight in weights.items():
        found = 0
        for rank in range(processes):
            begin, end = rank * IN // processes, (rank + 1) * IN // processes
            share = share_of([weight.out_features], [weight.out_features], [0], (begin, end))
            part = take(checkpoint, weight, Part(name, share, CPU))
            found = found + ServedLinear(checkpoint, [part], None)(x[:, begin:end])
        torch.testing.assert_close(found, linear(x, weight, factors.get(name)), rtol=1e-4, atol=1e-4)


def test_heads_that_several_processes_share(made: tuple) -> None:
    """Four processes over two heads of keys: two keep the first, two the second (`num_kv_head_replicas` 2)."""
    folder, weights, factors = made
    checkpoint, name = read_checkpoint(folder, CONFIG), named("k_proj")
    x, expected = random_input(2, IN), linear(random_input(2, IN), weights[name], factors[name])
    for rank in range(4):
        part = Part(name, share_of([64], [32], [rank // 2], (0, IN)), CPU)
        y = ServedLinear(checkpoint, [take(checkpoint, weights[name], part)], None)(x)
        begin = rank // 2 * 32
        torch.testing.assert_close(y, expected[:, begin : begin + 32], rtol=1e-4, atol=1e-4)


def test_several_kinds_in_one_tensor() -> None:
    """q, k and v in one module of the file, as Phi has them: three ranges of it."""
    assert share_of([256, 64, 64], [128, 32, 32], [1, 1, 1], (0, 8)).outputs == ((128, 256), (288, 320), (352, 384))
    assert share_of([256, 64, 64], [256, 64, 64], [0, 0, 0], (0, 8)).outputs == ((0, 384),)


def test_other_factors_in_place_of_the_checkpoints_own(made: tuple) -> None:
    folder, weights, _ = made
    checkpoint = read_checkpoint(folder, CONFIG)
    share = {name: share_of([one.out_features], [one.out_features], [0], (0, IN)) for name, one in weights.items()}
    parts = [take(checkpoint, weight, Part(name, share[name], CPU)) for name, weight in weights.items()]
    bias, x = torch.randn(sum(WIDTHS)), random_input(3, IN)
    served = ServedLinear(checkpoint, parts, bias, padding=8)
    plain = torch.cat([linear(x, weight) for weight in weights.values()], dim=1) + bias
    torch.testing.assert_close(served.bare(x)[:, :-8], plain, rtol=1e-4, atol=1e-4)
    assert not served.bare(x)[:, -8:].any()
    assert served(x[None]).shape == (1, 3, sum(WIDTHS) + 8)


def test_what_is_left_to_vllm() -> None:
    stock = {"quant_method": "gptq", "bits": 4, "group_size": 64, "sym": True, "desc_act": False}
    assert not needs_plugin(stock)
    assert not needs_plugin({**stock, "bits": 8, "group_size": -1, "desc_act": True})
    for change in ({"bits": 2}, {"bits": 3}, {"sym": False}, {"desc_act": True}, {"meta": {"eora_plan": 1}},
                   {"dynamic": {"+:.*v_proj": {"bits": 8}}}):  # fmt: skip
        assert needs_plugin({**stock, **change}), change
    assert is_gptq(stock) and not is_gptq({"quant_method": "awq"})
    assert is_gptq({"quant_method": "auto-round", "packing_format": "auto_round:auto_gptq"})
    assert not is_gptq({"quant_method": "auto-round", "packing_format": "auto_round:auto_awq"})


def damage_missing(adapter: Path) -> None:
    shutil.rmtree(adapter)


def damage_truncated(adapter: Path) -> None:
    path = adapter / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-64])


def damage_newer(adapter: Path) -> None:
    path = adapter / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "peft_type": "EORA", "factor_bits": 3}))


@pytest.mark.parametrize(
    ("damage", "told"),
    ((damage_missing, "is no folder"), (damage_truncated, "truncated"), (damage_newer, "newer gptqmodel-eora-ext")),
)
def test_an_adapter_that_cannot_be_read_is_refused(made: tuple, damage: Any, told: str) -> None:
    damage(made[0] / "eora")
    with pytest.raises(AdapterError, match=told):
        read_checkpoint(made[0], CONFIG)


def test_an_adapter_of_another_model_is_refused(made: tuple, tmp_path: Path) -> None:
    folder, weights, _ = made
    other = {named("q_proj"): random_factors(packed_weight(2, 128, IN, 32), 4)}
    adapter = {name: ModuleFactors.of_unknown_error(pair.down, pair.up) for name, pair in other.items()}
    shutil.rmtree(folder / "eora")
    save_adapter(folder / "eora", adapter, base_model="another", module_names=list(weights), details={})
    with pytest.raises(AdapterError, match=r"q_proj.*128 × 192.*256 × 192.*made for another"):
        read_checkpoint(folder, CONFIG)


def test_experts_are_refused_by_name(tmp_path: Path) -> None:
    weight = packed_weight(2, 32, 32, 32)
    save_file({f"model.layers.0.mlp.experts.3.up_proj.{part}": getattr(weight, part) for part in PACKED},
              tmp_path / "model.safetensors")  # fmt: skip
    with pytest.raises(CheckpointError, match=r"experts\.3\.up_proj"):
        read_checkpoint(tmp_path, CONFIG)


def test_tensors_that_do_not_fit_together_are_refused(tmp_path: Path) -> None:
    weight = packed_weight(2, 32, 64, 32)
    tensors = {f"model.a.{part}": getattr(weight, part) for part in PACKED}
    save_file({**tensors, "model.a.scales": weight.scales[:1].contiguous()}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match="fit none of"):
        read_checkpoint(tmp_path, CONFIG)


def test_a_part_of_which_tensors_are_missing_is_refused(made: tuple) -> None:
    folder, weights, _ = made
    checkpoint, name = read_checkpoint(folder, CONFIG), named("k_proj")
    part = Part(name, share_of([64], [64], [0], (0, IN)), CPU)
    part.take(checkpoint, "qweight", weights[name].qweight)
    with pytest.raises(CheckpointError, match=r"k_proj; it has read qweight"):
        part.require_whole()


def test_on_the_triton_kernels() -> None:
    """What a GPU would multiply, interpreted."""
    pytest.importorskip("triton")
    assert_passes(Path(__file__).with_name("vllm_triton.py"), interpreted=True)
