"""What one of vLLM's layers holds: modules of the checkpoint, each cut to this process's share.

vLLM joins q, k and v, and gate and up, to one layer, whose parameters it allocates beforehand and fills piece by piece.
That needs one width, one group size and one rank for all. Here each module of the checkpoint stays a part of its own:
the layer's parameters are empty, and a part takes its tensors as they are read, is cut and repacked when the last of
them is there, and lets go of them. So bits, groups and ranks may differ, and a weight is in memory once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from ...adapter.errors import AdapterError
from ...formats.factors import Factors
from ...formats.packed_weights import LayoutError, PackedWeight
from ...formats.shards import Range, take_factors, take_inputs, take_outputs
from ...kernels.cpu.factors import RepackedFactors, repack_factors
from ...kernels.cpu.repack import RepackedWeight, repack_weight
from .checkpoint import Checkpoint, CheckpointError


@dataclass(frozen=True)
class Share:
    """What this process keeps of a module.

    Attributes:
        outputs: ranges of the module's outputs, one after the other.
        inputs: range of its inputs.
    """

    outputs: tuple[Range, ...]
    inputs: Range

    @property
    def out_features(self) -> int:
        return sum(end - begin for begin, end in self.outputs)

    @property
    def in_features(self) -> int:
        return self.inputs[1] - self.inputs[0]


@dataclass
class Part:
    """A module of the checkpoint, in one of vLLM's layers.

    Attributes:
        name: the checkpoint's name of it.
        share: what is kept of it.
        device: where it is to lie.
        weight: repacked on a CPU, packed elsewhere; a matrix, out × in, for a module that is not quantised; None until
            all tensors are read.
        factors: of the checkpoint's own adapter, in the kernels' form; None for none.
    """

    name: str
    share: Share
    device: torch.device
    weight: RepackedWeight | PackedWeight | torch.Tensor | None = None
    factors: RepackedFactors | Factors | None = None
    _tensors: dict[str, torch.Tensor] = field(default_factory=dict)

    def take(self, checkpoint: Checkpoint, kind: str, tensor: torch.Tensor) -> None:
        """Take one of the module's tensors as it stands in the file; the last one makes the part.

        Args:
            checkpoint: that the module is of.
            kind: `qweight`, `qzeros`, `scales`, `g_idx` or `weight`.
            tensor: the whole module's.
        """
        # Some loaders read the next tensor into the same memory.
        self._tensors[kind] = tensor.clone()
        header = checkpoint.modules.get(self.name)
        if self._tensors.keys() >= (frozenset(("weight",)) if header is None else header.tensors):
            self._make(checkpoint)

    def _make(self, checkpoint: Checkpoint) -> None:
        tensors, self._tensors = self._tensors, {}
        header = checkpoint.modules.get(self.name)
        if header is None:
            rows = torch.cat([tensors["weight"][begin:end] for begin, end in self.share.outputs])
            self.weight = rows[:, slice(*self.share.inputs)].to(self.device).contiguous()
            return
        try:
            whole = PackedWeight(
                qweight=tensors["qweight"], qzeros=tensors["qzeros"], scales=tensors["scales"],
                g_idx=tensors.get("g_idx"), bits=header.bits, group_size=header.group_size,
                in_features=header.in_features, out_features=header.out_features,
                stores_zero_minus_one=checkpoint.stores_zero_minus_one, name=self.name,
            )  # fmt: skip
        except LayoutError as error:
            raise CheckpointError(f"EoRA: {error}") from error
        weight = take_outputs(take_inputs(whole, *self.share.inputs), self.share.outputs)
        factors = self._read_factors(checkpoint)
        if self.device.type == "cpu":
            self.weight = repack_weight(weight)
            self.factors = None if factors is None else repack_factors(factors)
        else:
            self.weight = weight.to(self.device)
            self.factors = None if factors is None else factors.to(self.device)

    def _read_factors(self, checkpoint: Checkpoint) -> Factors | None:
        stored, folder = checkpoint.adapter_name(self.name), checkpoint.adapter_folder
        if stored is None or folder is None:
            return None
        try:
            (_, read), = folder.factors([stored])
        except OSError as error:
            raise AdapterError(f"Adapter: `{folder.path}` cannot be read any more ({error}).") from error
        whole = Factors(*read.packed) if read.packed else Factors(read.lora_A, read.lora_B.T.contiguous())
        return take_factors(whole, outputs=self.share.outputs, inputs=self.share.inputs)

    def require_whole(self) -> None:
        """Refuse a part of which tensors are missing.

        Raises:
            CheckpointError: naming the module.
        """
        if self.weight is None:
            found = ", ".join(sorted(self._tensors)) or "none"
            raise CheckpointError(
                f"EoRA: vLLM has not read all tensors of {self.name}; it has read {found}. Is the checkpoint complete, "
                f"and --load-format left as it is by default?"
            )


def share_of(
    disk_sizes: Sequence[int], local_sizes: Sequence[int], ranks: Sequence[int], inputs: Range
) -> Share:
    """What a process keeps of a module that holds some outputs, one kind after the other (q, k and v, say).

    Args:
        disk_sizes: outputs of each kind in the file.
        local_sizes: of each kind that the process keeps.
        ranks: which share of each kind: the first is 0.
        inputs: range that it keeps.
    """
    ranges, offset = [], 0
    for whole, local, rank in zip(disk_sizes, local_sizes, ranks, strict=True):
        ranges.append((offset + rank * local, offset + (rank + 1) * local))
        offset += whole
    joined: list[Range] = []
    for begin, end in ranges:
        if joined and joined[-1][1] == begin:
            begin = joined.pop()[0]
        joined.append((begin, end))
    return Share(tuple(joined), inputs)
