"""Every place where the plugin touches GPTQModel. Each is checked before any is used, and all can be undone.

| seam | what it does |
|---|---|
| `ADAPTER_MAPPING["eora"]` | the dict form of `QuantizeConfig(adapter=…)` knows the type |
| `SUPPORTS_ADAPTERS` of each kernel | a kernel that takes `Lora` takes `EoRA`; the others refuse it by themselves |
| `BaseQModel.quantize` | takes an `EoRA` out of the host's sight and starts a run |
| `BaseQModel._quantize_weight_only` | round-to-nearest with an `EoRA` runs in the calibrated loop |
| `module_looper.ModuleLooper` | a subclass that equips the processor which quantises |
| `BaseQModel.save_quantized` | writes the adapter and names it in the checkpoint |
| `BaseQuantizeConfig.from_pretrained` | an adapter with `eora.json` loads as `EoRA`; AutoRound's configs are read |
| `auto._is_supported_quantization_config` | AutoRound's packed checkpoints are quantised ones |
| `importer.AUTO_BACKEND_KERNEL_MAPPING` | `EoRAFusedLinear` comes first, `EoRATritonLinear` before Triton's kernel |
| `model.select_quant_linear` | an explicit `BACKEND.GPTQ_TRITON` with an `EoRA` tries `EoRATritonLinear` first |
| `loader.gptqmodel_post_init` | attaches factors, checked, before kernels are initialised |
| `GPTQModel.adapter.generate` | an `EoRA` is made by the plugin |
| `_default_cpu_workers` | at least 2, which the host's own loader pool needs (it crashes on 1 or 2 processors) |
| `pack_module` of three processors | called without the processor's lock, which deadlocks with the parent module's |
"""

from __future__ import annotations

import functools
import logging
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from packaging.version import Version

from .. import SeamError, problem_at

log = logging.getLogger(__name__)

OLDEST_HOST = Version("7.7.0")
NEWEST_TESTED_HOST = Version("7.7.0")
# The host's own model loader asks its CPU pool for two workers.
LEAST_CPU_WORKERS = 2
# Stands for a backend in the host's automatic order, where it only names what was tried.
FUSED_KEY = "gptq_eora_fused"
TRITON_KEY = "gptq_eora_triton"

_undo: list[Callable[[], None]] = []
_failure: SeamError | None = None


@dataclass(frozen=True)
class Seam:
    """One attribute of the host that is replaced.

    Attributes:
        owner: module or class.
        name: the attribute.
        parameters: names that the attribute's signature must hold.
        replacement: takes the original, returns what stands in its place.
    """

    owner: Any
    name: str
    parameters: tuple[str, ...]
    replacement: Callable[[Any], Any]

    def problem(self) -> str | None:
        """What is wrong with the host at this place, or None."""
        return problem_at(self.owner, self.name, self.parameters)

    def apply(self) -> None:
        """Replace the attribute; remember how to put it back."""
        own = vars(self.owner).get(self.name)
        setattr(self.owner, self.name, self.replacement(getattr(self.owner, self.name)))
        _undo.append(lambda: setattr(self.owner, self.name, own))


def install_or_log() -> None:
    """Install; a host that cannot be served is logged now, and told again by `EoRA(…)`."""
    global _failure
    try:
        install()
    except SeamError as error:
        _failure = error
        log.warning("%s", error)


def require_installed() -> None:
    """Install if the autoload did not, for instance because it is switched off.

    Raises:
        SeamError: when the installed GPTQModel cannot be served.
    """
    if _failure is not None:
        raise _failure
    install()


def installed() -> bool:
    """Whether the seams are in place."""
    return bool(_undo)


def install() -> None:
    """Put all seams in place, once.

    Raises:
        SeamError: with every mismatch found, when the host is too old or of another shape; nothing is touched then.
    """
    if _undo:
        return
    check_version()
    seams = list_seams()
    problems = [problem for seam in seams if (problem := seam.problem())] + kernel_order_problems()
    if problems:
        raise SeamError(
            f"gptqmodel-eora-ext is not active: gptqmodel {host_version()} differs from the tested "
            f"{NEWEST_TESTED_HOST}: {'; '.join(problems)}. Install gptqmodel=={NEWEST_TESTED_HOST}, or a newer "
            f"gptqmodel-eora-ext."
        )
    for seam in seams:
        seam.apply()
    _register_kernels()
    _register_adapter()


def uninstall() -> None:
    """Undo everything `install` did."""
    while _undo:
        _undo.pop()()


def host_version() -> Version:
    """Version of the installed GPTQModel."""
    from gptqmodel.version import __version__

    return Version(__version__)


def check_version() -> None:
    """Refuse a host that is too old; warn about one that is newer than tested.

    Raises:
        SeamError: below the oldest supported version.
    """
    found = host_version()
    if found < OLDEST_HOST:
        raise SeamError(
            f"gptqmodel-eora-ext is not active: it needs gptqmodel >= {OLDEST_HOST}, found {found}. "
            f"pip install -U gptqmodel"
        )
    if found > NEWEST_TESTED_HOST:
        log.warning("gptqmodel %s is newer than the tested %s; its shape is checked, its behaviour is not.",
                    found, NEWEST_TESTED_HOST)  # fmt: skip


def list_seams() -> list[Seam]:
    """The attributes to replace, with what must be true of each."""
    import gptqmodel
    from gptqmodel.looper import awq_processor, gptq_processor, module_looper, qqq_processor
    from gptqmodel.models import auto, loader
    from gptqmodel.models.auto import GPTQModel
    from gptqmodel.models.base import BaseQModel
    from gptqmodel.quantization.config import BaseQuantizeConfig
    from gptqmodel.utils import model

    from . import checkpoint, generate, quantize, triton

    def method(function: Callable[..., Any]) -> Callable[[Any], Any]:
        return lambda original: functools.wraps(original)(
            lambda self, *args, **kwargs: function(original, self, *args, **kwargs)
        )

    def plain(function: Callable[..., Any]) -> Callable[[Any], Any]:
        return lambda original: functools.wraps(original)(lambda *args, **kwargs: function(original, *args, **kwargs))

    def class_method(function: Callable[..., Any]) -> Callable[[Any], Any]:
        def make(original: Any) -> Any:
            raw = original.__func__
            return classmethod(
                functools.wraps(raw)(
                    lambda cls, *args, **kwargs: function(functools.partial(raw, cls), *args, **kwargs)
                )
            )

        return make

    loop_options = ("calibration", "calibration_concat_size", "calibration_sort", "batch_size", "backend",
                    "calibration_concat_separator")  # fmt: skip
    seams = [
        Seam(BaseQModel, "quantize", (*loop_options, "adapter", "adapter_calibration_dataset"),
             method(quantize.quantize)),
        Seam(BaseQModel, "_quantize_weight_only", loop_options, method(quantize.quantize_weight_only)),
        Seam(module_looper, "ModuleLooper", ("model", "processors"), lambda original: quantize.CompensatingLooper),
        Seam(BaseQModel, "save_quantized", ("save_dir", "eora_path"), method(checkpoint.save_quantized)),
        Seam(BaseQuantizeConfig, "from_pretrained", ("save_dir",), class_method(checkpoint.config_from_pretrained)),
        Seam(auto, "_is_supported_quantization_config", ("config",), plain(checkpoint.is_supported)),
        Seam(loader, "gptqmodel_post_init", ("model",), plain(checkpoint.attach_adapters)),
        Seam(model, "select_quant_linear", ("backend", "adapter", "pack"), plain(triton.candidates)),
        Seam(GPTQModel.adapter, "generate", ("adapter", "model_id_or_path", "quantized_model_id_or_path",
                                             "calibration_dataset"), class_method(generate.generate)),
        Seam(gptqmodel, "_default_cpu_workers", (), plain(lambda original: max(LEAST_CPU_WORKERS, original()))),
    ]  # fmt: skip
    for processor in (gptq_processor, qqq_processor, awq_processor):
        seams.append(Seam(processor, "pack_module", ("lock",), plain(_without_lock)))
    return seams


def _without_lock(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """The lock guards two dictionaries that belong to the call alone."""
    kwargs["lock"] = None
    return original(*args, **kwargs)


def kernel_order_problems() -> list[str]:
    """What is wrong with the host's automatic order of kernels."""
    from gptqmodel import BACKEND
    from gptqmodel.quantization import FORMAT, METHOD
    from gptqmodel.utils import importer

    where = "importer.AUTO_BACKEND_KERNEL_MAPPING"
    order = getattr(importer, "AUTO_BACKEND_KERNEL_MAPPING", None)
    if not isinstance(order, dict):
        return [f"{where} is missing"]
    problems = []
    for name in (FORMAT.GPTQ, FORMAT.GPTQ_V2):
        kernels = order.get(METHOD.GPTQ, {}).get(name)
        if not isinstance(kernels, OrderedDict):
            problems.append(f"{where}[{METHOD.GPTQ}][{name}] is no ordered dict of kernels")
        elif BACKEND.GPTQ_TRITON not in kernels:
            problems.append(f"{where}[{METHOD.GPTQ}][{name}] has no {BACKEND.GPTQ_TRITON}")
    return problems


def _register_kernels() -> None:
    """Enter the fused kernels into the order that `BACKEND.AUTO` tries; they refuse all but `EoRA` adapters themselves.

    On a CPU ours comes first. On a GPU it comes before the host's Triton kernel: at 2 and 3 bits nothing faster stands
    before that, and at 4 and 8 bits Marlin and its like keep their place, to whose output the adapter is added in one
    launch. Whether ours would be faster there has not been measured.
    """
    from gptqmodel import BACKEND
    from gptqmodel.quantization import METHOD
    from gptqmodel.utils.importer import AUTO_BACKEND_KERNEL_MAPPING

    from .fused import EoRAFusedLinear
    from .triton import EoRATritonLinear

    for name in EoRAFusedLinear.SUPPORTS_FORMATS:
        order = AUTO_BACKEND_KERNEL_MAPPING[METHOD.GPTQ][name]
        later = list(order.items())
        later = later[[backend for backend, _ in later].index(BACKEND.GPTQ_TRITON) :]
        order[FUSED_KEY] = EoRAFusedLinear
        order.move_to_end(FUSED_KEY, last=False)
        order[TRITON_KEY] = EoRATritonLinear
        for backend, _ in later:
            order.move_to_end(backend)
        for key in (FUSED_KEY, TRITON_KEY):
            _undo.append(functools.partial(order.pop, key, None))


def _register_adapter() -> None:
    from gptqmodel.adapter.adapter import ADAPTER_MAPPING, Lora
    from gptqmodel.nn_modules.qlinear import BaseQuantLinear

    from .adapter import EoRA

    ADAPTER_MAPPING[EoRA.name()] = EoRA
    _undo.append(lambda: ADAPTER_MAPPING.pop(EoRA.name(), None))
    for kernel in _subclasses(BaseQuantLinear):
        # Some kernels share one list object.
        accepted = kernel.SUPPORTS_ADAPTERS
        if accepted and Lora in accepted and EoRA not in accepted:
            accepted.append(EoRA)
            _undo.append(functools.partial(accepted.remove, EoRA))


def _subclasses(cls: Any) -> list[Any]:
    found: list[Any] = []
    for subclass in cls.__subclasses__():
        found += [subclass, *_subclasses(subclass)]
    return found
