"""The parts of `gpu_day.py`, each called in a process of its own."""

from __future__ import annotations

import functools
import json
import threading
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import common
import torch
from gptqmodel import BACKEND, GPTQModel, QuantizeConfig
from gptqmodel.nn_modules.qlinear import BaseQuantLinear
from gptqmodel.quantization.gptq import GPTQ
from gpu_day import REFERENCE, Part
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen3Config

from gptqmodel_eora_ext import EoRA, EoRAConfig
from gptqmodel_eora_ext.autoload import autoload
from gptqmodel_eora_ext.capture import OutputErrorMoment, SecondMoment
from gptqmodel_eora_ext.compensate import Recipe, compensate
from gptqmodel_eora_ext.evaluate.demo import demo_text
from gptqmodel_eora_ext.hosts.gptqmodel import auto, processors
from gptqmodel_eora_ext.hosts.gptqmodel.checkpoint import adapters_off
from gptqmodel_eora_ext.hosts.gptqmodel.weights import dequantize
from gptqmodel_eora_ext.hosts.terminal import quiet
from gptqmodel_eora_ext.solve import eora

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


# Costs --------------------------------------------------------------------------------------------------------

# Hidden width, MLP width, heads × head_dim, key-value heads × head_dim, layers.
MODELS = {
    "Qwen3-8B": (4096, 12288, 4096, 1024, 36),
    "Qwen2.5-32B": (5120, 27648, 5120, 1024, 64),
    "Qwen2.5-72B": (8192, 29568, 8192, 1024, 80),
}
TINY_MODELS = {"tiny": (128, 384, 128, 64, 2)}
COST_RANK = 64
# Rows of a forward whose inputs are summed at a time.
CAPTURE_ROWS = 8192


class Stopwatch:
    """Seconds in functions, by name; work on the GPU included, threads added up, a call inside another not counted."""

    def __init__(self, part: Part) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self._part = part
        self._running = threading.local()
        self._lock = threading.Lock()

    def watch(self, owner: Any, attribute: str, name: str) -> None:
        """Replace a function by one that is timed."""
        original = getattr(owner, attribute)

        @functools.wraps(original)
        def timed(*args: Any, **kwargs: Any) -> Any:
            if getattr(self._running, "inside", False):
                return original(*args, **kwargs)
            self._running.inside = True
            self._part.settle()
            start = time.perf_counter()
            try:
                return original(*args, **kwargs)
            finally:
                self._part.settle()
                self._running.inside = False
                with self._lock:
                    self.seconds[name] += time.perf_counter() - start

        setattr(owner, attribute, timed)

    def take(self) -> dict[str, float]:
        """What was counted since the last call."""
        taken = {name: round(value, 4) for name, value in self.seconds.items()}
        self.seconds.clear()
        return taken


def watched(part: Part) -> Stopwatch:
    """Watch capture, solving, what comes before the loop, and the host's GPTQ.

    Threads of the host's pool share the GPU, so that what runs at the same time counts in each.
    """
    watch = Stopwatch(part)
    watch.watch(processors.Compensation, "_moment", "capture: copies of the host's Hessians")
    watch.watch(SecondMoment, "add", "capture: sums")
    watch.watch(OutputErrorMoment, "add", "capture: sums")
    watch.watch(processors, "compensate", "solve")
    watch.watch(auto, "full_precision", "before: the whole model in memory")
    watch.watch(auto, "cached_sensitivity", "before: sensitivities")
    watch.watch(auto, "forecast_allocation", "before: forecasts")
    watch.watch(GPTQ, "quantize", "host: GPTQ")
    watch.watch(GPTQ, "add_batch", "host: Hessians")
    return watch


def qwen3_8b_layers(part: Part) -> None:
    """Random layers of Qwen3-8B's shapes, random tokens: the times are those of the shapes, the errors mean nothing."""
    hidden, inner, query, key, _ = (TINY_MODELS if part.setting.tiny else MODELS)[
        "tiny" if part.setting.tiny else "Qwen3-8B"
    ]
    layers, head = 2, 32 if part.setting.tiny else 128
    samples, seqlen = (8, 64) if part.setting.tiny else (64, 2048)
    tokenizer = AutoTokenizer.from_pretrained(base_model(part))
    config = Qwen3Config(
        vocab_size=len(tokenizer), hidden_size=hidden, intermediate_size=inner, num_hidden_layers=layers,
        num_attention_heads=query // head, num_key_value_heads=key // head, head_dim=head, tie_word_embeddings=True,
        max_position_embeddings=4096, dtype=torch.bfloat16,
    )  # fmt: skip
    base = part.work / "qwen3"
    with part.timed("make the model"):
        torch.manual_seed(SEED)
        with torch.device(part.setting.device):
            model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
        model.save_pretrained(base)
        tokenizer.save_pretrained(base)
        del model
    generator = torch.Generator().manual_seed(SEED)
    ids = torch.randint(len(tokenizer), (samples, seqlen), generator=generator).tolist()
    data = [{"input_ids": one, "attention_mask": [1] * seqlen} for one in ids]
    watch = watched(part)
    part.figure("tokens", samples * seqlen)
    part.figure("layers", layers)
    part.attempt("warm-up", cost_of, "warm-up", None, base, data[:4], watch, layers)
    part.attempt("plain", cost_of, "plain", None, base, data, watch, layers)
    part.attempt("rank", cost_of, f"rank {COST_RANK}", EoRA(rank=COST_RANK), base, data, watch, layers)
    part.attempt("generate", cost_afterwards, base, data, watch, layers)
    budget = EoRA(budget=BUDGET, factor_bits=FACTOR_BITS)
    part.attempt("budget", cost_of, f"budget {BUDGET}", budget, base, data, watch, layers)


def cost_of(
    part: Part, title: str, adapter: EoRA | None, base: Path, data: list[Any], watch: Stopwatch, layers: int
) -> None:
    with quiet():
        model = GPTQModel.load(str(base), QuantizeConfig(bits=BITS, group_size=GROUP_SIZE))
    forget_peak(part)
    watch.take()
    step = f"{title}: quantise"
    with part.timed(step), quiet():
        model.quantize(data, batch_size=4, adapter=adapter, backend=BACKEND.GPTQ_TORCH)
    tell_costs(part, title, step, watch, layers)
    if adapter is not None:
        factors = model._eora_run.factors
        shares = [one.error_after / one.error_before for one in factors.values() if one.rank]
        part.check(f"{title}: errors fall", bool(shares) and max(shares) < 1, [min(shares), max(shares)])
        if title.startswith("rank"):
            with part.timed(f"{title}: save"), quiet():
                model.save(str(part.work / "qwen3-quantised"))


def cost_afterwards(part: Part, base: Path, data: list[Any], watch: Stopwatch, layers: int) -> None:
    title = f"afterwards, rank {COST_RANK}"
    forget_peak(part)
    watch.take()
    step = f"{title}: generate"
    with part.timed(step), quiet():
        GPTQModel.adapter.generate(
            adapter=EoRA(rank=COST_RANK, path=part.work / "qwen3-afterwards"), model_id_or_path=str(base),
            quantized_model_id_or_path=str(part.work / "qwen3-quantised"), calibration_dataset=data, batch_size=4,
        )  # fmt: skip
    tell_costs(part, title, step, watch, layers)


def forget_peak(part: Part) -> None:
    if part.setting.device == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def tell_costs(part: Part, title: str, step: str, watch: Stopwatch, layers: int) -> None:
    seconds = watch.take()
    seconds["all"] = part.result["seconds"][step]
    part.figure(f"{title}: seconds in", seconds)
    part.figure(f"{title}: seconds a layer", {name: round(one / layers, 4) for name, one in seconds.items()})
    if part.setting.device == "cuda":
        part.figure(f"{title}: peak GPU bytes", torch.cuda.max_memory_allocated())


def solver(part: Part) -> None:
    """Solving and capturing alone, and what they make of a whole model by adding up."""
    tiny = part.setting.tiny
    models, tokens = (TINY_MODELS, 1024) if tiny else (MODELS, 1 << 17)
    ranks = (16,) if tiny else (64, 128)
    shapes = {name: linears(*sizes[:4]) for name, sizes in models.items()}
    solved: dict[str, Any] = {}
    captured: dict[str, float] = {}
    for width in sorted({width for one in shapes.values() for _, width in one}):
        moment = part.attempt(f"capture {width}", capture_at, width, tokens, captured)
        for out_features in sorted({out for one in shapes.values() for out, wide in one if wide == width}):
            if moment is not None:
                part.attempt(f"solve {out_features} × {width}", solve_at, out_features, moment, ranks, solved)
        del moment
    for name, sizes in models.items():
        whole = {"tokens": tokens, "layers": sizes[4]}
        # q/k/v and gate/up read one input each.
        sums = [captured.get(str(width)) for width in (sizes[0], sizes[2], sizes[0], sizes[1])]
        whole["capture, a layer (added up)"] = sum(filter(None, sums)) if all(sums) else None
        for rank in ranks:
            times = [solved.get(f"{out} x {width}", {}).get(f"compensate, rank {rank}") for out, width in shapes[name]]
            whole[f"solve, a layer, rank {rank} (added up)"] = sum(filter(None, times)) if all(times) else None
        part.figure(name, whole)


def linears(hidden: int, inner: int, query: int, key: int) -> list[tuple[int, int]]:
    """Out × in of a layer's q, k, v, o, gate, up and down."""
    return [(query, hidden), (key, hidden), (key, hidden), (hidden, query), (inner, hidden), (inner, hidden),
            (hidden, inner)]  # fmt: skip


def capture_at(part: Part, width: int, tokens: int, captured: dict[str, float]) -> SecondMoment:
    """Sum x xᵀ of inputs whose energies fall as 1 / i over 512 shared directions, over a floor of white noise."""
    device = torch.device(part.setting.device)
    torch.manual_seed(SEED)
    directions = torch.randn(512, width, device=device) / torch.arange(1, 513, device=device).sqrt()[:, None]
    rows = torch.randn(CAPTURE_ROWS, 512, device=device) @ directions + 0.1 * torch.randn(
        CAPTURE_ROWS, width, device=device
    )
    rows = rows.to(torch.bfloat16)
    moment = SecondMoment(width, f"{width}")
    moment.add(rows[:64])
    moment = SecondMoment(width, f"{width}")
    with part.timed(f"capture of {tokens} tokens, {width} wide"):
        for start in range(0, tokens, CAPTURE_ROWS):
            moment.add(rows[: min(CAPTURE_ROWS, tokens - start)])
    captured[str(width)] = part.result["seconds"][f"capture of {tokens} tokens, {width} wide"]
    part.figure("captured", captured)
    return moment


def solve_at(
    part: Part, out_features: int, moment: SecondMoment, ranks: tuple[int, ...], solved: dict[str, Any]
) -> None:
    """A weight of random entries, and an error of a tenth of their size."""
    device = torch.device(part.setting.device)
    torch.manual_seed(SEED)
    width = moment.in_features
    weight = 0.02 * torch.randn(out_features, width, device=device, dtype=torch.bfloat16)
    quantized = weight + 0.002 * torch.randn_like(weight)
    mean = moment.mean(device)
    found = solved.setdefault(f"{out_features} x {width}", {})
    eora(weight.float() - quantized.float(), mean, 8)  # libraries start up once
    for rank in ranks:
        with part.timed(f"eora {out_features} × {width}, rank {rank}"):
            eora(weight.float() - quantized.float(), mean, rank)
        with part.timed(f"compensate {out_features} × {width}, rank {rank}"):
            factors = compensate(weight, quantized, moment, Recipe(rank), name=f"{out_features} × {width}")
        for what in ("eora", "compensate"):
            found[f"{what}, rank {rank}"] = part.result["seconds"][f"{what} {out_features} × {width}, rank {rank}"]
        part.check(f"{out_features} × {width}, rank {rank}: error falls", factors.error_after < factors.error_before,
                   factors.error_after / factors.error_before)  # fmt: skip
    part.figure("solved", solved)


def devices(part: Part) -> None:
    """Inputs summed on two devices give what they give on one, wherever the weights are."""
    if part.setting.device == "cpu":
        part.figure("not tested", "one device")
        return
    others = ["cpu", *(["cuda:1"] if torch.cuda.device_count() > 1 else [])]
    part.figure("devices", ["cuda:0", *others])
    if len(others) == 1:
        part.figure("not tested", "two GPUs: there is one; the GPU and the CPU stand for two devices")
    torch.manual_seed(SEED)
    rows = torch.randn(2048, 256, device="cuda:0") * torch.arange(1, 257, device="cuda:0").rsqrt()
    weight = torch.randn(192, 256, device="cuda:0", dtype=torch.bfloat16)
    quantized = weight + 0.1 * torch.randn_like(weight)
    whole = SecondMoment(256, "whole")
    whole.add(rows)
    expected = compensate(weight, quantized, whole, Recipe(16), name="whole")
    for other in others:
        halves = SecondMoment(256, "halves")
        halves.add(rows[:1024])
        halves.add(rows[1024:].to(other))
        for title, there in (("weights on the first", "cuda:0"), ("weights on the other", other)):
            found = compensate(weight.to(there), quantized, halves, Recipe(16), name="halves")
            gap = abs(found.error_after / expected.error_after - 1)
            part.check(f"cuda:0 and {other}, {title}", gap < 0.01, gap)
