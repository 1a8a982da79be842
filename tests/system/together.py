"""What `test_distributed.py` runs in several processes: the first argument names the case, the second a folder."""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import torch

from gptqmodel_eora_ext.capture import OrderedMoment, OrderedOutputError, OutputErrorMoment
from gptqmodel_eora_ext.system.distributed import as_first_says, joined, share
from gptqmodel_eora_ext.system.group import Group
from gptqmodel_eora_ext.system.kept import ResumeError
from gptqmodel_eora_ext.system.peers import LOST_STATUS, PeerLost
from gptqmodel_eora_ext.system.sent_state import receive_state, send_state

OUT, IN, WINDOWS = 40, 152, 7


def windows() -> list[torch.Tensor]:
    """Inputs of a module: windows × tokens × in, of which each has its own number of tokens."""
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(1, 20 + index, IN, generator=generator).bfloat16() for index in range(WINDOWS)]


def weights() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(OUT, IN, generator=generator), torch.randn(OUT, IN, generator=generator)


def sums(group: Group) -> dict[str, Any]:
    """Second moments of inputs and of output errors over the windows of all processes."""
    moment, error = OrderedMoment(IN, "m"), OrderedOutputError(OutputErrorMoment(*weights(), "m"))
    every = windows()
    for index in share(len(every), group.size, group.rank):
        moment.add(every[index])
        error.add(every[index])
    last = group.size - 1
    moment.merge(group, [0, last])
    error.merge(group, [0])
    if group.rank not in (0, last):
        return {}
    found: dict[str, Any] = {"C": moment.mean(), "tokens": torch.tensor(moment.tokens)}
    if group.rank == 0:
        found |= {"S": error.mean(), "energies": error.energies(), "signal": torch.tensor(error.signal)}
    return found


def exchanged(group: Group) -> None:
    """Whatever a process gives reaches all of them."""
    assert group.gather({"rank": group.rank, "float": 0.1}) == [
        {"rank": rank, "float": 0.1} for rank in range(group.size)
    ]
    owners = {"a": 1, "b": 0, "empty": 1}
    made = {
        name: (owner, {"x": torch.full((2, 3), owner + 0.5), "none": torch.zeros(0, 4, dtype=torch.int8)})
        for name, owner in owners.items()
        if owner == group.rank
    }
    for name, told, tensors in group.spread(owners, made):
        assert told == owners[name]
        assert torch.equal(tensors["x"], torch.full((2, 3), told + 0.5))
        assert tensors["none"].shape == (0, 4)
    rows = {"x": torch.full((group.rank + 1, 2), float(group.rank))} | ({"y": torch.ones(1, 1)} if group.rank else {})
    joined_rows = group.joined_rows(rows)
    assert joined_rows["x"][:, 0].tolist() == [float(rank) for rank in range(group.size) for _ in range(rank + 1)]
    assert len(joined_rows["y"]) == group.size - 1
    total = group.add_up(torch.tensor([1.0, float(group.rank)]))
    assert total.tolist() == [group.size, sum(range(group.size))]
    send_and_receive(group)
    try:
        group.agree({"model": "same", "calibration data": "other" if group.rank == 1 else "one"})
    except ValueError as error:
        assert "differ in calibration data: rank 0 has 'one', rank 1 (" in str(error), error
    else:
        raise AssertionError("different data were taken for the same")


def send_and_receive(group: Group) -> None:
    """A nested state arrives as it was; what the receiver has is told by name. Rank 0 decides for all, or fails."""
    mask, tensor = torch.ones(2, dtype=torch.bool), torch.arange(6).reshape(3, 2).T
    if group.is_first:
        for rank in range(1, group.size):
            told = receive_state(group, rank, {"mask": mask}, stays=True)
            assert told["of"] == (rank, 0.1) and told["mask"] is mask
            assert torch.equal(told["tensor"], tensor) and told["empty"].shape == (0, 3)
    else:
        state = {"of": (group.rank, 0.1), "mask": mask, "tensor": tensor, "empty": torch.zeros(0, 3)}
        send_state(group, state, 0, {id(mask): "mask"})
    assert as_first_says(lambda: group.rank, ValueError) == 0

    def refuses() -> None:
        raise ResumeError("of another run")

    try:
        as_first_says(refuses, ResumeError)
    except ResumeError as error:
        assert str(error) == "of another run"
    else:
        raise AssertionError("rank 0 has refused, and the others go on")


def main(case: str, folder: Path) -> None:
    with joined() as group:
        assert group is not None
        if case == "sums":
            from safetensors.torch import save_file

            exchanged(group)
            found = sums(group)
            if found:
                save_file(found, folder / f"{group.rank}.safetensors")
        else:
            group.at(f"layer 3, case {case}")
            group.barrier("the first")
            # Beats tell the others of the phase.
            time.sleep(1)
            if group.rank == 1 and case == "fails":
                raise OSError("no space left on device")
            if group.rank == 1 and case == "hangs":
                time.sleep(600)
            if group.rank == 1:
                os.kill(os.getpid(), signal.SIGKILL if case == "killed" else signal.SIGSTOP)
            group.barrier("the second")


if __name__ == "__main__":
    torch.set_num_threads(1)
    try:
        main(sys.argv[1], Path(sys.argv[2]))
    except PeerLost as lost:
        print(f"error: {lost}")
        sys.exit(LOST_STATUS)
