"""Packed adapters on disk: what is written, real bytes, and the plain copy."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file

from gptqmodel_eora_ext.adapter.errors import AdapterError
from gptqmodel_eora_ext.adapter.factors import ModuleFactors
from gptqmodel_eora_ext.adapter.folder import AdapterFolder
from gptqmodel_eora_ext.adapter.save import export_peft, save_adapter
from gptqmodel_eora_ext.adapter.summary import summarize
from gptqmodel_eora_ext.formats.names import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from gptqmodel_eora_ext.solve import quantize_factors

from .test_folder import NAMES, edit_config, factors


def packed_factors(bits: int, rank: int, in_features: int = 71, out_features: int = 130) -> ModuleFactors:
    plain = factors(rank, in_features, out_features)
    target = plain.lora_B.float() @ plain.lora_A.float()
    lora_A, lora_B = packed = quantize_factors(target, None, plain.lora_A.float(), bits)
    return replace(plain, lora_A=lora_A.dequantize(), lora_B=lora_B.dequantize().T.contiguous(), packed=packed)


def write(folder: Path, bits: int = 4, ranks: tuple[int, ...] = (4, 4, 3)) -> dict[str, ModuleFactors]:
    made = {name: packed_factors(bits, rank) for name, rank in zip(NAMES, ranks, strict=True)}
    save_adapter(folder, made, base_model="base", module_names=NAMES, details={"objective": "eora"})
    return made


@pytest.mark.parametrize("bits", [8, 4])
def test_round_trip(tmp_path: Path, bits: int) -> None:
    made = write(tmp_path, bits)
    folder = AdapterFolder.open(tmp_path)
    assert folder.is_packed and folder.factor_bits == bits
    for name, found in folder.factors(NAMES):
        assert torch.equal(found.lora_A, made[name].lora_A) and torch.equal(found.lora_B, made[name].lora_B)
    assert summarize(tmp_path).factor_bits == bits


@pytest.mark.parametrize("bits", [8, 4])
def test_reported_bytes_are_those_in_the_file(tmp_path: Path, bits: int) -> None:
    made = write(tmp_path, bits)
    tensors = load_file(tmp_path / ADAPTER_WEIGHTS)
    for name, one in made.items():
        assert one.nbytes == sum(tensor.nbytes for key, tensor in tensors.items() if f".{name}." in key)
    assert sum(one.nbytes for one in made.values()) == sum(tensor.nbytes for tensor in tensors.values())


def test_peft_refuses_it(tmp_path: Path) -> None:
    """PEFT would leave out the packed tensors without a word if the folder said LORA."""
    write(tmp_path)
    with pytest.raises((KeyError, ValueError, TypeError)):
        peft.PeftConfig.from_pretrained(str(tmp_path))


def test_a_module_without_tokens_is_left_out(tmp_path: Path) -> None:
    made = {NAMES[0]: packed_factors(4, 4), NAMES[1]: factors(0)}
    save_adapter(tmp_path, made, base_model="base", module_names=NAMES, details={})
    assert list(AdapterFolder.open(tmp_path).keys) == [NAMES[0]]


def test_export_is_a_plain_peft_folder(tmp_path: Path) -> None:
    made = write(tmp_path / "packed")
    export_peft(AdapterFolder.open(tmp_path / "packed"), tmp_path / "plain")
    config = peft.LoraConfig.from_pretrained(str(tmp_path / "plain"))
    assert config.r == 4 and config.rank_pattern == config.alpha_pattern == {NAMES[2]: 3}
    plain = AdapterFolder.open(tmp_path / "plain")
    assert plain.factor_bits == 16 and plain.details is not None and plain.details["factor_bits"] == 16
    for name, found in plain.factors(NAMES):
        assert found.lora_A.dtype == torch.float16
        torch.testing.assert_close(found.lora_A.float(), made[name].lora_A, rtol=1e-3, atol=1e-6)
        torch.testing.assert_close(found.lora_B.float(), made[name].lora_B, rtol=1e-3, atol=1e-6)


def test_export_over_itself_is_refused(tmp_path: Path) -> None:
    write(tmp_path)
    with pytest.raises(AdapterError, match="the adapter itself"):
        export_peft(AdapterFolder.open(tmp_path), tmp_path)


def test_a_layout_from_the_future(tmp_path: Path) -> None:
    write(tmp_path)
    edit_config(tmp_path, factor_bits=2)
    with pytest.raises(AdapterError, match="says factor_bits 2, factor_group_size 64"):
        AdapterFolder.open(tmp_path)


def test_missing_widths_and_missing_scales(tmp_path: Path) -> None:
    write(tmp_path)
    tensors = load_file(tmp_path / ADAPTER_WEIGHTS)
    save_file(tensors, tmp_path / ADAPTER_WEIGHTS)
    with pytest.raises(AdapterError, match="does not tell the widths"):
        list(AdapterFolder.open(tmp_path).factors(NAMES))
    del tensors[f"base_model.model.{NAMES[0]}.lora_A.scales"]
    save_file(tensors, tmp_path / ADAPTER_WEIGHTS)
    with pytest.raises(AdapterError, match=r"has only lora_A\.qweight, lora_B\.qweight, lora_B\.scales"):
        AdapterFolder.open(tmp_path)


def test_ranks_of_a_packed_folder_are_checked(tmp_path: Path) -> None:
    write(tmp_path)
    content = json.loads((tmp_path / ADAPTER_CONFIG).read_text())
    assert content["peft_type"] == "EORA" and content["rank_pattern"] == {NAMES[2]: 3}
    edit_config(tmp_path, rank_pattern={})
    with pytest.raises(AdapterError, match="gives it rank 4"):
        list(AdapterFolder.open(tmp_path).factors(NAMES))
