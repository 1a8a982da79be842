"""Pruning in the loop on real weights: zeros on disk, what the adapter wins back, skipped modules, what is refused."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel
from typer.testing import CliRunner

from gptqmodel_eora_ext import cli, prune, solve
from gptqmodel_eora_ext.evaluate.sparsity import examine_model
from gptqmodel_eora_ext.formats.names import ADAPTER_DETAILS, PRUNING_DETAILS
from gptqmodel_eora_ext.formats.sparsity import Pattern, examine
from gptqmodel_eora_ext.hosts.gptqmodel.known_weights import dequantize
from gptqmodel_eora_ext.hosts.terminal import quiet

from .helpers import Batches, distances, kernels, load

pytestmark = pytest.mark.e2e
runner = CliRunner()


def pruned(base: Path, folder: Path, calibration: Any, **options: Any) -> Path:
    with quiet():
        return prune(str(base), folder, calibration, batch_size=4, **options)


def modules(folder: Path) -> dict[str, dict[str, Any]]:
    """What the adapter's report says of each."""
    found: dict[str, dict[str, Any]] = json.loads((folder / "eora" / ADAPTER_DETAILS).read_text())["modules"]
    return found


@pytest.fixture(scope="module")
def made(two_layers: Path, calibration: Batches, tmp_path_factory: pytest.TempPathFactory) -> Path:
    dynamic = {r"-:.*layers\.1\..*v_proj": {}, r"+:.*down_proj": {"adapter": {"rank": 4}}}
    return pruned(two_layers, tmp_path_factory.mktemp("pruned") / "model", calibration, adapter={"rank": 16},
                  dynamic=dynamic)  # fmt: skip


def test_the_folder_is_the_model_with_zeros_in_it(made: Path, two_layers: Path) -> None:
    base, found = load_file(two_layers / "model.safetensors"), load_file(made / "model.safetensors")
    assert set(base) == set(found)
    for name, tensor in base.items():
        same = torch.equal(found[name], tensor)
        if not name.endswith("_proj.weight") or "layers.1.self_attn.v_proj" in name:
            assert same, name
        else:
            assert not same and examine(found[name]).pattern == "2:4" and found[name].dtype == tensor.dtype
    config = json.loads((made / "config.json").read_text())
    assert config == json.loads((two_layers / "config.json").read_text())
    assert not {"sparsity_config", "quantization_config"} & set(config)
    assert (made / "tokenizer.json").is_file()
    said = json.loads((made / PRUNING_DETAILS).read_text())
    assert (said["method"], said["pattern"], len(said["modules"])) == ("sparsegpt", "2:4", 13)


def test_the_adapter_wins_back_what_it_reports(made: Path, two_layers: Path, calibration: Batches) -> None:
    """Errors measured on the model that PEFT loads, each on the inputs that this model itself gives."""
    from peft import PeftModel

    report = modules(made)
    ranks = {name: one["rank"] for name, one in report.items()}
    assert len(ranks) == 13
    assert all(rank == (4 if name.endswith("down_proj") else 16) for name, rank in ranks.items())
    plain = AutoModelForCausalLM.from_pretrained(made, dtype="auto")
    weights = {name: plain.get_submodule(name).weight.detach().float().clone() for name in report}
    model = PeftModel.from_pretrained(plain, made / "eora").eval().base_model.model
    base = AutoModelForCausalLM.from_pretrained(two_layers, dtype="auto")
    inputs: dict[str, list[torch.Tensor]] = {name: [] for name in report}
    for name in report:
        model.get_submodule(name).register_forward_pre_hook(
            lambda module, given, name=name: inputs[name].append(given[0].flatten(0, -2).float())
        )
    with torch.inference_mode():
        for batch in calibration:
            model(torch.tensor([batch["input_ids"]]))
    stored = load_file(made / "eora" / "adapter_model.safetensors")
    for name, one in report.items():
        lora_A, lora_B = (stored[f"base_model.model.{name}.lora_{half}.weight"].float() for half in "AB")
        residual = base.get_submodule(name).weight.detach().float() - weights[name] - lora_B @ lora_A
        measured = (torch.cat(inputs[name]) @ residual.T).square().sum(1).mean().item()
        assert measured == pytest.approx(one["error_after"], rel=0.05), name
        assert one["error_after"] < one["error_before"]


def test_rounds_leave_no_more_error(two_layers: Path, calibration: Batches, tmp_path: Path) -> None:
    """The first modules see the same inputs in both runs."""
    one, two = (
        modules(pruned(two_layers, tmp_path / str(rounds), calibration[:2], method="wanda",
                       adapter={"rank": 32, "rounds": rounds}))
        for rounds in (1, 2)
    )  # fmt: skip
    names = [f"model.layers.0.self_attn.{kind}_proj" for kind in "qkv"]
    assert all(two[name]["error_after"] <= one[name]["error_after"] for name in names)
    assert any(two[name]["error_after"] < one[name]["error_after"] for name in names)


def test_without_an_adapter(two_layers: Path, calibration: Batches, tmp_path: Path) -> None:
    folder = pruned(two_layers, tmp_path / "model", calibration[:4], method="magnitude", pattern="50%")
    assert not (folder / "eora").exists()
    found = examine_model(folder)
    assert found is not None and found.expected is None and found.share == pytest.approx(0.5, abs=1e-4)
    assert len(found.modules) == 14 and not found.whole
    shown = runner.invoke(cli.app, ["inspect", str(folder)])
    assert shown.exit_code == 0
    output = " ".join(shown.output.split())
    assert "by magnitude to 50%" in output and "a layout with a bit for each weight" in output


def test_wanda_alone_goes_by_what_the_whole_layer_was(
    two_layers: Path, calibration: Batches, tmp_path: Path
) -> None:
    """As it was published: o is masked by inputs that q, k and v as they were have made."""
    folder = pruned(two_layers, tmp_path / "model", calibration[:4], method="wanda")
    model = AutoModelForCausalLM.from_pretrained(two_layers, dtype=torch.bfloat16)
    name = "model.layers.0.self_attn.o_proj"
    linear, rows = model.get_submodule(name), list[torch.Tensor]()
    linear.register_forward_pre_hook(lambda _, given: rows.append(given[0].flatten(0, 1).float()))
    with torch.no_grad():
        for batch in calibration[:4]:
            model(torch.tensor(batch["input_ids"])[None])
    expected = solve.prune(linear.weight.data, torch.cat(rows).square().mean(0), Pattern.parse("2:4"), "wanda") != 0
    found = load_file(folder / "model.safetensors")[f"{name}.weight"] != 0
    # Batches of one window round otherwise than batches of four.
    assert (found != expected).float().mean() < 1e-3


def test_quantised_at_once_without_an_adapter(two_layers: Path, calibration: Batches, tmp_path: Path) -> None:
    dynamic = {r"-:.*layers\.1\..*": {}}
    folder = pruned(two_layers, tmp_path / "model", calibration[:2], bits=4, group_size=64, dynamic=dynamic)
    assert not (folder / "eora").exists()
    told = json.loads((folder / "quantize_config.json").read_text())
    assert not told.get("adapter") and told["dynamic"] == dynamic
    found = kernels(load(folder))
    assert len(found) == 7
    for name, kernel in found.items():
        assert examine(dequantize(kernel)).pattern == "2:4", name


def test_inspect_tells_the_pattern_and_checks_it(made: Path, tmp_path: Path) -> None:
    shown = " ".join(runner.invoke(cli.app, ["inspect", str(made)]).output.split())
    assert "50.0% of the weights of 13 modules; 1 are as they were" in shown
    assert "2:4, kept by all of them" in shown and "in a 2:4 layout" in shown and "modules 13, rank 4 to 16" in shown
    told = json.loads(runner.invoke(cli.app, ["inspect", str(made), "--json"]).output)["sparsity"]
    # 9 bits in place of 16.
    assert told["sparse_bytes"] * 16 == told["dense_bytes"] * 9
    broken = Path(shutil.copytree(made, tmp_path / "broken"))
    tensors = load_file(broken / "model.safetensors")
    tensors["model.layers.0.mlp.up_proj.weight"][5, :4] = 1
    save_file(tensors, broken / "model.safetensors", metadata={"format": "pt"})
    shown = " ".join(runner.invoke(cli.app, ["inspect", str(broken)]).output.split())
    assert "BROKEN in 1 of 13 modules, for instance model.layers.0.mlp.up_proj" in shown


def test_a_model_that_is_not_pruned_has_no_zeros_to_tell(two_layers: Path) -> None:
    assert examine_model(two_layers) is None
    shown = runner.invoke(cli.app, ["inspect", str(two_layers)])
    assert shown.exit_code == 2 and "nor a folder `eora`" in " ".join(shown.output.split())


def test_what_cannot_be_pruned_is_named_before_work(
    two_layers: Path, calibration: Batches, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    out = tmp_path / "out"
    for options, message in (
        ({"method": "obd"}, "method must be one of sparsegpt, wanda, magnitude, got 'obd'"),
        ({"pattern": "2:5:1"}, 'pattern must be "2:4"'),
        ({"pattern": "3:7"}, r"layers\.0\.self_attn\.q_proj: 576 inputs cannot be cut into groups of 7"),
        ({"adapter": {"rank": 0}}, "`rank` must be at least 1"),
        ({"dynamic": {"down": {"adapter": {"rank": 8}}}}, r"dynamic\['down'\] names the rank of an adapter"),
        ({"calibration": []}, "0 tokens do not fill one window"),
    ):
        given = {"calibration": calibration, **options}
        with caplog.at_level(logging.WARNING), pytest.raises(ValueError, match=message):
            pruned(two_layers, out, given.pop("calibration"), **given)
        assert not out.exists()


def test_weights_that_the_files_call_otherwise_are_named(
    two_layers: Path, calibration: Batches, tmp_path: Path
) -> None:
    """transformers finds a weight with another prefix; the pruned one would have no place in the files."""
    base = Path(shutil.copytree(two_layers, tmp_path / "base"))
    tensors = {name.removeprefix("model."): one for name, one in load_file(base / "model.safetensors").items()}
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises((NotImplementedError, KeyError), match=r"layers\.0\.self_attn\.q_proj\.weight"):
        pruned(base, tmp_path / "out", calibration)
    assert not (tmp_path / "out").exists()


def test_pruned_and_quantised_at_once(two_layers: Path, calibration: Batches, tmp_path: Path) -> None:
    """The loaded kernels' weights keep the pattern, and the adapter brings the model nearer to the base."""
    folder = pruned(two_layers, tmp_path / "model", calibration[:4], bits=4, group_size=64, adapter={"rank": 16})
    model = load(folder)
    found = kernels(model)
    assert len(found) == 14
    for name, kernel in found.items():
        assert examine(dequantize(kernel)).pattern == "2:4", name
    with_adapter, without = distances(two_layers, model, calibration)
    assert with_adapter < without
    assert json.loads((folder / PRUNING_DETAILS).read_text())["bits"] == 4
    examined = examine_model(folder)
    assert examined is not None and len(examined.modules) == 14 and not examined.broken
    # Two codes of 4 bits and two places of 2 for four codes.
    assert examined.sparse_bytes * 4 == examined.dense_bytes * 3


@pytest.mark.parametrize("options", [{}, {"bits": 4, "group_size": 32}], ids=["pruned", "and quantised"])
def test_weights_that_are_stored_in_by_out(options: dict[str, Any], calibration: Batches, tmp_path: Path) -> None:
    """GPT-2's `Conv1D`: the pattern lies along the inputs all the same."""
    base = tmp_path / "base"
    config = GPT2Config(vocab_size=49152, n_embd=64, n_layer=1, n_head=4, n_positions=256)
    GPT2LMHeadModel(config).to(torch.bfloat16).save_pretrained(base)
    folder = pruned(base, tmp_path / "model", calibration[:4], adapter={"rank": 8}, **options)
    examined = examine_model(folder)
    assert examined is not None and len(examined.modules) == 4 and not examined.broken
    assert all(one["error_after"] < one["error_before"] for one in modules(folder).values())
