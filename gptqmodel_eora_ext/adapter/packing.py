"""Factors of a finished adapter rounded to 8 or 4 bits, without the data that they were made with."""

from __future__ import annotations

from pathlib import Path

import torch

from ..formats.factors import PACKED_BITS, QuantizedFactor
from ..solve import balance
from ..solve.quantized import quantize_factors
from .errors import AdapterError
from .factors import ModuleFactors
from .folder import AdapterFolder
from .save import require_another, save_adapter
from .settings import MODULES
from .validate import validate_choice

# A and Bᵀ.
Packed = tuple[QuantizedFactor, QuantizedFactor]


def export_packed(source: AdapterFolder, folder: Path, bits: int) -> dict[str, float]:
    """Write a copy of an adapter with factors of ``bits`` bits: after fine-tuning, say, which leaves 16 or 32.

    The product B A of each module is what is kept: it is taken apart anew into components that are orthogonal to each
    other, since rounding errors are least there, and B is solved against the rounded A. All inputs count alike. What an
    adapter is rounded to while it is made (`factor_bits=4`) or refined is better, since there the inputs are known.

    In memory are one module's factors and its B A, out × in in float32.

    Args:
        source: an adapter of 16- or 32-bit factors.
        folder: where to; an older one in its place stays whole until the copy is complete.
        bits: 8 or 4.

    Returns:
        Module → ‖B A − rounded B A‖ / ‖B A‖; 0 for a module without effect.

    Raises:
        AdapterError: when ``source`` is broken or packed already, or ``folder`` is ``source`` itself.
        ValueError: for other bits.

    Example:
        >>> export_packed(AdapterFolder.open("out/finetuned"), Path("out/finetuned-4bit"), bits=4)
    """
    validate_choice(bits, PACKED_BITS, what="factor_bits")
    require_another(source, folder)
    if source.is_packed:
        raise AdapterError(
            f"Adapter: `{source.path}` has factors in {source.factor_bits} bits already. To change their bits, begin "
            f"with an adapter in 16 bits."
        )
    factors, errors = {}, {}
    for name, read in source.factors(list(source.keys)):
        lora_A, lora_B = (one.to(torch.float32) for one in (read.lora_A, read.lora_B))
        packed, errors[name] = _packed(lora_A, lora_B, bits)
        factors[name] = ModuleFactors.of_unknown_error(*packed)
    details = {key: value for key, value in (source.details or {}).items() if key != MODULES}
    save_adapter(folder, factors, base_model=source.settings.base_model or "", module_names=list(factors),
                 details={**details, "factor_bits": bits})  # fmt: skip
    return errors


def _packed(lora_A: torch.Tensor, lora_B: torch.Tensor, bits: int) -> tuple[Packed, float]:
    product = lora_B @ lora_A
    size = float(product.norm())
    packed = quantize_factors(product, None, _orthogonal(lora_A, lora_B), bits)
    left = float((product - packed[1].dequantize().T @ packed[0].dequantize()).norm())
    return packed, left / size if size else 0.0


def _orthogonal(lora_A: torch.Tensor, lora_B: torch.Tensor) -> torch.Tensor:
    """A of the same B A in its singular components, balanced, by two thin QRs: nothing of out × in is decomposed."""
    left, right = torch.linalg.qr(lora_B), torch.linalg.qr(lora_A.T)
    found = torch.linalg.svd(left.R @ right.R.T)
    return balance(found.S[:, None] * (right.Q @ found.Vh.T).T, left.Q @ found.U)[0]
