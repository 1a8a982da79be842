"""Formats whose libraries are no dependency: `make test-formats` installs them beside the others."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from . import foreign_models as foreign
from .test_foreign import Batches, check, make

pytestmark = pytest.mark.formats

BITSANDBYTES: dict[str, dict[str, Any]] = {
    "nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True,
            "bnb_4bit_compute_dtype": torch.bfloat16},
    "fp4": {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4", "bnb_4bit_compute_dtype": torch.bfloat16},
}  # fmt: skip
# Preset, group size.
COMPRESSED = (("W4A16", 64), ("W8A16", 64), ("MXFP4A16", None), ("NVFP4A16", None))
# They quantise activations as well, so that logits differ by more than rounding from what Ŵ gives.
WITH_ACTIVATIONS = ("FP8_DYNAMIC", "INT8")


@pytest.mark.parametrize("kind", BITSANDBYTES)
def test_bitsandbytes(kind: str, two_layers: Path, calibration: Batches, tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    checkpoint = foreign.by_bitsandbytes(two_layers, tmp_path / kind, **BITSANDBYTES[kind])
    check(two_layers, checkpoint, calibration, tmp_path / "adapter")


def test_bitsandbytes_int8(two_layers: Path, calibration: Batches, tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    checkpoint = foreign.by_bitsandbytes(two_layers, tmp_path / "int8", load_in_8bit=True)
    assert (make(two_layers, checkpoint, calibration, tmp_path / "adapter") / "eora.json").is_file()


@pytest.mark.parametrize(("preset", "group_size"), COMPRESSED)
def test_compressed_tensors(
    preset: str, group_size: int | None, two_layers: Path, calibration: Batches, tmp_path: Path
) -> None:
    pytest.importorskip("compressed_tensors")
    from transformers import CompressedTensorsConfig

    checkpoint = foreign.by_compressed_tensors(two_layers, tmp_path / preset, preset, group_size)
    # PEFT asks a layer for its `weight`, which packed ones do not have.
    plain = CompressedTensorsConfig(dequantize=True)
    check(two_layers, checkpoint, calibration, tmp_path / "adapter", quantization_config=plain)


@pytest.mark.parametrize("preset", WITH_ACTIVATIONS)
def test_compressed_tensors_with_activations(
    preset: str, two_layers: Path, calibration: Batches, tmp_path: Path
) -> None:
    pytest.importorskip("compressed_tensors")
    checkpoint = foreign.by_compressed_tensors(two_layers, tmp_path / preset, preset)
    assert (make(two_layers, checkpoint, calibration, tmp_path / "adapter") / "eora.json").is_file()


def test_blocks_of_fp8(two_layers: Path, calibration: Batches, tmp_path: Path) -> None:
    check(two_layers, foreign.in_blocks_of_fp8(two_layers, tmp_path / "fp8"), calibration, tmp_path / "adapter")


TORCHAO: dict[str, dict[str, Any]] = {
    "Int8WeightOnlyConfig": {},
    "Float8WeightOnlyConfig": {},
    "IntxWeightOnlyConfig": {"weight_dtype": torch.int4},
}


@pytest.mark.parametrize("kind", TORCHAO)
def test_torchao(kind: str, two_layers: Path, calibration: Batches, tmp_path: Path) -> None:
    quantization = pytest.importorskip("torchao.quantization")
    checkpoint = foreign.by_torchao(two_layers, tmp_path / kind, getattr(quantization, kind)(**TORCHAO[kind]))
    check(two_layers, checkpoint, calibration, tmp_path / "adapter")
