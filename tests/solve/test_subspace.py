"""The iteration goes on from the subspace that it has when its precision turns out too coarse."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch

from gptqmodel_eora_ext.solve import subspace, weighted_energy
from gptqmodel_eora_ext.solve.error import WeightedError

from .problems import optimum, problem, with_outliers

RANK, SIDE = 32, 400
PRECISE = 1e-3


@dataclass(frozen=True)
class CountedError(WeightedError):
    """Counts the rows that are multiplied by ΔW, by dtype; says that rounded products are the faster ones."""

    counts: dict[torch.dtype, int]

    @property
    def rounds(self) -> bool:
        return True

    def project(self, rows: torch.Tensor) -> torch.Tensor:
        self.counts[rows.dtype] = self.counts.get(rows.dtype, 0) + len(rows)
        return super().project(rows)


def counted(share_left: float) -> CountedError:
    """An error of which the best correction of `RANK` leaves about that share of the energy."""
    generator = torch.Generator().manual_seed(0)
    rest = torch.randn(SIDE, SIDE, generator=generator)
    strong = torch.randn(SIDE, RANK - 4, generator=generator) @ torch.randn(RANK - 4, SIDE, generator=generator)
    strong *= (rest.square().sum() * (1 / share_left - 1) / strong.square().sum()).sqrt()
    return CountedError(rest + strong, torch.eye(SIDE), {})


def energy_over_least(error: CountedError, found: torch.Tensor) -> float:
    delta = error.delta.double()
    left = delta.square().sum() - (found.double() @ delta).square().sum()
    return float(left / torch.linalg.svdvals(delta)[RANK:].square().sum())


@pytest.mark.parametrize("share_left", [0.2, 0.05, 0.03, 0.008, 1e-3])
def test_the_optimum_at_every_precision(share_left: float) -> None:
    error = counted(share_left)
    found, projected = subspace.dominant_subspace(error, RANK, tolerance=PRECISE / 10, seed=0, exact=False)
    assert energy_over_least(error, found) < 1 + PRECISE
    torch.testing.assert_close(projected, found @ error.delta.to(found.dtype), rtol=1e-3, atol=1e-3)


def test_rounded_proposals_that_are_too_coarse_cost_no_second_start(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only proposals were rounded, so whatever was multiplied by then serves on."""
    goes_on, never_rounded = counted(0.03), counted(0.03)
    subspace.dominant_subspace(goes_on, RANK, tolerance=PRECISE, seed=0, exact=False)
    monkeypatch.setattr(subspace, "PRECISIONS", subspace.PRECISIONS[1:])
    subspace.dominant_subspace(never_rounded, RANK, tolerance=PRECISE, seed=0, exact=False)
    # Two more products, since what was gained before tells nothing of finer proposals.
    assert goes_on.counts[torch.float32] <= never_rounded.counts[torch.float32] + 2 * subspace._block(RANK)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("rank", [16, 40])
def test_float64_finds_what_float32_cannot_tell(rank: int, seed: int) -> None:
    """Of a million times larger channels the best correction leaves 10⁻⁷ of the energy: float32's rounding."""
    delta, second_moment = problem(SIDE, SIDE, tokens=1000)
    second_moment = with_outliers(second_moment, 1e6)
    error = CountedError(delta.float(), second_moment, {})
    found, _ = subspace.dominant_subspace(error, rank, tolerance=PRECISE / 2, seed=seed, exact=False)
    left = weighted_energy(delta.float().double() - found.double().T @ (found.double() @ delta.double()), second_moment)
    assert error.counts[torch.float64]
    assert left < (1 + PRECISE) * optimum(delta.float(), second_moment, rank)


@pytest.mark.parametrize("seed", range(3))
def test_probes_know_nothing_of_the_starting_block(seed: int) -> None:
    """Of a square layer both are as wide: drawn from equal numbers, the probes would lie in the block's span, and the
    energy that they say is left would be too small. With ΔW and C of one, the block is what was drawn."""
    error = CountedError(torch.eye(SIDE), torch.eye(SIDE), {})
    krylov = subspace._Krylov(error, RANK, subspace.PRECISIONS[1], seed)
    krylov.multiply()
    inside = krylov._space.inside.square().sum() / krylov._probes.square().sum()
    assert inside < 2 * krylov._space.rows / SIDE
