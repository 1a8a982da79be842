"""The command `eora plan`."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from ..adapter.budget import budget_bytes
from ..adapter.validate import validate_choice
from ..adapter.vocabulary import FACTOR_BITS, OBJECTIVES, SENSITIVITIES
from ..calibration import DEFAULT_SAMPLES, DEFAULT_SEQLEN, tokenized
from ..evaluate.size import readable
from ..formats.sizes import ModuleShape
from ..hosts.jobs import Planned, Windows
from ..hosts.registry import planner
from ..plan import (
    PLAIN_TITLE,
    PLANNED_BITS,
    QUANTIZERS,
    SWEEP,
    Plan,
    PlannedModule,
    Point,
    affordable,
    largest_rank,
    least_budget,
    plan_points,
    plan_question,
    planned,
    planned_modules,
    sweep_rank,
)
from ..plan.scaling import TRIAL_ITERS
from ..plan.survey import Bar
from ..solve import Grid
from ..system.distributed import by_first, current, is_first
from ..system.progress import counted
from .options import (
    DEFAULT_GROUP_SIZE,
    Calibration,
    GroupSize,
    Json,
    LogJson,
    Model,
    Samples,
    SeqLen,
    TrustRemoteCode,
    adapter_options,
    check_group_size,
    check_model,
    given,
    read_calibration,
)
from .plan_types import plan_types
from .printing import errors, fail, out, progress_bars, say
from .show import listing

# With the search, 2 bits in groups of 64 leave SmolLM2 a third less predicted loss, and 4 bits no more.
SCALE_SEARCH = 2.4


def plan(
    context: typer.Context,
    model: Model,
    calibration: Calibration,
    host: Annotated[
        str | None,
        typer.Option(help="Plan types of this host's own files in place of bits: llamacpp. Needs --total and --gguf."),
    ] = None,
    gguf: Annotated[
        list[Path] | None,
        typer.Option("--gguf", help="With --host: the model quantised to a type on offer; give it once for each type."),
    ] = None,
    total: Annotated[
        str | None,
        typer.Option(
            help="Choose bits and ranks under this size of weights, scales, zeros and factors: `2.5bpw` or `300MB`."
        ),
    ] = None,
    plan_file: Annotated[
        Path | None, typer.Option("--out", help="With --total: where to write the plan for `eora quantize --plan`.")
    ] = None,
    picture: Annotated[Path | None, typer.Option(help="Draw loss against bytes into this file (.svg, .png).")] = None,
    quantizer: Annotated[
        str,
        typer.Option(
            help="gptq, or autoround, which tunes a few layers at each width to scale the forecasts: as long as "
            "AutoRound takes for 9 layers."
        ),
    ] = QUANTIZERS[0],
    iters: Annotated[
        int, typer.Option(help="With --quantizer autoround: tuning steps of that trial.", min=1)
    ] = TRIAL_ITERS,
    bits: Annotated[int, typer.Option(help="Bits of the weights in the sweep.", min=2, max=4)] = 2,
    group_size: GroupSize = DEFAULT_GROUP_SIZE,
    budgets: Annotated[
        list[str] | None, typer.Option("--budget", help="A budget; give it once for each. By default a sweep.")
    ] = None,
    factor_bits: Annotated[
        list[int] | None,
        typer.Option(
            "--factor-bits", help="Once for each width to compare; mixes have the fewest. By default 16, 8 and 4."
        ),
    ] = None,
    sensitivity: Annotated[
        str, typer.Option(help="What an error is taken to cost: fisher or empirical (gradients), or relative.")
    ] = SENSITIVITIES[0],
    samples: Samples = DEFAULT_SAMPLES,
    seqlen: SeqLen = DEFAULT_SEQLEN,
    sym: Annotated[bool, typer.Option(help="Symmetric quantisation.")] = True,
    mse: Annotated[float, typer.Option(help="GPTQModel's search for scales; 0 is off.", min=0)] = SCALE_SEARCH,
    log_json: LogJson = False,
    trust_remote_code: TrustRemoteCode = False,
    as_json: Json = False,
) -> None:
    """Predict what bits and adapters buy before anything is quantised, and choose both under one size."""
    if host is not None or gguf:
        plan_types(
            context, model, calibration, host=host, files=gguf or [], total=total, plan_file=plan_file,
            factor_bits=factor_bits, sensitivity=sensitivity, samples=samples, seqlen=seqlen,
            trust_remote_code=trust_remote_code, as_json=as_json,
        )  # fmt: skip
        return
    with errors():
        validate_choice(quantizer, QUANTIZERS, what="--quantizer")
    tuning = {"iters": iters} if quantizer == QUANTIZERS[1] else {}
    if given(context, "iters") and not tuning:
        fail(f"--iters is of --quantizer {QUANTIZERS[1]}, got --quantizer {quantizer}.")
    asked = _Asked(
        total, plan_file, picture, bits, group_size, budgets, tuple(factor_bits or FACTOR_BITS), sensitivity, sym, mse,
        quantizer,
    )  # fmt: skip
    asked.check(as_json)
    check_model(model)
    texts = read_calibration(calibration)

    from ..hosts.terminal import quiet

    with errors(resumable=True), progress_bars() as bar, quiet():
        data = tokenized(texts, model, samples, seqlen, trust_remote_code)
        settings = {"bits": bits, "group_size": group_size, "sym": sym, **tuning}
        opened = planner(quantizer)(model, settings, trust_remote_code)
        if (group := current()) is not None:
            group.agree({f"option {name}": str(one) for name, one in vars(asked).items()})
        points, chosen = asked.answer(model, opened, data, lambda title: counted(bar(title)))
        by_first(lambda: asked.write(points, chosen, model))
    if not is_first():
        return
    if as_json:
        out.print_json(json.dumps([point.as_json() for point in points]))
    else:
        _print(points, chosen, plan_file)


@dataclass(frozen=True)
class _Asked:
    """What a plan is asked for, by the names of the options; ``widths`` are those of factors."""

    total: str | None
    plan_file: Path | None
    picture: Path | None
    bits: int
    group_size: int
    budgets: list[str] | None
    widths: tuple[int, ...]
    sensitivity: str
    sym: bool
    mse: float
    quantizer: str

    @property
    def grid(self) -> Grid:
        """How weights will be rounded."""
        return Grid(self.group_size, self.sym, self.mse)

    def check(self, as_json: bool) -> None:
        """Fail for whatever can be told to be wrong before the model is opened."""
        check_group_size(self.group_size)
        with errors():
            validate_choice(self.sensitivity, SENSITIVITIES, what="--sensitivity")
        for width in self.widths:
            for budget in (*(self.budgets or SWEEP), *([self.total] if self.total else ())):
                adapter_options(None, budget, OBJECTIVES[0], width, self.sensitivity)
        if self.plan_file and not self.total:
            fail("--out writes the plan of a --total; name one, for instance --total 2.5bpw.")
        if self.total and as_json and not self.plan_file:
            fail("--json prints the sweep; name a file for the plan by --out.")
        for target in (self.plan_file, self.picture):
            if target and not target.absolute().parent.is_dir():
                fail(f"there is no folder `{target.parent}` to write `{target.name}` into.")
            if target and target.is_dir():
                fail(f"`{target}` is a folder; name a file to write.")
        if self.picture and self.picture.suffix not in (".svg", ".png", ".pdf"):
            fail(f"--picture must end in .svg, .png or .pdf, got `{self.picture}`.")
        if self.picture:
            with errors():
                _require_matplotlib()

    def answer(self, model: str, opened: Planned, data: Windows, bar: Bar) -> tuple[list[Point], Plan | None]:
        """The sweep, and the plan of the total if one was asked for."""
        sweep = self.sweep(opened.shapes)
        modules = self.forecast(opened, data, sweep, bar)
        points = plan_points(modules, self.grid, bits=self.bits, factor_bits=self.widths, budgets=sweep)
        if not self.total:
            return points, None
        size, fewest = budget_bytes(self.total, opened.shapes), min(self.widths)
        return points, planned(
            modules, size, self.grid, fewest, model=model, sensitivity=self.sensitivity, quantizer=self.quantizer
        )

    def sweep(self, shapes: Sequence[ModuleShape]) -> tuple[str, ...]:
        """The budgets to compare: those asked for, all of which the model must be able to spend, or the usual that it
        can.

        Raises:
            ValueError: for one asked for that buys nothing in any width.
        """
        found = affordable(shapes, self.budgets or SWEEP, self.widths)
        useless = next((budget for budget in self.budgets or () if budget not in found), None)
        if useless is not None:
            least = min(least_budget(shapes, width) for width in self.widths)
            raise ValueError(
                f"--budget {useless} is {budget_bytes(useless, shapes)} bytes, which buys nothing: the smallest "
                f"adapter of these {len(shapes)} modules takes {least} bytes. Allow at least that."
            )
        return found

    def forecast(self, opened: Planned, data: Windows, sweep: Sequence[str], bar: Bar) -> list[PlannedModule]:
        """Forecasts of all modules, of as many components as anything that was asked can have."""
        shapes = opened.shapes
        size = budget_bytes(self.total, shapes) if self.total else 0
        most = max(
            sweep_rank(shapes, sweep, self.widths),
            largest_rank(shapes, size, PLANNED_BITS[0], self.group_size, min(self.widths)),
        )
        question = plan_question(shapes, self.grid, most=most, swept=self.bits)
        return planned_modules(shapes, opened.survey(data, question, self.sensitivity, bar))

    def write(self, points: Sequence[Point], chosen: Plan | None, model: str) -> None:
        """Write the files that were asked for."""
        if chosen and self.plan_file:
            chosen.write(self.plan_file)
        if self.picture:
            from ..plan.picture import draw

            draw(points, chosen, self.picture, title=Path(model).name)


def _require_matplotlib() -> None:
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise ValueError("--picture needs matplotlib: pip install 'gptqmodel-eora-ext[picture]'.") from error


def _table(points: Sequence[Point]) -> Table:
    table = Table("bits", "factors", "ranks", "budget", "total", "bpw", "predicted loss", "",
                  caption="predicted loss: nats a token above full precision, to compare by. dominated: another choice "
                          "is no larger and no worse. knee: beyond it a byte buys less than on average. mixed: bits "
                          "and ranks chosen together.")  # fmt: skip
    for point in sorted(points, key=lambda one: (one.total_bytes, one.loss)):
        notes = ["knee"] if point.knee else []
        if point.dominated:
            # Which adapter is better stands in `--json`; a plain model is a simpler choice and is named.
            plain = point.dominated_by.startswith(PLAIN_TITLE)
            notes.append(f"dominated by {point.dominated_by}" if plain else "dominated")
        factors = f"{point.factor_bits} bits, {readable(point.adapter_bytes)}" if point.factor_bits else ""
        table.add_row(str(point.bits or "mixed"), factors, point.ranks, point.budget, readable(point.total_bytes),
                      f"{point.bpw:.3f}", f"{point.loss:.4f}", ", ".join(notes))  # fmt: skip
    return table


def _print(points: Sequence[Point], chosen: Plan | None, plan_file: Path | None) -> None:
    out.print(_table(points))
    if chosen:
        out.print(_described(chosen))
        hint = "" if plan_file else "  (write it by --out plan.json)"
        by = f" --quantizer {chosen.quantizer}" if chosen.quantizer != QUANTIZERS[0] else ""
        say(f"Run it:  eora quantize {chosen.model} OUT{by} --plan {plan_file or 'plan.json'} --calibration …{hint}")


def _described(chosen: Plan) -> Table:
    table = listing()
    weights = sum(one.out_features * one.in_features for one in chosen.modules.values())
    counts: Counter[Any] = Counter(one.bits for one in chosen.modules.values())
    ranks = [one.rank for one in chosen.modules.values() if one.rank]
    shown = f", rank {min(ranks)} to {max(ranks)}" if ranks else ""
    table.add_row("plan", f"{readable(chosen.total_bytes)}, {8 * chosen.total_bytes / weights:.3f} bpw, predicted loss "
                          f"{chosen.predicted_loss:.4f}")  # fmt: skip
    table.add_row("weights", ", ".join(f"{counts[width]} modules at {width} bits" for width in sorted(counts)))
    table.add_row("adapter", f"{len(ranks)} modules{shown}, {chosen.factor_bits}-bit factors, "
                             f"{readable(chosen.adapter_bytes)}")  # fmt: skip
    return table
