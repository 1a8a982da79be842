"""Which kernel is chosen, and what a person is told."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from typer.testing import CliRunner

from gptqmodel_eora_ext import cli
from gptqmodel_eora_ext.kernels import dispatch
from gptqmodel_eora_ext.kernels.cpu import build
from gptqmodel_eora_ext.kernels.dispatch import CODES, FEW_ROWS, MATMUL, SWITCH, TILES, TORCH, choose
from tests.adapter.test_folder import NAMES, write
from tests.kernels.cases import packed_weight

pytestmark = pytest.mark.skipif(build.library() is None, reason="no C++ compiler")
BF16 = build.ISAS.index("avx512-bf16")


@pytest.mark.parametrize(
    ("best", "dtype", "rows", "off", "path", "isa", "reason"),
    [
        ("avx512-bf16", torch.bfloat16, 1, "", CODES, "avx512-bf16", ""),
        ("avx512-bf16", torch.bfloat16, FEW_ROWS + 1, "", MATMUL, "avx512-bf16", ""),
        ("avx512-bf16", torch.float32, 512, "", CODES, "avx512-bf16", ""),
        ("avx512-bf16", torch.bfloat16, 512, MATMUL, CODES, "avx512-bf16", f"{MATMUL} is off by {SWITCH}"),
        ("avx512-bf16", torch.bfloat16, 1, CODES, TILES, "avx512-bf16", f"{CODES} is off by {SWITCH}"),
        ("avx512-bf16", torch.float16, 1, f"{CODES},{TILES}", TORCH, "portable", f"{TILES} is off by {SWITCH}"),
        ("avx512-bf16", torch.bfloat16, 512, "avx512-bf16", CODES, "avx512", f"avx512-bf16 is off by {SWITCH}"),
        ("avx512", torch.bfloat16, 512, "", CODES, "avx512", "the processor has no avx512-bf16"),
        ("avx2", torch.float32, FEW_ROWS, "", CODES, "avx2", "the processor has no avx512"),
        ("avx2", torch.float32, FEW_ROWS + 1, "", TILES, "avx2", "the processor has no avx512"),
        ("avx2", torch.float32, 512, TILES, CODES, "avx2", f"{TILES} is off by {SWITCH}"),
        ("portable", torch.float32, 1, "", CODES, "portable", "the processor has no avx2"),
        ("avx512", torch.float64, 1, "", TORCH, "portable", "not float64"),
        ("avx512", torch.float32, 1, "all", TORCH, "portable", f"{SWITCH}=all"),
    ],
)
def test_choice(
    monkeypatch: pytest.MonkeyPatch,
    best: str,
    dtype: torch.dtype,
    rows: int,
    off: str,
    path: str,
    isa: str,
    reason: str,
) -> None:
    monkeypatch.setattr(dispatch, "best_isa", lambda: build.ISAS.index(best))
    monkeypatch.setenv(SWITCH, off)
    choice = choose("cpu", dtype, 2, rows, dispatch.switched_off())
    assert (choice.path, build.ISAS[choice.isa]) == (path, isa)
    assert reason in choice.reason and bool(choice.reason) == bool(reason)


def test_what_no_kernel_serves() -> None:
    assert "not 5" in choose("cpu", torch.float32, 5, 1).reason
    assert "for meta" in choose("meta", torch.float32, 2, 1).reason


def checkpoint(folder: Path, form: str = "gptq") -> None:
    """A checkpoint's files with the adapter of `test_peft`, whose modules have weights here."""
    write(folder / "eora")
    tensors = {}
    for name in NAMES:
        weight = packed_weight(3, 32, 64, 16)
        for part in ("qweight", "qzeros", "scales", "g_idx"):
            tensors[f"{name}.{part}"] = getattr(weight, part).clone()
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text('{"dtype": "bfloat16"}')
    adapter = {"name": "lora", "path": "eora", "rank": 4}
    (folder / "quantize_config.json").write_text(json.dumps({"bits": 3, "format": form, "adapter": adapter}))


def test_inspect_tells_each_modules_kernel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "best_isa", lambda: BF16)
    checkpoint(tmp_path)
    result = CliRunner().invoke(cli.app, ["inspect", str(tmp_path), "--kernels", "--json"])
    rows = json.loads(result.output)["kernels"]
    assert [row["module"] for row in rows] == sorted(NAMES)
    assert rows[0] == {
        "module": rows[0]["module"], "out_features": 32, "in_features": 64, "bits": 3, "group_size": 16,
        "rank": rows[0]["rank"], "one_row": "cpu-codes (avx512-bf16)", "many_rows": "cpu-matmul (avx512-bf16)",
        "reason": "",
    }  # fmt: skip
    assert sorted(row["rank"] for row in rows) == [2, 4, 4]
    shown = CliRunner().invoke(cli.app, ["inspect", str(tmp_path), "--kernels"])
    assert shown.exit_code == 0 and "512 rows" in " ".join(shown.output.split())


def test_inspect_says_why_a_format_has_no_kernel(tmp_path: Path) -> None:
    checkpoint(tmp_path, "gptq_p")
    rows = json.loads(CliRunner().invoke(cli.app, ["inspect", str(tmp_path), "--kernels", "--json"]).output)["kernels"]
    assert {(row["one_row"], row["reason"]) for row in rows} == {
        (TORCH, "the kernels read the formats gptq and gptq_v2, not gptq_p")
    }
    result = CliRunner().invoke(cli.app, ["inspect", str(tmp_path / "eora"), "--kernels"])
    assert result.exit_code == 2 and "needs a checkpoint" in " ".join(result.output.split())


def test_built_ahead_of_time() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "gptqmodel_eora_ext.kernels.cpu", "--build"], capture_output=True, text=True
    )
    assert done.returncode == 0 and str(build.library_path()) in done.stdout and "this processor uses" in done.stdout
