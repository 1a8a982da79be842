"""`eora prune`: GPTQModel's layer loop with a pruning processor in it, and the model's files written anew."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from gptqmodel import GPTQModel, QuantizeConfig

from ...adapter.checkpoint import replaced_checkpoint
from ...adapter.naming import DEFAULT_FOLDER
from ...adapter.save import save_adapter
from ...formats.names import PRUNING_DETAILS
from ...formats.sparsity import Pattern
from ...loop.changed_weights import ChangedWeights
from ...loop.weights import check_weight_files
from ...plan import without_groups
from ...solve import SPARSEGPT, WANDA
from ...system.files import write_json
from ...system.spill import spilling
from ..jobs import PruneJob
from ..terminal import watch_layers
from .adapter import EoRA
from .known_model import CONFIG
from .modules import check_experts, module_shapes
from .pruning import PruningProcessor
from .quantize import PATTERN_ATTRIBUTE, RUN_ATTRIBUTE, CompensatingLooper, logs_out_of_the_way
from .run import CompensationRun, batches_required, calibrated_by

# Pruned weights stay in memory up to so many bytes; what is beyond that lies in a file until the checkpoint is written.
KEPT_BYTES = 1 << 30


def prune_model(job: PruneJob) -> Path:
    """Prune a model layer by layer, each module by the inputs that what was pruned and compensated before it gives.

    Args:
        job: what to prune, and how. Without an adapter the model is pruned alone.

    Returns:
        The folder: the model's files with zeros in the weights, and the adapter in `eora`.

    Raises:
        ValueError: for a pattern that does not divide a module's inputs, missing data, or broken weights.
        NotImplementedError: for experts that GPTQModel would pass over, or weights that the files hold under other
            names.
        ModuleError: when pruning or compensating a module fails.
    """
    pattern = Pattern.parse(job.pattern)
    # The loop compensates by an adapter; where none is wanted, every module's rank becomes 0.
    adapter = EoRA(**(job.adapter if job.adapter is not None else {"rank": 1}))
    if job.bits is not None:
        return _prune_and_quantise(job, pattern, adapter)
    adapter.settle_for_making()
    with logs_out_of_the_way():
        # Pruned alone, Wanda's modules see what their layer computes before any of them is pruned, as its authors have
        # it: it changes no weight to make up for the zeros, and masks by inputs that are far off cost up to 24 % of
        # perplexity. SparseGPT and an adapter make up for what the modules before have changed.
        whole_layer = job.method == WANDA and job.adapter is None
        config = QuantizeConfig(
            **CONFIG, true_sequential=not whole_layer, dynamic=dict(job.dynamic) if job.dynamic else None
        )
        host = GPTQModel.load(job.model, config, trust_remote_code=job.trust_remote_code)
        check_experts(host)
        native = Path(host.model_local_path)
        check_weight_files(native)
        shapes = module_shapes(host)
        for shape in shapes:
            pattern.check(shape.in_features, shape.name)
        run = CompensationRun(adapter, config.dynamic, method=f"{job.method} {pattern}", rounds=adapter.rounds)
        if job.adapter is None:
            run.options, run.rank = dataclasses.replace(run.options, rank=0), 0
        setattr(host, RUN_ATTRIBUTE, run)
        if job.report is not None:
            watch_layers(host, job.report)
        needed = sum(path.stat().st_size for path in native.glob("*.safetensors"))
        with replaced_checkpoint(job.output, needed=needed) as fresh, spilling(KEPT_BYTES, fresh) as spill:
            changed = ChangedWeights(native, spill)
            changed.check(f"{shape.name}.weight" for shape in shapes)
            with batches_required(host):
                told = calibrated_by(host, job.windows, job.batch_size)
                processor = PruningProcessor(job.method, pattern, changed, **told)
            CompensatingLooper(host, processors=[processor]).loop()
            changed.write(fresh)
            write_json(fresh / PRUNING_DETAILS, _details(job, pattern, run))
            if job.adapter is not None:
                names = [name for name, _ in host.model.named_modules()]
                folder = fresh / DEFAULT_FOLDER
                save_adapter(folder, run.factors, base_model=str(job.output), module_names=names, details=run.details())
    return job.output


def _prune_and_quantise(job: PruneJob, pattern: Pattern, adapter: EoRA) -> Path:
    """SparseGPT's joint form, in the loop of GPTQModel's own GPTQ; the checkpoint is saved as any that it makes."""
    if job.method != SPARSEGPT:
        raise ValueError(
            f"EoRA: pruning and quantising at once is SparseGPT's; got {job.method!r}. Leave the bits out, or quantise "
            f"afterwards."
        )
    settings = {**without_groups(job.group_size), "bits": job.bits, "group_size": job.group_size, "desc_act": False}
    dynamic = dict(job.dynamic or {})
    without = {} if job.adapter is not None else {"+:.*": {"adapter": {"rank": 0}}}
    # Columns keep their order, since groups of a pattern are neighbours.
    config = QuantizeConfig(**{**settings, "act_group_aware": False}, dynamic={**dynamic, **without} or None)
    host = GPTQModel.load(job.model, config, trust_remote_code=job.trust_remote_code)
    for shape in module_shapes(host):
        pattern.check(shape.in_features, shape.name)
    if job.report is not None:
        watch_layers(host, job.report)
    setattr(host, PATTERN_ATTRIBUTE, pattern)
    host.quantize(list(job.windows), batch_size=job.batch_size, adapter=adapter)
    run = getattr(host, RUN_ATTRIBUTE)
    if job.adapter is None:
        # What is saved is the host's own: a checkpoint that names no adapter.
        setattr(host, RUN_ATTRIBUTE, None)
        config.adapter, config.dynamic = None, dynamic or None
    host.save(str(job.output))
    write_json(job.output / PRUNING_DETAILS, _details(job, pattern, run))
    return job.output


def _details(job: PruneJob, pattern: Pattern, run: CompensationRun) -> dict[str, Any]:
    """How a model was pruned, for whoever finds its folder."""
    told = run.details()
    return {
        "method": job.method,
        "pattern": str(pattern),
        **({"bits": job.bits, "group_size": job.group_size} if job.bits is not None else {}),
        "base_model": job.model,
        "calibration": told["calibration"],
        "versions": told["versions"],
        "modules": {name: {"signal": one.signal, "error": one.error_before} for name, one in run.factors.items()},
    }
