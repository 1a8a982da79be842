"""Importance matrices: the sums, against hooks on the whole model; the file, as llama.cpp reads it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch

from gptqmodel_eora_ext.hosts.jobs import ImatrixJob
from gptqmodel_eora_ext.hosts.registry import imatrix_maker
from gptqmodel_eora_ext.hosts.terminal import quiet
from tests.gguf_files import tensor_of, write_model
from tests.hosts.test_llamacpp import linears, make, windows


def measure(base: Path, file: Path, output: Path, data: Any) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    with quiet():
        imatrix_maker(file)(ImatrixJob(str(base), file, data, output, source="a text"))
    reader = gguf.GGUFReader(output)
    fields = {name: field.contents() for name, field in reader.fields.items()}
    return fields, {tensor.name: tensor.data for tensor in reader.tensors}


def test_sums_are_those_of_the_model_without_padding(tmp_path: Path, tokenizer: Any) -> None:
    model = make("llama", tmp_path / "base", tokenizer)
    file = write_model(model, tmp_path / "model.gguf", "F16")
    data = windows(3)
    # Padding of the last window does not count.
    data[2]["attention_mask"][25:] = [0] * 15
    fields, found = measure(tmp_path / "base", file, tmp_path / "imatrix.gguf", data)
    assert fields["general.type"] == "imatrix" and fields["imatrix.datasets"] == ["a text"]
    assert fields["imatrix.chunk_count"] == 3 and fields["imatrix.chunk_size"] == 40
    keep = torch.tensor([one["attention_mask"] for one in data]).bool()
    expected: dict[str, torch.Tensor] = {}
    for name, linear in linears(model).items():
        linear.register_forward_pre_hook(
            lambda module, inputs, name=name: expected.update({name: inputs[0][keep].double().square().sum(0)})
        )
    with torch.no_grad():
        model(input_ids=torch.tensor([one["input_ids"] for one in data]), attention_mask=keep.long())
    assert len(found) == 2 * len(expected)
    for name, sums in expected.items():
        np.testing.assert_allclose(found[f"{tensor_of(name)}.in_sum2"][0], sums.numpy(), rtol=1e-4)
        assert found[f"{tensor_of(name)}.counts"].item() == int(keep.sum())


def test_experts_have_a_row_each(tmp_path: Path, tokenizer: Any) -> None:
    model = make("experts", tmp_path / "base", tokenizer)
    file = write_model(model, tmp_path / "model.gguf", "F16")
    _, found = measure(tmp_path / "base", file, tmp_path / "imatrix.gguf", windows(3))
    counts = found["blk.1.ffn_down_exps.weight.counts"]
    assert counts.shape == (3, 1) and counts.sum() == 2 * 3 * 40
    assert found["blk.1.ffn_down_exps.weight.in_sum2"].shape == (3, 32)


def test_a_file_of_another_model_is_refused(tmp_path: Path, tokenizer: Any) -> None:
    make("experts", tmp_path / "base", tokenizer)
    other = write_model(make("llama", tmp_path / "llama", tokenizer), tmp_path / "llama.gguf", "F16")
    with pytest.raises(ValueError, match="holds no tensor for"):
        measure(tmp_path / "base", other, tmp_path / "imatrix.gguf", windows(1))
