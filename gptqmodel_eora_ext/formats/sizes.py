"""What quantised weights and factors weigh."""

from __future__ import annotations

from dataclasses import dataclass

from .factors import PACKED_LAYOUT, FactorLayout

SCALE_BYTES = 2
# The group size of one scale for a whole row.
WHOLE_ROW = -1


@dataclass(frozen=True)
class ModuleShape:
    """A module to compensate."""

    name: str
    out_features: int
    in_features: int

    @property
    def weights(self) -> int:
        """Quantised weights."""
        return self.out_features * self.in_features


def factor_bytes(rank: int, shape: ModuleShape, factor_bits: int, layout: FactorLayout = PACKED_LAYOUT) -> int:
    """Bytes of both factors as they are stored, scales included."""
    if factor_bits == 16:
        return 2 * rank * (shape.in_features + shape.out_features)

    def rows(count: int, features: int) -> int:
        return count * (-(-features * factor_bits // 8) + SCALE_BYTES * -(-features // layout.group_size))

    lora_A = rows(rank, shape.in_features)
    return lora_A + (rows(shape.out_features, rank) if layout.along_rank else rows(rank, shape.out_features))


def weight_bytes(shape: ModuleShape, bits: int, group_size: int) -> int:
    """Bytes of a module's weights in the GPTQ format: codes, float16 scales, zeros as wide as codes."""
    groups = 1 if group_size == WHOLE_ROW else -(-shape.in_features // group_size)
    return (shape.weights * bits + groups * shape.out_features * (8 * SCALE_BYTES + bits)) // 8
