"""Layer by layer, a model computes what it computes as a whole, and holds no weights in between."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from gptqmodel_eora_ext.plan.checkpoint import CheckpointWeights, skeleton
from gptqmodel_eora_ext.plan.layered import LayeredModel

from .helpers import CONFIGS, architecture, in_files, in_memory, mixed_batches, tiny_model


@torch.no_grad()
def logits(model: LayeredModel) -> list[torch.Tensor]:
    found = model.begin(mixed_batches())
    for index in range(len(model)):
        with model.layer(index) as layer:
            for window in found:
                window.hidden = model.run(layer, index, window.hidden, window)
    with model.head() as head:
        return [head(window.hidden.flatten(0, 1)).view(*window.ids.shape, -1)[window.keep] for window in found]


@pytest.mark.parametrize("name", CONFIGS)
def test_scores_are_those_of_the_whole(name: str, tmp_path: Path) -> None:
    whole = architecture(name)
    with torch.no_grad():
        expected = [
            whole(**batch).logits[batch["attention_mask"].bool()] for batch in mixed_batches()
        ]  # fmt: skip
    lazily = in_files(whole, tmp_path)
    for model in (in_memory(whole), lazily):
        for found, one in zip(logits(model), expected, strict=True):
            torch.testing.assert_close(found, one, rtol=1e-4, atol=1e-5)
    assert all(one.is_meta for one in lazily.model.parameters())
    assert all("forward" not in vars(layer) for layer in whole.get_submodule("model.layers"))


def test_weights_in_memory_are_not_touched_and_get_no_gradient() -> None:
    whole = tiny_model()
    before = dict(whole.named_parameters())
    model = in_memory(whole)
    with model.layer(0) as layer:
        assert not any(one.requires_grad for one in layer.parameters())
        assert layer.mlp.up_proj.weight.data_ptr() == before["model.layers.0.mlp.up_proj.weight"].data_ptr()
    assert all(one is before[name] and one.requires_grad for name, one in whole.named_parameters())


class Old(torch.nn.Module):
    """As in older model code, layers return tuples, and the model takes the first of each."""

    class Layer(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.proj = torch.nn.Linear(8, 8)

        def forward(self, hidden_states: torch.Tensor, scale: float = 1.0) -> tuple[torch.Tensor, None]:
            return hidden_states + scale * self.proj(hidden_states).tanh(), None

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = torch.nn.Embedding(48, 8), torch.nn.Linear(8, 48)
        self.blocks = torch.nn.ModuleList(self.Layer() for _ in range(3))

    def get_input_embeddings(self) -> torch.nn.Module:
        return self.embed

    def get_output_embeddings(self) -> torch.nn.Module:
        return self.head

    def forward(
        self, input_ids: Any = None, attention_mask: Any = None, inputs_embeds: Any = None, use_cache: bool = True
    ) -> Any:
        hidden = self.embed(input_ids) if inputs_embeds is None else inputs_embeds
        for index, block in enumerate(self.blocks):
            hidden = block(hidden_states=hidden, scale=0.5 + index)[0]
        return SimpleNamespace(logits=self.head(hidden))


def test_layers_that_return_tuples_and_take_their_input_by_name() -> None:
    whole = Old()
    with torch.no_grad():
        expected = [whole(input_ids=one["input_ids"]).logits[one["attention_mask"].bool()] for one in mixed_batches()]
    for found, one in zip(logits(LayeredModel(whole, None, ["blocks.1.proj"])), expected, strict=True):
        torch.testing.assert_close(found, one)


def test_layers_that_are_not_called_in_a_row() -> None:
    whole = tiny_model()
    # One more operation between two layers.
    whole.model.layers[1].register_forward_pre_hook(lambda module, given: (given[0] + 1, *given[1:]))
    with pytest.raises(NotImplementedError, match="one after another"):
        in_memory(whole).begin(mixed_batches())


def test_what_the_checkpoint_does_not_hold(tmp_path: Path) -> None:
    tiny_model().save_pretrained(tmp_path)
    weights = CheckpointWeights(tmp_path)
    del weights.files["model.layers.1.mlp.up_proj.weight"]
    model = LayeredModel(skeleton(tmp_path), weights, ["model.layers.0.mlp.up_proj"])
    with model.layer(0):
        pass
    absent = r"holds no tensor model\.layers\.1\.mlp\.up_proj\.weight"
    with pytest.raises(NotImplementedError, match=absent), model.layer(1):
        pass
    assert all(one.is_meta for one in model.model.parameters())
    with pytest.raises(NotImplementedError, match="not all in one list"):
        LayeredModel(model.model, weights, ["lm_head"])
    with pytest.raises(FileNotFoundError, match="safetensors"):
        CheckpointWeights(tmp_path / "nothing")
