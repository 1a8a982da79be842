"""Weights are looked through before a loop of hours: one NaN would end it, or make every layer after it worthless."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import torch
from safetensors import safe_open

# So many values are looked at together, for which the result of `isfinite` takes 16 MB.
VALUES_AT_ONCE = 1 << 24


def check_weights(named: Iterable[tuple[str, torch.Tensor]]) -> None:
    """Refuse weights that hold NaN or infinity.

    Args:
        named: pairs of full name and tensor; those on the meta device and those of integers are passed over.

    Raises:
        ValueError: naming the first that holds NaN or infinity, and where.
    """
    for name, weight in named:
        if weight.is_meta or not weight.is_floating_point():
            continue
        flat = weight.detach().reshape(-1)
        for start in range(0, flat.numel(), VALUES_AT_ONCE):
            some = flat[start : start + VALUES_AT_ONCE]
            # `isfinite` does not know the 8-bit floating types.
            finite = torch.isfinite(some.to(torch.float32) if some.element_size() == 1 else some)
            if bool(finite.all()):
                continue
            first = start + int((~finite).nonzero()[0])
            index = [int(one) for one in torch.unravel_index(torch.tensor(first), weight.shape)]
            raise ValueError(
                f"EoRA: {name} holds {float(flat[first])} at {index}. The model's files are damaged, or it was saved "
                f"after a training that diverged; get them again, or mend that weight."
            )


def check_weight_files(folder: Path) -> None:
    """As `check_weights`, for all weights in a folder's safetensors files; one tensor is in memory at a time.

    Other files (pickles) are not opened.

    Raises:
        ValueError: as `check_weights`.
    """
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            # Masks and other buffers may hold infinities on purpose.
            check_weights((key, file.get_tensor(key)) for key in file.keys() if key.endswith(".weight"))  # noqa: SIM118
