"""How many tokens a second does a whole model of Qwen3-8B's shapes generate on a GPU, beside dense bfloat16 and stock?

dense    the model in bfloat16
fused    2 or 3 bits with an adapter of rank 64, plain or in 4 bits, by this package's kernels
stock    the same weights by GPTQModel's torch and Triton kernels with `Lora`

Weights are random and made on the device; embeddings, norms and the vocabulary's matrix are of bfloat16 in all. 1,024
tokens of a prompt go through at once, then 128 tokens one by one: one step is captured as a CUDA graph over the static
cache of transformers and replayed. Beside tokens a second stands what the bytes that a token reads would take.

    python benchmarks/generate_cuda.py --json
    python benchmarks/generate_cuda.py --device cpu --layers 1 --tiny    # a dry run, without graphs
    GPTQMODEL_EORA_EXT_KERNELS_ON=cuda python benchmarks/generate_cuda.py --contenders dense fused

Needs a CUDA device and GPTQModel. No GPU has run it yet.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import common
import torch
from gptqmodel.adapter.adapter import Lora
from gptqmodel.nn_modules.qlinear.torch import TorchLinear
from gptqmodel.nn_modules.qlinear.tritonv2 import TritonV2Linear
from kernels_roofline import factor_bytes, weight_bytes
from transformers import Qwen3Config, Qwen3ForCausalLM, StaticCache

from gptqmodel_eora_ext import EoRA
from gptqmodel_eora_ext.formats.packed_weights import pack_words
from gptqmodel_eora_ext.hosts.gptqmodel.triton import EoRATritonLinear
from gptqmodel_eora_ext.kernels.shared_input import share_inputs
from gptqmodel_eora_ext.solve.quantized import quantize_factor

RESULT = common.RESULTS / "generate_cuda.json"
DTYPE = torch.bfloat16
GROUP_SIZE, RANK = 128, 64
PROMPT, NEW_TOKENS, ROUNDS = 1024, 128, 5
# Bytes a second of an H100's memory by its vendor.
BANDWIDTH = 3.35e12
SHAPES = {
    "vocab_size": 151936, "hidden_size": 4096, "intermediate_size": 12288, "num_hidden_layers": 36,
    "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128,
}  # fmt: skip
TINY = {**SHAPES, "vocab_size": 512, "hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 64}  # fmt: skip


def dense_model(options: argparse.Namespace) -> Any:
    """Random weights of a usual size."""
    shapes = {**(TINY if options.tiny else SHAPES), "num_hidden_layers": options.layers}
    with torch.device("meta"):
        model = Qwen3ForCausalLM(Qwen3Config(**shapes, tie_word_embeddings=False, dtype=DTYPE)).to(DTYPE)
    model = model.to_empty(device=options.device).eval()
    for name, parameter in model.named_parameters():
        torch.nn.init.ones_(parameter) if name.endswith("norm.weight") else torch.nn.init.normal_(parameter, std=0.02)
    # Made anew: they were empty as well.
    model.model.rotary_emb = type(model.model.rotary_emb)(config=model.config).to(options.device)
    return model.requires_grad_(False)


def packed(cls: Any, adapter: type[Lora], linear: torch.nn.Linear, bits: int, factor_bits: int, name: str) -> Any:
    """A host's kernel with random weights and factors in the place of ``linear``."""
    in_features, out, device = linear.in_features, linear.out_features, linear.weight.device
    groups = -(-in_features // GROUP_SIZE)
    down = torch.randn(RANK, in_features, device=device) * in_features**-0.5
    up = torch.randn(RANK, out, device=device) * 0.1 * RANK**-0.5
    factors: dict[str, Any] = {"lora_A": down.T.to(DTYPE), "lora_B": up.to(DTYPE)}
    made = cls(
        bits=bits, group_size=GROUP_SIZE, sym=True, desc_act=False, in_features=in_features, out_features=out,
        bias=False, pack_dtype=torch.int32, dtype=DTYPE, adapter=adapter(rank=RANK, path=None, **factors), name=name,
    )  # fmt: skip
    zeros = pack_words(torch.full((out, 1), 1 << (bits - 1), dtype=torch.int32), bits).T
    tensors = {
        "qweight": torch.randint(
            -(2**31), 2**31 - 1, (in_features * bits // 32, out), dtype=torch.int32, device=device
        ),
        "qzeros": zeros.expand(groups, -1).contiguous().to(device),
        "g_idx": torch.arange(in_features, dtype=torch.int32, device=device) // GROUP_SIZE,
        "scales": ((torch.rand(groups, out, device=device) + 0.5) * 0.02 / (1 << (bits - 1))).to(DTYPE),
    }
    for key, tensor in tensors.items():
        is_parameter = isinstance(getattr(made, key, None), torch.nn.Parameter)
        setattr(made, key, torch.nn.Parameter(tensor, requires_grad=False) if is_parameter else tensor)
    made.lora_A, made.lora_B = factors["lora_A"], factors["lora_B"]
    made.qzero_format(format=2)
    made.post_init()
    if factor_bits < 16:
        made.adapter.packed = (quantize_factor(down, factor_bits), quantize_factor(up, factor_bits))
    return made.eval()


def quantise(model: Any, cls: Any, adapter: type[Lora], bits: int, factor_bits: int) -> Any:
    """Every linear layer of the decoder becomes packed; those that read one input are computed together."""
    made = {}
    for index, layer in enumerate(model.model.layers):
        for parent_name, parent in (("self_attn", layer.self_attn), ("mlp", layer.mlp)):
            for name, linear in list(parent.named_children()):
                if isinstance(linear, torch.nn.Linear):
                    title = f"model.layers.{index}.{parent_name}.{name}"
                    made[title] = packed(cls, adapter, linear, bits, factor_bits, title)
                    setattr(parent, name, made[title])
    share_inputs(made)
    return model


def read_bytes(model: Any, bits: int, factor_bits: int) -> float:
    """Of a token: every linear layer's weight, with its adapter where it is packed, and the vocabulary's matrix."""
    sizes = model.config
    heads, kv_heads = (count * sizes.head_dim for count in (sizes.num_attention_heads, sizes.num_key_value_heads))
    width, inner = sizes.hidden_size, sizes.intermediate_size
    shapes = [(width, heads), (width, kv_heads), (width, kv_heads), (heads, width), (width, inner), (width, inner),
              (inner, width)]  # fmt: skip
    if bits == 16:
        layer = sum(2.0 * in_features * out for in_features, out in shapes)
    else:
        layer = sum(weight_bytes(*shape, bits) + factor_bytes(*shape, RANK, factor_bits) for shape in shapes)
    return sizes.num_hidden_layers * layer + model.lm_head.weight.nbytes


def generation(model: Any, options: argparse.Namespace) -> tuple[Callable[[], None], Callable[[], None]]:
    """What lets the prompt through, and what makes one token."""
    device = torch.device(options.device)
    length = PROMPT + NEW_TOKENS if not options.tiny else 64
    cache = StaticCache(config=model.config, max_cache_len=length)
    prompt = torch.randint(0, model.config.vocab_size, (1, length // 2 if options.tiny else PROMPT), device=device)
    token = prompt[:, :1].clone()
    position = torch.full((1, 1), prompt.shape[1], device=device)

    def prefill() -> None:
        cache.reset()
        model(prompt, past_key_values=cache, use_cache=True, logits_to_keep=1)

    def step() -> None:
        logits = model(token, past_key_values=cache, position_ids=position, use_cache=True).logits
        token.copy_(logits[:, -1:].argmax(-1))

    if device.type != "cuda":
        return prefill, step
    prefill()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    stream.synchronize()
    prefill()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return prefill, graph.replay


def seconds(call: Callable[[], None], count: int, device: str) -> float:
    """Of ``count`` calls."""
    synchronize = torch.cuda.synchronize if device != "cpu" else lambda: None
    synchronize()
    start = time.perf_counter()
    for _ in range(count):
        call()
    synchronize()
    return time.perf_counter() - start


def measure(model: Any, bits: int, factor_bits: int, options: argparse.Namespace) -> dict[str, Any]:
    # A tensor of inference mode has no count of writes, by which modules know that they share an input.
    with torch.no_grad():
        prefill, step = generation(model, options)
        tokens = 4 if options.tiny else NEW_TOKENS
        prefills, steps = [], []
        for _ in range(1 if options.tiny else ROUNDS):
            prefills.append(seconds(prefill, 1, options.device))
            steps.append(seconds(step, tokens, options.device) / tokens)
    per_token = statistics.median(steps)
    nbytes = read_bytes(model, bits, factor_bits)
    return {
        "prefill ms": statistics.median(prefills) * 1e3, "ms a token": per_token * 1e3, "tokens/s": 1 / per_token,
        "GB a token": nbytes / 1e9, "bytes' ms": nbytes / BANDWIDTH * 1e3,
    }  # fmt: skip


def contenders(options: argparse.Namespace) -> list[tuple[str, int, int, Callable[[Any], Any]]]:
    """Names, bits of weights and of factors, and what makes each of a dense model."""
    found: list[tuple[str, int, int, Callable[[Any], Any]]] = [("dense", 16, 16, lambda model: model)]
    for bits in options.bits:
        for factor_bits in (16, 4):
            make = partial(quantise, cls=EoRATritonLinear, adapter=EoRA, bits=bits, factor_bits=factor_bits)
            found.append((f"fused, {bits} bits, factors of {factor_bits}", bits, factor_bits, make))
        on_gpu = options.device != "cpu"
        kernel = TritonV2Linear if on_gpu and bits in TritonV2Linear.SUPPORTS_BITS else TorchLinear
        make = partial(quantise, cls=kernel, adapter=Lora, bits=bits, factor_bits=16)
        found.append((f"stock {kernel.__name__}, {bits} bits", bits, 16, make))
    return [one for one in found if one[0].split(",")[0].split(" ")[0] in options.contenders]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--layers", type=int, default=SHAPES["num_hidden_layers"])
    parser.add_argument("--bits", nargs="+", type=int, default=[2, 3])
    parser.add_argument(
        "--contenders", nargs="+", choices=("dense", "fused", "stock"), default=["dense", "fused", "stock"]
    )
    parser.add_argument("--tiny", action="store_true", help="narrow layers and few tokens")
    parser.add_argument("--out", type=Path, default=RESULT)
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    options = parser.parse_args()
    if options.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("No CUDA device. --device cpu --layers 1 --tiny is a dry run.")
    rows = []
    for name, bits, factor_bits, make in contenders(options):
        rows.append({"contender": name, **measure(make(dense_model(options)), bits, factor_bits, options)})
        print(rows[-1], flush=True)
        gc.collect()
        torch.cuda.empty_cache()
    if not options.tiny:
        result = {"measured": common.measured(), "layers": options.layers, "rows": rows}
        common.keep(options.out, result, as_json=options.json)
    common.table(tuple(rows[0]), [list(row.values()) for row in rows])


if __name__ == "__main__":
    main()
