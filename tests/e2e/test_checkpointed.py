"""`checkpoint=CheckpointConfig(…)` with an adapter: interrupted in one layer or another, the same bytes in the end."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from gptqmodel import AWQConfig, GPTQModel, QuantizeConfig
from gptqmodel.looper.checkpoint_store import CheckpointConfig
from transformers import LlamaConfig, LlamaForCausalLM

from gptqmodel_eora_ext import EoRA
from gptqmodel_eora_ext.hosts.gptqmodel.generate import generate_adapter
from gptqmodel_eora_ext.hosts.terminal import quiet
from gptqmodel_eora_ext.loop.resume import NEXT, Keeping
from gptqmodel_eora_ext.system.kept import Kept, ResumeError

from .helpers import Batches

pytestmark = pytest.mark.e2e

MIXED = {r"+:.*down_proj": {"bits": 3, "adapter": {"rank": 4}}, r"-:.*layers\.1\..*k_proj": {}}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory, tokenizer: Any) -> Path:
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("tiny")
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer), hidden_size=64, intermediate_size=128, num_hidden_layers=3,
            num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=True,
        )
    )  # fmt: skip
    model.to(torch.float16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def quantize(
    model: Path, folder: Path, calibration: Batches, adapter: dict[str, Any], config: Any, progress: Any = None
) -> Path:
    with quiet():
        host = GPTQModel.load(str(model), config)
        host.quantize(calibration[:8], batch_size=4, adapter=EoRA(**adapter), checkpoint=progress)
        host.save(str(folder))
    return folder


def written(folder: Path) -> dict[str, Any]:
    files: dict[str, Any] = {str(one.relative_to(folder)): one.read_bytes() for one in folder.rglob("*.safetensors")}
    return {**files, "modules": json.loads((folder / "eora" / "eora.json").read_text())["modules"]}


class Interrupted(BaseException):
    """As sudden as can be within one process."""


def interrupt(monkeypatch: pytest.MonkeyPatch, layer: int, *, before: bool) -> None:
    """End the run once so many layers are finished, before or after the last of them is kept as finished."""
    keep = Kept.keep

    def until(self: Kept, name: str, state: Any, *args: Any) -> None:
        last = name == NEXT and state.get("steps") == layer
        if last and before:
            raise Interrupted
        keep(self, name, state, *args)
        if last:
            raise Interrupted

    monkeypatch.setattr(Kept, "keep", until)


@pytest.mark.parametrize(
    ("adapter", "config", "before"),
    [
        ({"rank": 8, "rounds": 2}, {"dynamic": MIXED, "desc_act": True}, True),
        ({"budget": "0.5bpw", "factor_bits": 4}, {}, False),
        ({"rank": 8, "objective": "output"}, {}, False),
    ],
)
def test_goes_on_after_the_last_finished_layer(
    adapter: dict[str, Any], config: Any, before: bool, tiny: Path, calibration: Batches, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    def run(name: str, progress: Any = None) -> Path:
        settings = QuantizeConfig(bits=2, group_size=32, **config)
        return quantize(tiny, tmp_path / name, calibration, adapter, settings, progress)

    whole = run("whole")
    progress = CheckpointConfig(path=tmp_path / "progress")
    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        interrupt(patch, 2, before=before)
        run("resumed", progress)
    assert written(run("resumed", progress)) == written(whole)
    assert not (tmp_path / "progress" / "eora").exists()


@pytest.mark.resume
def test_awq_goes_on_with_the_scales_that_it_has_moved(
    two_layers: Path, calibration: Batches, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It changes norms as well, which are kept with the layer."""

    def run(name: str, progress: Any = None) -> Path:
        config = AWQConfig(bits=4, group_size=64)
        return quantize(two_layers, tmp_path / name, calibration, {"rank": 8}, config, progress)

    whole = run("whole")
    progress = CheckpointConfig(path=tmp_path / "progress")
    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        interrupt(patch, 1, before=False)
        run("resumed", progress)
    assert written(run("resumed", progress)) == written(whole)


def test_a_finished_checkpoints_adapter_goes_on_too(
    tiny: Path, calibration: Batches, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = quantize(tiny, tmp_path / "out", calibration, {"rank": 8}, QuantizeConfig(bits=2, group_size=32))

    def made(name: str) -> bytes:
        adapter = EoRA(rank=8, path=tmp_path / name)
        with quiet():
            folder = generate_adapter(
                adapter, str(tiny), checkpoint, calibration[:8], batch_size=4, keeping=Keeping(tmp_path / "kept")
            )
        assert not (tmp_path / "kept").exists()
        return (folder / "adapter_model.safetensors").read_bytes()

    whole = made("whole")
    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        interrupt(patch, 1, before=False)
        made("resumed")
    assert made("resumed") == whole


def test_what_a_checkpoint_config_says_is_done_or_refused(tiny: Path, calibration: Batches, tmp_path: Path) -> None:
    def run(**options: Any) -> None:
        progress = CheckpointConfig(path=tmp_path / "progress", **options)
        quantize(tiny, tmp_path / "out", calibration, {"rank": 8}, QuantizeConfig(bits=2, group_size=32), progress)

    with pytest.raises(NotImplementedError, match="keep_last=3"):
        run(keep_last=3)
    with pytest.raises(ResumeError, match="nothing to go on with"):
        run(resume="required")
    (tmp_path / "progress" / "eora").mkdir(parents=True)
    with pytest.raises(ResumeError, match="resume='never'"):
        run(resume="never")
