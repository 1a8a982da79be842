"""The state of a run in a file, from which an interrupted one goes on as if it had not been interrupted."""

from __future__ import annotations

import json
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from ..system.files import replaced_file
from ..system.tensor_file import write_tensors
from .factors import Stored, TrainedFactors
from .muon import Muon
from .outcome import Outcome

OUTCOME = "outcome"


class Progress:
    """Writes and reads the factors, the running means of their gradient and what was found so far.

    Args:
        path: the file; None keeps nothing.
        factors: that are trained.
        muon: that trains them.
    """

    def __init__(self, path: Path | None, factors: TrainedFactors, muon: Muon) -> None:
        self._path, self._factors, self._muon = path, factors, muon

    def write(self, outcome: Outcome) -> None:
        """Write all of it: twice the factors in float32, and the best state.

        Raises:
            OSError: when the disk is full; the older file stays.
        """
        if self._path is None:
            return
        # Whole and on the disk before it takes the older one's place, in the same order each time.
        told = {one.name: getattr(outcome, one.name) for one in fields(outcome) if one.name != "best"}
        tensors = dict(self._tensors())
        if outcome.best is not None:
            tensors |= {"best.values": outcome.best.values, "best.scales": outcome.best.scales}
        with replaced_file(self._path) as unfinished:
            write_tensors(unfinished, tensors, {OUTCOME: json.dumps(told)})

    def read(self, outcome: Outcome) -> bool:
        """Take up what `write` has left, if anything; tells whether there was."""
        if self._path is None or not self._path.is_file():
            return False
        with safe_open(self._path, framework="pt") as file:
            told: dict[str, Any] = json.loads(file.metadata()[OUTCOME])
            for name, tensor in self._tensors().items():
                tensor.copy_(file.get_tensor(name))
            if "best.values" in file.keys():  # noqa: SIM118
                device = self._factors.master.device
                outcome.best = Stored(*(file.get_tensor(f"best.{name}").to(device) for name in ("values", "scales")))
        told["validations"] = [(step, loss) for step, loss in told["validations"]]
        for name, value in told.items():
            setattr(outcome, name, value)
        return True

    def _tensors(self) -> dict[str, torch.Tensor]:
        return {"master": self._factors.master, "shares": self._factors.shares, "mean": self._muon.mean,
                "columns": self._muon.columns}  # fmt: skip
