"""Plans for AutoRound: forecasts for GPTQ, scaled by what AutoRound leaves on a few modules of each kind and width.

AutoRound tunes a few layers (`plan.scaling.compared_layers`) at every width that is planned with, each alone and on the
full-precision model's inputs, as its loop would. Of each of their modules the predicted loss by its Ŵ is compared with
the forecast. With 3 layers and 3 widths that costs as much as AutoRound on 9 layers of the model.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from ...plan.layered import LayeredModel
from ...plan.scaling import TRIAL_ITERS, compared_layers, left_of_forecast, scaled
from ...plan.survey import Bar, survey_some
from ...plan.sweep import Question, Swept
from ..jobs import Windows
from ..registry import planner
from .rounder import rounder_of, watch_blocks

log = logging.getLogger(__name__)

# Windows a step: AutoRound's own default.
TRIAL_BATCH = 8
# Forecasts are GPTQ's, whose rounding is quick to imitate.
FORECAST_BY = "gptq"
FORECAST_SETTINGS = ("bits", "group_size", "sym")


class PlannedByTuning:
    """A full-precision model that plans for AutoRound are made for: `hosts.jobs.FullPrecision`.

    Args:
        model: a folder or a hub name.
        settings: `bits`, `group_size` and `sym`; all others are AutoRound's for the trial, `iters` among them.
        trust_remote_code: whether model code from the hub may run.
    """

    def __init__(self, model: str, settings: Mapping[str, Any], trust_remote_code: bool) -> None:
        self._model, self._trust = model, trust_remote_code
        # Each width on offer is tried.
        self._tuning = {"iters": TRIAL_ITERS, **{name: one for name, one in settings.items() if name != "bits"}}
        forecast = {name: settings[name] for name in FORECAST_SETTINGS}
        self._forecasting = planner(FORECAST_BY)(model, forecast, trust_remote_code)
        self.shapes = self._forecasting.shapes

    def layered(self) -> LayeredModel:
        """The model, to be run layer by layer."""
        return self._forecasting.layered()

    def survey(self, windows: Windows, question: Question, kind: str, bar: Bar) -> Swept:
        """Forecast the modules as for GPTQ, tune a few layers at each width, and scale the forecasts by what is found.

        In memory are, beside what `survey` takes, the model in AutoRound and the Ŵ of the tuned layers.

        Raises:
            NotImplementedError: for a model that cannot be run layer by layer, or whose modules AutoRound names
                otherwise.
        """
        found = self._forecasting.survey(windows, question, kind, bar)
        model, names = self.layered(), [shape.name for shape in self.shapes]
        layers = compared_layers(model.layers)
        some = [name for name in names if name.startswith(tuple(f"{layer}." for layer in layers))]
        widths = question.rounding(some[0]).bits
        report = _reports(bar("EoRA: trial of AutoRound"), len(widths) * len(layers))
        tuned = {bits: self._tuned(windows, layers, some, bits, report) for bits in widths}

        def candidates(name: str, weight: torch.Tensor) -> Iterable[torch.Tensor]:
            return (tuned[bits][name].to(torch.float32) for bits in widths)

        own = replace(question, candidates=candidates)
        left = survey_some(model, names, some, windows, own, kind=kind, bar=bar)
        factors = left_of_forecast(found.forecasts, left.forecasts)
        for bits in widths:
            shown = ", ".join(f"{one:.2f} in {of}" for (of, width), one in factors.items() if width == bits)
            log.info("EoRA: at %d bits AutoRound leaves %s of what is forecast for GPTQ.", bits, shown)
        return scaled(found, factors)

    def _tuned(
        self, windows: Windows, layers: Sequence[str], names: Sequence[str], bits: int, report: Callable[[], None]
    ) -> dict[str, torch.Tensor]:
        """Ŵ of modules at a width, out × in, on the CPU."""
        rounder = rounder_of(
            self._model,
            windows,
            batch_size=TRIAL_BATCH,
            trust_remote_code=self._trust,
            device=None,
            scheme=f"W{bits}A16",
            # Compiling takes longer than three layers save by it: a minute and a half of one core for each width.
            enable_torch_compile=False,
            # Each layer a group of its own: the first of a group is tuned on the full-precision model's inputs.
            to_quant_block_names=[[layer] for layer in layers],
            **self._tuning,
        )
        watch_blocks(rounder, lambda done, total: report())
        rounder.quantize()
        modules = dict(rounder.model_context.model.named_modules())
        if absent := next((name for name in names if name not in modules), None):
            raise NotImplementedError(
                f"EoRA: AutoRound has no module {absent} in this model, so forecasts cannot be scaled for it. Plan for "
                f"GPTQ (eora plan without --quantizer); AutoRound runs that plan, too."
            )
        return {name: modules[name].weight.detach().cpu() for name in names}


def _reports(progress: Any, steps: int) -> Callable[[], None]:
    """A callback to call after each step, which a wrapper of sequences (`Bar`) hears of."""
    ticks = iter(progress(range(steps)))
    next(ticks, None)

    def step() -> None:
        next(ticks, None)

    return step
