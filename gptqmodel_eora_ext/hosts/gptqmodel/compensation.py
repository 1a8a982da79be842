"""Compensation inside GPTQModel's layer loop: right after a module is quantised, before anything reads its output.

`Compensation` is mixed into whatever processor quantises. The module's weight becomes Ŵ + BA for the rest of the
layer's forwards, so that later modules and layers are calibrated on what the compensated model computes. Before the
module is packed, its weight becomes Ŵ again.
"""

from __future__ import annotations

import functools
import logging
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from gptqmodel.looper.named_module import NamedModule
from gptqmodel.quantization.gptq import GPTQ

from ...adapter.compensate import compensate
from ...adapter.factors import ModuleFactors
from ...adapter.layers import is_linear, oriented
from ...capture import CrossMoment, OutputErrorMoment, RoutedRows, SecondMoment, require_finite, shared_leaders
from ...loop.place import put_in_place
from ...system.memory import release_free_memory
from .hessian import invert_by_products
from .rounds import JointRounds
from .run import CompensationRun
from .sparse_gptq import prune_jointly

log = logging.getLogger(__name__)

Moment = SecondMoment | OutputErrorMoment

# Key in `NamedModule.state` for Ŵ while the weight in use is Ŵ + BA.
QUANTIZED_WEIGHT = "eora_quantized_weight"


class Compensation:
    """Mixin for a `LoopProcessor` that quantises one module per `process()` call.

    In memory for the subset under way: one in × in float32 sum for each input that its modules read, and Ŵ of each
    module on the CPU until it is packed.
    """

    run: CompensationRun
    tasks: Any
    qcfg: Any
    lock: Any
    _mask_tls: Any
    current_batch_index: Callable[[], int | None]

    def equip(self, run: CompensationRun) -> None:
        """Start a run: fresh accumulators."""
        self.run = run
        self._moments: dict[str, Moment] = {}
        self._cross_moments: dict[str, CrossMoment] = {}
        self._leaders: dict[str, str] = {}
        self._modules: dict[str, NamedModule] = {}
        self._routed: RoutedRows | None = None
        self._threads = self._threads_each = torch.get_num_threads()

    # Capture ---------------------------------------------------------------------------------------------------

    def preprocess(self, module: NamedModule, *args: Any, **kwargs: Any) -> None:
        super().preprocess(module, *args, **kwargs)  # type: ignore[misc]
        if module.state.get("in_features"):
            self._modules[module.name] = module

    def begin_shared_input_capture(
        self, model: Any, subset_names: list[str], is_lm_head_module: bool = False
    ) -> dict[str, str]:
        """Called before hooks are set for a subset: drop the last subset's sums, and elect for each input that several
        modules read the one that captures it."""
        host_leaders = super().begin_shared_input_capture(model, subset_names, is_lm_head_module)  # type: ignore[misc]
        self._trim_memory()
        if self.run.allocation is not None:
            self.run.allocation.begin([self._modules[name].full_name for name in subset_names if name in self._modules])
        widths = {name: _width(self._modules[name]) for name in subset_names if name in self._modules}
        self._watch_routing(model, next(iter(widths), None))
        self._threads = torch.get_num_threads()
        self._threads_each = max(1, self._threads // max(1, len(widths)))
        self._moments.clear()
        self._cross_moments.clear()
        self._leaders = {} if is_lm_head_module else shared_leaders(list(widths), _shared_groups(model), widths)
        alone = set(widths) - set(self._leaders) - set(self._leaders.values())
        for name, width in widths.items():
            if name in self._leaders:
                continue
            self._moments[name] = self._new_moment(self._modules[name], alone=name in alone)
            if self.run.full_precision_inputs is not None and not is_lm_head_module:
                self._cross_moments[name] = CrossMoment(width, self._modules[name].full_name)
        return host_leaders

    def _watch_routing(self, model: Any, name: str | None) -> None:
        """Have a layer's modules watched for padding among the tokens that are routed to them, until `_end_watch`."""
        self._end_watch()
        if name is not None:
            # A head is in no layer, and is called by itself.
            layer = layer_of(self._modules[name]) or name
            self._routed = RoutedRows(model.model.get_submodule(layer), self._batch_mask)
            self._routed.__enter__()

    def _end_watch(self) -> None:
        if self._routed is not None:
            self._routed.__exit__()
            self._routed = None

    def _batch_mask(self) -> torch.Tensor | None:
        mask = getattr(getattr(self, "_mask_tls", None), "value", None)
        return mask if torch.is_tensor(mask) else None

    def _trim_memory(self) -> None:
        release_free_memory()

    def _new_moment(self, module: NamedModule, *, alone: bool) -> Moment:
        """An empty sum for a module's inputs, which it shares with others unless ``alone``."""
        return SecondMoment(_width(module), module.full_name)

    def end_shared_input_capture(self, subset_names: list[str]) -> Any:
        """Called once the subset's forwards are done: refuse broken activations before the host quantises with them.

        It runs on the main thread, where an error reaches the caller; one in a worker thread ends the process.
        """
        telemetry = super().end_shared_input_capture(subset_names)  # type: ignore[misc]
        self._end_watch()
        for name in subset_names:
            if name not in self._modules:
                continue
            if self._reads_hessian(name):
                task = self.tasks[name]
                task.materialize_global_hessian()
                require_finite(task.H.diagonal(), self._modules[name].full_name)
            elif name in self._moments:
                self._moments[name].require_finite()
        return telemetry

    def _reads_hessian(self, name: str) -> bool:
        """Whether the quantiser's own Hessian is the second moment wanted. GPTAQ and FOEM keep other sums."""
        return type(self.tasks.get(name)) is GPTQ and not self.run.own_data

    def pre_process_fwd_hook(self, name: str) -> Callable[..., None]:
        """The host's capture hook, with the adapter's beside it where the host keeps no usable second moment."""
        host_hook = super().pre_process_fwd_hook(name)  # type: ignore[misc]
        moment = None if self._reads_hessian(name) else self._moments.get(name)

        def hook(module: torch.nn.Module, inputs: tuple[torch.Tensor, ...], output: Any) -> None:
            batch = self.current_batch_index()
            rows = inputs[0]
            keep = self._keep_mask(name, rows)
            if self.run.for_quantiser(batch):
                self._call_host(host_hook, name, module, inputs, output, keep)
            if not self.run.for_adapter(batch):
                return
            with self.lock:
                if moment is not None:
                    moment.add(rows, keep)
                self._add_cross(name, batch, rows, keep)

        return hook

    def _call_host(
        self,
        host_hook: Callable[..., Any],
        name: str,
        module: torch.nn.Module,
        inputs: tuple[torch.Tensor, ...],
        output: Any,
        keep: torch.Tensor | None,
    ) -> None:
        """GPTQ leaves out padding of windows, but not among the tokens that are routed to an expert."""
        rows = inputs[0]
        if keep is not None and rows.ndim == 2 and self._reads_hessian(name):
            if not keep.any():
                return
            inputs, output = (rows[keep], *inputs[1:]), output[keep] if torch.is_tensor(output) else output
        host_hook(module, inputs, output)

    def _add_cross(self, name: str, batch: int | None, rows: torch.Tensor, keep: torch.Tensor | None) -> None:
        """Pair the inputs with the full-precision model's. An expert may get other tokens in the two models; then its
        inputs cannot be paired, and what was summed is dropped."""
        full_precision_inputs = self.run.full_precision_inputs
        if full_precision_inputs is None or name not in self._cross_moments:
            return
        original = full_precision_inputs.of(name, batch)
        if original is None or original.shape != rows.shape:
            del self._cross_moments[name]
        else:
            self._cross_moments[name].add(original, rows, keep)

    def _keep_mask(self, name: str, rows: torch.Tensor) -> torch.Tensor | None:
        """Which rows are no padding; None where all count, or where the host has left padding out already."""
        return self._routed.real(name, rows) if self._routed is not None else None

    def _moment(self, name: str) -> Moment:
        """The second moment of a module's inputs, one object for all modules that read the same input.

        GPTQ damps its Hessian in place while quantising, so its sum is copied first, once per group.
        """
        leader = self._leaders.get(name, name)
        with self.lock:
            moment = self._moments[leader]
            if isinstance(moment, SecondMoment) and self._reads_hessian(name) and not moment.tokens:
                task = self.tasks[name]
                if task.nsamples:
                    # GPTQ keeps 2/n · Σ x xᵀ, padded columns last.
                    total = task.H[: moment.in_features, : moment.in_features] * (task.nsamples / 2)
                    moment.add_sum(total, int(task.nsamples))
            return moment

    # Compensation ----------------------------------------------------------------------------------------------

    def process(self, module: NamedModule, *args: Any, **kwargs: Any) -> None:
        """Quantise by the host's processor, then compensate."""
        linear = module.module
        if module.name not in self._modules or not is_linear(linear):
            log.warning("%s: EoRA compensates linear layers, not %s; it stays without an adapter.",
                        module.full_name, type(linear).__name__)  # fmt: skip
            super().process(module, *args, **kwargs)  # type: ignore[misc]
            return
        weight = linear.weight.data
        moment = self._moment(module.name)
        solve = functools.partial(self._solve, module, weight, moment)
        if isinstance(task := self.tasks.get(module.name), GPTQ):
            invert_by_products(task)
        if self.run.pattern is not None:
            prune_jointly(self.tasks[module.name], self.run.pattern)
        rounds = JointRounds(self.tasks[module.name], self.run.rounds, solve) if self.run.rounds > 1 else None
        super().process(module, *args, **kwargs)  # type: ignore[misc]
        kept = rounds.factors if rounds is not None else None
        self._apply(module, kept if kept is not None else solve(linear.weight.data))

    def _solve(
        self, module: NamedModule, weight: torch.Tensor, moment: Moment, quantized: torch.Tensor, first: bool = True
    ) -> ModuleFactors:
        """Factors for a module's Ŵ, which with several rounds is not the ``first``."""
        start = time.perf_counter()
        # A subset's modules are compensated at once; together they would take the processors several times over.
        torch.set_num_threads(self._threads_each)
        try:
            return compensate(
                oriented(module.module, weight),
                oriented(module.module, quantized),
                moment,
                self.run.recipe_for(self.qcfg, module.full_name, first=first),
                name=module.full_name,
                cross_moment=self._cross_moments.get(self._leaders.get(module.name, module.name)),
            )
        finally:
            torch.set_num_threads(self._threads)
            self.run.took(time.perf_counter() - start)

    def _apply(self, module: NamedModule, factors: ModuleFactors) -> None:
        """Have the module compute Ŵ + BA until it is packed."""
        linear = module.module
        module.state[QUANTIZED_WEIGHT] = put_in_place(linear, factors).to("cpu")
        self.run.record(module.full_name, factors)

    def submodule_finalize(self, module: NamedModule, *args: Any, **kwargs: Any) -> None:
        """Put Ŵ back for the packer."""
        quantized = module.state.pop(QUANTIZED_WEIGHT, None)
        if quantized is not None:
            module.module.weight.data = quantized
        super().submodule_finalize(module, *args, **kwargs)  # type: ignore[misc]


class AWQCompensation(Compensation):
    """AWQ quantises a layer's modules together, after moving scales s between a module's input and its weight.

    The captured inputs are x; the quantised model feeds x / s, and the weight to reproduce is W diag(s) before
    clipping. So C becomes diag(1/s) C diag(1/s), and W is read between scaling and clipping.
    """

    def equip(self, run: CompensationRun) -> None:
        super().equip(run)
        self._layer_moments: dict[str, SecondMoment] = {}
        self._scaled_weights: dict[str, torch.Tensor] = {}

    def process(self, module: NamedModule, *args: Any, **kwargs: Any) -> None:
        if module.name in self._modules:
            moment = self._moment(module.name)
            assert isinstance(moment, SecondMoment)
            self._layer_moments[module.name] = moment
        # The last module's call quantises the whole layer, through `apply_quant`, which compensates.
        super(Compensation, self).process(module, *args, **kwargs)  # type: ignore[misc]

    def _search_best_clip(self, layer: torch.nn.Module, named_linears: Mapping[str, Any], input_feat: Any) -> Any:
        for name, linear in named_linears.items():
            self._scaled_weights[name] = linear.weight.data.clone()
        return super()._search_best_clip(layer, named_linears, input_feat)  # type: ignore[misc]

    def apply_quant(self, named_linears: dict[str, NamedModule], scales_list: list[Any]) -> None:
        targets = {
            name: self._scaled_weights.pop(name, module.module.weight.data) for name, module in named_linears.items()
        }
        super().apply_quant(named_linears, scales_list)  # type: ignore[misc]
        for name, module in named_linears.items():
            moment = self._layer_moments.pop(name)
            moment = moment.rescaled(_awq_scales(scales_list, module, moment.in_features), module.full_name)
            self._apply(module, self._solve(module, targets[name], moment, module.module.weight.data))


def _awq_scales(scales_list: list[Any], module: NamedModule, in_features: int) -> torch.Tensor:
    """Product of the scales that AWQ moved into this module's input columns."""
    total = torch.ones(in_features)
    for _previous, layer_names, scales, _loss in scales_list:
        if module.full_name in layer_names:
            total *= scales.reshape(-1).to(device="cpu", dtype=torch.float32)
    return total


def layer_of(module: NamedModule) -> str:
    """Full name of the layer that a module is in; empty for one that is in none."""
    return str(module.full_name.removesuffix(module.name).removesuffix("."))


def _width(module: NamedModule) -> int:
    return int(module.state["in_features"])


def _shared_groups(model: Any) -> list[list[str]]:
    """Groups of module names that GPTQModel's model definition marks as reading one input."""
    plan = model.shared_input_plan(
        model_config=getattr(model.model, "config", None), quantize_config=model.quantize_config
    )
    return [list(group.modules) for group in plan.shared_groups if group.explicit] if plan else []
