"""Tensors come back bit by bit, from memory and from disk, and no file is left."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from gptqmodel_eora_ext.system.spill import Spill, spilling

TENSORS = [
    torch.randn(5, 7),
    torch.randn(3, 4).to(torch.bfloat16),
    torch.randint(0, 9, (2, 2, 2)),
    torch.randn(6, 5).T,
    torch.empty(0, 3),
    torch.tensor(2.5),
]


@pytest.mark.parametrize("limit", [0, 100, 1 << 20])
def test_the_same_bits_in_any_order(limit: int, tmp_path: Path) -> None:
    with spilling(limit, tmp_path / "deep" / "folder") as spill:
        kept = [spill.keep(tensor) for tensor in TENSORS]
        assert spill.in_memory <= limit
        assert spill.in_memory + spill.on_disk == sum(tensor.nbytes for tensor in TENSORS)
        for one, tensor in reversed(list(zip(kept, TENSORS, strict=True))):
            found = spill.read(one)
            assert found.dtype == tensor.dtype and torch.equal(found, tensor)
        assert not [file for file in tmp_path.rglob("*") if file.is_file()]


def test_a_copy_is_kept_and_what_is_dropped_makes_room(tmp_path: Path) -> None:
    tensor = torch.ones(4)
    spill = Spill(16, tmp_path)
    kept = spill.keep(tensor)
    tensor.zero_()
    assert torch.equal(spill.read(kept), torch.ones(4))
    assert spill.keep(tensor).tensor is None
    spill.drop(kept)
    assert spill.keep(tensor).tensor is not None
    spill.close()


def test_nothing_is_left_of_a_killed_process(tmp_path: Path) -> None:
    code = (
        "import sys, time, torch; from pathlib import Path; from gptqmodel_eora_ext.system.spill import Spill;"
        "spill = Spill(0, Path(sys.argv[1])); spill.keep(torch.ones(1000)); print('kept', flush=True); time.sleep(60)"
    )
    process = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "kept\n"
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert not list(tmp_path.iterdir())
