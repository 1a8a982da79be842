"""`adapter_config.json` and `eora.json`: every field checked, and applied as PEFT applies it."""

from __future__ import annotations

import dataclasses
import json
import logging
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft.tuners.tuners_utils import check_target_module_exists
from safetensors.torch import load_file, save_file

from gptqmodel_eora_ext.adapter import settings
from gptqmodel_eora_ext.adapter.errors import AdapterError
from gptqmodel_eora_ext.adapter.folder import AdapterFolder
from gptqmodel_eora_ext.adapter.save import export_peft
from gptqmodel_eora_ext.adapter.settings import AdapterSettings, read_details
from gptqmodel_eora_ext.adapter.summary import summarize
from gptqmodel_eora_ext.formats.names import ADAPTER_CONFIG, ADAPTER_DETAILS, ADAPTER_WEIGHTS

from .test_folder import NAMES, edit_config, write

KEY = f"base_model.model.{NAMES[0]}.lora_A.weight"
REPORT = {"rank": 4, "requested_rank": 4, "tokens": 9, "bytes": 1, "signal": 1.0, "error_before": 1, "error_after": 0.5}


def test_every_field_of_the_installed_peft_is_known() -> None:
    """Fails, naming the field, when a new PEFT has one that has to be honoured, ignored or refused."""
    fields = {field.name for field in dataclasses.fields(peft.LoraConfig)}
    groups = [settings.HONOURED, settings.WITHOUT_EFFECT, set(settings.REFUSED)]
    assert fields - set().union(*groups) == set()
    assert sum(map(len, groups)) == len(set().union(*groups))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"r": 0}, "r = 0; expected a positive integer"),
        ({"r": True}, "r = True; expected a positive integer"),
        ({"r": "8"}, "r = '8'"),
        ({"r": 8.0}, "r = 8.0"),
        ({"r": None}, "r = None"),
        ({"r": 10**400}, "expected a positive integer"),
        ({"lora_alpha": "8"}, "lora_alpha = '8'; expected a finite number"),
        ({"lora_alpha": None}, "lora_alpha = None"),
        ({"lora_alpha": float("nan")}, "lora_alpha = nan"),
        ({"lora_alpha": float("inf")}, "lora_alpha = inf"),
        ({"lora_alpha": True}, "lora_alpha = True"),
        ({"use_rslora": "yes"}, "use_rslora = 'yes'; expected true or false"),
        ({"rank_pattern": {"q_proj": 0}}, "rank_pattern = .*; expected an object whose values are positive integers"),
        ({"rank_pattern": {"q_proj": "8"}}, "values are positive integers"),
        ({"rank_pattern": ["q_proj"]}, r"rank_pattern = \['q_proj'\]; expected an object"),
        ({"rank_pattern": {"(q_proj": 8}}, r"rank_pattern with an expression .*'\(q_proj': .*no regular expression"),
        ({"alpha_pattern": {"q_proj": None}}, "values are finite numbers"),
        ({"alpha_pattern": 3}, "alpha_pattern = 3; expected an object"),
        ({"target_modules": None}, "target_modules = None; expected a list such as"),
        ({"target_modules": []}, "target_modules = "),
        ({"target_modules": [1]}, "expected a list of module names, or one regular expression"),
        ({"target_modules": "(x"}, "target_modules with an expression"),
        ({"target_modules": ["v_proj"]}, "adapts none of the 3 modules"),
        ({"exclude_modules": ["Wqkv", "down_proj"]}, "adapts none of the 3 modules"),
        ({"layers_to_transform": ["0"]}, "layers_to_transform = .*; expected a layer's index"),
        ({"layers_to_transform": [7]}, "adapts none of the 3 modules"),
        ({"layers_pattern": 3}, "layers_pattern = 3"),
        ({"peft_type": 3}, "peft_type = 3; expected a string"),
        ({"base_model_name_or_path": 3}, "base_model_name_or_path = 3; expected a string"),
        ({"use_dora": True}, "use_dora = True, which scales"),
        ({"alora_invocation_tokens": [1, 2]}, r"alora_invocation_tokens = \[1, 2\], which switches"),
        ({"alora_invocation_tokens": []}, "alora_invocation_tokens"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"lora_bias": True}, "lora_bias"),
        ({"bias": "all"}, "bias = 'all'"),
        ({"trainable_token_indices": [1]}, "trainable_token_indices"),
        ({"layer_replication": [[0, 1]]}, "layer_replication"),
        ({"target_parameters": ["x"]}, "target_parameters"),
        ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights = 'pissa_niter_4', whose factors"),
    ],
)
def test_wrong_values_are_named(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    write(tmp_path)
    edit_config(tmp_path, **changes)
    with pytest.raises(AdapterError, match=message) as told:
        AdapterFolder.open(tmp_path)
    assert ADAPTER_CONFIG in str(told.value)


@pytest.mark.parametrize("field", sorted(settings.REFUSED))
def test_what_is_no_plain_lora_is_refused(tmp_path: Path, field: str) -> None:
    write(tmp_path)
    edit_config(tmp_path, **{field: {"x": 1}})
    with pytest.raises(AdapterError, match=f"says {field} = .*only plain LoRA"):
        AdapterFolder.open(tmp_path)


def test_pefts_own_defaults_are_taken(tmp_path: Path) -> None:
    peft.LoraConfig(r=4, target_modules=["q_proj"]).save_pretrained(tmp_path)
    found = AdapterSettings.read(tmp_path / ADAPTER_CONFIG)
    assert (found.rank, found.alpha) == (4, peft.LoraConfig().lora_alpha) and found.scale_of("q_proj") == 2
    (tmp_path / ADAPTER_CONFIG).write_text(json.dumps({"r": 4, "target_modules": ["q_proj"]}))
    assert AdapterSettings.read(tmp_path / ADAPTER_CONFIG).alpha == peft.LoraConfig().lora_alpha


def test_unknown_fields_are_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write(tmp_path)
    edit_config(tmp_path, later_invention=3, another=None)
    with caplog.at_level(logging.WARNING):
        AdapterFolder.open(tmp_path)
    assert "not known here and have no effect: later_invention." in caplog.text


MODULES = [
    f"model.{tower}.{layer}.{module}"
    for tower in ("layers", "vision.blocks")
    for layer in (0, 1, 10)
    for module in ("self_attn.q_proj", "mlp.up_proj", "mlp.experts.1.up_proj", "xq_proj")
]


@pytest.mark.parametrize(
    "options",
    [
        {"target_modules": ["q_proj", "up_proj"]},
        {"target_modules": ["self_attn.q_proj", "model.layers.1.mlp.up_proj"]},
        {"target_modules": r".*layers\.1.*\.(q|up)_proj"},
        {"target_modules": ["q_proj", "up_proj"], "exclude_modules": ["experts.1.up_proj"]},
        {"target_modules": ["q_proj", "up_proj"], "exclude_modules": r".*vision.*"},
        {"target_modules": ["q_proj", "up_proj"], "layers_to_transform": [1]},
        {"target_modules": ["q_proj", "up_proj"], "layers_to_transform": 0},
        {"target_modules": ["q_proj", "up_proj"], "layers_to_transform": [1, 10], "layers_pattern": "layers"},
        {"target_modules": ["q_proj", "up_proj"], "layers_to_transform": [10], "layers_pattern": ["blocks", "h"]},
        {"target_modules": ["q_proj", "model.layers.0.xq_proj"], "layers_to_transform": [1]},
    ],
)
def test_the_same_modules_are_adapted_as_by_peft(tmp_path: Path, options: dict[str, Any]) -> None:
    config = peft.LoraConfig(r=4, **options)
    config.save_pretrained(tmp_path)
    found = AdapterSettings.read(tmp_path / ADAPTER_CONFIG)
    expected = [name for name in MODULES if check_target_module_exists(config, name) is True
                or type(check_target_module_exists(config, name)).__name__ == "Match"]  # fmt: skip
    assert [name for name in MODULES if found.applies_to(name)] == expected != []


def test_a_narrower_config_narrows_loading_and_the_copy(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write(tmp_path / "a")
    edit_config(tmp_path / "a", layers_to_transform=[0])
    with caplog.at_level(logging.WARNING):
        folder = AdapterFolder.open(tmp_path / "a")
    assert set(folder.keys) == set(NAMES[:2]) and "adapts 2 of the 3 modules" in caplog.text
    export_peft(folder, tmp_path / "copy")
    assert set(AdapterFolder.open(tmp_path / "copy").keys) == set(NAMES[:2])


# Factors -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t * float("nan"), "holds NaN or infinity in base_model"),
        (lambda t: t.float() / 0, "holds NaN or infinity"),
        (lambda t: t[:, :, None], r"as torch.float16 \(4, 12, 1\); expected a matrix in float16"),
        (lambda t: t[:, 0], r"as torch.float16 \(4,\); expected a matrix"),
        (lambda t: t.to(torch.int32), r"as torch.int32 \(4, 12\)"),
        (lambda t: t[:3], "gives it rank 4. Correct r or rank_pattern"),
    ],
)
def test_factors_that_cannot_be_are_named(tmp_path: Path, change: Any, message: str) -> None:
    write(tmp_path)
    tensors = load_file(tmp_path / ADAPTER_WEIGHTS)
    save_file({**tensors, KEY: change(tensors[KEY]).contiguous()}, tmp_path / ADAPTER_WEIGHTS)
    with pytest.raises(AdapterError, match=message):
        list(AdapterFolder.open(tmp_path).factors(NAMES))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_wide_factors_are_read_as_by_peft(tmp_path: Path, dtype: torch.dtype) -> None:
    write(tmp_path)
    tensors = {key: value.to(dtype) for key, value in load_file(tmp_path / ADAPTER_WEIGHTS).items()}
    save_file(tensors, tmp_path / ADAPTER_WEIGHTS)
    for name, found in AdapterFolder.open(tmp_path).factors(NAMES):
        expected = tensors[f"base_model.model.{name}.lora_A.weight"]
        assert found.lora_A.dtype == (torch.bfloat16 if dtype == torch.bfloat16 else torch.float32)
        assert torch.equal(found.lora_A.float(), expected.float())


def test_a_factor_that_is_there_twice_is_told(tmp_path: Path) -> None:
    write(tmp_path)
    tensors = load_file(tmp_path / ADAPTER_WEIGHTS)
    save_file({**tensors, KEY.replace("lora_A", "lora_A.default"): tensors[KEY].clone()}, tmp_path / ADAPTER_WEIGHTS)
    with pytest.raises(AdapterError, match=r"holds lora_A of .* twice"):
        AdapterFolder.open(tmp_path)


# eora.json -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("details", "message"),
    [
        ({"modules": []}, r"modules = \[\]; expected an object"),
        ({"modules": {"x": 3}}, "says x = 3; expected an object of figures"),
        ({"modules": {"x": {"rank": 1}}}, r"modules\['x'\] says requested_rank = nothing; expected an integer"),
        ({"modules": {"x": {**REPORT, "error_after": float("nan")}}}, "error_after = nan; expected a finite number"),
        ({"modules": {"x": {**REPORT, "error_before": "1"}}}, "error_before = '1'"),
        ({"modules": {"x": {**REPORT, "error_before": -1}}}, "error_before = -1; expected a finite number of at least"),
        ({"calibration": 3}, "calibration = 3; expected an object"),
        ({"versions": ["torch"]}, "versions = "),
        ({"versions": {"torch": 2}}, "versions says torch = 2; expected a string"),
        ({"allocation": {"spent": 1}}, "allocation says budget = nothing"),
        ({"objective": []}, "objective = "),
        ({"version": 2}, "version = 2; expected at most 1; a newer gptqmodel-eora-ext"),
    ],
)
def test_wrong_details_are_named(tmp_path: Path, details: dict[str, Any], message: str) -> None:
    write(tmp_path)
    (tmp_path / ADAPTER_DETAILS).write_text(json.dumps(details))
    with pytest.raises(AdapterError, match=message) as told:
        summarize(tmp_path)
    assert ADAPTER_DETAILS in str(told.value) and "the adapter loads without it" in str(told.value)
    # They are for people to read: the adapter itself is as good as before.
    assert len(list(AdapterFolder.open(tmp_path).factors(NAMES))) == 3


def test_details_without_reports_are_read(tmp_path: Path) -> None:
    write(tmp_path)
    (tmp_path / ADAPTER_DETAILS).write_text(json.dumps({"objective": "eora", "modules": {"x": REPORT}}))
    assert read_details(tmp_path / ADAPTER_DETAILS)["modules"]["x"]["rank"] == 4
    (tmp_path / ADAPTER_DETAILS).write_text("{}")
    assert summarize(tmp_path).modules == {}
