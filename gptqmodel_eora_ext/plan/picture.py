"""Predicted loss against bytes, drawn."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ..system.files import replaced_file
from .file import Plan
from .points import CHOSEN, MIXED, PLAIN, UNIFORM, Point

# The narrower the factors, the darker.
COLOURS = {16: "C0", 8: "C1", 4: "C3"}


def draw(points: Sequence[Point], chosen: Plan | None, path: Path, *, title: str) -> None:
    """Write the sweep to a picture: chosen ranks solid, uniform dashed, mixes black, plain models as squares.

    Args:
        points: of `plan_points`.
        chosen: a plan to mark, or None.
        path: its suffix names the format.
        title: over the picture.
    """
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    bpw_per_byte = points[0].bpw / points[0].total_bytes

    def line(kind: str, width: int, style: str, colour: str, label: str) -> None:
        some = [one for one in points if one.ranks == kind and width in (0, one.factor_bits)]
        some.sort(key=lambda one: one.bpw)
        if some:
            axes.plot([one.bpw for one in some], [one.loss for one in some], style, color=colour, label=label, ms=4)

    for width in sorted({one.factor_bits for one in points if one.ranks == UNIFORM}, reverse=True):
        colour = COLOURS[width]
        line(UNIFORM, width, "o--", colour, f"one rank for all, {width}-bit factors")
        line(CHOSEN, width, "o-", colour, f"chosen ranks, {width}-bit factors")
    line(MIXED, 0, ".-", "black", "bits and ranks chosen together")
    line(PLAIN, 0, "s", "0.3", "no adapter")
    for one in points:
        if one.ranks == PLAIN:
            axes.annotate(f" {one.bits} bits", (one.bpw, one.loss))
    for number, one in enumerate(one for one in points if one.knee):
        axes.plot(one.bpw, one.loss, "o", mfc="none", mec="black", ms=11, label="" if number else "knee")
    if chosen is not None:
        axes.plot(chosen.total_bytes * bpw_per_byte, chosen.predicted_loss, "k*", ms=13, label="this plan")
    axes.set_yscale("log")
    axes.set_xlabel("bits per weight: weights, scales, zeros and factors")
    axes.set_ylabel("predicted loss above full precision, nats a token")
    axes.set_title(title)
    axes.grid(alpha=0.3, which="both")
    axes.legend(fontsize="small")
    # Words stay words in an SVG, so that they can be read aloud, searched and copied.
    with replaced_file(path) as temporary, rc_context({"svg.fonttype": "none"}):
        figure.savefig(temporary, format=path.suffix[1:])
