"""Quantise, save, load; and errors measured on the loaded model rather than taken from the report."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from gptqmodel import BACKEND, GPTQModel
from gptqmodel.nn_modules.qlinear import BaseQuantLinear
from transformers import AutoModelForCausalLM

from gptqmodel_eora_ext import EoRA
from gptqmodel_eora_ext.adapter.factors import ModuleFactors
from gptqmodel_eora_ext.hosts.gptqmodel.checkpoint import adapters_off
from gptqmodel_eora_ext.hosts.gptqmodel.known_weights import dequantize
from gptqmodel_eora_ext.hosts.terminal import quiet

Batches = list[dict[str, list[int]]]


@dataclass
class Made:
    """A quantised checkpoint and what the run reported."""

    folder: Path
    factors: dict[str, ModuleFactors]
    host: Any


def quantize(base: Path, folder: Path, config: Any, calibration: Batches, **options: Any) -> Made:
    """Quantise with an adapter and save."""
    options.setdefault("adapter", EoRA(rank=16))
    dtype = options.pop("dtype", "auto")
    with quiet():
        host = GPTQModel.load(str(base), config, dtype=dtype)
        host.quantize(calibration, batch_size=options.pop("batch_size", 4), **options)
        host.save(str(folder))
    return Made(folder, host._eora_run.factors, host)


def load(folder: Path, **options: Any) -> Any:
    """Load by GPTQModel, with the torch kernel."""
    with quiet():
        return GPTQModel.load(str(folder), backend=options.pop("backend", BACKEND.GPTQ_TORCH), **options).model


def kernels(model: Any) -> dict[str, BaseQuantLinear]:
    return {name: module for name, module in model.named_modules() if isinstance(module, BaseQuantLinear)}


def measured_errors(base: Path, model: Any, batches: Batches) -> dict[str, float]:
    """E‖(W − Ŵ − BA) x‖² per module, x the inputs that the loaded model itself produces on ``batches``."""
    native = AutoModelForCausalLM.from_pretrained(base, dtype="auto")
    inputs: dict[str, list[torch.Tensor]] = {}
    handles = [
        kernel.register_forward_pre_hook(
            lambda module, args, name=name: inputs.setdefault(name, []).append(args[0].reshape(-1, args[0].shape[-1]))
        )
        for name, kernel in kernels(model).items()
    ]
    with torch.inference_mode():
        for batch in batches:
            model(input_ids=torch.tensor([batch["input_ids"]]), attention_mask=torch.tensor([batch["attention_mask"]]))
    for handle in handles:
        handle.remove()
    errors = {}
    for name, kernel in kernels(model).items():
        weight = dequantize(kernel).float()
        if kernel.adapter is not None and kernel.adapter.lora_A is not None:
            weight += (kernel.adapter.lora_A.float() @ kernel.adapter.lora_B.float()).T
        rows = torch.cat(inputs[name]).float()
        residual = native.get_submodule(name).weight.float() - weight
        errors[name] = (rows @ residual.detach().T).square().sum(1).mean().item()
    return errors


def distances(base: Path, model: Any, batches: Batches) -> tuple[float, float]:
    """How far a loaded model's logits are from the full-precision model's, with its adapter and without: ‖·‖ / ‖·‖."""
    ids = torch.tensor([batches[0]["input_ids"]])
    with torch.inference_mode():
        expected = AutoModelForCausalLM.from_pretrained(base, dtype="auto")(ids).logits.float()
        adapted = model(ids).logits.float()
        with adapters_off(model):
            alone = model(ids).logits.float()
    return tuple(float((one - expected).norm() / expected.norm()) for one in (adapted, alone))  # type: ignore[return-value]
