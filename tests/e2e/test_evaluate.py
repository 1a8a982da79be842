"""Evaluation on a real checkpoint: what is measured is what each model computes by itself, loaded once for all."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from gptqmodel import GPTQModel
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from gptqmodel_eora_ext import EoRA, cli
from gptqmodel_eora_ext.adapter.save import save_adapter
from gptqmodel_eora_ext.evaluate.outcome import rows
from gptqmodel_eora_ext.evaluate.perplexity import text_loss
from gptqmodel_eora_ext.evaluate.texts import demo_text
from gptqmodel_eora_ext.hosts.gptqmodel.generate import generate_adapter
from gptqmodel_eora_ext.hosts.jobs import QuantizeJob
from gptqmodel_eora_ext.hosts.registry import quantizer
from gptqmodel_eora_ext.hosts.terminal import quiet
from tests.adapter.test_folder import factors
from tests.e2e.helpers import Batches

pytestmark = pytest.mark.e2e

WINDOW, STRIDE, WINDOWS = 64, 32, 12
runner = CliRunner()


@pytest.fixture(scope="module")
def made(two_layers: Path, calibration: Batches, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Two layers at 2 bits without an adapter, and two adapters for them."""
    folder = tmp_path_factory.mktemp("evaluated")
    with quiet():
        job = QuantizeJob(str(two_layers), folder / "out", calibration, {"bits": 2, "group_size": 64}, batch_size=4)
        quantizer("gptq")(job)
        for rank in (4, 32):
            generate_adapter(EoRA(rank=rank, path=folder / f"r{rank}"), str(two_layers), folder / "out", calibration)
    return {"out": folder / "out", "r4": folder / "r4", "r32": folder / "r32"}


@pytest.fixture(scope="module")
def record(made: dict[str, Path], two_layers: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What the command writes, of all of them at once, with windows that slide."""
    data = tmp_path_factory.mktemp("results")
    items = data / "capitals.jsonl"
    asked = [{"question": f"{one} + 1 = ?", "choices": [str(one + 1), "zero"], "answer": 0} for one in range(12)]
    items.write_text("".join(json.dumps(row) + "\n" for row in asked))
    result = runner.invoke(cli.app, [
        "eval", str(made["out"]), str(made["r4"]), str(made["r32"]), "--base", f"two layers={two_layers}",
        "--text", str(demo_text("heldout")), "--window", str(WINDOW), "--stride", str(STRIDE), "--max-windows",
        str(WINDOWS), "--kl-windows", "8", "--items", str(items), "--prompt", "The capital of France is", "--speed",
        "--out", str(data / "report.json"),
    ])  # fmt: skip
    assert result.exit_code == 0, result.output
    shown = " ".join(result.output.split())
    assert "heldout: out + r32" in shown and "n = 12 windows" in shown and "sliding windows of 64 tokens" in shown
    # Nothing but what the command says, whatever libraries say of themselves.
    assert "Generating" not in shown and "WARNING" not in shown and "Loading weights" not in shown
    return json.loads((data / "report.json").read_text())  # type: ignore[no-any-return]


def logits(model: Any, ids: torch.Tensor) -> torch.Tensor:
    with torch.inference_mode():
        return model(ids[None]).logits[0].float()  # type: ignore[no-any-return]


def test_each_model_is_what_it_is_by_itself(
    record: dict[str, Any], made: dict[str, Path], two_layers: Path, token_ids: list[int], tokenizer: Any
) -> None:
    """Loss, agreement and divergence, computed anew window by window on models that are loaded one by one."""
    ids = torch.tensor(tokenizer(demo_text("heldout").read_text(encoding="utf-8")).input_ids)
    full = AutoModelForCausalLM.from_pretrained(two_layers, dtype="auto")
    found = {row["model"]: row["texts"]["heldout"] for row in rows(record)}
    own = text_loss(full, ids, window=WINDOW, stride=STRIDE, max_windows=WINDOWS)
    assert found["two layers"]["nats"] == pytest.approx(own.nats, abs=1e-4)
    assert found["two layers"]["tokens"] == own.tokens == 63 + (WINDOWS - 1) * STRIDE
    for name, adapter in (("out", None), ("out + r4", made["r4"]), ("out + r32", made["r32"])):
        with quiet():
            # The same kernels, without an adapter where there is none.
            model = GPTQModel.load(str(made["out"]), adapter=EoRA(path=adapter) if adapter else EoRA()).model
        nats = divergence = 0.0
        same = tokens = 0
        for window in range(WINDOWS):
            row = ids[window * STRIDE : window * STRIDE + WINDOW]
            first = 1 if window == 0 else WINDOW - STRIDE
            p, q = (torch.log_softmax(logits(one, row)[first - 1 : -1], -1) for one in (full, model))
            nats -= float(q.gather(1, row[first:, None]).sum())
            same += int((p.argmax(-1) == q.argmax(-1)).sum())
            tokens += len(p)
            if window < 8:
                divergence += float((p.exp() * (p - q)).sum())
        assert found[name]["nats"] == pytest.approx(nats / tokens, rel=2e-3), name
        assert found[name]["same"] == pytest.approx(same / tokens, abs=0.02), name
        assert found[name]["kl"] == pytest.approx(divergence / (63 + 7 * STRIDE), rel=0.02), name
    assert found["out + r32"]["kl"] < found["out + r4"]["kl"] < found["out"]["kl"]


def test_the_record_is_complete(record: dict[str, Any], made: dict[str, Path]) -> None:
    names = ["two layers", "out", "out + r4", "out + r32"]
    assert [one["name"] for one in record["models"]] == names
    for kind in ("texts", "tasks", "samples"):
        assert [one["model"] for one in record[kind][0]["results"]] == names
    assert [one["model"] for one in record["speed"]] == names
    assert all(one["tokens_per_second"] > 0 and one["peak_bytes"] > 0 for one in record["speed"])
    for one in record["tasks"][0]["results"]:
        assert [item["id"] for item in one["items"]] == list(range(12))
        assert math.isclose(sum(item["value"] for item in one["items"]) / 12, one["value"])
    sizes = {one["name"]: one for one in record["models"]}
    assert sizes["out"]["quantised"]["widths"] == {"2": 14} and sizes["out"]["quantised"]["modules"] == 14
    assert sizes["out + r4"]["adapter_bytes"] == (made["r4"] / "adapter_model.safetensors").stat().st_size
    assert sizes["out + r4"]["quantised"]["bits_per_weight"] > sizes["out"]["quantised"]["bits_per_weight"]
    assert len(sizes["out + r4"]["adapter"]["spectra"]) == 14
    # Once for all that is put on it.
    assert sum(stage["name"].startswith("loading out") for stage in record["stages"]) == 1


def test_the_table_of_sizes_is_what_files_take(record: dict[str, Any], made: dict[str, Path]) -> None:
    """The computed bytes of this very width and these ranks, beside the files'."""
    out = next(one for one in record["models"] if one["name"] == "out")
    table = out["quantised"]["table"]
    # Files hold each module's column index and headers on top: below 1 % here.
    assert table["plain"]["2"] == pytest.approx(out["bytes"], rel=0.01)
    [rank32] = [one for one in table["adapters"] if (one["rank"], one["factor_bits"]) == (32, 16)]
    assert rank32["bytes"] == pytest.approx((made["r32"] / "adapter_model.safetensors").stat().st_size, rel=0.01)


def test_an_adapter_of_another_model_is_refused_before_work(made: dict[str, Path], tmp_path: Path) -> None:
    """Told by the headers alone, of modules that the model lacks and of such that are of another size."""
    names = ["model.layers.0.mlp.down_proj", "model.layers.7.mlp.down_proj"]
    for count, message in ((2, "1 of 2 modules that are no quantised module"), (1, "12 inputs and 8 outputs, but")):
        other = tmp_path / f"other{count}"
        save_adapter(other, {name: factors(4) for name in names[:count]}, base_model="other", module_names=names,
                     details={"objective": "eora"})  # fmt: skip
        result = runner.invoke(cli.app, ["eval", str(made["out"]), str(other), "--speed"])
        assert result.exit_code == 2 and message in " ".join(result.output.split())
