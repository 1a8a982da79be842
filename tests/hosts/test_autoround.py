"""The contract with AutoRound, the algorithm's options, and the reading of its checkpoints' files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from auto_round.algorithms import composer, registry
from auto_round.cli.algorithms import AlgorithmHandler
from auto_round.cli.parser import build_quantize_parser
from packaging.version import Version
from safetensors.torch import save_file

from gptqmodel_eora_ext import EoRAConfig
from gptqmodel_eora_ext.formats.autoround import is_autoround, packing, quantize_config
from gptqmodel_eora_ext.hosts import SeamError
from gptqmodel_eora_ext.hosts.autoround import seams

# The seams -----------------------------------------------------------------------------------------------------


def test_the_host_has_the_expected_shape() -> None:
    """Fails, naming the place, when a new AutoRound changes what the plugin relies on."""
    assert seams.problems() == []


def test_registered_by_import_alone_undone_and_done_again() -> None:
    assert isinstance(registry.resolve_alg_config("eora"), EoRAConfig)
    seams.uninstall()
    try:
        assert not seams.installed() and registry.resolve_algorithm_alias("eora") is None
    finally:
        seams.install()
    assert registry.resolve_pipeline_member(EoRAConfig()).__name__ == "EoRATransform"


def test_a_changed_or_old_host_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(registry, "register_algorithm", lambda name: None)
        patch.delattr(composer.AlgorithmComposer, "compress_block")
        with pytest.raises(SeamError, match=r"register_algorithm lacks .*'config_factory'.*compress_block is missing"):
            seams.install()
    monkeypatch.setattr(seams, "host_version", lambda: Version("0.15.0"))
    with pytest.raises(SeamError, match=r"needs auto-round >= 0\.16\.0, found 0\.15\.0"):
        seams.install()


# Options -------------------------------------------------------------------------------------------------------


def test_flags_of_the_command_line_become_options() -> None:
    arguments = ["model", "--algorithm", "auto_round,eora", "--eora-budget", "0.5bpw", "--eora-factor-bits", "4"]
    configs = AlgorithmHandler.build_configs(build_quantize_parser(prog="auto_round").parse_args(arguments), {})
    (config,) = [one for one in configs if isinstance(one, EoRAConfig)]
    assert config.options() == {
        "rank": "auto", "objective": "eora", "factor_bits": 4, "budget": "0.5bpw", "sensitivity": "fisher"
    }  # fmt: skip
    assert "--eora-rank" in AlgorithmHandler.format_detail("eora")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 0}, "must be at least 1, got 0"),
        ({"rank": 8, "budget": "1MB"}, "exclude each other"),
        ({"budget": "much"}, "positive number of bytes"),
        ({"objective": "output"}, "side by side"),
        ({"objective": "svd", "budget": "1MB"}, 'components of objective "eora"'),
        ({"factor_bits": 3}, "must be one of 16, 8, 4, got 3"),
        ({"sensitivity": "x"}, "must be one of fisher"),
    ],
)
def test_options_that_cannot_be(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        EoRAConfig(**options)


# Files ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "method", "layout"),
    [
        ({"packing_format": "auto_round:auto_gptq"}, "gptq", "gptq"),
        ({"packing_format": "auto_round:exllamav2"}, "gptq", "gptq_v2"),
        ({"packing_format": "auto_round"}, "gptq", "gptq_v2"),
        ({"packing_format": "auto_round:gptqmodel"}, "gptq", "gptq_v2"),
        ({"packing_format": "auto_round:auto_awq"}, "awq", "gemm"),
        ({"quant_method": "gptq"}, "gptq", "gptq"),
        ({"quant_method": "awq"}, "awq", "gemm"),
    ],
)
def test_packings(config: dict[str, Any], method: str, layout: str) -> None:
    found = packing(config, "here")
    assert (found.method, found.format) == (method, layout)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"packing_format": "auto_round:mx_fp", "data_type": "mx_fp", "act_bits": 4}, "`mx_fp` with activations in 4"),
        ({"packing_format": "auto_round:nv_fp", "data_type": "nv_fp", "act_bits": 4}, "`nv_fp` with activations in 4"),
        ({"packing_format": "auto_round:fp8", "data_type": "fp"}, "`fp` weights in the format `auto_round:fp8`"),
        ({"packing_format": "auto_round:llm_compressor", "data_type": "int"}, "`auto_round:llm_compressor`"),
    ],
)
def test_formats_without_packed_integers_are_refused_by_name(config: dict[str, Any], message: str) -> None:
    with pytest.raises(NotImplementedError, match=f"{message}.*\n?.*What can be: packed integer weights"):
        packing(config, "here")


def checkpoint(folder: Path, **tensors: torch.Tensor) -> Path:
    config = {"quant_method": "auto-round", "packing_format": "auto_round:auto_gptq", "bits": 2, "sym": True}
    (folder / "config.json").write_text(json.dumps({"quantization_config": config}))
    save_file({name.replace("__", "."): tensor for name, tensor in tensors.items()}, folder / "model.safetensors")
    return folder


def packed(name: str, bits: int, groups: int, out: int = 64, inner: int = 128) -> dict[str, torch.Tensor]:
    return {
        f"{name}__qweight": torch.zeros(inner * bits // 32, out, dtype=torch.int32),
        f"{name}__qzeros": torch.zeros(groups, out * bits // 32, dtype=torch.int32),
        f"{name}__scales": torch.zeros(groups, out, dtype=torch.float16),
    }


def test_widths_and_groups_are_read_off_the_tensors(tmp_path: Path) -> None:
    folder = checkpoint(
        tmp_path, **packed("a", 2, 4), **packed("b", 2, 4), **packed("c", 3, 2), **packed("d", 4, 1),
        e__weight=torch.zeros(64, 128), norm__weight=torch.zeros(64),
    )  # fmt: skip
    config = quantize_config(folder)
    assert (config["bits"], config["group_size"], config["method"], config["format"]) == (2, 32, "gptq", "gptq")
    assert config["dynamic"] == {
        "+:^c$": {"bits": 3, "group_size": 64}, "+:^d$": {"bits": 4, "group_size": -1}, "-:^e$": {}
    }  # fmt: skip


def test_broken_checkpoints_are_told(tmp_path: Path) -> None:
    for name, message in (("none", "no packed layer"), ("five", "a in .* is packed in 5 bits"), ("half", "no scales")):
        folder = tmp_path / name
        folder.mkdir()
        tensors = {"none": {"e__weight": torch.zeros(4, 4)}, "five": packed("a", 5, 4), "half": packed("a", 2, 4)}[name]
        if name == "half":
            del tensors["a__scales"]
        with pytest.raises((ValueError, NotImplementedError), match=message):
            quantize_config(checkpoint(folder, **tensors))
    (tmp_path / "none" / "model.safetensors").write_bytes(b"x" * 20)
    with pytest.raises(ValueError, match="truncated or corrupted"):
        quantize_config(tmp_path / "none")


def test_checkpoints_of_others_are_left_alone() -> None:
    assert is_autoround({"quant_method": "auto-round"}) and is_autoround(
        {"quant_method": "gptq", "provider": "auto-round"}
    )
    assert not is_autoround({"quant_method": "gptq"}) and not is_autoround({"quant_method": "awq"})
