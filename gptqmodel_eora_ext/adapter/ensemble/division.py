"""How an ensemble's budget divides into the shared adapter's part and each member's: by forecasts on a sample of
modules.

For a part of the budget, the shared adapter is solved for the ranks that it buys, by the moment of all texts; what is
left of the error, weighed by each domain's own moment, has a spectrum that tells what each further rank of
the domain's member will buy. The part with the least error left is taken, the mean over domains and modules of what
is left of what was there, a domain like another.

EoRA's correction of rank r is a projection U Uᵀ ΔW of the error, and leaves no input with a larger error than before.
So components made for one domain never harm another, and for the mean error of all domains no update of so many
components is better than one adapter for all of them. Members pay where the bytes that serve a prompt count, not
those that are stored, or where a domain comes later; forecasts for stored bytes alone choose the largest part that is
compared.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch

from ...formats.sizes import ModuleShape, factor_bytes
from ...solve import eora, weighted_energy

# Parts for the shared adapter that are compared. With less than the last leaves them, members get a component or two.
PARTS = (0.25, 0.4, 0.55, 0.7, 0.85)
# A member's part is given out in so many steps for each member.
STEPS = 4
# Without any module to forecast by, members get as much as the shared adapter.
UNKNOWN_PART = 0.5
# Components over which the bytes of one are averaged: packed ones share scales and bytes.
COMPONENTS = 64


@dataclass(frozen=True)
class Sample:
    """A module to forecast by.

    Attributes:
        delta: ΔW = W − Ŵ, out × in, float32.
        moments: text → C of the module's inputs, in × in, of each domain and of any other text to be shared.
    """

    delta: torch.Tensor
    moments: Mapping[str, torch.Tensor]


@dataclass(frozen=True)
class Division:
    """Bytes of each adapter.

    Attributes:
        shared: of the shared adapter.
        members: of each member.
        forecast: part for the shared adapter → mean share of the error that is forecast to be left; empty if none was.
    """

    shared: int
    members: Mapping[str, int]
    forecast: Mapping[float, float]

    @property
    def total(self) -> int:
        """Bytes of all."""
        return self.shared + sum(self.members.values())

    @classmethod
    def by_part(cls, total: int, part: float, names: Sequence[str]) -> Division:
        """A part for the shared adapter, the rest for the members alike."""
        shared = int(total * part)
        return cls(shared, dict.fromkeys(names, (total - shared) // len(names)), {})


def divide(
    samples: Iterable[Sample],
    total: int,
    weights: int,
    names: Sequence[str],
    *,
    factor_bits: int,
    member_weights: int | None = None,
) -> Division:
    """Choose the division.

    Args:
        samples: of some modules.
        total: bytes of all factors.
        weights: of all quantised modules, which tells the rank that bytes buy in each: bytes per weight alike.
        names: of the domains.
        factor_bits: of a stored factor, which tells the components that bytes buy.
        member_weights: of the modules that members adapt; None for all.

    Returns:
        The division with the least error left; half for the shared adapter where there is no sample.
    """
    left: dict[float, list[dict[str, torch.Tensor]]] = {part: [] for part in PARTS}
    counts: dict[float, list[float]] = {part: [] for part in PARTS}
    for sample in samples:
        out_features, in_features = sample.delta.shape
        shape = ModuleShape("", out_features, in_features)
        # Bytes per weight are the same in all modules, and members have theirs in fewer of them.
        rank = total * shape.weights / weights * COMPONENTS / factor_bytes(COMPONENTS, shape, factor_bits)
        more = 1 if member_weights is None else weights / member_weights
        for part in PARTS:
            shared = max(1, round(part * rank))
            left[part].append(_left(sample, shared, names))
            # What rounding has given the shared adapter is taken off the members', so that no part gains by it.
            counts[part].append(max(0.0, (rank - shared) * more))
    if not left[PARTS[0]]:
        return Division.by_part(total, UNKNOWN_PART, names)
    forecasts: dict[float, tuple[float, dict[str, int]]] = {}
    for part in PARTS:
        forecasts[part] = _given_out(left[part], counts[part], names)
    best = min(PARTS, key=lambda part: forecasts[part][0])
    shared = int(total * best)
    steps = forecasts[best][1]
    each = (total - shared) / (STEPS * len(names))
    return Division(
        shared,
        {name: max(1, int(each * steps[name])) for name in names},
        {part: round(value, 4) for part, (value, _) in forecasts.items()},
    )


def _left(sample: Sample, rank: int, names: Sequence[str]) -> dict[str, torch.Tensor]:
    """Of each domain, the share of its error left after the shared adapter and 0, 1, 2 … components of its own."""
    everywhere = torch.stack(list(sample.moments.values())).mean(dim=0)
    lora_A, lora_B = eora(sample.delta, everywhere, min(rank, *sample.delta.shape))
    rest = sample.delta - (lora_B @ lora_A).to(sample.delta.dtype)
    curves = {}
    for name in names:
        moment = sample.moments[name]
        before = weighted_energy(sample.delta, moment)
        # Eigenvalues of ΔW C ΔWᵀ are the energies of its best components under C.
        energies = torch.linalg.eigvalsh(rest @ moment @ rest.T).clamp_min(0).flip(0)
        after = energies.sum() - torch.cat([energies.new_zeros(1), energies.cumsum(0)])
        curves[name] = after.clamp_min(0) / max(before, torch.finfo(torch.float32).tiny)
    return curves


def _given_out(
    curves: Sequence[Mapping[str, torch.Tensor]], counts: Sequence[float], names: Sequence[str]
) -> tuple[float, dict[str, int]]:
    """Give the members' part out step by step, each to the member that it helps most; what is left, and the steps."""

    def left(name: str, steps: int) -> float:
        shares = []
        for curve, count in zip(curves, counts, strict=True):
            # Between two ranks the curve is a line: rounded, a step might gain nothing, and the next one twice as much.
            rank = min(count * steps / (STEPS * len(names)), len(curve[name]) - 1)
            low = min(int(rank), len(curve[name]) - 2)
            shares.append(float(torch.lerp(curve[name][low], curve[name][low + 1], rank - low)))
        return sum(shares) / len(shares)

    # Every member gets something: one without a component would be none.
    steps = dict.fromkeys(names, 1)
    for _ in range((STEPS - 1) * len(names)):
        gains = {name: left(name, steps[name]) - left(name, steps[name] + 1) for name in names}
        # Of members that gain alike, as where nothing is left to correct, the one with least.
        steps[max(names, key=lambda name: (gains[name], -steps[name]))] += 1
    return sum(left(name, steps[name]) for name in names) / len(names), steps
