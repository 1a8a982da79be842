"""Figures of the report as SVG, to stand inside its page: in the page's colours, with plain numbers and words as text.

Every figure comes twice, for wide and for narrow screens: one that is scaled down to a phone's width cannot be read.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

# Inches. At matplotlib's 72 points an inch, a figure that fills its column keeps its letters at their size.
WIDE, NARROW = 9.4, 4.4
FONT_POINTS = 10
# Stand-ins that the page's own colours replace, in light and in dark.
INK, LINE, MUTED = "#010203", "#010204", "#010205"
PAGE_COLOURS = {INK: "var(--ink)", LINE: "var(--line)", MUTED: "var(--muted)"}
# Okabe and Ito's colours, which people with any colour vision tell apart, on white and on black.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#8f8f00", "#7a5195")
HEAT = "cividis"
# The axis of sizes reaches at least so far to both sides of its middle, as a share of it.
SAME_SIZE = 0.1


@dataclass(frozen=True)
class Figure:
    """A drawn figure.

    Attributes:
        title: over it.
        alternative: what it shows, in a sentence, for those who do not see it.
        wide, narrow: SVG.
    """

    title: str
    alternative: str
    wide: str
    narrow: str


@dataclass(frozen=True)
class Point:
    """A model in the plane of size and loss."""

    name: str
    bytes: int
    loss: float
    dominated: bool


def trade_off(panels: Mapping[str, Sequence[Point]], alternative: str) -> Figure:
    """Loss against bytes, a panel a text; dominated models in grey."""

    def draw(figure: Any, narrow: bool) -> None:
        shape = (len(panels), 1) if narrow else (1, len(panels))
        all_axes = figure.subplots(*shape, squeeze=False).flat
        names = [point.name for point in next(iter(panels.values()))]
        for axes, (text, points) in zip(all_axes, panels.items(), strict=True):
            sizes = [point.bytes / 1e6 for point in points]
            middle, half = (max(sizes) + min(sizes)) / 2, (max(sizes) - min(sizes)) / 2
            for point, size in zip(points, sizes, strict=True):
                colour = MUTED if point.dominated else COLOURS[names.index(point.name) % len(COLOURS)]
                axes.plot(size, point.loss, "o", color=colour, ms=9)
                # Names grow away from the edge that their point is nearer to.
                axes.annotate(
                    point.name, (size, point.loss), xytext=(0, 9), textcoords="offset points", color=colour,
                    ha="left" if size <= middle else "right",
                )  # fmt: skip
            axes.set_title(text)
            axes.set_xlabel("MB on disk, adapter included")
            axes.set_ylabel("nats a token above full precision")
            # Models of nearly the same size are shown as such.
            axes.set_xlim(middle - max(1.3 * half, SAME_SIZE * middle), middle + max(1.3 * half, SAME_SIZE * middle))
            axes.set_ylim(0, 1.25 * max(point.loss for point in points))
            _plain(axes)

    rows = len(panels)
    return _figure("trade-off", "Loss against bytes", alternative, draw, 3.6, 3.4 * rows)


def heat_maps(
    name: str, title: str, alternative: str, maps: Mapping[str, Sequence[Sequence[float]]], kinds: Sequence[str],
    label: str,
) -> Figure:  # fmt: skip
    """Layers × modules, side by side on one scale.

    Args:
        name: of the figure in the page.
        title: over it.
        alternative: what it shows.
        maps: title of each map → layers × kinds, NaN where a layer has no such module.
        kinds: of modules, the columns.
        label: of the colours.
    """

    def draw(figure: Any, narrow: bool) -> None:
        import numpy

        shape = (len(maps), 1) if narrow else (1, len(maps))
        all_axes = list(figure.subplots(*shape, squeeze=False).flat)
        arrays = [numpy.array(rows, dtype=float) for rows in maps.values()]
        most = max((float(numpy.nanmax(one)) for one in arrays), default=1.0)
        drawn = None
        for axes, (heading, values) in zip(all_axes, zip(maps, arrays, strict=True), strict=True):
            drawn = axes.pcolormesh(values, cmap=HEAT, vmin=0, vmax=most, edgecolors="none")
            axes.set_title(heading)
            axes.set_xticks([place + 0.5 for place in range(len(kinds))], kinds, rotation=45, ha="right")
            axes.set_ylabel("layer")
            axes.invert_yaxis()
            axes.yaxis.get_major_locator().set_params(integer=True)
        bar = figure.colorbar(drawn, ax=all_axes, location="bottom" if narrow else "right", fraction=0.05)
        bar.set_label(label)
        bar.outline.set_edgecolor(LINE)
        bar.ax.tick_params(color=LINE)

    return _figure(name, title, alternative, draw, 4.4, 4.2 * len(maps) + 0.6)


def lines(name: str, title: str, alternative: str, curves: Mapping[str, Sequence[float]], x: str, y: str) -> Figure:
    """Curves over 1, 2, 3 …, on a logarithmic scale with plain numbers."""

    def draw(figure: Any, narrow: bool) -> None:
        axes = figure.subplots()
        for number, (label, values) in enumerate(curves.items()):
            axes.plot(range(1, len(values) + 1), values, color=COLOURS[number % len(COLOURS)], label=label)
        axes.set_yscale("log")
        axes.set_xlabel(x)
        axes.set_ylabel(y)
        _plain(axes)
        axes.legend(frameon=False, labelcolor=INK, ncols=2 if narrow else 1)

    return _figure(name, title, alternative, draw, 3.6, 3.6)


def bars(name: str, title: str, alternative: str, lengths: Mapping[str, float], x: str) -> Figure:
    """Horizontal bars, the first on top."""

    def draw(figure: Any, narrow: bool) -> None:
        axes = figure.subplots()
        labels = [_shortened(label, 26 if narrow else 60) for label in lengths]
        places = range(len(labels))
        axes.barh(places, list(lengths.values()), color=COLOURS[0])
        axes.set_yticks(places, labels)
        axes.invert_yaxis()
        axes.set_xlabel(x)
        _plain(axes, words=True)

    height = 0.8 + 0.3 * len(lengths)
    return _figure(name, title, alternative, draw, height, height)


def plain_number(value: float) -> str:
    """`0.2`, `1500`, never `2 × 10⁻¹`."""
    if value == 0 or not math.isfinite(value):
        return "0" if value == 0 else ""
    digits = max(0, 2 - math.floor(math.log10(abs(value))))
    shown = f"{value:.{digits}f}"
    return shown.rstrip("0").rstrip(".") if "." in shown else shown


def _plain(axes: Any, *, words: bool = False) -> None:
    """Plain numbers on both axes, or on the lower one alone where ``words`` stand at the other, and a grid behind."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter, ScalarFormatter

    for axis in (axes.xaxis,) if words else (axes.xaxis, axes.yaxis):
        if axis.get_scale() == "log":
            # Ticks at 1, 2 and 5 of every decade, so that a narrow range has several as well.
            axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axis.set_minor_formatter(NullFormatter())
            axis.set_major_formatter(FuncFormatter(lambda value, _: plain_number(value)))
        else:
            formatter = ScalarFormatter(useOffset=False)
            formatter.set_scientific(False)
            axis.set_major_formatter(formatter)
    axes.grid(color=LINE, linewidth=0.6)
    axes.set_axisbelow(True)


def _figure(
    name: str, title: str, alternative: str, draw: Callable[[Any, bool], None], height: float, narrow_height: float
) -> Figure:
    return Figure(
        title,
        alternative,
        _svg(f"{name}-wide", title, alternative, lambda figure: draw(figure, False), (WIDE, height)),
        _svg(f"{name}-narrow", title, alternative, lambda figure: draw(figure, True), (NARROW, narrow_height)),
    )


def _svg(name: str, title: str, alternative: str, draw: Callable[[Any], None], size: tuple[float, float]) -> str:
    from matplotlib import rc_context
    from matplotlib.figure import Figure as Canvas

    style: Any = {
        # Words stay words, so that they can be read aloud, searched and copied, in the page's font.
        "svg.fonttype": "none", "svg.hashsalt": name, "font.size": FONT_POINTS, "font.family": "sans-serif",
        "text.color": INK, "axes.labelcolor": INK, "axes.edgecolor": LINE, "xtick.color": LINE, "ytick.color": LINE,
        "xtick.labelcolor": INK, "ytick.labelcolor": INK, "axes.facecolor": "none", "figure.facecolor": "none",
        "axes.titlesize": FONT_POINTS, "axes.spines.top": False, "axes.spines.right": False,
    }  # fmt: skip
    with rc_context(style):
        figure = Canvas(figsize=size, layout="constrained")
        draw(figure)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    return _for_page(buffer.getvalue(), name, title, alternative)


def _for_page(svg: str, name: str, title: str, alternative: str) -> str:
    """The drawing alone, in the page's colours, its ids apart from those of other figures, and with its alternative."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'\bid="', f'id="{name}-', svg)
    svg = re.sub(r'href="#', f'href="#{name}-', svg)
    svg = svg.replace("url(#", f"url(#{name}-")
    for colour, variable in PAGE_COLOURS.items():
        svg = svg.replace(colour, variable)
    svg = re.sub(r"font: ([\d.]+)px [^;\"]*", r"font: \1px var(--font)", svg)
    # The page gives the width; `viewBox` keeps the shape.
    opening = re.sub(r' (?:width|height)="[^"]*"', "", svg[: svg.index(">") + 1])
    opening = opening.replace("<svg", f'<svg role="img" aria-labelledby="{name}-title {name}-description"', 1)
    described = (
        f'<title id="{name}-title">{escape(title)}</title><desc id="{name}-description">{escape(alternative)}</desc>'
    )
    return opening + described + svg[svg.index(">") + 1 :].strip()


def _shortened(label: str, most: int) -> str:
    return label if len(label) <= most else label[: most - 1] + "…"
