"""GPT-2's `Conv1D` stands for a linear layer wherever layers are counted, measured and forecast."""

from __future__ import annotations

import torch
from transformers import Conv1D, GPT2Config, GPT2LMHeadModel

from gptqmodel_eora_ext.adapter.layers import shape_of, use_linear_layers
from gptqmodel_eora_ext.formats.sizes import ModuleShape


def test_shapes_are_out_by_in() -> None:
    assert shape_of("a", torch.nn.Linear(8, 24)) == ModuleShape("a", 24, 8)
    assert shape_of("b", Conv1D(24, 8)) == ModuleShape("b", 24, 8)


def test_linear_layers_compute_the_same_over_the_same_weights() -> None:
    model = GPT2LMHeadModel(GPT2Config(vocab_size=50, n_embd=16, n_layer=1, n_head=2)).eval()
    ids = torch.arange(12).reshape(1, -1)
    block = model.transformer.h[0].mlp
    was = block.c_fc
    with torch.no_grad():
        expected = model(ids).logits
        put_back = use_linear_layers(model)
        assert not any(isinstance(module, Conv1D) for module in model.modules())
        assert isinstance(block.c_fc, torch.nn.Linear) and block.c_fc.weight.shape == (64, 16)
        assert block.c_fc.weight.data_ptr() == was.weight.data_ptr()
        torch.testing.assert_close(model(ids).logits, expected)
        put_back()
        assert block.c_fc is was
