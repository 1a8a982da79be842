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
| `CompressionOrchestrator._quantize_blocks` | keeps finished blocks, and begins after those of an interrupted run |
| `ShardWriter.write`, `_flush_shard` | where blocks are kept: notes a block's tensors; shards stay as large as always |
"""

from __future__ import annotations

import logging
from typing import Any

from packaging.version import Version

from ..seam import HostVersion, SeamError, problem_at

log = logging.getLogger(__name__)

OLDEST_HOST = Version("0.16.0")
NEWEST_TESTED_HOST = Version("0.16.1")


def install_or_log() -> None:
    """Install, or log why this host cannot be served; it then does not know the algorithm."""
    try:
        install()
    except SeamError as error:
        log.warning("%s", error)


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
    host = HostVersion("auto-round", host_version(), OLDEST_HOST, NEWEST_TESTED_HOST)
    host.check()
    host.require(problems())
    if installed():
        return
    from auto_round.algorithms import registry

    from .config import NAME, EoRAConfig
    from .loop import EoRATransform

    try:
        registry.register_algorithm(
            NAME, config_factory=EoRAConfig, summary="Low-rank compensation of each block's quantisation error (EoRA)."
        )
        registry.register_pipeline_member(EoRAConfig)(EoRATransform)
    except BaseException:
        uninstall()
        raise


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
    from auto_round import special_model_handler
    from auto_round.algorithms import composer, registry
    from auto_round.algorithms.quantization import config
    from auto_round.algorithms.transforms import base
    from auto_round.compressors import base as compressors
    from auto_round.compressors import orchestrator, shard_writer
    from auto_round.compressors import utils as compressors_utils
    from auto_round.modeling.fused_moe import replace_modules
    from auto_round.utils import disk_stream_util

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
        (orchestrator.CompressionOrchestrator, "_quantize_blocks",
         ("model", "inputs", "block_names", "q_input", "nblocks", "input_others_extra_blocks", "token_ids",
          "resume_state", "resume_input_ids")),
        (shard_writer.ShardWriter, "write", ("m", "is_finalize")),
        (shard_writer.ShardWriter, "_flush_shard", ()),
        (compressors_utils, "immediate_pack", ("name", "layer_config")),
        (replace_modules, "materialize_model_", ("model",)),
        (disk_stream_util, "get_safetensors_index", ("checkpoint_dir",)),
        (disk_stream_util, "materialize_module", ("module", "module_name", "index", "device")),
        (disk_stream_util, "unfuse_meta_moe_", ("model",)),
        (special_model_handler, "update_module", ("model",)),
    ]  # fmt: skip
    return [problem for place in expected if (problem := problem_at(*place))]
