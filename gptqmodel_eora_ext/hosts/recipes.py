"""Running a recipe: plan, quantise, refine, by the hosts that serve it, for `eora quantize --total` and for Python."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .._version import __version__
from ..adapter.errors import read_json
from ..adapter.folder import AdapterFolder
from ..adapter.naming import DEFAULT_FOLDER
from ..adapter.summary import find_adapter
from ..calibration import DEFAULT_SAMPLES, DEFAULT_SEQLEN, read_texts, windows
from ..formats.names import PLAN_FILE, RECIPE_FILE
from ..loop.resume import Keeping
from ..plan import (
    PLANNED_BITS,
    Plan,
    Recipe,
    largest_rank,
    plan_question,
    planned,
    planned_modules,
    recipe_of,
)
from ..plan.recipes import AUTOROUND, BEST, FACTOR_BITS, GRID, GROUP_SIZE, PLANNED_FOR, SENSITIVITY
from ..refine import INTERRUPTED, Outcome, RefineSettings
from ..system.files import write_json
from ..system.progress import counted
from .jobs import Planned, QuantizeJob, Windows
from .refine import refine_checkpoint
from .registry import planner, quantizer

log = logging.getLogger(__name__)

# AutoRound's export that its own loaders and GPTQModel's open.
FORMAT = "auto_round"
# Makes a bar of a title; the bar hears (steps done, steps in all), and of a refinement a note.
Bars = Callable[[str], Callable[..., None]]


@dataclass(frozen=True)
class Prepared:
    """A model opened for a recipe, and the text cut for it: all that can be found wrong before hours of work is found.

    Attributes:
        recipe: to run.
        model: the full-precision model, a folder or a hub name.
        opened: the model, for plans.
        calibration: windows to plan and quantise with.
        refinement: windows to refine on; none where the recipe refines nothing.
        seqlen: tokens of a calibration window.
        trust_remote_code: whether model code from the hub may run.
    """

    recipe: Recipe
    model: str
    opened: Planned
    calibration: Windows
    refinement: Windows
    seqlen: int
    trust_remote_code: bool

    def record(self) -> dict[str, Any]:
        """What a checkpoint is recognised by: the same recipe, model and text. Ready for JSON."""
        row = self.recipe.row
        ids = json.dumps([one["input_ids"] for one in self.calibration])
        return {
            "model": self.model,
            "effort": row.effort,
            "total": self.recipe.total,
            "quantizer": row.quantizer,
            "tuning": dict(row.tuning),
            "adapter": self.recipe.adapter,
            "refine": row.refine,
            "calibration": hashlib.sha256(ids.encode()).hexdigest(),
            "version": __version__,
        }


@dataclass(frozen=True)
class Made:
    """What a recipe has made.

    Attributes:
        checkpoint: the folder.
        plan: what was run.
        outcome: of the refinement; None where there was none, or one that was complete already.
    """

    checkpoint: Path
    plan: Plan
    outcome: Outcome | None


def prepare_recipe(
    model: str,
    total: int | str,
    calibration: str | Iterable[Any],
    *,
    effort: str = BEST,
    samples: int = DEFAULT_SAMPLES,
    seqlen: int = DEFAULT_SEQLEN,
    trust_remote_code: bool = False,
    what: str = "total",
) -> Prepared:
    """Pick the recipe for a model and a total size, and read what it needs; nothing is quantised.

    Args:
        model: full precision, a folder or a hub name.
        total: bytes of weights, scales, zeros and factors, or "2.75bpw" (bits per quantised weight) or "300MB".
        calibration: a file or data set, as `eora quantize --calibration` takes it, or a list of documents.
        effort: "fast" (GPTQ, minutes), "balanced" or "best" (AutoRound and refinement, longer).
        samples: calibration windows for plan and quantiser.
        seqlen: tokens of each.
        trust_remote_code: whether model code from the hub may run.
        what: names the total in messages.

    Raises:
        ValueError: for a total that no recipe reaches, with those that one does; an unknown effort; or too little text.

    Example:
        >>> prepared = prepare_recipe("Qwen/Qwen3-8B", "2.75bpw", "c4.jsonl")
        >>> print(prepared.recipe)
        >>> made = run_recipe(prepared, "out")
    """
    opened = planner(PLANNED_FOR)(model, {"bits": PLANNED_BITS[0], "group_size": GROUP_SIZE, "sym": GRID.sym},
                             trust_remote_code)  # fmt: skip
    recipe = recipe_of(total, effort, opened.shapes, what=what)

    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model, trust_remote_code=trust_remote_code)
    documents = calibration if isinstance(calibration, str) else list(calibration)

    def cut(count: int, length: int) -> Windows:
        texts = read_texts(documents) if isinstance(documents, str) else documents
        return windows(texts, tokenizer, samples=count, seqlen=length)

    refinement: Windows = ()
    if recipe.row.refine:
        settings = RefineSettings.settle(tokens=recipe.row.refine)
        refinement = cut(settings.windows, settings.window)
        if len(refinement) < settings.least_windows:
            raise ValueError(
                f"EoRA: the calibration fills {len(refinement)} windows of {settings.window} tokens; this recipe "
                f"refines, which needs {settings.least_windows}, and has use for {settings.windows}. Pass more text."
            )
    return Prepared(recipe, model, opened, cut(samples, seqlen), refinement, seqlen, trust_remote_code)


def run_recipe(
    prepared: Prepared,
    output: str | Path,
    *,
    form: str | None = None,
    batch_size: int | None = None,
    bar: Bars = lambda title: lambda done, total, note="": None,
    keeping: Keeping | None = None,
) -> Made:
    """Plan widths and ranks, quantise by the plan, and refine the adapter, as the recipe says.

    The checkpoint, its adapter, the plan and what was asked go into ``output``. Memory is that of the quantiser; of the
    plan and the refinement one layer at full precision. Called again with the same model, text and total after the
    refinement was interrupted, it goes on there and quantises nothing (`is_quantised`).

    Args:
        prepared: of `prepare_recipe`.
        output: folder for the checkpoint.
        form: AutoRound's export, "auto_round" by default.
        batch_size: windows a step or a forward; None for the recipe's.
        bar: makes a progress bar of a title.
        keeping: where finished layers are kept, so that a call that is interrupted while it quantises goes on after
            them; `lasting`, since what the folder is of is written after the checkpoint.

    Raises:
        ValueError: for calibration or weights that do not fit, or an export of AutoRound where GPTQ quantises.
        NotImplementedError: for a model that cannot be run layer by layer.
    """
    folder = Path(output)
    if form is not None and prepared.recipe.row.quantizer != AUTOROUND:
        raise ValueError(
            f"EoRA: {form} is an export of AutoRound, and the recipe `{prepared.recipe.row.effort}` quantises by "
            f"GPTQ, which has one format. Leave it out, or take another effort."
        )
    if is_quantised(prepared, folder):
        log.info("EoRA: `%s` is quantised by this recipe already.", folder)
        plan = Plan.read(folder / PLAN_FILE)
    else:
        plan = _quantize(prepared, folder, form or FORMAT, batch_size, bar, keeping)
    if keeping is not None:
        keeping.remove()
    refined = prepared.recipe.row.refine
    if not refined or not plan.largest_rank or _is_refined(folder):
        return Made(folder, plan, None)
    outcome = refine_checkpoint(
        folder, prepared.model, prepared.refinement, tokens=refined, adapter=folder / DEFAULT_FOLDER,
        trust_remote_code=prepared.trust_remote_code, teaching=bar("full precision"), training=bar("refining"),
    )  # fmt: skip
    return Made(folder, plan, outcome)


def is_quantised(prepared: Prepared, folder: Path) -> bool:
    """Whether a folder holds what this recipe has quantised of this model, by this text; refined or not."""
    record = folder / RECIPE_FILE
    return record.is_file() and read_json(record) == prepared.record()


def _is_refined(folder: Path) -> bool:
    """Whether a refinement has run to its end here."""
    adapter = find_adapter(folder, required=False)
    told = AdapterFolder.open(adapter).details if adapter is not None else None
    ended = (told or {}).get("refinement", {}).get("ended", INTERRUPTED)
    return bool(ended != INTERRUPTED)


def _quantize(
    prepared: Prepared, folder: Path, form: str, batch_size: int | None, bar: Bars, keeping: Keeping | None
) -> Plan:
    recipe = prepared.recipe
    plan = plan_of(prepared, bar)
    # What stands there of another recipe is replaced, and must not be taken for this one's if the work breaks off.
    (folder / RECIPE_FILE).unlink(missing_ok=True)
    job = QuantizeJob(
        model=prepared.model,
        output=folder,
        windows=prepared.calibration,
        settings=recipe.settings(plan, form),
        plan=plan,
        batch_size=batch_size or recipe.batch_size,
        trust_remote_code=prepared.trust_remote_code,
        report=bar("quantising layers"),
        keeping=keeping,
    )
    quantizer(recipe.row.quantizer)(job)
    plan.write(folder / PLAN_FILE)
    # Last, since it says that all the rest is there.
    write_json(folder / RECIPE_FILE, prepared.record())
    return plan


def plan_of(prepared: Prepared, bar: Bars) -> Plan:
    """Bits and ranks of every module, as the recipe has them planned."""
    recipe, shapes = prepared.recipe, prepared.opened.shapes
    most = largest_rank(shapes, recipe.total, PLANNED_BITS[0], GROUP_SIZE, FACTOR_BITS)
    question = plan_question(shapes, GRID, most=most)
    found = prepared.opened.survey(prepared.calibration, question, SENSITIVITY, lambda title: counted(bar(title)))
    return planned(
        planned_modules(shapes, found), recipe.total, GRID, FACTOR_BITS, model=prepared.model, sensitivity=SENSITIVITY,
        adapter=recipe.adapter, quantizer=PLANNED_FOR,
    )  # fmt: skip
