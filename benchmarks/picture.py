"""Draw `docs/recovery.svg` from `results/recovery.json`, and `docs/pareto.svg` from `results/plan.json` where that is.

python benchmarks/picture.py
"""

from __future__ import annotations

import json
from pathlib import Path

import matplotlib.pyplot as plt

HERE = Path(__file__).parent
CONTENDERS = (("stock share", "GPTQModel's Lora", "0.6"), ("our share", "EoRA (this plugin)", "C0"))


# Kinds of `plan.py`'s cells.
PARETO = (("uniform", "o--", "0.6", "one rank for all"), ("auto", "o-", "C1", "chosen ranks"),
          ("mix", "o-", "k", "bits and ranks chosen together"), ("plain", "s", "C0", "no adapter"))  # fmt: skip


def main() -> None:
    recovery()
    if (HERE / "results" / "plan.json").is_file():
        pareto()


def pareto() -> None:
    """Measured loss against size, a line for each width of weights and factors."""
    result = json.loads((HERE / "results" / "plan.json").read_text())
    texts = [text for text in result["full"] if all(text in run["loss"] for run in result["runs"])]
    figure, axes = plt.subplots(1, len(texts), figsize=(5 * len(texts), 4), squeeze=False)
    for axis, text in zip(axes[0], texts, strict=True):
        full = result["full"][text]
        for kind, style, colour, label in PARETO:
            lines: dict[tuple[int, int], list[tuple[float, float]]] = {}
            for run in (run for run in result["runs"] if run["kind"] == kind):
                key = (run["bits"] if kind != "plain" else 0, run["factor_bits"])
                lines.setdefault(key, []).append((run["bpw"], run["loss"][text] - full))
            for number, points in enumerate(lines.values()):
                axis.plot(
                    *zip(*sorted(points), strict=True), style, color=colour, ms=4, label=label if not number else ""
                )
        axis.set_title(text)
        axis.set_xlabel("bits per weight, all in")
        axis.set_yscale("log")
        axis.grid(alpha=0.3, which="both")
    axes[0][0].set_ylabel("measured loss above full precision, nats")
    axes[0][0].legend(fontsize="small")
    figure.tight_layout()
    figure.savefig(HERE.parent / "docs" / "pareto.svg")


def recovery() -> None:
    rows = json.loads((HERE / "results" / "recovery.json").read_text())["shares"]
    panels = sorted({(row["bits"], row["text"]) for row in rows})
    figure, axes = plt.subplots(1, len(panels), figsize=(3 * len(panels), 3), squeeze=False)
    for axis, (bits, text) in zip(axes[0], panels, strict=True):
        cell = [row for row in rows if (row["bits"], row["text"]) == (bits, text)]
        cell.sort(key=lambda row: row["rank"])
        for key, label, colour in CONTENDERS:
            axis.plot([row["rank"] for row in cell], [100 * row[key] for row in cell], "o-", color=colour, label=label)
        axis.set_title(f"{bits} bits, {text}")
        axis.set_xlabel("rank")
        axis.set_xticks([row["rank"] for row in cell])
    axes[0][0].set_ylabel("% of the lost loss won back")
    axes[0][0].legend(fontsize="small")
    figure.tight_layout()
    figure.savefig(HERE.parent / "docs" / "recovery.svg")


if __name__ == "__main__":
    main()
