"""Resuming in GPTQModel's layer loop, through the loop's own extension points.

GPTQModel 7.7 keeps checkpoints of its own (`checkpoint=CheckpointConfig(…)`), for two families of models, without
overrides by `dynamic`, and with no adapter but its own. Its loop offers the two moments that are needed: before the
first layer, where a finished part may be put in place, and after each layer, once its modules can be waited for. What a
packed module is made of again is GPTQModel's as well (`packed_module_spec`, `restore_packed_module`).
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from gptqmodel.looper.checkpoint_modules import is_packed_module, packed_module_spec, restore_packed_module
from gptqmodel.looper.checkpoint_store import CheckpointConfig
from gptqmodel.looper.extension import LoopBoundary, LoopContext, LoopStep
from gptqmodel.looper.gptq_checkpoint import _checkpoint_quantization_identity
from gptqmodel.looper.input_cache import InputCache
from gptqmodel.quantization.config import METHOD
from gptqmodel.utils.offload import offload_to_disk, set_submodule
from safetensors import safe_open

from ...loop.resume import NEXT, Keeping, factors_state, layer_file, load_run_state, read_factors, run_state
from ...loop.weights import weights_fingerprint
from ...system.distributed import as_first_says
from ...system.kept import Kept, ResumeError
from ...system.randomness import random_state, set_random_state
from ...system.spill import bytes_of
from .run import CompensationRun

log = logging.getLogger(__name__)

# Below the folder of a `CheckpointConfig`, so that GPTQModel's own store may stand beside it.
FOLDER = "eora"
# The one number of generations that makes sense here: a state is replaced by renaming, so it is whole at any time.
GENERATIONS = CheckpointConfig().keep_last
# What of an adapter's options does not change its factors in the loop.
NOT_OF_FACTORS = ("path", "refine")
# A file of tensors in GPTQModel's folder of offloaded modules.
BUNDLE = "module.safetensors"


def keeping_of(checkpoint: CheckpointConfig | Keeping | None, config: Any) -> Keeping | None:
    """What a `CheckpointConfig` asks for, in our terms.

    Args:
        checkpoint: GPTQModel's, or ours; None where nothing is kept.
        config: the model's `QuantizeConfig`.

    Raises:
        TypeError: for anything else.
        NotImplementedError: for several generations.
    """
    if checkpoint is None or isinstance(checkpoint, Keeping):
        return checkpoint
    if not isinstance(checkpoint, CheckpointConfig):
        raise TypeError(f"EoRA: `checkpoint` must be a CheckpointConfig, got {type(checkpoint).__name__}.")
    if checkpoint.keep_last != GENERATIONS:
        raise NotImplementedError(
            f"EoRA: with an adapter one state is kept, replaced in one step, so that keep_last={checkpoint.keep_last} "
            f"has nothing to count. Leave it out."
        )
    root = Path(checkpoint.resolve_path(config.offload_to_disk_path)) / FOLDER
    if checkpoint.resume == "never" and as_first_says(root.exists, ResumeError):
        raise ResumeError(f"EoRA: `{root}` holds an interrupted run, and resume='never'. Name another folder.")
    return Keeping(
        root,
        required=checkpoint.resume == "required",
        every=checkpoint.interval_layers,
        strict=checkpoint.strict_device_check,
    )


def asked_of(run: CompensationRun, model: Any, more: Mapping[str, Any]) -> dict[str, Any]:
    """All that a run's result depends on, ready for JSON.

    Args:
        run: its calibration is known.
        model: GPTQModel's model object, without an adapter in its config.
        more: what only this kind of run depends on.
    """
    folder = Path(model.model_local_path)
    return {
        "host": f"gptqmodel {version('gptqmodel')}",
        "model": {"folder": folder.name, "weights": weights_fingerprint(folder)},
        "calibration": run.calibration,
        "quantizer calibration": run.quantizer_calibration,
        "adapter": {key: value for key, value in run.asked.items() if key not in NOT_OF_FACTORS},
        "rounds": run.rounds,
        "quantization": _checkpoint_quantization_identity(model.quantize_config),
        **more,
    }


class LayerKeeper:
    """An extension of GPTQModel's loop: puts finished layers in place, and keeps each layer once it is finished.

    Args:
        run: whose factors are kept.
        kept: where; None in a process that keeps nothing itself (`shared_resume`).
        every: layers between two that are kept.
    """

    def __init__(self, run: CompensationRun, kept: Kept | None, every: int) -> None:
        self._run, self._opened, self._every = run, kept, every
        self._context: LoopContext | None = None
        # What enters the first layer, by name; masks and positions stay to the end, and are not written.
        self._begun: dict[str, torch.Tensor] = {}
        self._names: dict[int, str] = {}
        self._digest = ""
        self._steps: tuple[LoopStep, ...] = ()
        self._last = 0

    @property
    def _kept(self) -> Kept:
        assert self._opened is not None
        return self._opened

    # The two moments that the loop offers ----------------------------------------------------------------------

    def on_start(self, context: LoopContext) -> int:
        """Called before the first layer, with the activations that enter it; returns the first step to run."""
        self._context, self._steps = context, context.plan.steps
        self._begin(0)
        self._digest = digest_of(digests(self._begun))
        state = self._read(self._begun)
        if state is None:
            return 0
        for number in range(state["steps"]):
            self._put_in_place(self._kept.read(layer_file(number)))
        self._load(state)
        return self._go_on(state["steps"])

    def _begin(self, first: int) -> None:
        """Note what enters the first layer of each batch; ``first`` is the number of the first batch."""
        for number, processor in enumerate(self._processors()):
            for key, batches in processor["cache"].items():
                _tensors_in(dict(enumerate(batches, first)), f"/{number}/cache/{key}", self._begun)
        self._names = {id(one): name for name, one in self._begun.items()}

    def _read(self, known: Mapping[str, torch.Tensor]) -> Any:
        """What the next layer starts from; None where no layer is finished."""
        if NEXT not in self._kept:
            return None
        state = self._kept.read(NEXT, known)
        if state["begun with"] != self._digest:
            raise ResumeError(
                f"EoRA: what enters the first layer is not what entered it in the interrupted run that has left "
                f"`{self._kept.root}`, so its layers belong to another model or other data. Begin anew: `--restart`, "
                f"or remove the folder."
            )
        return state

    def _go_on(self, steps: int) -> int:
        """Tell that so many steps were finished before; returns the first one to run."""
        assert self._context is not None
        self._last = steps
        log.info("EoRA: %d of %d layers were finished before.", steps, len(self._steps))
        callback = getattr(self._context.model, "layer_callback", None)
        if callback is not None and hasattr(callback, "go_on"):
            callback.go_on(steps)
        return steps

    def on_boundary(self, boundary: LoopBoundary) -> None:
        """Called once a layer is quantised and its outputs are known, while its modules may still be packed."""
        done = self._steps.index(boundary.step) + 1
        if done - self._last < self._every and done < len(self._steps):
            return
        boundary.quiesce()
        self._run.raise_failure()
        self._keep(done)

    def _keep(self, done: int) -> None:
        """Keep all that ``done`` steps have come to."""
        self._write(self._next(done), self._names)
        self._kept.step_done()

    def _write(self, state: Mapping[str, Any], names: Mapping[int, str]) -> None:
        """Write the layers that are finished since the last time, then what the next one starts from."""
        for number in range(self._last, state["steps"]):
            self._kept.keep(layer_file(number), self._layer(self._steps[number]))
        self._kept.keep(NEXT, state, names)
        self._last = state["steps"]

    # What is kept ----------------------------------------------------------------------------------------------

    def _layer(self, step: LoopStep) -> dict[str, Any]:
        """Packed modules and factors of a layer; where the method changes other weights too (AWQ), those as well."""
        assert self._context is not None
        model = self._context.model
        path = model.lm_head if step.kind == "lm_head" else step.name
        config = model.quantize_config
        packed: dict[str, Any] = {}
        others: dict[str, Any] = {}
        inside = model.model.get_submodule(path)
        for part, module in inside.named_modules():
            name = f"{path}.{part}" if part else path
            if is_packed_module(module):
                packed[name] = {"spec": packed_module_spec(module, config), "tensors": self._tensors(name, module)}
            elif config.method == METHOD.AWQ and not any(name.startswith(f"{one}.") for one in packed):
                held = {key: one.data for key, one in module.named_parameters(recurse=False) if not one.is_meta}
                others |= {f"{name}.{key}": one for key, one in held.items()}
        names = [name for name in self._run.factors if name == path or name.startswith(f"{path}.")]
        return {"packed": packed, "others": others, "factors": factors_state(self._run.factors, names)}

    def _tensors(self, name: str, module: torch.nn.Module) -> dict[str, torch.Tensor]:
        """The tensors of a packed module; GPTQModel may have moved them to a file."""
        found = module.state_dict()
        if not any(one.is_meta for one in found.values()):
            return dict(found)
        assert self._context is not None
        bundle = Path(self._context.model.quantize_config.offload_to_disk_path, name, BUNDLE)
        with safe_open(bundle, framework="pt") as file:
            return {key: file.get_tensor(key) for key in found}

    def _next(self, done: int) -> dict[str, Any]:
        """What the step after ``done`` steps starts from."""
        assert self._context is not None and self._context.execution is not None
        return {
            "steps": done,
            "begun with": self._digest,
            "run": run_state(self._run),
            "processors": self._processors(),
            "shared": self._context.shared_state,
            "execution": self._context.execution.execution_state_dict(),
            "random": random_state(),
        }

    def _processors(self) -> list[dict[str, Any]]:
        assert self._context is not None
        found = []
        for processor in self._context.processors:
            state = processor.continuation_state_dict()
            found.append({**state, "cache": dict(vars(state["cache"]))})
        return found

    # Putting it back -------------------------------------------------------------------------------------------

    def _put_in_place(self, layer: Mapping[str, Any]) -> None:
        assert self._context is not None
        model = self._context.model
        config = model.quantize_config
        for name, one in layer["packed"].items():
            module = restore_packed_module(
                one["spec"], name=name, config=config, kernel=model.qlinear_kernel, lm_head_name=model.lm_head
            )
            module.load_state_dict(one["tensors"], assign=True)
            # A checkpoint's file has a module's tensors in their order here, which packing has changed.
            module._buffers = {key: module._buffers[key] for key in {**one["tensors"], **module._buffers}}
            set_submodule(model.model, name, module)
            if config.offload_to_disk:
                offload_to_disk(module=module, model=model.model, disk_path=config.offload_to_disk_path)
        for name, tensor in layer["others"].items():
            path, _, key = name.rpartition(".")
            owner = model.model.get_submodule(path)
            setattr(owner, key, torch.nn.Parameter(tensor, requires_grad=False))
        self._run.factors.update(read_factors(layer["factors"]))

    def _load(self, state: Mapping[str, Any]) -> None:
        assert self._context is not None and self._context.execution is not None
        for processor, one in zip(self._context.processors, state["processors"], strict=True):
            processor.load_continuation_state_dict({**one, "cache": InputCache(**one["cache"])})
        self._context.shared_state.clear()
        self._context.shared_state.update(state["shared"])
        self._context.execution.load_execution_state_dict(state["execution"])
        load_run_state(self._run, state["run"])
        set_random_state(state["random"])


def _tensors_in(value: Any, path: str, found: dict[str, torch.Tensor]) -> None:
    """All tensors of a nested state, each by the first path that leads to it."""
    if isinstance(value, torch.Tensor):
        found.setdefault(path, value)
    elif isinstance(value, Mapping):
        for key, one in value.items():
            _tensors_in(one, f"{path}/{key}", found)
    elif isinstance(value, (list, tuple)):
        for number, one in enumerate(value):
            _tensors_in(one, f"{path}/{number}", found)


def digests(tensors: Mapping[str, torch.Tensor]) -> dict[str, str]:
    """Name → digest of dtype, shape and bytes, by which equal tensors are recognised."""
    found = {}
    for name, one in tensors.items():
        digest = hashlib.sha256(f"{one.dtype} {tuple(one.shape)}".encode())
        digest.update(bytes_of(one.detach().to("cpu").contiguous()))
        found[name] = digest.hexdigest()
    return found


def digest_of(found: Mapping[str, str]) -> str:
    """One digest of all that `digests` has found, in whichever processes."""
    return hashlib.sha256("".join(f"{name} {found[name]}\n" for name in sorted(found)).encode()).hexdigest()
