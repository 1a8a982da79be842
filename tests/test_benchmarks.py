"""What the benchmarks share: where results go and come from, texts that stay apart, a copy that computes what ships."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from gptqmodel.adapter.adapter import Lora

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
import common  # type: ignore[import-not-found]
import rounded_checkpoint  # type: ignore[import-not-found]

from gptqmodel_eora_ext.formats.packed_weights import PackedWeight
from gptqmodel_eora_ext.kernels.reference import dequantize


def options(*arguments: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    common.add_model(parser)
    return parser.parse_args(arguments)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    model = tmp_path / "a-model"
    model.mkdir()
    (model / "config.json").write_text("{}")
    return model


def test_a_model_has_results_of_its_own(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(common.MODELS, "qwen-coder", (common.QWEN_CODER, lambda: folder))
    monkeypatch.setitem(common.MODELS, "smollm2", (common.SMOLLM2, lambda: folder))
    names = {}
    for arguments in ([], ["--model", "qwen-coder"], ["--model", str(folder)], ["--calibration", "code"]):
        with common.subject(options(*arguments)) as model:
            names[tuple(arguments)] = model.results("cost").name
            assert model.folder == folder
            assert common.measured(model)["model"] == model.name
    assert list(names.values()) == ["cost.json", "cost_qwen-coder.json", "cost_a-model.json", "cost_on_code.json"]
    with (
        pytest.raises(SystemExit, match="expected smollm2, qwen-coder, or a folder"),
        common.subject(options("--model", "qwen")),
    ):
        pass


def test_parts_of_another_model() -> None:
    first, other = common.Subject("", Path()), common.Subject("", Path(), suffix="_other")
    assert common.parts(None, ["speed"], ["model"], first) == ["speed", "model"]
    assert common.parts(None, ["speed"], ["model"], other) == ["model"]
    assert common.parts(["speed"], ["speed"], ["model"], first) == ["speed"]
    with pytest.raises(SystemExit, match="speed: no model in it"):
        common.parts(["model", "speed"], ["speed"], ["model"], other)


def test_kept_rows_keep_their_origin(tmp_path: Path) -> None:
    path = tmp_path / "results" / "one.json"
    assert common.kept(path) == {}
    old = {"measured": {"commit": "abc", "torch": "1.0"}, "rows": [1]}
    common.keep(path, {"first": old})
    result = common.kept(path)
    result["second"] = {"measured": common.measured(), "rows": [2]}
    common.keep(path, result)
    assert json.loads(path.read_text())["first"] == old
    assert {"commit", "day", "processor", "cores", "threads", "torch"} <= set(common.kept(path)["second"]["measured"])


def test_rows_of_another_set_up_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "one.json"
    common.keep(path, {"setup": {"mse": {"2": 2.4}, "windows": 24}})
    assert common.kept(path, {"mse": {2: 2.4}, "windows": 24})
    with pytest.raises(SystemExit, match="holds results of another set-up"):
        common.kept(path, {"mse": {2: 2.4}, "windows": 8})


def test_code_is_calibrated_without_what_is_held_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(common, "DATA", tmp_path)
    text = "".join(f"{'' if not number else chr(10)}# file: {number}.py\n{'x' * 50}" for number in range(100))
    (tmp_path / common.CODE).write_text(text)
    seen, unseen = (common.read_part(common.CODE, seen=one) for one in (True, False))
    assert seen + unseen == text and unseen.startswith("\n# file: ")
    assert len(unseen) / len(text) == pytest.approx(1 - common.CODE_SEEN, abs=0.01)
    with pytest.raises(SystemExit, match=r"wikitext2_raw_test\.txt is missing\. Set EORA_BENCHMARK_DATA"):
        common.read_part(common.HELD_OUT["wikitext2"], seen=False)


def test_texts_that_all_know() -> None:
    assert common.common_texts({"a": 1.0, "b": 2.0}, {"b": 1.0, "c": 3.0}) == ["b"]
    previous: dict[str, Any] = {"full": {"a": 1.0}, "full measured": {"day": "then"}, "runs": []}
    known = common.full_precision(previous, None, {"a": torch.zeros(1)}, 1, "cpu")
    assert known == {"full": {"a": 1.0}, "full measured": {"day": "then"}}


@pytest.mark.parametrize("shape", [(5, 24), (2, 5, 24)])
def test_computes_what_a_loaded_adapter_computes(shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    linear = torch.nn.Linear(24, 40).to(torch.bfloat16)
    down, up = torch.randn(24, 3, dtype=torch.bfloat16), torch.randn(3, 40, dtype=torch.bfloat16)
    x = torch.randn(shape, dtype=torch.bfloat16)
    with torch.inference_mode():
        shipped = Lora(rank=3, lora_A=down, lora_B=up).apply(x, linear(x))
        assert torch.equal(common.Corrected(linear, down, up)(x), shipped)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_a_rounded_checkpoint_holds_the_nearest_codes(bits: int) -> None:
    weight = torch.randn(40, 100, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    packed = rounded_checkpoint._packed(weight, bits, 32)
    found = dequantize(PackedWeight(**packed, bits=bits, group_size=32, in_features=100, out_features=40,
                                    stores_zero_minus_one=True))  # fmt: skip
    step = packed["scales"].float().T.repeat_interleave(32, dim=1)[:, :100]
    # The largest of a group may lie one step above the largest code.
    assert bool(((found.float() - weight.float()).abs() <= 1.01 * step).all())
    inside = weight.float() < 0
    assert bool(((found.float() - weight.float()).abs() <= 0.51 * step)[inside].all())
