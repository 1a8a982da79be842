"""vLLM's way of multiplying a linear layer, over the plugin's kernels."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any

import torch
from vllm.model_executor.layers.linear import (
    ColumnParallelLinear,
    LinearBase,
    LinearMethodBase,
    MergedColumnParallelLinear,
    QKVParallelLinear,
    ReplicatedLinear,
    RowParallelLinear,
)
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead

from ...system.memory import release_free_memory
from .checkpoint import PACKED, Checkpoint, CheckpointError
from .ops import register_layer, served_linear
from .parts import Part, Share, share_of
from .served import ServedLinear

# Layers whose cut by tensor parallelism is known here. A class of its own for one model may cut in another way.
KNOWN_LAYERS = (
    ColumnParallelLinear, MergedColumnParallelLinear, QKVParallelLinear, ReplicatedLinear, RowParallelLinear,
)  # fmt: skip
# dtypes of the tensors in files, which vLLM compares with the parameters' and warns about.
DTYPES = {"qweight": torch.int32, "qzeros": torch.int32, "g_idx": torch.int32, "scales": torch.float16}
QKV = {"q": 0, "k": 1, "v": 2}


class EoRALinearMethod(LinearMethodBase):
    """The linear method of one layer.

    Args:
        checkpoint: that is loaded.
        prefix: the layer's name in vLLM.
        stored: the checkpoint's names of its modules.
    """

    def __init__(self, checkpoint: Checkpoint, prefix: str, stored: Sequence[str]) -> None:
        self.checkpoint, self.prefix, self.stored = checkpoint, prefix, list(stored)

    def create_weights(
        self,
        layer: torch.nn.Module,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs: Any,
    ) -> None:
        """Give the layer empty parameters under the names of the checkpoint's tensors, which take what is read."""
        loading = _Loading(self.checkpoint, layer, self.prefix, self.stored, list(output_partition_sizes),
                           input_size_per_partition, input_size)  # fmt: skip
        layer._eora_loading = loading  # type: ignore[assignment]
        dense = any(name not in self.checkpoint.modules for name in self.stored)
        for kind in (*PACKED, *(("weight",) if dense else ())):
            parameter = torch.nn.Parameter(torch.empty(0, dtype=DTYPES.get(kind, params_dtype)), requires_grad=False)
            parameter.weight_loader = _Loader(loading, kind)  # type: ignore[attr-defined]
            layer.register_parameter(kind, parameter)

    def process_weights_after_loading(self, layer: torch.nn.Module) -> None:
        """Make the layer ready; its parameters stay empty.

        Raises:
            CheckpointError: when tensors are missing.
        """
        loading: _Loading | None = getattr(layer, "_eora_loading", None)
        if loading is None:
            return
        layer._eora_served = loading.finish()  # type: ignore[assignment]
        layer._eora_name = register_layer(self.prefix, layer._eora_served)  # type: ignore[assignment, arg-type]
        del layer._eora_loading
        for kind in (*PACKED, "weight"):
            parameter = layer._parameters.get(kind)
            # vLLM asks `qweight` on which device a LoRA's tensors are to lie.
            if kind == "qweight" and parameter is not None:
                layer.register_parameter(kind, torch.nn.Parameter(parameter.data, requires_grad=False))
            elif parameter is not None:
                layer.register_parameter(kind, None)

    def apply(self, layer: torch.nn.Module, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """y with the checkpoint's adapter, and the bias if vLLM hands it over."""
        served: ServedLinear = layer._eora_served  # type: ignore[assignment]
        traced = torch.compiler.is_compiling()
        y = served_linear(x, layer._eora_name, served.out_features) if traced else served(x)  # type: ignore[arg-type]
        return y if bias is None or served.adds_bias else y + bias


class _Loader:
    """The `weight_loader` of one of the layer's parameters."""

    def __init__(self, loading: _Loading, kind: str) -> None:
        self._loading, self._kind = loading, kind

    def __call__(self, parameter: torch.nn.Parameter, tensor: torch.Tensor, shard: Any = None) -> None:
        self._loading.take(self._kind, tensor, shard)


class _Loading:
    """A layer of which tensors are being read."""

    def __init__(
        self, checkpoint: Checkpoint, layer: torch.nn.Module, prefix: str, stored: list[str], local_sizes: list[int],
        local_inputs: int, inputs: int,
    ) -> None:  # fmt: skip
        # The layer holds this object.
        self._layer = weakref.ref(layer)
        self._checkpoint, self._prefix, self._stored, self._local = checkpoint, prefix, stored, local_sizes
        self._local_inputs, self._inputs = local_inputs, inputs
        self._device = torch.empty(0).device
        self._parts: dict[tuple[int, ...], Part] = {}
        self._check_cut()

    @property
    def _rank(self) -> int:
        return int(getattr(self._layer(), "tp_rank", 0))

    @property
    def _processes(self) -> int:
        return int(getattr(self._layer(), "tp_size", 1))

    def _check_cut(self) -> None:
        layer = self._layer()
        if self._processes > 1 and isinstance(layer, LinearBase) and type(layer) not in KNOWN_LAYERS:
            raise CheckpointError(
                f"EoRA: {self._prefix} is a {type(layer).__name__}, and how tensor parallelism cuts it is not known "
                f"here. Serve with --tensor-parallel-size 1."
            )

    def take(self, kind: str, tensor: torch.Tensor, shard: Any) -> None:
        kinds = self._kinds(shard)
        if kinds not in self._parts:
            self._parts[kinds] = Part(self._name(kinds), self._share(kinds), self._device)
        self._parts[kinds].take(self._checkpoint, kind, tensor)

    def _kinds(self, shard: Any) -> tuple[int, ...]:
        """Which of the layer's outputs a tensor holds, by what vLLM calls the piece that it hands over."""
        if shard is None:
            return tuple(range(len(self._local)))
        if isinstance(shard, str):
            return (QKV[shard],)
        return tuple(shard) if isinstance(shard, (tuple, list)) else (int(shard),)

    def _name(self, kinds: tuple[int, ...]) -> str:
        if len(self._stored) == 1:
            return self._stored[0]
        if len(self._stored) == len(self._local) and len(kinds) == 1:
            return self._stored[kinds[0]]
        raise CheckpointError(
            f"EoRA: vLLM reads outputs {kinds} of {self._prefix} from one tensor, and which of {self._stored} it is of "
            f"is not known here. Load the checkpoint with GPTQModel."
        )

    def _share(self, kinds: tuple[int, ...]) -> Share:
        layer = self._layer()
        begin = self._rank * self._local_inputs if self._local_inputs != self._inputs else 0
        inputs = (begin, begin + self._local_inputs)
        if isinstance(layer, ParallelLMHead):
            vocabulary = layer.shard_indices
            disk, found = layer.org_vocab_size, (vocabulary.org_vocab_start_index, vocabulary.org_vocab_end_index)
            share = Share((found,), inputs)
        else:
            sizes, ranks = self._disk_sizes(layer)
            disk = sum(sizes[kind] for kind in kinds)
            share = share_of([sizes[kind] for kind in kinds], [self._local[kind] for kind in kinds],
                           [ranks[kind] for kind in kinds], inputs)  # fmt: skip
        name = self._name(kinds)
        header = self._checkpoint.modules.get(name)
        if header is not None and (header.in_features, header.out_features) != (self._inputs, disk):
            raise CheckpointError(
                f"EoRA: {name} is a weight of out × in = {header.out_features} × {header.in_features}, where the model "
                f"has a {self._prefix} of {disk} × {self._inputs}. config.json tells of another model."
            )
        return share

    def _disk_sizes(self, layer: Any) -> tuple[list[int], list[int]]:
        """Outputs of each kind in the file, and which share of them this process keeps."""
        if isinstance(layer, (RowParallelLinear, ReplicatedLinear)) or self._processes == 1:
            return self._local, [0] * len(self._local)
        if isinstance(layer, QKVParallelLinear):
            # Where there are fewer heads of keys than processes, several keep the same.
            shared = self._rank // layer.num_kv_head_replicas
            return [
                layer.total_num_heads * layer.head_size,
                layer.total_num_kv_heads * layer.head_size,
                layer.total_num_kv_heads * layer.v_head_size,
            ], [self._rank, shared, shared]
        return [size * self._processes for size in self._local], [self._rank] * len(self._local)

    def finish(self) -> ServedLinear:
        """The layer, ready.

        Raises:
            CheckpointError: when tensors are missing.
        """
        layer = self._layer()
        covered = sorted(kind for kinds in self._parts for kind in kinds)
        if covered != list(range(len(self._local))):
            raise CheckpointError(
                f"EoRA: vLLM has not read all modules of {self._prefix} ({', '.join(self._stored)}). Is the checkpoint "
                f"complete, and --load-format left as it is by default?"
            )
        parts = [self._parts[kinds] for kinds in sorted(self._parts)]
        for part in parts:
            part.require_whole()
        bias = getattr(layer, "bias", None)
        handed_over = not getattr(layer, "skip_bias_add", False) and not (
            isinstance(layer, RowParallelLinear) and self._rank > 0
        )
        release_free_memory()
        # vLLM pads a vocabulary to a multiple of 64, and cuts the logits off again.
        padding = sum(self._local) - sum(part.share.out_features for part in parts)
        return ServedLinear(self._checkpoint, parts, bias if handed_over else None, padding)
