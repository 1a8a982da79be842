"""GPTQModel's layer loop in several processes: each runs its windows and solves its modules, all hold the same model.

Every process runs the whole loop over the layers, on its share of the calibration windows. What the loop does between a
subset's forwards and its quantisation happens in three steps here:

1. Sums of inputs (GPTQ's Hessian, or the adapter's second moment) are passed on from process to process
   (`capture.ordered`), to those that need them, with the bits that one process would sum.
2. The subset's modules were dealt out by what they cost; each process quantises and compensates its own.
3. Ŵ, its scales, the factors and what a budget was spent on go from each module's owner to all, so that all go on
   with the same layer. Rank 0 packs and saves; the others let go of a layer's weights when it is done.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import torch
from gptqmodel.looper.gptq_processor import GPTQProcessor
from gptqmodel.looper.named_module import NamedModule
from gptqmodel.quantization.gptq import GPTQ

from ...adapter.carried import carried, received
from ...adapter.layers import is_linear, solving_cost
from ...capture import OrderedMoment, OrderedOutputError, OutputErrorMoment, chained, panels_of
from ...loop.shared import check_enough, check_same
from ...system.distributed import deal, share
from ...system.group import Group
from .compensation import QUANTIZED_WEIGHT, Compensation
from .known_weights import CheckpointProcessor, RTNProcessor, let_go
from .run import CompensationRun

# What GPTQModel keeps of a module for its packer.
PACKED_STATE = ("q_scales", "q_zeros", "q_g_idx")
# Processors that share their work; others are refused.
SHARING = (GPTQProcessor, CheckpointProcessor, RTNProcessor)


# What decides the weights, of GPTQModel's config.
COMPARED = ("method", "format", "bits", "group_size", "sym", "desc_act", "act_group_aware", "mse", "damp_percent",
            "damp_auto_increment", "true_sequential", "static_groups", "dynamic")  # fmt: skip


def check_shared(run: CompensationRun, model: Any, processor: Any) -> None:
    """Refuse to begin what cannot be shared out, or what processes were started on differently.

    Raises:
        ValueError: naming what differs and the ranks.
        NotImplementedError: naming what cannot be shared, and what can.
    """
    assert run.group is not None
    run.group.at("comparing models, data and options")
    _check_shareable(processor, run)
    options = {name: getattr(processor.qcfg, name, None) for name in COMPARED} | asdict(run.options)
    options["rounds"] = run.rounds
    options["layers between two that are kept"] = None if run.keeping is None else run.keeping.every
    check_same(run.group, str(model.model_local_path), "gptqmodel", options, processor.calibration_dataset)


def _check_shareable(processor: Any, run: CompensationRun) -> None:
    config = processor.qcfg
    reason = None
    if not isinstance(processor, SHARING) or run.pattern is not None:
        reason = f"what `{type(processor).__name__}` does"
    elif isinstance(processor, GPTQProcessor) and (config.gptaq is not None or config.foem is not None):
        reason = "GPTAQ and FOEM, which keep sums of their own,"
    elif (chunks := getattr(config, "hessian", None)) and (chunks.chunk_size or chunks.chunk_bytes):
        reason = "a Hessian in chunks (`QuantizeConfig.hessian`)"
    elif run.options.objective == "output":
        reason = 'objective "output"'
    elif run.own_data:
        reason = "`adapter_calibration_dataset`"
    elif config.lm_head:
        reason = "`lm_head=True`"
    elif getattr(config, "moe", None) is not None:
        reason = "GPTQModel's `moe` options"
    if reason is not None:
        raise NotImplementedError(
            f"EoRA: {reason} cannot be shared out between processes. GPTQ, RTN and finished checkpoints can, with a "
            f"rank or a budget; start the others without torchrun."
        )


def share_windows(processor: Any, model: Any, group: Group) -> None:
    """Leave a processor the batches of this process alone. Only rank 0 keeps finished modules on disk, to save them.

    Raises:
        ValueError: for fewer batches than processes.
    """
    batches = list(processor.calibration_dataset)
    check_enough(len(batches), group.size, "calibration batches")
    mine = share(len(batches), group.size, group.rank)
    processor.calibration_dataset = batches[mine.start : mine.stop]
    processor.num_batches = len(mine)
    if not group.is_first:
        model.quantize_config.offload_to_disk = False


class OrderedHessian:
    """Takes the place of `add_batch` of one `GPTQ` task: rows are kept, and added in the order of one process.

    Args:
        task: of a linear module.

    Raises:
        NotImplementedError: for a convolution.
    """

    def __init__(self, task: GPTQ) -> None:
        if not is_linear(task.module):
            raise NotImplementedError(
                f"EoRA: {type(task.module).__name__} modules cannot be shared out between processes. Leave them out "
                f'(`dynamic={{"-:…": {{}}}}`), or start without torchrun.'
            )
        self._task = task
        self._rows: list[torch.Tensor] = []
        self._calls = 0
        task.add_batch = self.add_batch

    def add_batch(self, inp: torch.Tensor, out: torch.Tensor, batch_index: int | None = None) -> None:
        """Keep a batch, in its own dtype, on the CPU: see `GPTQ.add_batch`."""
        rows = inp.reshape(-1, inp.shape[-1])
        if len(rows):
            self._rows.append(rows.to("cpu", copy=True))
            self._calls += 1

    def merge(self, group: Group, targets: Collection[int]) -> None:
        """Have the task hold the sum over all processes, in those of ``targets``; the counts in all."""
        task = self._task

        def add(panel: torch.Tensor, first: int, columns: slice) -> None:
            for rows in self._rows:
                # As `GPTQ.process_batch` does: padded columns last, in float32, each batch's product by itself.
                wide = torch.nn.functional.pad(rows.to(panel.device), (0, task._tp_pad_cols)).to(torch.float32)
                panel.add_(torch.matmul(wide.T, wide[:, columns]))

        total = chained(group, task.columns, panels_of(task.columns, group.size), add, targets)
        told = group.gather([sum(map(len, self._rows)), self._calls])
        self._rows.clear()
        tokens = sum(one for one, _ in told)
        with task.lock:
            task.fwd_counter = sum(calls for _, calls in told)
            task.nsamples = tokens
            if total is not None and tokens:
                task._device_hessian_partials[total.device] = total
                task._device_sample_counts[total.device] = tokens
                task._hessian_dirty = True


class SharedCompensation(Compensation):
    """Mixed in above `Compensation` where several processes share a run.

    In memory besides: the rows that this process's windows give the modules of a subset, on the CPU in their own dtype.
    """

    log: list[dict[str, Any]]

    def equip(self, run: CompensationRun) -> None:
        assert run.group is not None
        self._group: Group = run.group
        self._loads = [0.0] * self._group.size
        self._owners: dict[str, int] = {}
        self._hessians: dict[str, OrderedHessian] = {}
        super().equip(run)

    def begin_shared_input_capture(
        self, model: Any, subset_names: list[str], is_lm_head_module: bool = False
    ) -> dict[str, str]:
        names = [name for name in subset_names if name in self._modules]
        if names:
            self._group.at(f"{self._modules[names[0]].full_name} and what reads with it: calibration windows")
        leaders = super().begin_shared_input_capture(model, subset_names, is_lm_head_module)
        for name in subset_names:
            if name not in self._modules and name in self.tasks:
                # Its sums would be those of this process's windows alone.
                raise NotImplementedError(
                    f"EoRA: {name} has no linear input, and cannot be shared out between processes. Leave it out "
                    f'(`dynamic={{"-:…": {{}}}}`), or start without torchrun.'
                )
        weights = {name: self._modules[name].module.weight for name in names}
        costs = [solving_cost(*weights[name].shape) for name in names]
        self._owners = dict(zip(names, deal(costs, self._loads), strict=True))
        self._hessians = {}
        for name, moment in list(self._moments.items()):
            if self._reads_hessian(name):
                self._hessians[name] = OrderedHessian(self.tasks[name])
            elif isinstance(moment, OutputErrorMoment):
                self._moments[name] = OrderedOutputError(moment)
            else:
                self._moments[name] = OrderedMoment(moment.in_features, moment.name)
        return leaders

    def _targets(self, leader: str) -> list[int]:
        """Ranks that solve a module which reads the input of ``leader``."""
        return sorted({owner for name, owner in self._owners.items() if self._leaders.get(name, name) == leader})

    def _is_mine(self, name: str) -> bool:
        return self._owners.get(name, self._group.rank) == self._group.rank

    def end_shared_input_capture(self, subset_names: list[str]) -> Any:
        self.run.raise_failure()
        self._group.at("adding up inputs")
        for name, moment in self._moments.items():
            if name in self._hessians:
                self._hessians[name].merge(self._group, self._targets(name))
            else:
                assert isinstance(moment, OrderedMoment | OrderedOutputError)
                moment.merge(self._group, self._targets(name))
        self._hessians = {}
        mine = [name for name in subset_names if self._is_mine(name)]
        self._group.at("solving " + (", ".join(self._modules[name].full_name for name in mine if name in self._modules)
                                     or "nothing"))  # fmt: skip
        with self.lock:
            host_leaders = getattr(self, "_shared_input_leaders", {})
            # Followers whose Hessian is wanted here alone take a copy of their leader's.
            self._shared_input_leaders = {name: leader for name, leader in host_leaders.items() if name in mine}
        return super().end_shared_input_capture(mine)

    def process(self, module: NamedModule, *args: Any, **kwargs: Any) -> None:
        """Quantise and compensate a module of this process; another's comes by `exchange`."""
        if self._is_mine(module.name):
            super().process(module, *args, **kwargs)
        elif isinstance(self.tasks.get(module.name), GPTQ):
            with self.lock:
                self.tasks[module.name].free()

    def exchange(self, names: Sequence[str]) -> None:
        """Give every process what each has made of a subset's modules; called on the main thread once all are done."""
        known = [name for name in names if name in self._owners and is_linear(self._modules[name].module)]
        self._group.at(f"exchanging {len(known)} modules")
        made = {name: self._made(self._modules[name]) for name in known if self._is_mine(name)}
        for name, header, tensors in self._group.spread({name: self._owners[name] for name in known}, made):
            if not self._is_mine(name):
                self._take(self._modules[name], header, tensors)

    def _made(self, module: NamedModule) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
        """Header, ready for JSON, and tensors of a module that this process has made."""
        figures, tensors = carried(self.run.factors[module.full_name])
        tensors["weight"] = module.state[QUANTIZED_WEIGHT]
        module.stream_sync()
        tensors |= {key: module.state[key] for key in PACKED_STATE if key in module.state}
        allocation = self.run.allocation
        header = {
            "figures": figures,
            "chosen": allocation.chosen(module.full_name) if allocation is not None else None,
            "log": self._log_of(module),
        }
        return header, tensors

    def _log_of(self, module: NamedModule) -> dict[str, str] | None:
        """GPTQModel's own row on a module, which its log of losses is written from."""
        with self.lock:
            rows = [row for row in self.log if row.get("module") == module.name]
        return {key: str(value) for key, value in rows[-1].items()} if rows else None

    def _take(self, module: NamedModule, header: Mapping[str, Any], tensors: dict[str, torch.Tensor]) -> None:
        """Have a module hold what another process has made of it."""
        linear = module.module
        linear.weight.data = tensors.pop("weight").to(linear.weight.device)
        module.state.update({key: tensors.pop(key) for key in PACKED_STATE if key in tensors})
        if header["chosen"] is not None:
            assert self.run.allocation is not None
            self.run.allocation.take(module.full_name, tuple(header["chosen"]))
        if header["log"] is not None:
            with self.lock:
                self.log.append(header["log"])
        self._apply(module, received(header["figures"], tensors).to(linear.weight.device))

    def submodule_finalize(self, module: NamedModule, *args: Any, **kwargs: Any) -> None:
        """Rank 0 packs; the others only let go of the weight."""
        if self._group.is_first:
            super().submodule_finalize(module, *args, **kwargs)
            return
        for key in (QUANTIZED_WEIGHT, *PACKED_STATE):
            module.state.pop(key, None)
        let_go(module)
