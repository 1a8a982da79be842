"""What several commands print of an adapter."""

from __future__ import annotations

import math

from rich.table import Table

from ..adapter.summary import AdapterSummary
from ..evaluate.size import readable, weight_bytes
from ..evaluate.sparsity import PrunedModel
from ..refine import INTERRUPTED, Outcome
from .printing import RESUME, fail, out


def listing() -> Table:
    """A table of names and values; a long value, such as a path, goes on in the next line and is never cut."""
    table = Table.grid(padding=(0, 2))
    table.add_column()
    table.add_column(overflow="fold")
    return table


def check_complete(outcome: Outcome) -> None:
    """Leave where a refinement was interrupted."""
    if outcome.ended == INTERRUPTED:
        fail("refinement was interrupted; the best so far is written. The same command goes on.", RESUME)


def print_sparsity(pruned: PrunedModel) -> None:
    table = listing()
    said = pruned.said
    if said:
        table.add_row("pruned", f"by {said.get('method')} to {said.get('pattern')}, from {said.get('base_model')}")
    table.add_row("zeros", f"{pruned.share:.1%} of the weights of {len(pruned.modules)} modules"
                           + (f"; {len(pruned.whole)} are as they were" if pruned.whole else ""))  # fmt: skip
    if pruned.expected is None:
        table.add_row("pattern", "none")
    elif pruned.broken:
        table.add_row("pattern", f"{pruned.expected}, BROKEN in {len(pruned.broken)} of {len(pruned.modules)} modules, "
                                 f"for instance {pruned.broken[0]}")  # fmt: skip
    else:
        table.add_row("pattern", f"{pruned.expected}, kept by all of them")
    layout = f"a {pruned.expected} layout" if pruned.expected else "a layout with a bit for each weight"
    table.add_row("bytes", f"{readable(pruned.dense_bytes)} as they are stored, "
                           f"{readable(pruned.sparse_bytes)} in {layout}")  # fmt: skip
    out.print(table)


def print_summary(summary: AdapterSummary, seconds: float | None = None) -> None:
    details = summary.details
    ranks = sorted(set(summary.ranks.values()))
    table = listing()
    table.add_row("adapter", str(summary.folder))
    table.add_row(
        "modules", f"{len(summary.ranks)}, rank {ranks[0] if len(ranks) == 1 else f'{ranks[0]} to {ranks[-1]}'}"
    )
    table.add_row("bytes", f"{readable(summary.bytes)}, factors in {summary.factor_bits} bits")
    # A GGUF file may lie anywhere; a folder lies in its checkpoint.
    checkpoint = weight_bytes(summary.folder.parent) if summary.folder.is_dir() else 0
    if checkpoint:
        table.add_row("checkpoint", f"{readable(checkpoint)} without the adapter")
    if details:
        data = details.get("calibration", {})
        versions = ", ".join(f"{name} {found}" for name, found in details.get("versions", {}).items())
        if allocation := details.get("allocation"):
            spent, budget = (readable(allocation[key]) for key in ("spent", "budget"))
            table.add_row("budget", f"{spent} of {budget}, ranks by {allocation['sensitivity']} sensitivity")
        table.add_row("objective", f"{details.get('objective')}, after {details.get('method')}")
        table.add_row("calibration", f"{data.get('tokens')} tokens, sha256 {str(data.get('sha256'))[:12]}…")
        if not math.isnan(left := summary.error_left()):
            table.add_row("error left", f"{left:.1%} of the weighted error (geometric mean over modules)")
        if refined := details.get("refinement"):
            table.add_row("refined", f"by {refined['loss']} on {refined['tokens']} tokens, {refined['steps']} steps; "
                                     f"validation loss {refined['before']:.4f} → {refined['after']:.4f}")  # fmt: skip
        table.add_row("made by", versions)
    if seconds is not None:
        table.add_row("seconds", f"{seconds:.0f}")
    out.print(table)
