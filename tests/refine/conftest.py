"""A small Llama of random weights, and the same with rounded weights as what is to be refined."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from gptqmodel_eora_ext.adapter.factors import ModuleFactors
from gptqmodel_eora_ext.adapter.folder import AdapterFolder
from gptqmodel_eora_ext.adapter.save import save_adapter
from gptqmodel_eora_ext.refine import RefineJob, RefineSettings, Trainee
from gptqmodel_eora_ext.solve import balance, svd
from gptqmodel_eora_ext.solve.quantized import quantize_factor

RANK, WINDOW, WINDOWS, VOCABULARY = 8, 24, 20, 97
# Of a weight's standard deviation: coarse enough that there is much to win back.
STEP = 1.6


@dataclass
class DenseWeight:
    """A rounded weight, kept as it is."""

    weight: torch.Tensor
    bias: torch.Tensor | None = None

    @property
    def in_features(self) -> int:
        return self.weight.shape[1]

    @property
    def out_features(self) -> int:
        return self.weight.shape[0]

    def dense(self, dtype: torch.dtype) -> torch.Tensor:
        return self.weight.to(dtype, copy=True).T


def rounded(weight: torch.Tensor) -> torch.Tensor:
    step = STEP * weight.std()
    return (weight / step).round() * step


def small_model() -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
                         num_key_value_heads=2, vocab_size=VOCABULARY, max_position_embeddings=64,
                         tie_word_embeddings=True, initializer_range=0.1)  # fmt: skip
    return LlamaForCausalLM(config).to(torch.float32).eval()


def linears(model: Any) -> dict[str, torch.nn.Linear]:
    head = model.get_output_embeddings()
    return {name: one for name, one in model.named_modules() if isinstance(one, torch.nn.Linear) and one is not head}


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    small_model().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def ids() -> torch.Tensor:
    """Windows that the model has written itself."""
    generator, model = torch.Generator().manual_seed(1), small_model()
    found = torch.randint(0, VOCABULARY, (WINDOWS, 1), generator=generator)
    with torch.no_grad():
        while found.shape[1] < WINDOW:
            likely = model(found).logits[:, -1].softmax(-1)
            found = torch.cat([found, torch.multinomial(likely, 1, generator=generator)], 1)
    return found


@pytest.fixture
def trainee() -> Trainee:
    model = small_model()
    weights = {name: DenseWeight(rounded(one.weight.detach())) for name, one in linears(model).items()}
    for name, one in linears(model).items():
        one.weight.data = weights[name].weight
    return Trainee(model, weights)


def starting_factors(bits: int) -> dict[str, ModuleFactors]:
    """The best correction of each weight by itself, as it is stored."""
    factors = {}
    for name, one in linears(small_model()).items():
        weight = one.weight.detach()
        lora_A, lora_B = balance(*svd(weight - rounded(weight), RANK))
        packed = None
        if bits < 16:
            packed = (quantize_factor(lora_A, bits), quantize_factor(lora_B.T, bits))
            lora_A, lora_B = packed[0].dequantize(), packed[1].dequantize().T
        factors[name] = ModuleFactors(lora_A.half(), lora_B.half(), RANK, 100, 1.0, 0.5, 0.2, packed)
    return factors


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """A folder that stands for a checkpoint and names its adapter of 4-bit factors."""
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    (folder / "quantize_config.json").write_text('{"bits": 2}')
    names = [name for name, _ in small_model().named_modules()]
    save_adapter(folder / "eora", starting_factors(4), base_model="base", module_names=names,
                 details={"objective": "svd"})  # fmt: skip
    return folder


@pytest.fixture
def source(checkpoint: Path) -> AdapterFolder:
    return AdapterFolder.open(checkpoint / "eora")


@pytest.fixture
def job(base: Path, ids: torch.Tensor) -> RefineJob:
    return RefineJob(str(base), ids, RefineSettings(tokens=ids.numel(), window=WINDOW, learning_rate=0.003))


@pytest.fixture(autouse=True)
def in_float32(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Have every processor compute the same."""
    monkeypatch.setattr("gptqmodel_eora_ext.refine.run.activation_dtype", lambda device: torch.float32)
    yield
