"""What processes compare before they begin."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from gptqmodel_eora_ext.loop.shared import check_enough, fingerprint


def model(folder: Path, weight: torch.Tensor, config: str = "{}") -> Path:
    folder.mkdir()
    (folder / "config.json").write_text(config)
    save_file({"weight": weight}, folder / "model.safetensors")
    return folder


def test_fewer_windows_than_processes_are_refused() -> None:
    check_enough(4, 4, "windows")
    with pytest.raises(ValueError, match="3 windows cannot be shared out between 4 processes"):
        check_enough(3, 4, "windows")


def test_models_are_told_apart_wherever_they_lie(tmp_path: Path) -> None:
    weight = torch.randn(400, 300, generator=torch.Generator().manual_seed(0))
    first = fingerprint(str(model(tmp_path / "a", weight)))
    assert fingerprint(str(model(tmp_path / "b", weight))) == first
    changed = weight.clone()
    changed[-1, -1] += 1
    others = [
        model(tmp_path / "another weight", changed),
        model(tmp_path / "another shape", weight.reshape(300, 400)),
        model(tmp_path / "another config", weight, '{"rope_theta": 1}'),
    ]
    assert first not in {fingerprint(str(one)) for one in others}
    assert fingerprint("Qwen/Qwen3-8B") == "Qwen/Qwen3-8B"
