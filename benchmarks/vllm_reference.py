"""What a served checkpoint should give: its model in float32 with Ŵ + B A as plain matrices, from its files alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM

from gptqmodel_eora_ext.adapter.folder import AdapterFolder
from gptqmodel_eora_ext.formats.packed_weights import PackedWeight
from gptqmodel_eora_ext.hosts.vllm.checkpoint import read_checkpoint
from gptqmodel_eora_ext.kernels.reference import dequantize


def dense_model(folder: Path, *adapters: Path | str) -> Any:
    """The model of a checkpoint in float32.

    Args:
        folder: of the checkpoint.
        adapters: that are added to Ŵ, "own" for the checkpoint's.
    """
    config = AutoConfig.from_pretrained(folder)
    found = read_checkpoint(folder, config.quantization_config)
    del config.quantization_config
    tensors: dict[str, torch.Tensor] = {}
    for path in folder.glob("*.safetensors"):
        tensors |= load_file(path)
    state = {name: one.float() for name, one in tensors.items() if name.rpartition(".")[0] not in found.modules}
    for name, header in found.modules.items():
        weight = PackedWeight(
            tensors[f"{name}.qweight"], tensors[f"{name}.qzeros"], tensors[f"{name}.scales"],
            tensors.get(f"{name}.g_idx"), header.bits, header.group_size, header.in_features, header.out_features,
            found.stores_zero_minus_one, name,
        )  # fmt: skip
        state[f"{name}.weight"] = dequantize(weight)
        if f"{name}.bias" in tensors:
            state[f"{name}.bias"] = tensors[f"{name}.bias"].float()
    for adapter in adapters:
        opened = found.adapter_folder if adapter == "own" else AdapterFolder.open(adapter)
        assert opened is not None
        for name, factors in opened.factors(list(opened.keys)):
            state[f"{name}.weight"] += factors.lora_B.float() @ factors.lora_A.float()
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert not unexpected, unexpected
    assert set(missing) <= {"lm_head.weight"}, missing
    model.tie_weights()
    return model.eval()


@torch.inference_mode()
def losses(model: Any, ids: list[int]) -> list[float]:
    """Of each token but the first, in nats."""
    logits = model(torch.tensor([ids])).logits[0, :-1].float()
    found: list[float] = torch.nn.functional.cross_entropy(logits, torch.tensor(ids[1:]), reduction="none").tolist()
    return found


@torch.inference_mode()
def greedy(model: Any, ids: list[int], tokens: int) -> list[int]:
    """The likeliest continuation, token after token."""
    found: list[int] = []
    read, cache = ids, None
    for _ in range(tokens):
        output = model(torch.tensor([read]), past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        read = [int(output.logits[0, -1].argmax())]
        found += read
    return found
