"""Parts of `gpu_day.py` that tell what things cost, and where moments may lie; each called in a process of its own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from gptqmodel import BACKEND, GPTQModel, QuantizeConfig
from gptqmodel.quantization.gptq import GPTQ
from gpu_day import Part
from gpu_day_parts import BITS, BUDGET, FACTOR_BITS, GROUP_SIZE, SEED, base_model
from stopwatch import Stopwatch
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen3Config

from gptqmodel_eora_ext import EoRA
from gptqmodel_eora_ext.adapter.compensate import Recipe, compensate
from gptqmodel_eora_ext.capture import OutputErrorMoment, SecondMoment
from gptqmodel_eora_ext.hosts.gptqmodel import compensation
from gptqmodel_eora_ext.hosts.terminal import quiet
from gptqmodel_eora_ext.plan import survey
from gptqmodel_eora_ext.solve import eora

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


def watched(part: Part) -> Stopwatch:
    """Watch capture, solving, what comes before the loop, and the host's GPTQ.

    Work on the GPU is included. Threads of the host's pool share it, so that what runs at the same time counts in each.
    A watched function inside another is not counted.
    """
    watch = Stopwatch(part.settle, nested=False)
    watch.watch(compensation.Compensation, "_moment", "capture: copies of the host's Hessians")
    watch.watch(SecondMoment, "add", "capture: sums")
    watch.watch(OutputErrorMoment, "add", "capture: sums")
    watch.watch(compensation, "compensate", "solve")
    watch.watch(survey, "cached_sensitivity", "before: sensitivities")
    watch.watch(survey, "sweep", "before: forecasts")
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
