"""The quantisation method `eora` as vLLM asks for it: which checkpoints it takes, and what multiplies each layer."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig, QuantizeMethodBase

from ...formats.names import ADAPTER_CONFIG, ADAPTER_WEIGHTS, QUANTIZE_CONFIG
from .checkpoint import Checkpoint, CheckpointError, is_gptq, names_adapter, needs_plugin, read_checkpoint

# Below vLLM's own logger, so that its users see what is said.
log = logging.getLogger("vllm.plugins.eora")

NAME = "eora"
# What users of vLLM say for a checkpoint in GPTQ's layout, whichever kernel multiplies it. `inc` is AutoRound's name.
SAME_FORMAT = (None, NAME, "gptq", "auto_gptq", "gptq_marlin", "marlin", "inc", "auto-round")
# Of CUDA, as vLLM counts it: Triton's oldest target that the kernels were compiled for (docs/kernels.md).
LEAST_CAPABILITY = 75
# Files of a repository on the hub that a checkpoint and its adapter consist of; vLLM finds its own of them there later.
HUB_FILES = ("*.json", f"*/{ADAPTER_CONFIG}", f"*/{ADAPTER_WEIGHTS}", "*.safetensors")
# What is to be done before the first layer is made: `seams` enters what has to wait for vLLM's own imports.
before_layers: list[Callable[[], None]] = []


class EoRAQuantization(QuantizationConfig):
    """vLLM's configuration of a checkpoint that the plugin serves.

    It is made in the process that the user starts, where the checkpoint is read and checked (`maybe_update_config`),
    and sent to those that load the model.

    Args:
        quantization: the `quantization_config` of the checkpoint's `config.json`.

    Attributes:
        problem: why this vLLM cannot be served; None where it can.
    """

    problem: str | None = None

    def __init__(self, quantization: Mapping[str, Any]) -> None:
        super().__init__()
        self.quantization = dict(quantization)
        self.checkpoint: Checkpoint | None = None
        # vLLM's name of a module → the checkpoint's.
        self._names: dict[str, str] = {}

    def __repr__(self) -> str:
        found = self.checkpoint
        held = "not read yet" if found is None else f"{found.folder}, adapter {found.adapter}"
        return f"{type(self).__name__}({held})"

    @classmethod
    def get_name(cls) -> str:
        return NAME

    @classmethod
    def get_supported_act_dtypes(cls) -> list[torch.dtype]:
        return [torch.float32, torch.float16, torch.bfloat16]

    @classmethod
    def get_min_capability(cls) -> int:
        return LEAST_CAPABILITY

    @staticmethod
    def get_config_filenames() -> list[str]:
        return [QUANTIZE_CONFIG]

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> EoRAQuantization:
        return cls(config)

    @classmethod
    def override_quantization_method(
        cls, hf_quant_cfg: dict[str, Any], user_quant: str | None, hf_config: Any = None
    ) -> str | None:
        """`eora` for a checkpoint that the plugin serves; None for one that is left to vLLM.

        It serves what names an adapter, what stock vLLM does not multiply (`needs_plugin`), and what it is asked to.

        Raises:
            CheckpointError: where it is asked for another format than GPTQ's, or another method for a checkpoint with
                an adapter, which that method would leave out; or where this vLLM cannot be served.
        """
        if not is_gptq(hf_quant_cfg):
            if user_quant == NAME:
                raise CheckpointError(
                    f"EoRA: --quantization {NAME} serves packed integers in GPTQ's layout; this checkpoint says "
                    f"quant_method {hf_quant_cfg.get('quant_method')!r}. Leave --quantization out."
                )
            return None
        named, revision = str(getattr(hf_config, "name_or_path", "") or ""), getattr(hf_config, "_commit_hash", None)
        folder = _local_folder(named, revision, (QUANTIZE_CONFIG,))
        adapted = folder is not None and names_adapter(folder)
        if user_quant not in SAME_FORMAT:
            if adapted:
                raise CheckpointError(
                    f"EoRA: `{folder}` names an adapter, which --quantization {user_quant} would leave out and not "
                    f"tell. Leave --quantization out, or take \"adapter\" out of its {QUANTIZE_CONFIG}."
                )
            return None
        if not (adapted or user_quant == NAME or needs_plugin(hf_quant_cfg)):
            return None
        if cls.problem is not None:
            raise CheckpointError(cls.problem)
        return NAME

    def maybe_update_config(self, model_name: str, hf_config: Any = None, revision: str | None = None) -> None:
        """Read and check the checkpoint and its adapter.

        Raises:
            CheckpointError: as `read_checkpoint`, or where the checkpoint is not to be had.
            AdapterError: as `read_checkpoint`.
        """
        folder = _local_folder(model_name, revision, HUB_FILES)
        if folder is None:
            raise CheckpointError(
                f"EoRA: `{model_name}` is no folder, and no repository of the hub that can be reached."
            )
        self.checkpoint = read_checkpoint(folder, self.quantization)
        self._names = {name: name for name in (*self.checkpoint.modules, *self.checkpoint.dense)}
        adapter = self.checkpoint.adapter_folder
        if adapter is None:
            log.warning("EoRA: `%s` names no adapter; it is served without one.", model_name)
        else:
            log.info("EoRA: `%s` is served with its adapter `%s`: %d of %d modules, factors in %d bits.", model_name,
                     adapter.path, len(adapter.keys), len(self.checkpoint.modules), adapter.factor_bits)  # fmt: skip

    def apply_vllm_mapper(self, hf_to_vllm_mapper: Any) -> None:
        """Take note of how a model of vLLM calls the checkpoint's modules."""
        renamed: dict[str, str] = {}
        for name, stored in self._names.items():
            for mapped in hf_to_vllm_mapper.apply_list([name]):
                renamed[mapped] = stored
        self._names = renamed

    @staticmethod
    def get_checkpoint_weight_mapper() -> Any:
        """No tensor of the checkpoint is dropped; vLLM's own would drop `g_idx`."""
        from vllm.model_executor.models.utils import WeightsMapper

        return WeightsMapper()

    def stored_names(self, prefix: str) -> list[str]:
        """The checkpoint's names of the modules that one of vLLM's layers holds: three for q/k/v, one for most."""
        parent, _, own = prefix.rpartition(".")
        names = [f"{parent}.{shard}" if parent else shard for shard in self.packed_modules_mapping.get(own, [own])]
        return [self._names[name] for name in names if name in self._names]

    def get_quant_method(self, layer: torch.nn.Module, prefix: str) -> QuantizeMethodBase | None:
        """What multiplies a layer: the plugin's kernels, or vLLM's for one that is not quantised."""
        from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod
        from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead

        from .linear import EoRALinearMethod

        if self.checkpoint is None:
            raise CheckpointError(f"EoRA: vLLM asks for {prefix} before it has named the checkpoint. Is it a new one?")
        for prepare in before_layers:
            prepare()
        if not isinstance(layer, (LinearBase, ParallelLMHead)):
            return _unquantized_experts(layer)
        stored = self.stored_names(prefix)
        if any(name in self.checkpoint.modules for name in stored):
            return EoRALinearMethod(self.checkpoint, prefix, stored)
        return UnquantizedLinearMethod() if isinstance(layer, LinearBase) else None


def _unquantized_experts(layer: torch.nn.Module) -> QuantizeMethodBase | None:
    """vLLM's method for experts in 16 bits; quantised ones were refused before. None for layers without weights."""
    from vllm.model_executor.layers.fused_moe import RoutedExperts, UnquantizedFusedMoEMethod

    return UnquantizedFusedMoEMethod(layer.moe_config) if isinstance(layer, RoutedExperts) else None


def _local_folder(model: str, revision: str | None, files: tuple[str, ...]) -> Path | None:
    """Where a checkpoint lies on this machine; of one on the hub, some files are downloaded first.

    None where it is neither.
    """
    if not model:
        return None
    if Path(model).is_dir():
        return Path(model)
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(model, revision=revision, allow_patterns=list(files)))
    except (OSError, ValueError):
        return None
