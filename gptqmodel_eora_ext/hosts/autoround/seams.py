"""Every place where the plugin touches AutoRound. Each is checked before any is used.

| seam | what it does |
|---|---|
| `registry.register_algorithm("eora")` | the name, its config, and with it the flags of the command line |
| `registry.register_pipeline_member` | the config's member of the block loop, `loop.EoRATransform` |

and, on the objects of one run, from its start to its end (`loop.py`):

| seam | what it does |
|---|---|
| `AlgorithmComposer.compress_block` | tells a block's inputs, and when its outputs have been computed |
| `BaseOrchestrator.save_quantized` | writes the adapter beside the checkpoint |
"""

from __future__ import annotations

import inspect
import logging
from typing import Any

from packaging.version import Version

from .. import SeamError

log = logging.getLogger(__name__)

OLDEST_HOST = Version("0.16.0")
NEWEST_TESTED_HOST = Version("0.16.1")

_failure: SeamError | None = None


def install_or_log() -> None:
    """Install; a host that cannot be served is logged now, and told again by `require_installed`."""
    global _failure
    try:
        install()
    except SeamError as error:
        _failure = error
        log.warning("%s", error)


def require_installed() -> None:
    """Install if the autoload did not, for instance because it is switched off.

    Raises:
        SeamError: when the installed AutoRound cannot be served.
    """
    if _failure is not None:
        raise _failure
    install()


def installed() -> bool:
    """Whether AutoRound knows the algorithm."""
    from auto_round.algorithms import registry

    from .config import NAME

    return NAME in registry._ALG_REGISTRY


def install() -> None:
    """Register the algorithm, once.

    Raises:
        SeamError: with every mismatch found, when the host is too old or of another shape; nothing is registered then.
    """
    found = host_version()
    if found < OLDEST_HOST:
        raise SeamError(
            f"gptqmodel-eora-ext is not active in AutoRound: it needs auto-round >= {OLDEST_HOST}, found {found}. "
            f"pip install -U auto-round"
        )
    missing = problems()
    if missing:
        raise SeamError(
            f"gptqmodel-eora-ext is not active in AutoRound: auto-round {found} differs from the tested "
            f"{NEWEST_TESTED_HOST}: {'; '.join(missing)}. Install auto-round=={NEWEST_TESTED_HOST}, or a newer "
            f"gptqmodel-eora-ext."
        )
    if found > NEWEST_TESTED_HOST:
        log.warning("auto-round %s is newer than the tested %s; its shape is checked, its behaviour is not.",
                    found, NEWEST_TESTED_HOST)  # fmt: skip
    if installed():
        return
    from auto_round.algorithms import registry

    from .config import NAME, EoRAConfig
    from .loop import EoRATransform

    registry.register_algorithm(
        NAME, config_factory=EoRAConfig, summary="Low-rank compensation of each block's quantisation error (EoRA)."
    )
    registry.register_pipeline_member(EoRAConfig)(EoRATransform)


def uninstall() -> None:
    """Undo what `install` did."""
    from auto_round.algorithms import registry

    from .config import NAME, EoRAConfig

    registry._ALG_REGISTRY.pop(NAME, None)
    registry._ALIAS_TO_NAME.pop(NAME, None)
    registry._CONFIG_IMPL_REGISTRY.pop(EoRAConfig, None)


def host_version() -> Version:
    """Version of the installed AutoRound."""
    from auto_round.version import __version__

    return Version(__version__)


def problems() -> list[str]:
    """What is wrong with the host at the places that the plugin uses."""
    from auto_round.algorithms import composer, registry
    from auto_round.algorithms.quantization import config
    from auto_round.algorithms.transforms import base
    from auto_round.compressors import base as compressors

    expected: list[tuple[Any, str, tuple[str, ...]]] = [
        (registry, "register_algorithm", ("name", "config_factory", "summary")),
        (registry, "register_pipeline_member", ("config_cls",)),
        (registry, "_ALG_REGISTRY", ()),
        (registry, "_ALIAS_TO_NAME", ()),
        (registry, "_CONFIG_IMPL_REGISTRY", ()),
        (config, "QuantizationConfig", ("scheme",)),
        (base.BasePreprocessor, "pre_quantize_block", ("ctx",)),
        (base.BasePreprocessor, "post_quantize_block", ("ctx",)),
        (base.BasePreprocessor, "prepare_run", ("composer",)),
        (base.BasePreprocessor, "finalize_run", ()),
        (composer.AlgorithmComposer, "compress_block",
         ("block", "fp_inputs", "input_others", "block_ctx", "q_inputs", "input_ids")),
        (compressors.BaseOrchestrator, "save_quantized", ("output_dir", "return_folders")),
    ]  # fmt: skip
    found = []
    for owner, name, parameters in expected:
        value = getattr(owner, name, None)
        where = f"{getattr(owner, '__qualname__', owner.__name__)}.{name}"
        if value is None:
            found.append(f"{where} is missing")
        elif parameters and (missing := set(parameters) - set(inspect.signature(value).parameters)):
            found.append(f"{where} lacks the parameters {sorted(missing)}")
    return found
