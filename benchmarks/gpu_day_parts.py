"""The parts of `gpu_day.py`, each called in a process of its own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import common
import torch
from gptqmodel import BACKEND, GPTQModel, QuantizeConfig
from gptqmodel.nn_modules.qlinear import BaseQuantLinear
from gpu_day import REFERENCE, Part
from transformers import AutoModelForCausalLM, AutoTokenizer

from gptqmodel_eora_ext import EoRA, EoRAConfig
from gptqmodel_eora_ext.autoload import autoload
from gptqmodel_eora_ext.evaluate.demo import demo_text
from gptqmodel_eora_ext.hosts.gptqmodel.checkpoint import adapters_off
from gptqmodel_eora_ext.hosts.gptqmodel.known_weights import dequantize
from gptqmodel_eora_ext.hosts.terminal import quiet

BITS, GROUP_SIZE, LAYERS = 2, 64, 4
RANK, BUDGET, FACTOR_BITS = 32, "0.5bpw", 4
NEW_TOKENS = 16
# Kernels in bfloat16 beside a dense model in float32: 0.004 to 0.005 on a CPU. Without adapters: above 0.06.
LOGITS_TOLERANCE = 0.02
SEED = 0

# What the entry point does where the package is installed; here it may only lie on the path.
autoload()
# GPTQModel's torch kernel compiles its unpacking anew for every shape, for minutes in all.
torch.compiler.set_stance("force_eager")


# What the parts share -----------------------------------------------------------------------------------------


def base_model(part: Part) -> Path:
    """SmolLM2's first layers, in the run's folder; made by the first process that asks."""
    folder = part.work / "base"
    if folder.is_dir():
        return folder
    layers = 2 if part.setting.tiny else LAYERS
    if part.setting.model:
        model = AutoModelForCausalLM.from_pretrained(part.setting.model, dtype="auto")
        model.model.layers = model.model.layers[:layers]
        model.config.num_hidden_layers = layers
        model.config.layer_types = None
        model.save_pretrained(folder)
        AutoTokenizer.from_pretrained(part.setting.model).save_pretrained(folder)
        return folder
    return common.first_layers(folder, layers)


def windows(part: Part, base: Path) -> list[dict[str, list[int]]]:
    """Real text that comes with the package."""
    samples, seqlen = (8, 64) if part.setting.tiny else (64, 256)
    ids = AutoTokenizer.from_pretrained(base)(demo_text("calibration").read_text(encoding="utf-8")).input_ids
    samples = min(samples, len(ids) // seqlen)
    return [{"input_ids": ids[i * seqlen : (i + 1) * seqlen], "attention_mask": [1] * seqlen} for i in range(samples)]


def adapters(path: Path | None = None) -> dict[str, EoRA]:
    """A rank for all, and a budget with packed factors."""
    paths = {name: str(path / name) if path is not None else None for name in ("rank", "budget")}
    return {
        "rank": EoRA(rank=RANK, path=paths["rank"]),
        "budget": EoRA(budget=BUDGET, factor_bits=FACTOR_BITS, path=paths["budget"]),
    }


def load(part: Part, folder: Path, *, backend: Any = None, adapter: Any = None) -> Any:
    """By GPTQModel; with our kernels unless another is named, whose choice would compile others first."""
    chosen = backend or (BACKEND.GPTQ_TRITON if part.setting.device == "cuda" else BACKEND.AUTO)
    with quiet():
        return GPTQModel.load(str(folder), backend=chosen, adapter=adapter, device=part.setting.device).model


def kernels(model: Any) -> dict[str, Any]:
    return {name: module for name, module in model.named_modules() if isinstance(module, BaseQuantLinear)}


def logits(model: Any, ids: list[int]) -> torch.Tensor:
    device = model.get_input_embeddings().weight.device
    with torch.inference_mode():
        return model(input_ids=torch.tensor([ids], device=device)).logits[0].float().cpu()


def text_of(model: Any, ids: list[int]) -> list[int]:
    """Greedy continuation."""
    asked = torch.tensor([ids], device=model.get_input_embeddings().weight.device)
    with torch.inference_mode():
        found = model.generate(
            input_ids=asked, attention_mask=torch.ones_like(asked), do_sample=False,
            max_new_tokens=NEW_TOKENS, min_new_tokens=NEW_TOKENS,
        )  # fmt: skip
    return [int(one) for one in found[0, len(ids) :]]


def densified(base: Path, quantized: Any) -> Any:
    """The full-precision model in float32 with each weight set to Ŵ + BA."""
    dense = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    for name, kernel in kernels(quantized).items():
        weight = dequantize(kernel).float()
        if kernel.adapter is not None and kernel.adapter.lora_A is not None:
            weight = weight + (kernel.adapter.lora_A.float() @ kernel.adapter.lora_B.float()).T
        dense.get_submodule(name).weight.data = weight.cpu()
    return dense


def check_loaded(part: Part, title: str, base: Path, folder: Path, ids: list[int], adapter: Any = None) -> None:
    """Logits of a checkpoint with its adapter: by our kernels, by the torch kernel, by the dense weights; and text."""
    with part.timed(f"{title}: load"):
        model = load(part, folder, adapter=adapter)
    names = sorted({type(one).__name__ for one in kernels(model).values()})
    part.figure(f"{title}: kernels", names)
    if part.setting.device == "cuda":
        part.check(f"{title}: our kernel was chosen", names == ["EoRATritonLinear"], names)
    with part.timed(f"{title}: first logits"):
        found = logits(model, ids)
    with part.timed(f"{title}: text"):
        told = text_of(model, ids[:32])
    torch_model = load(part, folder, backend=BACKEND.GPTQ_TORCH, adapter=adapter)
    by_torch, told_by_torch = logits(torch_model, ids), text_of(torch_model, ids[:32])
    with adapters_off(torch_model):
        without = relative(logits(torch_model, ids), by_torch)
    expected = logits(densified(base, torch_model), ids)
    part.check(f"{title}: logits are finite", bool(torch.isfinite(found).all()))
    for name, one in (("our kernel", found), ("torch kernel", by_torch)):
        gap = relative(one, expected)
        part.check(f"{title}: {name} computes Ŵ + BA", gap < LOGITS_TOLERANCE < without, [gap, without])
    same = sum(a == b for a, b in zip(told, told_by_torch, strict=True))
    part.check(f"{title}: {NEW_TOKENS} tokens of text", len(told) == NEW_TOKENS, f"{same} as by the torch kernel")


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


def check_errors(part: Part, title: str, folder: Path) -> None:
    """Every module that has components leaves less than it found."""
    details = json.loads((folder / "eora.json").read_text(encoding="utf-8"))
    modules = details["modules"]
    shares = [one["error_after"] / one["error_before"] for one in modules.values() if one["rank"]]
    part.check(f"{title}: errors fall", bool(shares) and max(shares) < 1, [min(shares), max(shares)])
    part.figure(f"{title}: seconds told by the run", details["seconds"])
    if "allocation" in details:
        spent, budget = details["allocation"]["spent"], details["allocation"]["budget"]
        part.check(f"{title}: the budget is kept", 0.8 * budget < spent <= budget, [spent, budget])


# The parts ----------------------------------------------------------------------------------------------------


def quantise(part: Part) -> None:
    """GPTQModel's loop, on SmolLM2's first layers."""
    base = base_model(part)
    if part.setting.device == "cuda":
        part.attempt("host's extensions", compile_extensions)
    for name, adapter in adapters().items():
        part.attempt(name, quantise_with, name, adapter, base, "quantise" if name == "rank" else f"quantise-{name}")


def compile_extensions(part: Part) -> None:
    """What GPTQModel compiles on first use, timed apart from what uses it."""
    from gptqmodel.quantization.gptq_cuda import block_update_available
    from gptqmodel.utils.cpp import load_pack_block_extension

    with part.timed("host compiles: GPTQ on CUDA"):
        part.figure("host's GPTQ on CUDA", block_update_available())
    with part.timed("host compiles: packing"):
        part.figure("host's packing", load_pack_block_extension() is not None)


def quantise_with(part: Part, title: str, adapter: EoRA, base: Path, place: str) -> None:
    data = windows(part, base)
    with quiet():
        model = GPTQModel.load(str(base), QuantizeConfig(bits=BITS, group_size=GROUP_SIZE))
    with part.timed(f"{title}: quantise"), quiet():
        # Packing is the same whichever kernel does it; by default the host compiles kernels to choose one.
        model.quantize(data, batch_size=common.BATCH_SIZE, adapter=adapter, backend=BACKEND.GPTQ_TORCH)
    with part.timed(f"{title}: save"), quiet():
        model.save(str(part.work / place))
    check_errors(part, title, part.work / place / "eora")
    check_loaded(part, title, base, part.work / place, data[-1]["input_ids"])


def afterwards(part: Part) -> None:
    """An adapter for the checkpoint that `quantise` left, and that checkpoint's own set aside."""
    base = base_model(part)
    for name, adapter in adapters(part.work / "afterwards").items():
        part.attempt(name, generate_with, name, adapter, base)
    # Where the comparison with the CPU looks for it.
    made = part.work / "afterwards" / "rank"
    if made.is_dir():
        made.rename(part.work / "afterwards" / "eora")


def generate_with(part: Part, title: str, adapter: EoRA, base: Path, checked: bool = True) -> None:
    data, checkpoint = windows(part, base), part.work / "quantise"
    with part.timed(f"{title}: generate"), quiet():
        GPTQModel.adapter.generate(
            adapter=adapter, model_id_or_path=str(base), quantized_model_id_or_path=str(checkpoint),
            calibration_dataset=data, batch_size=common.BATCH_SIZE,
        )  # fmt: skip
    if checked:
        check_errors(part, title, Path(str(adapter.path)))
        check_loaded(part, title, base, checkpoint, data[-1]["input_ids"], EoRA(path=adapter.path))


def reference(part: Part) -> None:
    """Both of the above with a rank, on the CPU: what the GPU's are compared with."""
    base = base_model(part)
    part.attempt("afterwards", generate_with, "afterwards", EoRA(rank=RANK, path=part.work / f"{REFERENCE}-afterwards" /
                                                                 "eora"), base, False)  # fmt: skip
    data = windows(part, base)
    with quiet():
        model = GPTQModel.load(str(base), QuantizeConfig(bits=BITS, group_size=GROUP_SIZE))
        model.quantize(data, batch_size=common.BATCH_SIZE, adapter=EoRA(rank=RANK), backend=BACKEND.GPTQ_TORCH)
        model.save(str(part.work / f"{REFERENCE}-quantise"))


def autoround(part: Part) -> None:
    """AutoRound's loop."""
    base = base_model(part)
    for name, config, formats in (
        ("rank", EoRAConfig(rank=RANK), "auto_round,auto_gptq"),
        ("budget", EoRAConfig(budget=BUDGET, factor_bits=FACTOR_BITS), "auto_round"),
    ):
        part.attempt(name, autoround_with, name, config, formats, base)


def autoround_with(part: Part, title: str, config: EoRAConfig, formats: str, base: Path) -> None:
    from auto_round import AutoRound

    data = windows(part, base)
    quantizer = AutoRound(
        str(base), tokenizer=AutoTokenizer.from_pretrained(base), scheme=f"W{BITS}A16", group_size=GROUP_SIZE,
        iters=2 if part.setting.tiny else 20, alg_configs=["signround", config],
        dataset=[torch.tensor([window["input_ids"]]) for window in data], nsamples=len(data),
        seqlen=len(data[0]["input_ids"]), batch_size=common.BATCH_SIZE, device_map=part.setting.device,
        enable_torch_compile=False,
    )  # fmt: skip
    with part.timed(f"{title}: quantise and save"):
        _, folders = quantizer.quantize_and_save(str(part.work / f"autoround-{title}"), format=formats)
    for number, folder in enumerate(map(Path, [folders] if isinstance(folders, str) else folders)):
        if number == 0:
            check_errors(part, title, folder / "eora")
        check_loaded(part, f"{title}, {formats.split(',')[number]}", base, folder, data[-1]["input_ids"])
