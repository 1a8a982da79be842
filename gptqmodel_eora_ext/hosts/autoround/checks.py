"""What compensation in AutoRound's loop cannot be combined with is refused before any work."""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from auto_round.utils import get_block_names
from auto_round.utils.disk_stream_util import materialize_module

from ...calibration.token_ids import require_token_ids

log = logging.getLogger(__name__)

# Exports of packed integer weights, with the names of AutoRound's `--format`; "fake" keeps Ŵ in 16 bits.
FORMATS = ("auto_round", "auto_round:auto_gptq", "auto_round:gptqmodel", "auto_round:auto_awq", "auto_gptq",
           "gptqmodel", "auto_awq", "fake")  # fmt: skip
WORKS = f"Use integer weights with 16-bit activations (W2A16, W3A16, W4A16, W8A16) and one of {', '.join(FORMATS)}."
# Mixtures of experts whose checkpoints GPTQModel cannot open, by model type, and why. Transformers opens them in
# AutoRound's own format, whose loader takes the experts apart as AutoRound did. Measured at 8 bits on small random
# models: logits of GPT-OSS that AutoRound packed and GPTQModel opened differ from full precision by 1.26 of their norm.
OPENED_BY_TRANSFORMERS = {
    "gpt_oss": "AutoRound takes every second row of a joined matrix for `gate_proj`, GPTQModel its first half",
}
# What is told of tuning in several processes.
TUNING = (
    "AutoRound's tuning, each step of which begins where the one before has ended,",
    "Start it without torchrun; an adapter for its finished checkpoint is made in several by `eora generate`",
)
# What the names of AutoRound's own formats begin with.
OWN_FORMAT = "auto_round"


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


def check_experts(orchestrator: Any) -> None:
    """Refuse mixtures of experts that AutoRound cannot read from their files, or of which no export can be opened.

    Reads one block where AutoRound keeps the weights on disk; it would stop there itself, after calibration.

    Raises:
        NotImplementedError: naming the model type.
    """
    model = orchestrator.model_context.model
    model_type = _model_type(model)
    index = getattr(model, "_disk_stream_index", None)
    if index is None:
        return
    groups = orchestrator.quant_block_list or get_block_names(model)
    # The first blocks of some models have no experts.
    name = groups[-1][-1]
    block = copy.deepcopy(model.get_submodule(name))
    materialize_module(block, name, index, "cpu")
    absent = [known for known, one in block.named_parameters() if one.is_meta]
    if absent:
        raise NotImplementedError(
            f"EoRA: AutoRound does not find {name}.{absent[0]} and {len(absent) - 1} other tensors of a model of type "
            f"{model_type} in its files, and would stop. Pass it the model in memory "
            f"(AutoModelForCausalLM.from_pretrained), or set AR_DISABLE_META_LOAD=1."
        )


def _model_type(model: Any) -> str:
    return str(getattr(getattr(model, "config", None), "model_type", "unknown"))


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


def check_formats(formats: Iterable[Any], model: Any) -> None:
    """Refuse an export that no adapter can stand beside, or that nothing would open.

    Args:
        formats: AutoRound's objects.
        model: what is quantised.

    Raises:
        NotImplementedError: naming the format and those that work.
    """
    model_type = _model_type(model)
    for one in formats:
        name = one.get_backend_name()
        if name not in FORMATS:
            raise NotImplementedError(f"EoRA: no adapter can stand beside the export format `{name}`. {WORKS}")
        if model_type not in OPENED_BY_TRANSFORMERS:
            continue
        reason = OPENED_BY_TRANSFORMERS[model_type]
        if not name.startswith(OWN_FORMAT):
            raise NotImplementedError(
                f"EoRA: nothing opens an export of a model of type {model_type} in the format `{name}`: {reason}. Use "
                f"the format `{OWN_FORMAT}`, which transformers opens, or quantise with GPTQModel (`eora quantize`)."
            )
        log.warning(
            "EoRA: a checkpoint of AutoRound of a model of type %s opens in transformers, with the adapter by "
            "gptqmodel_eora_ext.load_peft, and not in GPTQModel: %s. For GPTQModel quantise with it (`eora quantize`).",
            model_type, reason,
        )  # fmt: skip
