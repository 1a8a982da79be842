"""Draw `docs/recovery.svg` from `results/recovery.json`.

python benchmarks/picture.py
"""

from __future__ import annotations

import json
from pathlib import Path

import matplotlib.pyplot as plt

HERE = Path(__file__).parent
CONTENDERS = (("stock share", "GPTQModel's Lora", "0.6"), ("our share", "EoRA (this plugin)", "C0"))


def main() -> None:
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
