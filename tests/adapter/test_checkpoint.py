"""What of an old checkpoint goes when a new one takes its folder, and what stays."""

from __future__ import annotations

import json
from pathlib import Path

from gptqmodel_eora_ext.adapter.checkpoint import replaced_checkpoint

OLD = {
    "config.json": "old", "model-00001-of-00002.safetensors": "old", "model-00002-of-00002.safetensors": "old",
    "layers/0/layer.safetensors": "old", "layers/0/mine.txt": "mine", "pytorch_model-00001-of-00001.bin": "old",
    "quantize_config.json": "old", "quantization_config.json": "old", "quant_log.csv": "old",
    "model-shard-00003.safetensors": "old",
    "control_vector.safetensors": "mine", "README.md": "mine", "tokenizer.json": "mine", "eora/README.md": "mine",
    "eora/adapter_model.safetensors": "old", "other/model.safetensors": "mine",
}  # fmt: skip
NEW = {"config.json": "new", "model.safetensors": "new", "eora/adapter_model.safetensors": "new"}


def write(folder: Path, content: dict[str, str]) -> None:
    for name, text in content.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)


def test_old_weights_and_manifests_go_and_all_else_stays(tmp_path: Path) -> None:
    target = tmp_path / "model"
    index = json.dumps({"weight_map": {"a": "layers/0/layer.safetensors", "b": "model-00001-of-00002.safetensors"}})
    write(target, {**OLD, "model.safetensors.index.json": index})
    with replaced_checkpoint(target) as fresh:
        write(fresh, NEW)
    found = {str(path.relative_to(target)): path.read_text() for path in target.rglob("*") if path.is_file()}
    assert found == {**NEW, **{name: text for name, text in OLD.items() if text == "mine"}}


def test_a_broken_index_is_no_obstacle(tmp_path: Path) -> None:
    for content in ("{", "[]", '{"weight_map": 3}', '{"weight_map": {"a": 3}}'):
        write(tmp_path / "model", {"model.safetensors.index.json": content, "x.safetensors.index.json": "{"})
        with replaced_checkpoint(tmp_path / "model") as fresh:
            write(fresh, NEW)
        assert not (tmp_path / "model" / "model.safetensors.index.json").exists()
