"""Every place where the plugin touches GPTQModel. Each is checked before any is used, and all can be undone.

| seam | what it does |
|---|---|
| `ADAPTER_MAPPING["eora"]` | the dict form of `QuantizeConfig(adapter=…)` knows the type |
| `SUPPORTS_ADAPTERS` of each kernel | a kernel that takes `Lora` takes `EoRA`; the others refuse it by themselves |
| `BaseQModel.quantize` | takes an `EoRA` out of the host's sight and starts a run |
| `BaseQModel._quantize_weight_only` | round-to-nearest with an `EoRA` runs in the calibrated loop |
| `module_looper.ModuleLooper` | a subclass that equips the processor which quantises, and raises workers' errors |
| `BaseQModel.generate` | weights of an ensemble's members may be told |
| `BaseQModel.save_quantized` | writes the adapter and names it in the checkpoint |
| `BaseQuantizeConfig.from_pretrained` | an adapter with `eora.json` loads as `EoRA`; AutoRound's configs are read |
| `auto._is_supported_quantization_config` | AutoRound's packed checkpoints are quantised ones |
| `importer.AUTO_BACKEND_KERNEL_MAPPING` | `EoRAFusedLinear` comes first, `EoRATritonLinear` before Triton's kernel |
| `model.select_quant_linear` | an explicit `BACKEND.GPTQ_TRITON` with an `EoRA` tries `EoRATritonLinear` first |
| `loader.gptqmodel_post_init` | attaches factors, checked, before kernels are initialised |
| `GPTQModel.load` | an ensemble's folder loads its checkpoint, with the ensemble |
| `GPTQModel.from_quantized` | what loading freed goes back to the system |
| `GPTQModel.adapter.generate` | an `EoRA` is made by the plugin |
| `_default_cpu_workers` | at least 2, which the host's own loader pool needs (it crashes on 1 or 2 processors) |
| `pack_module` of three processors | called without the processor's lock, which deadlocks with the parent module's |

and, on the objects of one run, from its start to its end:

| seam | where | what it does |
|---|---|---|
| `model._eora_run` | `quantize.py` | the run under way, and after it the adapter that `save()` writes |
| `model._eora_pattern` | `prune.py` | the zeros that GPTQ is to make as it quantises |
| a processor's `__class__` | `quantize.equip` | what quantises gets `Compensation` and `Guarded` mixed in |
| `model.prepare_dataset` | `run.py` | calibration data of which nothing is left is refused |
| `GPTQ.quantize` of a task | `rounds.py` | a module is quantised several times, for its adapter |
| the same | `sparse_gptq.py` | a module is pruned and quantised at once |
| `GPTQ.hessian_inverse` of a task | `hessian.py` | its factor has the same bits with any number of threads |
| `loop_processor._PROJECT_LOG_DIR` | `quantize.py` | logs go to a temporary folder, not to `./logs` |
| `model.layer_callback` | `terminal.py` | a command's own progress bar hears of finished layers |
| `logger._suppress_live_renderables` | `terminal.py` | no tables and bars of GPTQModel's beside that |
| `ModuleLooper(extensions=…)` | `resume.py` | GPTQModel's own place for what keeps layers and puts them back |
"""

from __future__ import annotations

import functools
import logging
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

from packaging.version import Version

from ..seam import HostVersion, Seam, SeamError, all_or_none, problem_at, undo_all
from . import installed as record

log = logging.getLogger(__name__)

OLDEST_HOST = Version("7.7.0")
NEWEST_TESTED_HOST = Version("7.7.0")
# The host's own model loader asks its CPU pool for two workers.
LEAST_CPU_WORKERS = 2
# Keys of the plugin's kernels in the host's automatic order, whose other keys are backends. The host uses a key only to
# name in messages what it has tried.
FUSED_KEY = "gptq_eora_fused"
TRITON_KEY = "gptq_eora_triton"


def install_or_log() -> None:
    """Install; a host that cannot be served is logged now, and told again by `EoRA(…)`."""
    try:
        install()
    except SeamError as error:
        record.record_failure(error)
        log.warning("%s", error)


def install() -> None:
    """Put all seams in place, once; all or none.

    Raises:
        SeamError: with every mismatch found, when the host is too old or of another shape; nothing is touched then.
    """
    if record.is_installed():
        return
    host = host_known()
    host.check()
    seams = list_seams()
    host.require([problem for seam in seams if (problem := seam.problem())] + relied_on_problems())
    with all_or_none(record.undo):
        for seam in seams:
            record.undo.append(seam.apply())
        _register_kernels()
        _register_adapter()
    record.record_failure(None)


def installed() -> bool:
    """Whether the seams are in place."""
    return record.is_installed()


def uninstall() -> None:
    """Undo everything `install` did."""
    undo_all(record.undo)


def host_version() -> Version:
    """Version of the installed GPTQModel."""
    from gptqmodel.version import __version__

    return Version(__version__)


def host_known() -> HostVersion:
    """The installed GPTQModel beside those that the plugin knows."""
    return HostVersion("gptqmodel", host_version(), OLDEST_HOST, NEWEST_TESTED_HOST)


def list_seams() -> list[Seam]:
    """The attributes to replace, each with the parameters that it must have."""
    import gptqmodel
    from gptqmodel.looper import awq_processor, gptq_processor, module_looper, qqq_processor
    from gptqmodel.models import auto, loader
    from gptqmodel.models.auto import GPTQModel
    from gptqmodel.models.base import BaseQModel
    from gptqmodel.quantization.config import BaseQuantizeConfig
    from gptqmodel.utils import model

    from . import ensemble, generate, quantize, triton
    from .checkpoint import load, save

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
        Seam(BaseQModel, "generate", ("inputs",), method(ensemble.generate)),
        Seam(BaseQModel, "save_quantized", ("save_dir", "eora_path"), method(save.save_quantized)),
        Seam(BaseQuantizeConfig, "from_pretrained", ("save_dir",), class_method(load.config_from_pretrained)),
        Seam(auto, "_is_supported_quantization_config", ("config",), plain(load.is_supported)),
        Seam(loader, "gptqmodel_post_init", ("model",), plain(load.attach_adapters)),
        Seam(GPTQModel, "load", ("model_id_or_path", "quantize_config"), class_method(load.load)),
        Seam(GPTQModel, "from_quantized", ("model_id_or_path",), class_method(load.from_quantized)),
        Seam(model, "select_quant_linear", ("backend", "adapter", "pack"), plain(triton.candidates)),
        Seam(GPTQModel.adapter, "generate", ("adapter", "model_id_or_path", "quantized_model_id_or_path",
                                             "calibration_dataset"), class_method(generate.generate)),
        Seam(gptqmodel, "_default_cpu_workers", (), plain(lambda original: max(LEAST_CPU_WORKERS, original()))),
    ]  # fmt: skip
    for processor in (gptq_processor, qqq_processor, awq_processor):
        seams.append(Seam(processor, "pack_module", ("lock",), plain(_without_lock)))
    return seams


def _without_lock(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Pack without the lock. It guards two dictionaries that belong to this call alone, so nothing is lost."""
    kwargs["lock"] = None
    return original(*args, **kwargs)


def relied_on_problems() -> list[str]:
    """What is wrong with the host where the plugin relies on it without replacing anything for good."""
    from gptqmodel.looper import checkpoint_modules, extension, gptq_checkpoint, loop_processor, module_looper
    from gptqmodel.models.base import BaseQModel
    from gptqmodel.quantization.gptq import GPTQ
    from gptqmodel.utils import logger

    processor = loop_processor.LoopProcessor
    expected: list[tuple[Any, str, tuple[str, ...]]] = [
        (processor, "preprocess", ("module",)),
        (processor, "begin_shared_input_capture", ("model", "subset_names", "is_lm_head_module")),
        (processor, "end_shared_input_capture", ("subset_names",)),
        (processor, "pre_process_fwd_hook", ("name",)),
        (processor, "process", ("module",)),
        (processor, "submodule_finalize", ("module",)),
        (processor, "current_batch_index", ()),
        (module_looper.ModuleLooper, "_subset_event_dispatch", ("stage",)),
        (module_looper.ModuleLooper, "loop", ()),
        (module_looper.ModuleLooper, "__init__", ("extensions",)),
        (extension.LoopExtensions, "start", ("context",)),
        (extension.LoopExtensions, "publish", ("step", "futures")),
        (processor, "continuation_state_dict", ()),
        (processor, "load_continuation_state_dict", ("state",)),
        (checkpoint_modules, "is_packed_module", ("module",)),
        (checkpoint_modules, "packed_module_spec", ("module", "config")),
        (checkpoint_modules, "restore_packed_module", ("spec", "name", "config", "kernel", "lm_head_name")),
        (gptq_checkpoint, "_checkpoint_quantization_identity", ("config",)),
        (GPTQ, "quantize", ()),
        (GPTQ, "clone_module", ()),
        (GPTQ, "materialize_global_hessian", ()),
        (GPTQ, "clear_shared_hessian_cache", ()),
        (loop_processor, "_PROJECT_LOG_DIR", ()),
        (BaseQModel, "simple_layer_modules", ("model_config", "quantize_config")),
        (BaseQModel, "extract_layers_node", ()),
        (BaseQModel, "prepare_dataset", ("calibration_dataset", "batch_size")),
        (logger, "_suppress_live_renderables", ()),
    ]
    return [problem for place in expected if (problem := problem_at(*place))] + kernel_order_problems()


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
            record.undo.append(functools.partial(order.pop, key, None))


def _register_adapter() -> None:
    """Make the type known to the dict form of `QuantizeConfig`, and to the kernels that take a `Lora`."""
    from gptqmodel.adapter.adapter import ADAPTER_MAPPING, Lora
    from gptqmodel.nn_modules.qlinear import BaseQuantLinear

    from .adapter import EoRA

    ADAPTER_MAPPING[EoRA.name()] = EoRA
    record.undo.append(lambda: ADAPTER_MAPPING.pop(EoRA.name(), None))
    for kernel in _subclasses(BaseQuantLinear):
        # Some kernels share one list object.
        accepted = kernel.SUPPORTS_ADAPTERS
        if accepted and Lora in accepted and EoRA not in accepted:
            accepted.append(EoRA)
            record.undo.append(functools.partial(accepted.remove, EoRA))


def _subclasses(cls: Any) -> list[Any]:
    found: list[Any] = []
    for subclass in cls.__subclasses__():
        found += [subclass, *_subclasses(subclass)]
    return found
