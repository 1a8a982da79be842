"""Adapter folders: what is written, what is refused, and that a killed save loses nothing."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from gptqmodel_eora_ext.adapter.errors import AdapterError
from gptqmodel_eora_ext.adapter.factors import ModuleFactors
from gptqmodel_eora_ext.adapter.folder import AdapterFolder
from gptqmodel_eora_ext.adapter.save import save_adapter
from gptqmodel_eora_ext.adapter.summary import summarize
from gptqmodel_eora_ext.formats.names import ADAPTER_CONFIG, ADAPTER_DETAILS, ADAPTER_WEIGHTS
from gptqmodel_eora_ext.system.files import replaced_folder

NAMES = ["model.layers.0.self_attn.Wqkv", "model.layers.0.mlp.down_proj", "model.layers.1.mlp.down_proj"]


def factors(rank: int, in_features: int = 12, out_features: int = 8) -> ModuleFactors:
    return ModuleFactors(
        lora_A=torch.randn(rank, in_features).half(),
        lora_B=torch.randn(out_features, rank).half(),
        requested_rank=4,
        tokens=100,
        signal=10.0,
        error_before=1.0,
        error_after=0.25,
    )


def write(folder: Path, ranks: tuple[int, ...] = (4, 4, 2), **details: object) -> dict[str, ModuleFactors]:
    made = {name: factors(rank) for name, rank in zip(NAMES, ranks, strict=True)}
    save_adapter(folder, made, base_model="base", module_names=NAMES, details={"objective": "eora", **details})
    return made


def edit_config(folder: Path, **changes: object) -> None:
    path = folder / ADAPTER_CONFIG
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_round_trip_keeps_case_and_ranks(tmp_path: Path) -> None:
    made = write(tmp_path / "a")
    folder = AdapterFolder.open(tmp_path / "a")
    assert set(folder.keys) == set(NAMES)
    for name, found in folder.factors(NAMES):
        assert torch.equal(found.lora_A, made[name].lora_A) and torch.equal(found.lora_B, made[name].lora_B)
    assert folder.details is not None and folder.details["objective"] == "eora"


def test_ranks_that_differ_have_scale_one_everywhere(tmp_path: Path) -> None:
    write(tmp_path)
    config = json.loads((tmp_path / ADAPTER_CONFIG).read_text())
    assert config["r"] == config["lora_alpha"] == 4
    assert config["rank_pattern"] == config["alpha_pattern"] == {NAMES[2]: 2}


def test_rank_zero_is_written_as_zeros_of_rank_one(tmp_path: Path) -> None:
    write(tmp_path, ranks=(4, 4, 0))
    tensors = load_file(tmp_path / ADAPTER_WEIGHTS)
    assert tensors[f"base_model.model.{NAMES[2]}.lora_A.weight"].shape == (1, 12)
    assert not tensors[f"base_model.model.{NAMES[2]}.lora_B.weight"].any()


def test_suffixes_name_only_modules_with_factors(tmp_path: Path) -> None:
    made = {NAMES[1]: factors(4)}
    save_adapter(tmp_path, made, base_model="b", module_names=NAMES, details={})
    assert json.loads((tmp_path / ADAPTER_CONFIG).read_text())["target_modules"] == [NAMES[1]]


@pytest.mark.parametrize(("alpha", "rslora", "scale"), [(4, False, 1.0), (8, False, 2.0), (8, True, 4.0)])
def test_scale_is_folded_in(tmp_path: Path, alpha: int, rslora: bool, scale: float) -> None:
    made = write(tmp_path, ranks=(4, 4, 4))
    edit_config(tmp_path, lora_alpha=alpha, use_rslora=rslora)
    _, found = next(AdapterFolder.open(tmp_path).factors(NAMES[:1]))
    torch.testing.assert_close(found.lora_B, made[NAMES[0]].lora_B * scale)


def test_lower_case_names_of_stock_match(tmp_path: Path) -> None:
    write(tmp_path)
    tensors = {key.lower().replace("lora_a", "lora_A").replace("lora_b", "lora_B"): value
               for key, value in load_file(tmp_path / ADAPTER_WEIGHTS).items()}  # fmt: skip
    save_file(tensors, tmp_path / ADAPTER_WEIGHTS)
    assert AdapterFolder.open(tmp_path).match(NAMES)[NAMES[0]] == NAMES[0].lower()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: (f / ADAPTER_CONFIG).unlink(), f"has no {ADAPTER_CONFIG}; found"),
        (lambda f: (f / ADAPTER_WEIGHTS).unlink(), f"has no {ADAPTER_WEIGHTS}; found"),
        (lambda f: (f / ADAPTER_CONFIG).write_text("{"), "cannot be read as JSON"),
        (lambda f: (f / ADAPTER_CONFIG).write_text("[]"), "holds a list, expected an object"),
        (lambda f: os.truncate(f / ADAPTER_WEIGHTS, 300), "truncated or corrupted"),
        (lambda f: (f / ADAPTER_WEIGHTS).write_bytes(b"not safetensors"), "truncated or corrupted"),
        (lambda f: edit_config(f, peft_type="VERA"), "says peft_type = 'VERA'; expected LORA or EORA"),
        (lambda f: edit_config(f, use_dora=True), "says use_dora"),
        (lambda f: edit_config(f, r=0), "says r = 0; expected a positive integer"),
        (lambda f: save_file({"model.x.weight": torch.zeros(1)}, f / ADAPTER_WEIGHTS), "which is no LoRA factor"),
        (lambda f: save_file({"x.lora_A.weight": torch.zeros(1)}, f / ADAPTER_WEIGHTS), "has only lora_A of x"),
        (lambda f: save_file({}, f / ADAPTER_WEIGHTS), "holds no factors"),
    ],
)
def test_broken_folders_are_named(tmp_path: Path, damage: object, message: str) -> None:
    write(tmp_path)
    damage(tmp_path)  # type: ignore[operator]
    with pytest.raises(AdapterError, match=message):
        AdapterFolder.open(tmp_path)


def test_not_a_folder(tmp_path: Path) -> None:
    with pytest.raises(AdapterError, match="is not a folder"):
        AdapterFolder.open(tmp_path / "missing")


def test_ranks_that_disagree_with_the_config(tmp_path: Path) -> None:
    write(tmp_path)
    edit_config(tmp_path, rank_pattern={}, alpha_pattern={})
    with pytest.raises(AdapterError, match=r"has A \(2, 12\) and B \(8, 2\), but adapter_config.json gives it rank 4"):
        list(AdapterFolder.open(tmp_path).factors(NAMES))


def test_adapter_of_another_model(tmp_path: Path) -> None:
    write(tmp_path)
    with pytest.raises(AdapterError, match="3 of 3 modules that are no quantised module of this model"):
        AdapterFolder.open(tmp_path).match(["transformer.h.0.attn.c_attn"])


def test_nothing_to_save(tmp_path: Path) -> None:
    with pytest.raises(AdapterError, match="no module has factors"):
        save_adapter(tmp_path, {}, base_model="b", module_names=[], details={})


def test_saving_again_keeps_what_a_user_put_there(tmp_path: Path) -> None:
    folder = tmp_path / "a"
    write(folder)
    (folder / "README.md").write_text("mine")
    (folder / "notes").mkdir()
    (folder / "notes" / "one.txt").write_text("kept")
    made = write(folder, ranks=(2, 2, 2))
    assert (folder / "README.md").read_text() == "mine"
    assert (folder / "notes" / "one.txt").read_text() == "kept"
    assert torch.equal(next(AdapterFolder.open(folder).factors(NAMES[:1]))[1].lora_A, made[NAMES[0]].lora_A)
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["a"]


def test_failed_save_leaves_the_old_adapter(tmp_path: Path) -> None:
    made = write(tmp_path / "a")
    with pytest.raises(RuntimeError, match="disk full"), replaced_folder(tmp_path / "a") as fresh:
        (fresh / ADAPTER_WEIGHTS).write_bytes(b"half")
        raise RuntimeError("disk full")
    assert torch.equal(next(AdapterFolder.open(tmp_path / "a").factors(NAMES[:1]))[1].lora_A, made[NAMES[0]].lora_A)
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["a"]


@pytest.mark.skipif(os.name != "posix", reason="needs SIGKILL")
def test_killed_save_leaves_the_old_adapter(tmp_path: Path) -> None:
    """The process dies by SIGKILL with the new folder written and not yet in place."""
    made = write(tmp_path / "a")
    script = f"""
import os, signal, torch
from pathlib import Path
import gptqmodel_eora_ext.system.files as files
from tests.adapter.test_folder import write
files._exchange = lambda *a: os.kill(os.getpid(), signal.SIGKILL)
write(Path({str(tmp_path / "a")!r}), ranks=(1, 1, 1))
"""
    done = subprocess.run([sys.executable, "-c", script], cwd=Path(__file__).parents[2])
    assert done.returncode == -9
    folder = AdapterFolder.open(tmp_path / "a")
    assert torch.equal(next(folder.factors(NAMES[:1]))[1].lora_A, made[NAMES[0]].lora_A)


def test_a_file_in_the_way(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("a file")
    with pytest.raises(NotADirectoryError, match="is a file; what is saved is a folder"):
        write(tmp_path / "a")


def test_factors_that_were_read_do_not_change_with_the_file(tmp_path: Path) -> None:
    """They would, and end the process where the file becomes shorter, if they lay in its mapping."""
    write(tmp_path / "adapter")
    (_, read), = AdapterFolder.open(tmp_path / "adapter").factors([NAMES[0]])  # fmt: skip
    before = read.lora_A.clone(), read.lora_B.clone()
    weights = tmp_path / "adapter" / ADAPTER_WEIGHTS
    with weights.open("r+b") as file:
        file.write(bytes(weights.stat().st_size))
    assert torch.equal(read.lora_A, before[0]) and torch.equal(read.lora_B, before[1])


def test_summary(tmp_path: Path) -> None:
    write(tmp_path, calibration={"tokens": 5})
    summary = summarize(tmp_path)
    assert summary.ranks == dict(zip(NAMES, (4, 4, 2), strict=True))
    assert summary.error_left() == pytest.approx(0.25)
    assert summary.bytes == (tmp_path / ADAPTER_WEIGHTS).stat().st_size
    (tmp_path / ADAPTER_DETAILS).unlink()
    assert summarize(tmp_path).details == {}
