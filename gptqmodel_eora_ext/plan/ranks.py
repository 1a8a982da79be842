"""The ranks that a module may choose from, and a correction of what they are predicted to buy."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch

from ..formats.factors import PACKED_LAYOUT, FactorLayout
from ..formats.sizes import ModuleShape, factor_bytes
from ..solve import Curve

# Ranks on offer are multiples of this, where the layout of the factors says nothing else.
RANK_STEP = PACKED_LAYOUT.step
# No module gets more than this many times the rank that the budget gives to all alike. SmolLM2 at 2 bits and 0.25, 0.5
# and 1 bpw: a limit of 4 times is predicted to lose 9, 2 and 5 % more than this one, and a limit of 16 times no less.
MOST_OF_UNIFORM = 8


@dataclass(frozen=True)
class RankOptions:
    """The ranks that a module may choose from.

    Attributes:
        ranks: ascending, 0 first; or one fixed rank.
        nbytes: bytes of the factors of each rank, scales included.
    """

    ranks: tuple[int, ...]
    nbytes: tuple[int, ...]

    def first(self, count: int) -> RankOptions:
        """The ``count`` smallest of them."""
        return RankOptions(self.ranks[:count], self.nbytes[:count])


def rank_options(
    shape: ModuleShape,
    most: int,
    factor_bits: int,
    fixed: int | None = None,
    layout: FactorLayout = PACKED_LAYOUT,
) -> RankOptions:
    """The ranks on offer to a module: 0 and multiples of the layout's step up to ``most``; or a ``fixed`` rank alone.

    Args:
        shape: the module, whose smaller side limits its rank.
        most: the largest rank on offer.
        factor_bits: bits of a stored factor.
        fixed: the rank of a module that does not choose.
        layout: of the factors.
    """
    limit = min(shape.in_features, shape.out_features, most)
    ranks = (0, *range(layout.step, limit + 1, layout.step)) if fixed is None else (fixed,)
    # A plain PEFT adapter holds rank 1 of zeros where it has nothing to add; other files leave such a module out.
    zeros = factor_bits == 16 and layout == PACKED_LAYOUT
    stored = [max(rank, 1) if zeros else rank for rank in ranks]
    return RankOptions(ranks, tuple(factor_bytes(rank, shape, factor_bits, layout) for rank in stored))


def joint_curve(options: Sequence[RankOptions], curves: Sequence[Curve]) -> tuple[RankOptions, Curve]:
    """What modules of one shape that have to share a rank choose from together, and what they lose together.

    A module that is offered less than others keeps the components that it is offered; its factors are filled up with
    zeros, which take the same bytes.

    Args:
        options: of each module.
        curves: losses of those options, in the same order.

    Returns:
        The ranks of the module that is offered most, with the bytes of all modules; and the sums of their losses.
    """
    longest = max(options, key=lambda one: len(one.ranks))
    nbytes = tuple(len(options) * size for size in longest.nbytes)
    losses = tuple(
        sum(curve.losses[min(index, len(curve.losses) - 1)] for curve in curves) for index in range(len(longest.ranks))
    )
    return RankOptions(longest.ranks, nbytes), Curve(nbytes, losses)


def least_budget(
    shapes: Iterable[ModuleShape],
    factor_bits: int,
    fixed_rank: Callable[[str], int | None] = lambda name: None,
    layout: FactorLayout = PACKED_LAYOUT,
) -> int:
    """Bytes of the smallest adapter that does anything: the fewest components in one module, none in the others.

    Args:
        shapes: the modules that share a budget.
        factor_bits: of the factors.
        fixed_rank: rank of a module, by its name, that does not choose; None for one that does.
        layout: of the factors.
    """
    options = [rank_options(shape, layout.step, factor_bits, fixed_rank(shape.name), layout) for shape in shapes]
    least = sum(one.nbytes[0] for one in options)
    if any(one.ranks[0] for one in options):
        return least
    return least + min((one.nbytes[1] - one.nbytes[0] for one in options if len(one.ranks) > 1), default=0)


def most_rank(
    shapes: Iterable[ModuleShape],
    budget: int,
    factor_bits: int,
    of_uniform: int = MOST_OF_UNIFORM,
    layout: FactorLayout = PACKED_LAYOUT,
) -> int:
    """The largest rank that a module may choose under ``budget`` bytes, a multiple of the layout's step: ``of_uniform``
    times the rank that all modules could have alike."""
    step = layout.step
    uniform = step * budget / max(sum(factor_bytes(step, shape, factor_bits, layout) for shape in shapes), 1)
    return max(step, step * round(of_uniform * uniform / step))


@dataclass(frozen=True)
class TokenCorrection:
    """Factors that make up for what the loss ½ tr(G ΔW C ΔWᵀ) leaves out.

    That formula takes a module's gradients g and inputs x to be independent. They are not where tokens of large
    gradients have unusual inputs. With E[‖g‖² x xᵀ] / E‖g‖² in place of C the formula weighs inputs by their tokens'
    gradients, and then agrees with ½ E[(gᵀ ΔW x)²] taken token by token. The ratio of the two is 0.4 for SmolLM2's
    `v_proj`, whose large gradients belong to the few tokens that all others attend to, and 1.0 to 1.3 for other kinds.
    The first components often correct just such tokens; so they have a factor of their own.

    Attributes:
        head: factor for what the first `RANK_STEP` components take off.
        tail: factor for all the rest of the loss.
    """

    head: float = 1.0
    tail: float = 1.0

    def __call__(self, gains: torch.Tensor, total: float) -> tuple[torch.Tensor, float]:
        """Correct the gains of components and the loss without any.

        Args:
            gains: of each component, in the order in which `eora` returns them.
            total: loss without any component.

        Returns:
            Both, corrected.
        """
        first = float(gains[:RANK_STEP].sum())
        corrected = torch.cat([gains[:RANK_STEP] * self.head, gains[RANK_STEP:] * self.tail])
        return corrected, self.head * first + self.tail * max(total - first, 0.0)

    def scaled(self, factor: float) -> TokenCorrection:
        """Both factors times ``factor``."""
        return TokenCorrection(self.head * factor, self.tail * factor)


def kind_of(name: str) -> str:
    """The kind of a module: the last part of its full name (`q_proj`)."""
    return name.rsplit(".", 1)[-1]
