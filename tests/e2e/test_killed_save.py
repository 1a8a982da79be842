"""A real save by GPTQModel that is killed: the folder holds the old checkpoint or the whole new one, byte for byte."""

from __future__ import annotations

import hashlib
import os
import random
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from gptqmodel import GPTQModel, QuantizeConfig
from transformers import LlamaConfig, LlamaForCausalLM

from gptqmodel_eora_ext import EoRA
from gptqmodel_eora_ext.hosts.terminal import quiet

from .helpers import Batches, kernels, load

pytestmark = pytest.mark.e2e

MOMENTS = 4
# A process loads a checkpoint and saves it, and dies at its n-th operation on files.
SAVE = """
import os, signal, sys
from gptqmodel import GPTQModel
from gptqmodel_eora_ext.hosts.terminal import quiet

source, target, last = sys.argv[1], sys.argv[2], int(sys.argv[3])
operations = 0

def count(event, arguments):
    global operations
    if event.startswith(("os.", "open", "shutil.", "ctypes.call_function")):
        operations += 1
        if operations == last:
            os.kill(os.getpid(), signal.SIGKILL)

with quiet():
    host = GPTQModel.load(source, backend="gptq_torch")
    sys.addaudithook(count)
    host.save(target, max_shard_size="2MB")
print("OPERATIONS", operations)
"""


OFFLOADING = re.compile(rb'"offload_to_disk_path": "[^"]*"')


def save(source: Path, target: Path, last: int) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", SAVE, str(source), str(target), str(last)]
    # PEFT keeps target_modules as a set and writes it in the set's order.
    environment = {**os.environ, "PYTHONHASHSEED": "0"}
    return subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)


def fingerprint(folder: Path) -> dict[str, str]:
    """A digest a file; without the folder for offloading that GPTQModel draws anew for each process and writes down."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    contents = {str(path.relative_to(folder)): OFFLOADING.sub(b"", path.read_bytes()) for path in files}
    return {name: hashlib.sha256(content).hexdigest() for name, content in contents.items()}


@pytest.fixture(scope="module")
def pair(tokenizer: Any, calibration: Batches, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Two checkpoints of one small random model: ranks 4 and 8."""
    folder = tmp_path_factory.mktemp("killed")
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=len(tokenizer), hidden_size=64, intermediate_size=128, num_hidden_layers=1,
                         num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=True)  # fmt: skip
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder / "base")
    tokenizer.save_pretrained(folder / "base")
    for name, rank in (("old", 4), ("new", 8)):
        with quiet():
            host = GPTQModel.load(str(folder / "base"), QuantizeConfig(bits=4, group_size=32))
            host.quantize(calibration[:4], adapter=EoRA(rank=rank))
            host.save(str(folder / name))
    return folder / "old", folder / "new"


@pytest.mark.skipif(os.name != "posix", reason="needs SIGKILL")
def test_a_killed_save_leaves_the_old_checkpoint_or_the_new_one(pair: tuple[Path, Path], tmp_path: Path) -> None:
    old, new = pair
    target = tmp_path / "target"
    shutil.copytree(old, target)
    known_old = fingerprint(target)
    done = save(new, target, last=-1)
    assert done.returncode == 0, done.stderr[-3000:]
    operations = int(done.stdout.rsplit("OPERATIONS", 1)[1])
    known_new = fingerprint(target)
    assert "model.safetensors" in known_old and "model.safetensors" not in known_new
    found = []
    for moment in [*random.Random(0).sample(range(1, operations), MOMENTS - 1), operations]:
        shutil.rmtree(target)
        shutil.copytree(old, target)
        done = save(new, target, last=moment)
        now = fingerprint(target)
        assert done.returncode == -signal.SIGKILL and now in (known_old, known_new), (
            moment,
            sorted(set(now.items()) ^ set(known_new.items())),
            done.stderr[-3000:],
        )
        found.append("old" if now == known_old else "new")
    # The last operations remove the old folder, when the new one is in place.
    assert found[0] == "old" and found[-1] == "new", found
    assert kernels(load(target))["model.layers.0.mlp.up_proj"].adapter.rank == 8


def test_saving_over_the_folder_that_was_loaded(pair: tuple[Path, Path], tmp_path: Path) -> None:
    """Its files may be read while the new ones are written; what a user put there stays, old shards do not."""
    folder = tmp_path / "model"
    with quiet():
        host = GPTQModel.load(str(pair[1]), backend="gptq_torch")
        host.save(str(folder), max_shard_size="2MB")
        assert len(list(folder.glob("model-*.safetensors"))) > 1
        (folder / "README.md").write_text("mine")
        (folder / "eora" / "notes.txt").write_text("mine")
        before = [kernel.adapter.lora_A.clone() for kernel in kernels(load(folder)).values()]
        host = GPTQModel.load(str(folder), backend="gptq_torch")
        host.save(str(folder))
        host.save(str(folder))
    assert [path.name for path in folder.glob("*.safetensors*")] == ["model.safetensors"]
    assert (folder / "README.md").read_text() == (folder / "eora" / "notes.txt").read_text() == "mine"
    after = [kernel.adapter.lora_A for kernel in kernels(load(folder)).values()]
    assert all(torch.equal(one, other) for one, other in zip(before, after, strict=True))
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_full_disk_is_told_before_anything_is_written(
    pair: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    with quiet():
        host = GPTQModel.load(str(pair[1]), backend="gptq_torch")
        with pytest.raises(OSError, match=r"saving takes about .* GB and .* GB free.*Free some space"):
            host.save(str(tmp_path / "model"))
    assert list(tmp_path.iterdir()) == []
