"""`model.quantize(calibration, adapter=EoRA(rank=…))`: what happens around GPTQModel's own `quantize`."""

from __future__ import annotations

import contextlib
import functools
import inspect
import logging
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from gptqmodel.looper import loop_processor
from gptqmodel.looper.awq_processor import AWQProcessor
from gptqmodel.looper.gptq_processor import GPTQProcessor
from gptqmodel.looper.loop_processor import LoopProcessor
from gptqmodel.looper.module_looper import ModuleLooper
from gptqmodel.looper.qqq_processor import QQQProcessor
from gptqmodel.quantization.config import METHOD, RTNConfig

from ...adapter.vocabulary import AUTO, UNIFORM
from ...loop.budgeting import budgeted_rank
from ...loop.run import counted_tokens, fingerprint_windows
from ...loop.weights import check_weight_files
from .adapter import EoRA
from .checkpoint_compensation import CheckpointCompensation
from .compensation import AWQCompensation, Compensation
from .distributed import SharedCompensation, check_shared, share_windows
from .full_precision_inputs import FullPrecisionInputs
from .guard import Guarded
from .known_weights import CheckpointProcessor, RTNProcessor
from .methods import ROTATION, not_in_loop
from .modules import check_experts, module_shapes
from .planned import check_plan, warn_if_dominated
from .pruning import PruningCompensation, PruningProcessor
from .refining import joined_windows
from .resume import asked_of, keeping_of
from .run import CompensationRun, batches_required, check_token_ids, rounds_to_make
from .shared_resume import keeper_of
from .sparse_gptq import forecast_jointly
from .survey import allocate_ranks

log = logging.getLogger(__name__)

# Attribute of GPTQModel's model object: the run under way, and after it the adapter that `save()` writes.
RUN_ATTRIBUTE = "_eora_run"
# Another one: the pattern that GPTQ is to prune to as it quantises.
PATTERN_ATTRIBUTE = "_eora_pattern"
COMPENSATED_PROCESSORS = (
    GPTQProcessor, AWQProcessor, QQQProcessor, RTNProcessor, CheckpointProcessor, PruningProcessor
)  # fmt: skip


def quantize(original: Callable[..., Any], model: Any, *args: Any, **kwargs: Any) -> Any:
    """Run `original` (GPTQModel's `quantize`) with compensation when the adapter is an `EoRA`.

    While it runs, the host sees no adapter, so that its own second pass over the data and its branches for `Lora` stay
    off; `CompensatingLooper` finds the run on the model. With `checkpoint=CheckpointConfig(path=…)` finished layers are
    kept there, and the same call goes on after them (`resume`); once the model is saved, what was kept is removed.

    Args:
        original: GPTQModel's `quantize`.
        model: GPTQModel's model object; the other arguments are those of its `quantize`.

    Raises:
        ValueError: for a plan or a budget that does not fit, broken weights, or calibration data that is empty or of
            another tokenizer.
        NotImplementedError: for a method or an option that compensation cannot be combined with.
        ModuleError: when quantising or compensating a module fails.
        ResumeError: where what an interrupted run has left is of another run.
        Stopped: after Ctrl-C or SIGTERM, with ``checkpoint``.

    Example:
        >>> model.quantize(calibration, adapter=EoRA(rank=64))
    """
    call = inspect.signature(original).bind(model, *args, **kwargs)
    call.apply_defaults()
    options = call.arguments
    config = model.quantize_config
    adapter = options["adapter"] if options["adapter"] is not None else getattr(config, "adapter", None)
    if not isinstance(adapter, EoRA):
        return original(*call.args, **call.kwargs)
    adapter.settle_for_making()
    for name in ("calibration", "adapter_calibration_dataset"):
        # The data is looked at before the host reads it, and a generator can be read only once.
        if isinstance(options[name], Iterator):
            options[name] = list(options[name])
    _check_supported(model, adapter, options)
    check_experts(model)
    if adapter.plan is not None:
        check_plan(model, adapter.plan)
    warn_if_dominated(model, adapter)
    check_weight_files(Path(model.model_local_path))
    own_batches = _prepare(model, options) if options["adapter_calibration_dataset"] is not None else ()
    run = CompensationRun(
        adapter,
        config.dynamic,
        method=str(config.method.value),
        adapter_batches=own_batches,
        rounds=rounds_to_make(adapter, _single_round(config)),
    )
    run.pattern = getattr(model, PATTERN_ATTRIBUTE, None)
    if run.pattern is not None:
        run.method = f"sparsegpt {run.pattern}, {config.bits} bits"
    run.asked = adapter.to_dict()
    run.keeping = keeping_of(options.get("checkpoint"), config)
    options.update(adapter=None, adapter_calibration_dataset=None, checkpoint=None)
    config.adapter = None
    setattr(model, RUN_ATTRIBUTE, run)
    try:
        with logs_out_of_the_way(), batches_required(model), run.keeping or contextlib.nullcontext():
            result = original(*call.args, **call.kwargs)
    except BaseException:
        setattr(model, RUN_ATTRIBUTE, None)
        raise
    finally:
        config.adapter = adapter
    log.info("EoRA: %d adapters in %.1f s.", len(run.factors), run.seconds)
    return result


def _check_supported(model: Any, adapter: EoRA, options: dict[str, Any]) -> None:
    config = model.quantize_config
    reason = ROTATION if config.rotation else not_in_loop(config.method)
    if reason is not None and not isinstance(config, RTNConfig):
        raise NotImplementedError(f"EoRA: cannot compensate while quantising by `{config.method.value}`: {reason}.")
    if adapter.objective == "output" and config.method not in (METHOD.GPTQ,):
        raise NotImplementedError(
            f'EoRA: objective "output" pairs the inputs of the full-precision and the quantised model, which '
            f'`{config.method.value}` rescales. Use objective "eora".'
        )
    if options.get("embed_quant_config") is not None or options.get("embed_quant_mode") is not None:
        raise NotImplementedError("EoRA: embeddings have no linear input to compensate; pass no adapter.")
    calibration = options["calibration"]
    if calibration is None or (hasattr(calibration, "__len__") and len(calibration) == 0):
        raise ValueError(
            "EoRA: the calibration dataset is empty. Compensation weighs the error by the inputs of each module, so "
            "it needs data with every quantisation method, round-to-nearest included: pass texts or token ids."
        )


def _single_round(config: Any) -> str | None:
    """Why modules are quantised once only; None for GPTQ, which can do it again."""
    if isinstance(config, RTNConfig) or config.method != METHOD.GPTQ:
        return "only GPTQ quantises a module by itself, with a Hessian to do it again"
    if config.gptaq is not None or config.foem is not None:
        return "GPTAQ and FOEM keep sums that a quantisation uses up"
    return None


def _prepare(model: Any, options: dict[str, Any]) -> Sequence[dict[str, Any]]:
    dataset = options["adapter_calibration_dataset"]
    if len(dataset) == 0:
        raise ValueError("EoRA: `adapter_calibration_dataset` is empty. Leave it out to use the calibration data.")
    with batches_required(model):
        prepared: Sequence[dict[str, Any]] = model.prepare_dataset(
            calibration_dataset=dataset,
            calibration_dataset_concat_size=options["calibration_concat_size"],
            calibration_dataset_sort=options["calibration_sort"],
            batch_size=options["batch_size"],
            calibration_concat_separator=options["calibration_concat_separator"],
        )
    return prepared


def quantize_weight_only(original: Callable[..., Any], model: Any, **kwargs: Any) -> Any:
    """Run round-to-nearest in the calibrated loop when an EoRA run is under way; else call `original`."""
    run = getattr(model, RUN_ATTRIBUTE, None)
    if run is None:
        return original(model, **kwargs)
    processor = RTNProcessor(
        tokenizer=model.tokenizer,
        qcfg=model.quantize_config,
        calibration=kwargs["calibration"],
        prepare_dataset_func=model.prepare_dataset,
        calibration_concat_size=kwargs["calibration_concat_size"],
        calibration_sort=kwargs["calibration_sort"],
        calibration_concat_separator=kwargs["calibration_concat_separator"],
        batch_size=kwargs["batch_size"],
    )
    return CompensatingLooper(model, processors=[processor]).loop(backend=kwargs["backend"])


@functools.cache
def compensated(processor: Any, shared: bool = False) -> Any:
    """The processor class with compensation mixed in, and what several processes share it by."""
    mixins = {
        AWQProcessor: AWQCompensation,
        CheckpointProcessor: CheckpointCompensation,
        PruningProcessor: PruningCompensation,
    }
    mixin = next((mixins[base] for base in processor.__mro__ if base in mixins), Compensation)
    mixed: tuple[Any, ...] = (mixin,)
    if shared:
        # Between a mixin and `Compensation`, which both build on.
        mixed = (SharedCompensation,) if mixin is Compensation else (mixin, SharedCompensation)
    return type(f"Compensated{processor.__name__}", (Guarded, *mixed, processor), {})


class CompensatingLooper(ModuleLooper):
    """GPTQModel's layer loop; where a run is under way, the processor that quantises also compensates."""

    def __init__(self, model: Any, processors: list[LoopProcessor], *args: Any, **kwargs: Any) -> None:
        run: CompensationRun | None = getattr(model, RUN_ATTRIBUTE, None)
        self._run = run
        if run is not None and not run.factors:
            if run.group is not None:
                check_shared(run, model, processors[-1])
            equip(processors[-1], run, model)
            if run.keeping is not None:
                batch = getattr(processors[-1], "batch_size", None)
                asked = asked_of(run, model, {"batch_size": batch, "weights": run.source})
                keeper = keeper_of(run, run.keeping, asked)
                kwargs["extensions"] = (*kwargs.get("extensions", ()), keeper)
            if run.rank == AUTO and run.options.sensitivity == UNIFORM:
                run.rank = budgeted_rank(module_shapes(model), run.options)
            elif run.rank == AUTO:
                # AWQ's Ŵ belongs to a rescaled W. It cannot be compared with W, so forecasts round W by themselves.
                config = model.quantize_config
                known = getattr(processors[-1], "approximation", None) if config.method != METHOD.AWQ else None
                if run.pattern is not None:
                    known = functools.partial(forecast_jointly, config, run.pattern)
                run.allocation = allocate_ranks(
                    model,
                    run.options,
                    run.adapter_batches or list(processors[-1].calibration_dataset),
                    functools.partial(run.fixed_rank, config),
                    known,
                    run.source,
                    run.together,
                )
            if run.options.objective == "output":
                run.full_precision_inputs = FullPrecisionInputs(processors[-1])
                processors = [run.full_precision_inputs, *processors]
            if run.group is not None:
                share_windows(processors[-1], model, run.group)
        super().__init__(model, processors, *args, **kwargs)

    def _subset_event_dispatch(self, **event: Any) -> None:
        """Called on the main thread as a subset of modules goes from step to step; here workers' errors are raised."""
        super()._subset_event_dispatch(**event)
        if self._run is not None:
            self._run.raise_failure()
            if self._run.group is not None and event["stage"] == "quant_complete":
                self.processors[-1].exchange(event["module_names"])

    def loop(self, *args: Any, **kwargs: Any) -> Any:
        """Run the whole loop. Where a worker's error has made something else fail, the worker's error is raised."""
        try:
            result = super().loop(*args, **kwargs)
        finally:
            if self._run is not None:
                self._run.raise_failure()
        if self._run is not None and self._run.group is not None:
            self._run.seconds = sum(self._run.group.gather(self._run.seconds))
        return result


def equip(processor: LoopProcessor, run: CompensationRun, model: Any) -> None:
    """Turn a processor into one that compensates, and give it the run's batches.

    Raises:
        ValueError: when the calibration data does not fit the model.
        NotImplementedError: for a processor that compensation does not know.
    """
    if not isinstance(processor, COMPENSATED_PROCESSORS):
        raise NotImplementedError(f"EoRA: cannot compensate after {type(processor).__name__}.")
    own_batches = list(processor.calibration_dataset)
    vocabulary = model.model.get_input_embeddings().weight.shape[0]
    check_token_ids([*own_batches, *run.adapter_batches], vocabulary)
    run.describe_calibration(counted_tokens(run.adapter_batches or own_batches))
    if run.own_data:
        run.quantizer_calibration = fingerprint_windows(counted_tokens(own_batches))
    if run.refine is not None:
        run.refine_windows = joined_windows(run.adapter_batches or own_batches, run.refine)
    if run.own_data:
        # One set of forwards serves both: the adapter's batches first, each side's hooks reading only its own.
        processor.calibration_dataset = [*run.adapter_batches, *own_batches]
        processor.num_batches = len(processor.calibration_dataset)
    processor.__class__ = compensated(processor.__class__, run.group is not None)  # type: ignore[arg-type]
    processor.equip(run)


@contextlib.contextmanager
def logs_out_of_the_way() -> Iterator[None]:
    """Have GPTQModel write its processors' logs to a temporary folder, not to `logs` in the working directory."""
    user = os.getuid() if hasattr(os, "getuid") else "user"
    previous = loop_processor._PROJECT_LOG_DIR
    loop_processor._PROJECT_LOG_DIR = Path(tempfile.gettempdir()) / f"gptqmodel_logs_{user}"
    try:
        yield
    finally:
        loop_processor._PROJECT_LOG_DIR = previous
