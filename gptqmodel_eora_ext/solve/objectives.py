"""What a low-rank correction of a weight error minimises, one function an objective.

    svd        ‖ΔW − B A‖                      every input direction counts alike
    diagonal   ‖(ΔW − B A) diag(C)^½‖          inputs count by their size, channel by channel
    eora       ‖(ΔW − B A) C^½‖                inputs count as they occur; the mean squared error of the output
    output     ‖X Wᵀ − X̂ (Ŵ + B A)ᵀ‖          the output of the full-precision model, errors of earlier layers included

C = E[x xᵀ] is the second moment of the module's inputs. All return A (rank × in) and B (out × rank), as PEFT stores
them, components in order of decreasing weighted energy: float32, or float64 where the input or `exact` asks for it.

None takes an inverse of C. With U the top-r eigenvectors of ΔW C ΔWᵀ the optimum is B = U, A = Uᵀ ΔW, since
U Uᵀ ΔW C^½ is the best rank-r approximation of ΔW C^½ (Eckart-Young). A C of low rank (fewer tokens than channels, dead
channels, an expert that saw few tokens) is therefore harmless.
"""

from __future__ import annotations

import math
from typing import TypedDict, Unpack

import torch

from .error import OutputError, WeightedError, square_root
from .factors import refit_B
from .moments import Moment, RowMoment, times
from .subspace import dominant_subspace

# The iteration stops when the weighted error is predicted to be within this share of the least. The prediction
# is on the safe side where gains fall faster and faster, as they do, so that 1.001 holds (benchmarks/solver.py).
TOLERANCE = 7e-4
# Share of the difference between the two models' inputs that `output` makes up for. 1 follows the full-precision
# output entirely and overfits the calibration data; QEP and SAES-SVD damp the cross term for the same reason.
OUTPUT_DAMPING = 0.25
# Added to the diagonal of the second moment before it is solved with, as a share of its mean: GPTQ's own damping.
OUTPUT_RIDGE = 0.01

Factors = tuple[torch.Tensor, torch.Tensor]


class SolverOptions(TypedDict, total=False):
    """What every objective takes by keyword.

    Attributes:
        seed: of the starting block; a seed gives the same factors again on the same device.
        exact: by an SVD in float64 instead of iteration: the oracle, slow.
        tolerance: share by which the weighted error may exceed the least.
    """

    seed: int
    exact: bool
    tolerance: float


def svd(delta: torch.Tensor, rank: int, **options: Unpack[SolverOptions]) -> Factors:
    """Minimise ‖ΔW − B A‖: a truncated SVD, as in ZeroQuant-V2 (arXiv 2303.08302) and LoftQ (arXiv 2310.08659).

    Args:
        delta: ΔW = W − Ŵ, out × in.
        rank: components, at least 1; above min(out, in) it is cut to that.

    Raises:
        ValueError: for a rank below 1, wrong shapes or non-finite input.
    """
    return _solve("svd", delta, None, rank, **options)


def diagonal(delta: torch.Tensor, second_moment: torch.Tensor, rank: int, **options: Unpack[SolverOptions]) -> Factors:
    """Minimise ‖(ΔW − B A) diag(C)^½‖, as in LQER (arXiv 2402.02446) and QERA-approx (arXiv 2410.06040).

    Args:
        delta: ΔW, out × in.
        second_moment: C, in × in, or its diagonal E[x²], of length in.
        rank: as in `svd`.

    Raises:
        ValueError: as `svd`.
    """
    energies = second_moment.diagonal() if second_moment.ndim == 2 else second_moment
    return _solve("diagonal", delta, energies, rank, **options)


def eora(
    delta: torch.Tensor,
    second_moment: Moment,
    rank: int,
    *,
    output_moment: torch.Tensor | None = None,
    **options: Unpack[SolverOptions],
) -> Factors:
    """Minimise ‖G^½ (ΔW − B A) C^½‖: EoRA (arXiv 2410.21271), the same optimum as QERA-exact (arXiv 2410.06040).

    Args:
        delta: ΔW, out × in.
        second_moment: C = E[x xᵀ], in × in, symmetric, indefinite by rounding is accepted; or the rows that it is of.
        rank: as in `svd`.
        output_moment: G, out × out: the second moment of the loss's gradient at the module's output, which weighs
            output directions by what an error there costs. None weighs them alike.

    Raises:
        ValueError: as `svd`.
    """
    if output_moment is None:
        return _solve("eora", delta, second_moment, rank, **options)
    if output_moment.shape != (delta.shape[0], delta.shape[0]):
        raise ValueError(
            f"eora: `output_moment` must be out_features × out_features for `delta` out_features × in_features, "
            f"got output_moment {tuple(output_moment.shape)} and delta {tuple(delta.shape)}."
        )
    _require_finite("eora", output_moment=output_moment)
    weighted = square_root(output_moment).T @ delta.to(torch.float64)
    lora_A, _ = _solve("eora", weighted, second_moment, rank, **options)
    # For a given A the best B does not depend on G, so no inverse of G is needed to find it.
    return lora_A, refit_B(delta.to(torch.float64), second_moment, lora_A)


def eora_from_outputs(
    delta: torch.Tensor, error_moment: torch.Tensor, rank: int, **options: Unpack[SolverOptions]
) -> Factors:
    """The factors of `eora`, from the second moment of the output error instead of the inputs'.

    Args:
        delta: ΔW, out × in.
        error_moment: S = E[(ΔW x)(ΔW x)ᵀ] = ΔW C ΔWᵀ, out × out.
        rank: as in `svd`.

    Raises:
        ValueError: as `svd`.
    """
    if error_moment.shape != (delta.shape[0], delta.shape[0]):
        raise ValueError(
            f"eora: `error_moment` must be out_features × out_features for `delta` out_features × in_features, "
            f"got error_moment {tuple(error_moment.shape)} and delta {tuple(delta.shape)}."
        )
    _check("eora", delta, None, rank)
    _require_finite("eora", delta=delta, error_moment=error_moment)
    return _project(OutputError(error_moment), delta, rank, **options)


def output(
    weight: torch.Tensor,
    quantized: torch.Tensor,
    second_moment: torch.Tensor,
    cross_moment: torch.Tensor,
    rank: int,
    *,
    damping: float = OUTPUT_DAMPING,
    **options: Unpack[SolverOptions],
) -> Factors:
    """Minimise ‖X Wᵀ − X̂ (Ŵ + B A)ᵀ‖: reduced-rank regression of the full-precision output on the inputs X̂ that the
    quantised model really sees. The solution is `eora` of `output_target`.

    Args:
        weight: W, out × in.
        quantized: Ŵ, out × in.
        second_moment: Ĉ = E[x̂ x̂ᵀ], in × in.
        cross_moment: Ĉx = E[x x̂ᵀ], x the full-precision model's input and x̂ the quantised one's, of the same token.
        rank: as in `svd`.
        damping: 0 is `eora`; 1 corrects the whole difference of the inputs.

    Raises:
        ValueError: as `svd`.
    """
    target = output_target(weight, quantized, second_moment, cross_moment, damping=damping)
    return eora(target, second_moment, rank, **options)


def output_target(
    weight: torch.Tensor,
    quantized: torch.Tensor,
    second_moment: torch.Tensor,
    cross_moment: torch.Tensor,
    *,
    damping: float = OUTPUT_DAMPING,
) -> torch.Tensor:
    """What B A of `output` approximates under Ĉ: ΔW + damping · W (Ĉx − Ĉ) Ĉ⁻¹, out × in, float64."""
    delta = weight.to(torch.float64) - quantized.to(torch.float64)
    _check("output", delta, second_moment, 1)
    if cross_moment.shape != second_moment.shape:
        raise ValueError(
            f"output: `cross_moment` must have the shape of `second_moment`, got cross_moment "
            f"{tuple(cross_moment.shape)} and second_moment {tuple(second_moment.shape)}."
        )
    _require_finite("output", delta=delta, second_moment=second_moment, cross_moment=cross_moment)
    moment = second_moment.to(torch.float64)
    ridge = OUTPUT_RIDGE * moment.diagonal().mean()
    if damping == 0 or ridge <= 0:
        return delta
    drift = weight.to(torch.float64) @ (cross_moment.to(torch.float64) - moment)
    ridged = moment + ridge * torch.eye(moment.shape[0], dtype=moment.dtype, device=moment.device)
    return delta + damping * torch.linalg.solve(ridged, drift, left=False)


def _solve(
    objective: str,
    delta: torch.Tensor,
    second_moment: Moment | None,
    rank: int,
    **options: Unpack[SolverOptions],
) -> Factors:
    _check(objective, delta, second_moment, rank)
    if delta.dtype != torch.float64:
        delta = delta.to(torch.float32)
    error = WeightedError(delta, second_moment)
    # `unit` is made from the largest entries of ΔW and C, so it is NaN or infinite wherever one of them is, and no
    # other pass over the large matrices is needed. It can also be infinite when all entries are finite but very large;
    # the full check then finds nothing to refuse.
    if not math.isfinite(error.unit):
        known = second_moment.rows if isinstance(second_moment, RowMoment) else second_moment
        _require_finite(objective, delta=delta, second_moment=known)
    return _project(error, delta, rank, **options)


def _project(
    error: WeightedError | OutputError,
    delta: torch.Tensor,
    rank: int,
    *,
    seed: int = 0,
    exact: bool = False,
    tolerance: float = TOLERANCE,
) -> Factors:
    moment = error.second_moment if isinstance(error, WeightedError) else None
    # Of few rows there are no more components than rows.
    rows = [len(moment.rows)] if isinstance(moment, RowMoment) else []
    rank = min(rank, *delta.shape, *rows)
    vectors, projected = dominant_subspace(error, rank, tolerance=tolerance, seed=seed, exact=exact)
    if isinstance(error, OutputError):
        projected = times(vectors, delta)
    return projected, vectors.T


def _check(objective: str, delta: torch.Tensor, second_moment: Moment | None, rank: int) -> None:
    if delta.ndim != 2 or 0 in delta.shape:
        raise ValueError(f"{objective}: `delta` must be out_features × in_features, got {tuple(delta.shape)}.")
    width = delta.shape[1]
    if second_moment is not None and second_moment.shape not in ((width, width), (width,)):
        raise ValueError(
            f"{objective}: `second_moment` must be in_features × in_features for `delta` out_features × in_features, "
            f"got second_moment {tuple(second_moment.shape)} and delta {tuple(delta.shape)}."
        )
    if rank < 1:
        raise ValueError(f"{objective}: `rank` must be at least 1, got {rank}.")


def _require_finite(objective: str, **tensors: torch.Tensor | None) -> None:
    for name, tensor in tensors.items():
        # The smallest and largest entry are found in one pass that allocates nothing, and are NaN where any entry is.
        if tensor is not None and not all(map(torch.isfinite, torch.aminmax(tensor))):
            broken = int((~torch.isfinite(tensor)).sum())
            raise ValueError(f"{objective}: `{name}` holds NaN or infinity in {broken} of {tensor.numel()} entries.")
