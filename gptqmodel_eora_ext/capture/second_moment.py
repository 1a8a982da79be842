"""The second moment of a module's inputs: raw sums of xᵀx and a token count, never a running rescale.

Raw sums make the result independent of batch size and, to float32 rounding, of batch order; a running rescale
(``S ← S·N/(N+b) + XᵀX/N``) weighs the first batches down.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence

import torch

# The lower triangle of x xᵀ is computed in so many block columns, each from the diagonal down: 9/16 of the products of
# the whole. On a CPU that takes half the time of the whole, with the same rounding. Products in bfloat16 were tried and
# are no faster (docs/method.md).
TRIANGLE_BLOCKS = 8


def kept_inputs(inputs: torch.Tensor, keep: torch.Tensor | None, features: int, name: str) -> torch.Tensor:
    """The rows of real tokens, tokens × features, in the dtype of ``inputs``.

    Args:
        inputs: (…, features), any floating dtype.
        keep: attention mask of the leading dimensions (non-zero = a real token); padding is left out.

    Raises:
        ValueError: when the width is not ``features`` or the mask does not fit.
    """
    if inputs.shape[-1] != features:
        raise ValueError(f"{name}: input has {inputs.shape[-1]} channels, expected {features}.")
    if keep is not None:
        if keep.shape != inputs.shape[:-1]:
            raise ValueError(f"{name}: attention mask {tuple(keep.shape)} does not fit input {tuple(inputs.shape)}.")
        inputs = inputs[keep.to(device=inputs.device, dtype=torch.bool)]
    return inputs.detach().reshape(-1, features)


def kept_rows(inputs: torch.Tensor, keep: torch.Tensor | None, features: int, name: str) -> torch.Tensor:
    """As `kept_inputs`, in float32."""
    return kept_inputs(inputs, keep, features, name).to(torch.float32)


def merged(
    sums: Mapping[torch.device, torch.Tensor], shape: tuple[int, ...], device: torch.device | str
) -> torch.Tensor:
    """The sums of all devices on ``device``, float32, a copy; zeros of ``shape`` when there are none."""
    if not sums:
        return torch.zeros(shape, device=device)
    # A fixed order of devices makes the result independent of which worker finished first.
    first, *others = sorted(sums, key=str)
    total = sums[first].to(device, copy=True)
    for source in others:
        total.add_(sums[source].to(device))
    return total


def block_columns(features: int) -> Iterator[slice]:
    """The block columns of a sum, each of which is summed from the diagonal down."""
    width = -(-features // TRIANGLE_BLOCKS)
    for start in range(0, features, width):
        yield slice(start, min(start + width, features))


def _add_lower_triangle(total: torch.Tensor, rows: torch.Tensor) -> None:
    """total += rowsᵀ rows, the diagonal and what is below it."""
    for columns in block_columns(len(total)):
        total[columns.start :, columns].addmm_(rows[:, columns.start :].T, rows[:, columns])


def _mirror_lower_triangle(total: torch.Tensor) -> torch.Tensor:
    """Copy what is below the diagonal above it, block column by block column: a fraction of a `tril` of the whole."""
    for columns in block_columns(len(total)):
        corner = total[columns, columns]
        corner.copy_(corner.tril() + corner.tril(-1).T)
        total[columns, columns.stop :] = total[columns.stop :, columns].T
    return total


class SecondMoment:
    """Sum of x xᵀ over tokens, kept per device and merged when read. Only lower triangles are summed.

    Args:
        in_features: width of the module's input.
        name: the module, for messages.
    """

    def __init__(self, in_features: int, name: str) -> None:
        self.in_features = in_features
        self.name = name
        self.tokens = 0
        self._sums: dict[torch.device, torch.Tensor] = {}

    def add(self, inputs: torch.Tensor, keep: torch.Tensor | None = None) -> None:
        """Add a batch.

        Args:
            inputs: (…, in_features), any floating dtype.
            keep: attention mask of the leading dimensions (non-zero = a real token); padding is left out.

        Raises:
            ValueError: when the width is not ``in_features`` or the mask does not fit.
        """
        rows = kept_rows(inputs, keep, self.in_features, self.name)
        if rows.shape[0] == 0:
            return
        total = self._sums.get(rows.device)
        if total is None:
            total = self._sums[rows.device] = rows.new_zeros(self.in_features, self.in_features)
        _add_lower_triangle(total, rows)
        self.tokens += rows.shape[0]

    def add_sum(self, total: torch.Tensor, tokens: int) -> None:
        """Add a finished sum of x xᵀ (in × in, float32); ``total`` is kept, not copied."""
        mine = self._sums.get(total.device)
        self._sums[total.device] = total if mine is None else mine.add_(total)
        self.tokens += tokens

    def rescaled(self, scales: torch.Tensor, name: str) -> SecondMoment:
        """The second moment of x / s, for a model that divides this input by ``scales`` (in_features)."""
        result = SecondMoment(self.in_features, name)
        for device, total in self._sums.items():
            inverse = 1 / scales.to(device=device, dtype=total.dtype)
            result._sums[device] = total * inverse[:, None] * inverse[None, :]
        result.tokens = self.tokens
        return result

    def mean(self, device: torch.device | str = "cpu") -> torch.Tensor:
        """Return C = Σ x xᵀ / tokens, in × in, float32, on ``device``; zeros when no token was seen."""
        total = merged(self._sums, (self.in_features, self.in_features), device).div_(max(self.tokens, 1))
        return _mirror_lower_triangle(total)

    def require_finite(self) -> None:
        """Raise ValueError when an input held NaN or infinity."""
        for total in self._sums.values():
            require_finite(total.diagonal(), self.name)


class DiagonalMoment:
    """Sum of x² per channel over tokens: the diagonal of a `SecondMoment`, where the whole would not fit.

    Args:
        in_features: width of x.
        name: the module, for messages.
    """

    def __init__(self, in_features: int, name: str) -> None:
        self.in_features = in_features
        self.name = name
        self.tokens = 0
        self._sums: dict[torch.device, torch.Tensor] = {}

    def add(self, inputs: torch.Tensor, keep: torch.Tensor | None = None) -> None:
        """Add a batch: see `SecondMoment.add`."""
        rows = kept_rows(inputs, keep, self.in_features, self.name)
        energies = rows.square().sum(0)
        mine = self._sums.get(rows.device)
        self._sums[rows.device] = energies if mine is None else mine.add_(energies)
        self.tokens += rows.shape[0]

    def mean(self, device: torch.device | str = "cpu") -> torch.Tensor:
        """Return E[x²] per channel, of length in_features, float32, on ``device``."""
        return merged(self._sums, (self.in_features,), device).div_(max(self.tokens, 1))

    def require_finite(self) -> None:
        """Raise ValueError when an input held NaN or infinity."""
        for total in self._sums.values():
            require_finite(total, self.name)


class CrossMoment:
    """Sum of x x̂ᵀ over tokens: x from the full-precision model, x̂ from the quantised one, kept per device.

    Args:
        in_features: width of both.
        name: the module, for messages.
    """

    def __init__(self, in_features: int, name: str) -> None:
        self.in_features = in_features
        self.name = name
        self.tokens = 0
        self._sums: dict[torch.device, torch.Tensor] = {}

    def add(self, original: torch.Tensor, inputs: torch.Tensor, keep: torch.Tensor | None = None) -> None:
        """Add a batch: x and x̂ of the same tokens, each as in `SecondMoment.add`.

        Raises:
            ValueError: when the two differ in shape.
        """
        if original.shape != inputs.shape:
            raise ValueError(
                f"{self.name}: the full-precision input {tuple(original.shape)} and the quantised model's "
                f"{tuple(inputs.shape)} differ; they must hold the same tokens."
            )
        rows = kept_rows(inputs, keep, self.in_features, self.name)
        product = kept_rows(original.to(inputs.device), keep, self.in_features, self.name).T @ rows
        total = self._sums.get(rows.device)
        self._sums[rows.device] = product if total is None else total.add_(product)
        self.tokens += rows.shape[0]

    def mean(self, device: torch.device | str = "cpu") -> torch.Tensor:
        """Return E[x x̂ᵀ], in × in, float32, on ``device``."""
        return merged(self._sums, (self.in_features, self.in_features), device).div_(max(self.tokens, 1))


def require_finite(energies: torch.Tensor, name: str) -> None:
    """Raise ValueError when a second moment's diagonal shows that an input held NaN or infinity.

    Every x² stands on the diagonal, so it is enough to look there.
    """
    if not torch.isfinite(energies).all():
        raise ValueError(
            f"{name}: calibration activations hold NaN or infinity. Check the model in this dtype (float16 overflows "
            f"where bfloat16 does not) and the calibration data."
        )


def shared_leaders(names: Sequence[str], groups: Iterable[Iterable[str]], widths: Mapping[str, int]) -> dict[str, str]:
    """Elect one module per group that reads the same input, so that q/k/v and gate/up share one matrix.

    Args:
        names: modules captured in this pass, in order.
        groups: sets of modules known to read the same tensor.
        widths: in_features of each name; members of another width are left alone.

    Returns:
        ``{follower: leader}``.
    """
    leaders: dict[str, str] = {}
    for group in groups:
        members = set(group)
        present = [name for name in names if name in members]
        for follower in present[1:]:
            if widths[follower] == widths[present[0]]:
                leaders[follower] = present[0]
    return leaders
