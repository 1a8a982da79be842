"""What goes wrong in a host's loop, also in its worker threads, reaches the caller; what can be told first is."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from auto_round import AutoRound
from gptqmodel import GPTQModel, QuantizeConfig
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from gptqmodel_eora_ext import EoRA
from gptqmodel_eora_ext.adapter.factors import ModuleFactors
from gptqmodel_eora_ext.hosts.autoround.config import EoRAConfig
from gptqmodel_eora_ext.hosts.terminal import quiet
from gptqmodel_eora_ext.loop.run import ModuleError, Run

SEQLEN, MODULES = 32, 14
Quantize = Callable[..., None]


@pytest.fixture(autouse=True)
def without_compiling() -> Iterator[None]:
    with torch.compiler.set_stance("force_eager"):
        yield


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory, tokenizer: Any) -> Path:
    """Two layers of Llama with random weights."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("base")
    config = LlamaConfig(vocab_size=len(tokenizer), hidden_size=64, intermediate_size=128, num_hidden_layers=2,
                         num_attention_heads=4, num_key_value_heads=2)  # fmt: skip
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def windows(token_ids: list[int]) -> list[list[int]]:
    return [token_ids[start : start + SEQLEN] for start in range(0, 4 * SEQLEN, SEQLEN)]


def by_gptqmodel(base: Path, calibration: Any, rank: int = 4) -> None:
    with quiet():
        host = GPTQModel.load(str(base), QuantizeConfig(bits=4, group_size=32))
        host.quantize(calibration, adapter=EoRA(rank=rank))


def by_autoround(base: Path, calibration: Any, rank: int = 4) -> None:
    from transformers import AutoTokenizer

    data = (torch.tensor([window]) for window in calibration)
    AutoRound(
        str(base), tokenizer=AutoTokenizer.from_pretrained(base), scheme="W4A16", group_size=32, iters=0,
        dataset=data if isinstance(calibration, Iterator) else list(data), nsamples=4, seqlen=SEQLEN,
        alg_configs=["signround", EoRAConfig(rank=rank)], device_map="cpu", batch_size=2,
    ).quantize()  # fmt: skip


HOSTS = pytest.mark.parametrize(
    ("quantize", "place"),
    [(by_gptqmodel, "gptqmodel.compensation"), (by_autoround, "autoround.loop")],
    ids=["gptqmodel", "autoround"],
)


@HOSTS
@pytest.mark.parametrize("module", ["layers.0.self_attn.k_proj", "layers.1.mlp.down_proj"])
def test_an_error_in_a_module_reaches_the_caller(
    quantize: Quantize, place: str, module: str, base: Path, windows: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A worker of GPTQModel's ends the process at an exception; then this test could not fail, it would be gone."""
    where = importlib.import_module(f"gptqmodel_eora_ext.hosts.{place}")
    solve = where.compensate

    def breaks(*args: Any, name: str, **kwargs: Any) -> Any:
        if name.endswith(module):
            raise MemoryError("no room")
        return solve(*args, name=name, **kwargs)

    monkeypatch.setattr(where, "compensate", breaks)
    with pytest.raises(ModuleError, match=rf"stopped at model\.{module}, after \d+ modules: MemoryError") as raised:
        quantize(base, windows)
    assert isinstance(raised.value.__cause__, MemoryError)
    assert raised.value.module == f"model.{module}"
    assert len(raised.value.finished) == MODULES - 1 if "layers.1" in module else len(raised.value.finished) < 7
    assert raised.value.module not in raised.value.finished


def test_an_error_while_packing_reaches_the_caller(base: Path, windows: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from gptqmodel_eora_ext.hosts.gptqmodel.compensation import Compensation

    def breaks(self: Any, module: Any, *args: Any, **kwargs: Any) -> None:
        raise RuntimeError("cannot pack")

    monkeypatch.setattr(Compensation, "submodule_finalize", breaks)
    with pytest.raises(ModuleError, match=r"stopped at model\.layers\.0\..*cannot pack"):
        by_gptqmodel(base, windows)


@HOSTS
def test_broken_weights_are_found_before_the_loop(
    quantize: Quantize, place: str, base: Path, windows: Any, tmp_path: Path, tokenizer: Any
) -> None:
    model = AutoModelForCausalLM.from_pretrained(base, dtype="auto")
    model.model.layers[1].mlp.up_proj.weight.data[3, 5] = float("nan")
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"layers\.1\.mlp\.up_proj\.weight holds nan at \[3, 5\]"):
        quantize(tmp_path, windows)


@HOSTS
@pytest.mark.parametrize("found", [-1, 10**6])
def test_token_ids_that_the_model_does_not_embed(
    quantize: Quantize, place: str, found: int, base: Path, windows: Any
) -> None:
    windows[2][5] = found
    with pytest.raises(ValueError, match=f"calibration holds token id {found}, but the model embeds"):
        quantize(base, windows)


@HOSTS
def test_a_generator_of_calibration(
    quantize: Quantize, place: str, base: Path, windows: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All of it is read, though checks look at it before the host does: every module sees every token that counts.

    AutoRound leaves out the last token of a sample, which has no label.
    """
    found: dict[str, int] = {}
    record = Run.record

    def counted(self: Run, name: str, factors: ModuleFactors) -> None:
        found[name] = factors.tokens
        record(self, name, factors)

    monkeypatch.setattr(Run, "record", counted)
    quantize(base, iter(windows))
    assert len(found) == MODULES
    assert set(found.values()) == {len(windows) * (SEQLEN - (quantize is by_autoround))}


@HOSTS
def test_three_tokens_of_calibration(quantize: Quantize, place: str, base: Path) -> None:
    with pytest.raises(ValueError, match="calibration"):
        quantize(base, [[5, 6, 7]])
