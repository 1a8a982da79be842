"""An ensemble's folder and the weights that somebody tells it: what is read, joined, exported and refused."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from gptqmodel_eora_ext.adapter.ensemble.folder import (
    ENSEMBLE_FILE,
    MEMBERS_FOLDER,
    EnsembleFolder,
    Member,
    checkpoint_fingerprint,
    export_pair,
    fingerprint,
    write_manifest,
)
from gptqmodel_eora_ext.adapter.ensemble.told import told_weights
from gptqmodel_eora_ext.adapter.errors import AdapterError
from gptqmodel_eora_ext.adapter.factors import ModuleFactors
from gptqmodel_eora_ext.adapter.folder import AdapterFolder
from gptqmodel_eora_ext.adapter.save import save_adapter
from gptqmodel_eora_ext.solve.quantized import quantize_factor

MODULES = ("model.layers.2.mlp.up_proj", "model.layers.3.mlp.up_proj")
IN, OUT = 64, 48
MEMBERS = ("math", "code")


def adapter(folder: Path, rank: int, bits: int, seed: int, modules: tuple[str, ...] = MODULES) -> None:
    generator = torch.Generator().manual_seed(seed)
    factors = {}
    for name in modules:
        down, up = (torch.randn(rank, width, generator=generator) for width in (IN, OUT))
        pair = (quantize_factor(down, bits), quantize_factor(up, bits)) if bits < 16 else (down.half(), up.half())
        factors[name] = ModuleFactors.of_unknown_error(*pair)
    save_adapter(folder, factors, base_model="checkpoint", module_names=MODULES, details={})


def ensemble(folder: Path, bits: int = 16, checkpoint: str = "c" * 64) -> Path:
    adapter(folder, 6, bits, 0)
    over = fingerprint([AdapterFolder.open(folder).weights])
    for index, name in enumerate(MEMBERS):
        adapter(folder / MEMBERS_FOLDER / name, 2 + index, bits, 1 + index, MODULES[index:])
    write_manifest(folder, [Member(name, over, checkpoint, 512) for name in MEMBERS], 2, {})
    return folder


def change(folder: Path, **fields: Any) -> None:
    content = json.loads((folder / ENSEMBLE_FILE).read_text())
    (folder / ENSEMBLE_FILE).write_text(json.dumps({**content, **fields}))


def product(path: Path, module: str) -> torch.Tensor:
    folder = AdapterFolder.open(path)
    if module not in folder.keys:
        return torch.zeros(OUT, IN)
    read = next(folder.factors([module]))[1]
    return read.lora_B.float() @ read.lora_A.float()


@pytest.mark.parametrize("bits", [16, 8, 4])
def test_members_are_stacked(tmp_path: Path, bits: int) -> None:
    opened = EnsembleFolder.open(ensemble(tmp_path, bits))
    assert opened.names == ("shared", *MEMBERS)
    found = dict(opened.factors(MODULES))
    assert {name: one.members for name, one in found.items()} == {MODULES[0]: (6, 2, 0), MODULES[1]: (6, 2, 3)}
    for name, factors in found.items():
        down, up = factors.dense()
        expected = sum(product(tmp_path / part, name) for part in (".", "members/math", "members/code"))
        torch.testing.assert_close(up.T @ down, expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("bits", [16, 4])
def test_a_pair_is_one_plain_adapter(tmp_path: Path, bits: int) -> None:
    opened = EnsembleFolder.open(ensemble(tmp_path / "ensemble", bits))
    for member in (None, "code"):
        out = tmp_path / f"plain-{member}"
        export_pair(opened, member, out)
        assert not AdapterFolder.open(out).is_packed
        for name in MODULES:
            expected = product(opened.path, name)
            if member is not None:
                expected = expected + product(opened.path / MEMBERS_FOLDER / member, name)
            torch.testing.assert_close(product(out, name), expected, rtol=2e-3, atol=2e-2)


def test_a_pair_opens_in_peft(tmp_path: Path) -> None:
    import peft

    export_pair(EnsembleFolder.open(ensemble(tmp_path / "ensemble")), "code", tmp_path / "plain")
    config = peft.PeftConfig.from_pretrained(str(tmp_path / "plain"))
    assert config.r in (6, 9) and set(config.rank_pattern.values()) < {6, 9}


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda path: (path / ENSEMBLE_FILE).unlink(), "is no ensemble"),
        (lambda path: change(path, version=9), "expected at most 1"),
        (lambda path: change(path, depth=-1), "depth = -1; expected an integer of at least 0"),
        (lambda path: adapter(path, 6, 16, seed=77), "member math .* corrects what another shared adapter leaves"),
        (lambda path: adapter(path / MEMBERS_FOLDER / "code", 3, 4, 1), "member code .* in 4 bits, the shared"),
        (lambda path: (path / MEMBERS_FOLDER / "code" / "adapter_config.json").unlink(), "has no adapter_config.json"),
    ],
)  # fmt: skip
def test_what_cannot_be(tmp_path: Path, spoil: Any, message: str) -> None:
    spoil(ensemble(tmp_path))
    with pytest.raises(AdapterError, match=message):
        EnsembleFolder.open(tmp_path)


def test_members_for_different_checkpoints(tmp_path: Path) -> None:
    content = json.loads((ensemble(tmp_path) / ENSEMBLE_FILE).read_text())["members"]
    content["code"]["checkpoint"] = "d" * 64
    change(tmp_path, members=content)
    with pytest.raises(AdapterError, match=r"math and code .* made for different checkpoints"):
        EnsembleFolder.open(tmp_path)


@pytest.mark.parametrize("names", [("math", "Math"), ("shared",), ("a/b",), ("",), ("x" * 65,)])
def test_names_that_overlap_or_are_no_folders(tmp_path: Path, names: tuple[str, ...]) -> None:
    over = fingerprint([AdapterFolder.open(ensemble(tmp_path)).weights])
    write_manifest(tmp_path, [Member(name, over, "c", 1) for name in names], 2, {})
    with pytest.raises(AdapterError, match=r"cannot name a member|there is a member 'math' already"):
        EnsembleFolder.open(tmp_path)


def test_another_checkpoint(tmp_path: Path) -> None:
    checkpoint = tmp_path / "checkpoint"
    checkpoint.mkdir()
    (checkpoint / "model.safetensors").write_bytes(bytes(200_000))
    opened = EnsembleFolder.open(ensemble(tmp_path / "ensemble", checkpoint=checkpoint_fingerprint(checkpoint)))
    opened.check_checkpoint(checkpoint)
    (checkpoint / "model.safetensors").write_bytes(bytes(199_999) + b"\x01")
    with pytest.raises(AdapterError, match=r"member math .* was made for another checkpoint"):
        opened.check_checkpoint(checkpoint)


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ({"law": 1.0}, "no member 'law'; there are math, code"),
        ({"math": -0.1}, "the weight of math is -0.1"),
        ({"math": math.nan}, "the weight of math is nan"),
        ({"math": "1"}, "the weight of math is '1'"),
        ({"math": True}, "the weight of math is True"),
        ({"math": 0.7, "code": 0.4}, "sum to 1.1; expected at most 1"),
        ({"shared": 1.0}, "name 'shared', whose weight is always 1"),
        ([{"math": 1.0}], "1 rows of weights for 2 prompts"),
        ([None, {"code": math.inf}], "the weight of code of prompt 1 is inf"),
        ("math", "weights are 'math'"),
        ([None, 3], "the weights of prompt 1 are 3"),
    ],
)
def test_weights_that_cannot_be(weights: Any, message: str) -> None:
    with pytest.raises(AdapterError, match=message):
        told_weights(weights, MEMBERS, 2)


def test_weights() -> None:
    assert told_weights({"code": 0.25}, MEMBERS, 2) == [[0.0, 0.25]] * 2
    assert told_weights([None, {}], MEMBERS, 2) == [None, [0.0, 0.0]]
    assert told_weights(None, MEMBERS, 3) == [None] * 3
