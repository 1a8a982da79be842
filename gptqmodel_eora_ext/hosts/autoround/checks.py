"""What compensation in AutoRound's loop cannot be combined with is refused before any work."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch

from ...loop.run import require_token_ids

# Exports of packed integer weights, with the names of AutoRound's `--format`; "fake" keeps Ŵ in 16 bits.
FORMATS = ("auto_round", "auto_round:auto_gptq", "auto_round:gptqmodel", "auto_round:auto_awq", "auto_gptq",
           "gptqmodel", "auto_awq", "fake")  # fmt: skip
WORKS = f"Use integer weights with 16-bit activations (W2A16, W3A16, W4A16, W8A16) and one of {', '.join(FORMATS)}."


def check_composition(orchestrator: Any) -> None:
    """Refuse algorithms and schemes that leave no Ŵ beside which an adapter could run.

    Raises:
        NotImplementedError: naming what was found and what would work.
    """
    from auto_round.algorithms.transforms.base import BaseRotationConfig
    from auto_round.algorithms.transforms.svdquant.config import SVDQuantConfig

    for config in orchestrator._alg_configs:
        if isinstance(config, SVDQuantConfig):
            raise NotImplementedError(
                "EoRA: does not compose with SVDQuant, which adds low-rank factors of its own. Choose one of them."
            )
        if isinstance(config, BaseRotationConfig):
            raise NotImplementedError(
                f"EoRA: does not compose with the rotation `{config.algorithm}`: an adapter sees the inputs before "
                f"they are rotated. Use sign-SGD, RTN, `enable_alg_ext` or AWQ."
            )
    if orchestrator.diffusion:
        raise NotImplementedError("EoRA: diffusion models have no adapter format here; compensate language models.")
    _check_scheme("the scheme", orchestrator.scheme_context)
    for name, layer in (orchestrator.layer_config or {}).items():
        _check_scheme(name, layer)


def _check_scheme(where: str, scheme: Any) -> None:
    bits, data_type = (_field(scheme, name) for name in ("bits", "data_type"))
    act_bits, super_bits = (_field(scheme, name) for name in ("act_bits", "super_bits"))
    if bits is not None and bits > 8:
        return
    if act_bits is not None and act_bits <= 8:
        raise NotImplementedError(
            f"EoRA: {where} quantises activations to {act_bits} bits ({_field(scheme, 'act_data_type') or data_type}), "
            f"whose error an adapter on 16-bit inputs does not see. {WORKS}"
        )
    if super_bits is not None or (data_type is not None and not str(data_type).startswith("int")):
        raise NotImplementedError(f"EoRA: {where} stores weights as `{data_type}`, not as packed integers. {WORKS}")


def _field(scheme: Any, name: str) -> Any:
    return scheme.get(name) if isinstance(scheme, dict) else getattr(scheme, name, None)


def check_dataset(orchestrator: Any) -> None:
    """Refuse token ids that the model does not embed, and data of which AutoRound keeps nothing.

    Only samples of token ids are checked; AutoRound reads texts and data sets itself. A generator can be read only
    once, so it becomes a list here, which AutoRound then gets.

    Raises:
        ValueError: naming what was found.
    """
    state = orchestrator.calibration_context
    if isinstance(state.dataset, Iterator):
        state.dataset = orchestrator.dataset = list(state.dataset)
    if not isinstance(state.dataset, (list, tuple)):
        return
    rows = [row["input_ids"] if isinstance(row, Mapping) else row for row in state.dataset]
    ids = [row for row in rows if isinstance(row, torch.Tensor)]
    if not rows or (len(ids) == len(rows) and all(row.shape[-1] < state.seqlen for row in ids)):
        raise ValueError(
            f"EoRA: none of the {len(rows)} calibration samples has seqlen={state.seqlen} tokens; AutoRound leaves "
            f"shorter ones out. Pass longer samples, or a smaller seqlen."
        )
    vocabulary = orchestrator.model_context.model.get_input_embeddings().weight.shape[0]
    for row in ids:
        if row.numel():
            require_token_ids(row, vocabulary)


def check_formats(formats: Iterable[Any]) -> None:
    """Refuse an export that no adapter can stand beside.

    Raises:
        NotImplementedError: naming the format and those that work.
    """
    for one in formats:
        name = one.get_backend_name()
        if name not in FORMATS:
            raise NotImplementedError(f"EoRA: no adapter can stand beside the export format `{name}`. {WORKS}")
