"""The command `eora plan`."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from ..adapter.budget import budget_bytes
from ..adapter.validate import validate_choice
from ..adapter.vocabulary import FACTOR_BITS, OBJECTIVES, SENSITIVITIES
from ..calibration import DEFAULT_SAMPLES, DEFAULT_SEQLEN
from ..evaluate.size import readable
from ..plan import (
    PLAIN_TITLE,
    PLANNED_BITS,
    SWEEP,
    Plan,
    Point,
    largest_rank,
    plan_points,
    plan_question,
    planned,
    planned_modules,
    sweep_rank,
)
from ..solve import Grid
from .options import (
    DEFAULT_GROUP_SIZE,
    Calibration,
    GroupSize,
    Json,
    Model,
    Samples,
    SeqLen,
    adapter_options,
    check_group_size,
    check_model,
    counted,
    errors,
    fail,
    out,
    progress_bars,
    read_calibration,
    tokenized,
)

QUANTIZER = "gptq"
# With the search, 2 bits in groups of 64 leave SmolLM2 a third less predicted loss, and 4 bits no more.
SCALE_SEARCH = 2.4


def plan(
    model: Model,
    calibration: Calibration,
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
    trust_remote_code: Annotated[bool, typer.Option(help="Allow model code from the hub.")] = False,
    as_json: Json = False,
) -> None:
    """Predict what bits and adapters buy before anything is quantised, and choose both under one size."""
    check_group_size(group_size)
    widths, sweep = factor_bits or list(FACTOR_BITS), tuple(budgets or SWEEP)
    with errors():
        validate_choice(sensitivity, SENSITIVITIES, what="--sensitivity")
    for width in widths:
        for budget in (*sweep, *([total] if total else ())):
            adapter_options(None, budget, OBJECTIVES[0], width, sensitivity)
    if plan_file and not total:
        fail("--out writes the plan of a --total; name one, for instance --total 2.5bpw.")
    if total and as_json and not plan_file:
        fail("--json prints the sweep; name a file for the plan by --out.")
    for target in (plan_file, picture):
        if target and not target.absolute().parent.is_dir():
            fail(f"there is no folder `{target.parent}` to write `{target.name}` into.")
    if picture and picture.suffix not in (".svg", ".png", ".pdf"):
        fail(f"--picture must end in .svg, .png or .pdf, got `{picture}`.")
    check_model(model)
    texts = read_calibration(calibration)
    if picture:
        with errors():
            _require_matplotlib()

    from ..hosts.registry import planner
    from ..hosts.terminal import quiet

    grid = Grid(group_size, sym, mse)
    with errors(), progress_bars() as bar, quiet():
        data = tokenized(texts, model, samples, seqlen, trust_remote_code)
        settings = {"bits": bits, "group_size": group_size, "sym": sym}
        opened = planner(QUANTIZER)(model, settings, trust_remote_code)
        shapes = opened.shapes
        size = budget_bytes(total, shapes) if total else 0
        most = max(
            sweep_rank(shapes, sweep, widths),
            largest_rank(shapes, size, PLANNED_BITS[0], group_size, min(widths)),
        )
        question = plan_question(shapes, grid, most=most, swept=bits)
        modules = planned_modules(shapes, opened.survey(data, question, sensitivity, lambda title: counted(bar(title))))
        points = plan_points(modules, grid, bits=bits, factor_bits=widths, budgets=sweep)
        chosen = None
        if total:
            chosen = planned(modules, size, grid, min(widths), model=model, sensitivity=sensitivity)
    if chosen and plan_file:
        chosen.write(plan_file)
    if picture:
        from ..plan.picture import draw

        draw(points, chosen, picture, title=Path(model).name)
    if as_json:
        out.print_json(json.dumps([point.as_json() for point in points]))
        return
    out.print(_table(points))
    if chosen:
        out.print(_described(chosen))
        where = plan_file or "plan.json"
        hint = "" if plan_file else f"  (write it by --out {where})"
        out.print(f"Run it:  eora quantize {model} OUT --plan {where} --calibration …{hint}", highlight=False)


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


def _described(chosen: Plan) -> Table:
    table = Table.grid(padding=(0, 2))
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
