"""How a checkpoint names its adapter: the entry's form, and where it may lead, which is where GPTQModel follows it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from gptqmodel.adapter.remote import resolve_checkpoint_adapter_path

from gptqmodel_eora_ext.adapter.errors import AdapterError
from gptqmodel_eora_ext.adapter.naming import AdapterEntry, named_folder, read_entry
from gptqmodel_eora_ext.adapter.summary import find_adapter
from gptqmodel_eora_ext.formats.names import ADAPTER_CONFIG, ADAPTER_WEIGHTS, QUANTIZE_CONFIG

from .test_folder import write


def checkpoint(folder: Path, entry: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / QUANTIZE_CONFIG).write_text(json.dumps({"bits": 2, "adapter": entry}))
    return folder


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ("eora", "adapter = 'eora'; expected an object"),
        (["eora"], "adapter = "),
        ({"name": "lora"}, "path = nothing; expected the adapter's folder"),
        ({"name": "lora", "path": ""}, "path = ''"),
        ({"name": "lora", "path": 5}, "path = 5; expected a string"),
        ({"path": "eora"}, "name = nothing; expected lora or eora"),
        ({"name": "lora", "path": "eora", "rank": "8"}, "rank = '8'; expected a positive integer"),
    ],
)
def test_entries_of_a_wrong_form_are_named(tmp_path: Path, entry: Any, message: str) -> None:
    with pytest.raises(AdapterError, match=f"{QUANTIZE_CONFIG}.*{message}.*It looks like"):
        find_adapter(checkpoint(tmp_path, entry))


@pytest.mark.parametrize("content", ["[]", "{", '"x"'])
def test_a_broken_file_is_named(tmp_path: Path, content: str) -> None:
    (tmp_path / QUANTIZE_CONFIG).write_text(content)
    with pytest.raises(AdapterError, match=QUANTIZE_CONFIG):
        find_adapter(tmp_path)


def test_without_an_entry(tmp_path: Path) -> None:
    assert read_entry(tmp_path) is None
    for nothing in (None, {}):
        assert find_adapter(checkpoint(tmp_path, nothing), required=False) is None


def lead_somewhere(root: Path, kind: str) -> tuple[Path, str]:
    """A checkpoint of one kind, and the path that it names."""
    folder, outside = root / "model", root / "outside"
    write(outside)
    folder.mkdir()
    write(folder / "eora")
    write(folder / "adapters" / "one")
    if kind == "link to a folder":
        (folder / "link").symlink_to(outside)
        return folder, "link"
    if kind == "link on the way":
        (folder / "link").symlink_to(root)
        return folder, "link/outside"
    if kind == "link to a folder inside":
        (folder / "link").symlink_to(folder / "eora")
        return folder, "link"
    if kind == "linked file":
        (folder / "eora" / ADAPTER_WEIGHTS).unlink()
        (folder / "eora" / ADAPTER_WEIGHTS).symlink_to(outside / ADAPTER_WEIGHTS)
        return folder, "eora"
    if kind.startswith("cache"):
        repository = root / "models--some--model"
        snapshot = repository / "snapshots" / ("a" * 40)
        write(snapshot / "eora")
        (repository / "blobs").mkdir()
        for name, digest in ((ADAPTER_CONFIG, "b" * 40), (ADAPTER_WEIGHTS, "c" * 64)):
            blob = repository / "blobs" / (digest if kind == "cache" else "no-hash")
            (snapshot / "eora" / name).rename(blob)
            (snapshot / "eora" / name).symlink_to(Path("../../../blobs") / blob.name)
        return snapshot, "eora"
    if kind == "link to the checkpoint":
        (root / "alias").symlink_to(folder)
        return root / "alias", "eora"
    return folder, {
        "plain": "eora", "below": "adapters/one", "dot": "./eora", "up": "../outside", "up inside": "eora/../eora",
        "absolute": str(outside), "absolute inside": str(folder / "eora"), "windows": r"C:\\adapter",
        "backslash": r"..\\outside", "missing": "none", "file": QUANTIZE_CONFIG,
    }[kind]  # fmt: skip


ALLOWED = ("plain", "below", "dot", "cache", "link to the checkpoint")


@pytest.mark.parametrize(
    "kind",
    [*ALLOWED, "up", "up inside", "absolute", "absolute inside", "windows", "backslash", "missing", "file",
     "link to a folder", "link to a folder inside", "link on the way", "linked file", "cache of other names"],
)  # fmt: skip
def test_it_is_followed_where_gptqmodel_follows_it(tmp_path: Path, kind: str) -> None:
    folder, path = lead_somewhere(tmp_path, kind)
    checkpoint(folder, {"name": "lora", "path": path, "rank": 4})
    try:
        theirs = resolve_checkpoint_adapter_path(path, str(folder))
    except ValueError:
        theirs = None
    assert (theirs is not None) == (kind in ALLOWED)
    if theirs is None:
        with pytest.raises(AdapterError, match=f"{QUANTIZE_CONFIG}.*names the adapter's path"):
            find_adapter(folder)
    else:
        found = named_folder(folder, AdapterEntry("lora", path, 4))
        assert found.resolve() == Path(theirs) and find_adapter(folder) == found
