"""`eora quantize --total`: the recipe for a size and an effort, picked and run."""

from __future__ import annotations

import time
from pathlib import Path

import typer

from ..adapter.budget import parse_budget
from ..adapter.summary import summarize
from ..adapter.validate import validate_choice
from ..formats.names import PLAN_FILE, RECIPE_FILE
from ..loop.resume import Keeping
from ..plan import EFFORTS, PLANNED_BITS
from ..system.distributed import refuse_shared
from .options import check_format, check_model, check_out, given, read_calibration
from .printing import err, errors, fail, out, progress_bars, say
from .show import check_complete, listing, print_summary

DEFAULT_EFFORT = EFFORTS[-1]
# What a recipe picks; by the names of the command's parameters.
PICKED = (
    "quantizer", "bits", "group_size", "rank", "budget", "plan_file", "preset", "sensitivity", "objective",
    "factor_bits", "rounds", "refine", "sym", "desc_act", "mse", "iters",
)  # fmt: skip
# What only a recipe has.
OF_RECIPES = ("effort", "dry_run")


def check_recipe(context: typer.Context, total: str | None) -> None:
    """Fail for an option that a recipe picks where one is asked for, and for one of recipes where none is."""
    flags = {one.name: max(one.opts, key=len) for one in context.command.params}
    for name in OF_RECIPES if total is None else PICKED:
        if not given(context, name):
            continue
        if total is None:
            fail(f"{flags[name]} is of recipes; name a size, for instance --total 2.75bpw.")
        fail(f"--total picks what {flags[name]} says; pass one of them. See what it picks by --dry-run.")


def quantize_by_recipe(
    model: str,
    output: Path,
    calibration: str,
    *,
    total: str,
    effort: str,
    dry_run: bool,
    form: str | None,
    samples: int,
    seqlen: int,
    batch_size: int | None,
    force: bool,
    keeping: Keeping | None,
    trust_remote_code: bool,
) -> None:
    """Say what is picked and why, and run it; the arguments are the options of `eora quantize`."""
    with errors():
        refuse_shared("a recipe (--total)", "Start it without torchrun, or plan, quantise and refine one by one")
        validate_choice(effort, EFFORTS, what="--effort")
        parse_budget(total, what="--total")
    if form is not None:
        check_format(form, *PLANNED_BITS)
    check_model(model)
    # What an interrupted run has left may be gone on with; whether it is that shows when the model is open.
    left = keeping is not None and keeping.exists
    check_out(output, force or left or (output / RECIPE_FILE).is_file(), model)
    read_calibration(calibration)

    from ..hosts.recipes import is_quantised, prepare_recipe, run_recipe
    from ..hosts.terminal import quiet

    start = time.perf_counter()
    with errors(resumable=keeping is not None), quiet():
        prepared = prepare_recipe(model, total, calibration, effort=effort, samples=samples, seqlen=seqlen,
                                  trust_remote_code=trust_remote_code, what="--total")  # fmt: skip
        goes_on = is_quantised(prepared, output)
    check_out(output, force or goes_on or left, model)
    table = listing()
    takes = "goes on with what is there" if goes_on or left else _duration(prepared.recipe.seconds(seqlen))
    for name, text in {**prepared.recipe.described(), "takes": takes}.items():
        table.add_row(name, text)
    # Beside the bars, so that stdout holds the result alone; with --dry-run this is the result.
    if dry_run:
        out.print(table)
        return
    err.print(table)
    with errors(resumable=keeping is not None), progress_bars() as bar, quiet():
        made = run_recipe(prepared, output, form=form, batch_size=batch_size, bar=bar, keeping=keeping)
    if made.plan.largest_rank:
        print_summary(summarize(output), time.perf_counter() - start)
    bpw = 8 * made.plan.total_bytes / prepared.recipe.weights
    say(f"{bpw:.3f} bpw of weights and factors; the plan is `{output / PLAN_FILE}`.")
    if made.outcome is not None:
        check_complete(made.outcome)
    say(f'Load it:  GPTQModel.load("{output}")')


def _duration(seconds: float) -> str:
    """About how long, and on what it was timed; on another machine or a GPU it is another time."""
    hours = seconds / 3600
    shown = f"{hours:.1f} hours" if hours >= 1.5 else f"{max(seconds / 60, 1):.0f} minutes"
    return f"about {shown} of one thread of the processor that it was timed on; a GPU was not timed"
