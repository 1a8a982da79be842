"""The factor of the inverse Hessian, which GPTQ spreads its errors by, with bits that threads do not change."""

from __future__ import annotations

import torch
from gptqmodel.quantization.gptq import GPTQ

from ...solve import NotDefinite, invert_upper, one_thread, upper_root


def invert_by_products(task: GPTQ) -> None:
    """Have a module's task invert its Hessian by products of matrices, on a CPU.

    The host's three LAPACK routines give other last bits with another number of threads. The factor is the same to
    rounding, in less time. Where the damped Hessian is not positive definite, the host's own search for a damping runs,
    on one thread.

    Args:
        task: its `hessian_inverse` is replaced.
    """
    original = task.hessian_inverse

    def hessian_inverse(hessian: torch.Tensor) -> tuple[torch.Tensor | None, float]:
        if hessian.device.type != "cpu":
            return original(hessian)  # type: ignore[no-any-return]
        damping = float(task.qcfg.damp_percent)
        diagonal = hessian.diagonal()
        kept = diagonal.clone()
        diagonal.add_(damping * kept.mean())
        try:
            return invert_upper(upper_root(hessian)), damping
        except NotDefinite:
            pass
        finally:
            diagonal.copy_(kept)
        with one_thread():
            return original(hessian)  # type: ignore[no-any-return]

    task.hessian_inverse = hessian_inverse
