"""How much of the loss that quantisation costs does an adapter win back, against GPTQModel's own `Lora`?

Recovered share = (loss_q − loss_adapter) / (loss_q − loss_full), loss in nats per token on held-out text. Same model,
calibration, rank and process for both. Results are kept after every run, so that an interrupted benchmark goes on.

    python benchmarks/recovery.py --json
"""

from __future__ import annotations

import argparse
import json
import time
from typing import Any

import common
from gptqmodel import GPTQModel, QuantizeConfig
from gptqmodel.adapter.adapter import AdapterCache, Lora

from gptqmodel_eora_ext import EoRA
from gptqmodel_eora_ext.hosts.gptqmodel.output import quiet

# 8k tokens: a run takes minutes on two cores, and every cell of both contenders sees the same tokens.
SAMPLES, SEQLEN = 32, 256
GROUP_SIZE = 64
# GPTQModel's search for scales (`mse`), by bits. With it off, 2 bits g64 leaves SmolLM2 at a loss above that of a
# uniform guess (11.3 nats against 10.8), where a share of what was lost says nothing. At 3 bits it is not needed.
SCALE_SEARCH = {2: 2.4, 3: 0.0}


def measure(kind: str, bits: int, rank: int, texts: dict[str, Any], windows: int) -> dict[str, Any]:
    """Quantise, save, load, evaluate."""
    with common.scratch() as folder, quiet():
        adapter = {
            "none": lambda: None,
            "stock": lambda: Lora(rank=rank, path=str(folder / "lora")),
            "ours": lambda: EoRA(rank=rank),
        }[kind]()
        AdapterCache.reset()
        config = QuantizeConfig(bits=bits, group_size=GROUP_SIZE, mse=SCALE_SEARCH[bits])
        model = GPTQModel.load(str(common.smollm2()), config)
        start = time.perf_counter()
        model.quantize(common.calibration(SAMPLES, SEQLEN), batch_size=common.BATCH_SIZE, adapter=adapter)
        seconds = time.perf_counter() - start
        model.save(str(folder / "model"))
        del model
        reload = Lora(rank=rank, path=str(folder / "lora")) if kind == "stock" else None
        losses = common.losses(common.densified(folder / "model", reload), texts, windows)
    return {"kind": kind, "bits": bits, "rank": rank, "seconds": seconds, "loss": losses}


def shares(runs: list[dict[str, Any]], full: dict[str, float]) -> list[dict[str, Any]]:
    """One row a cell: recovered shares of both contenders."""
    found = {(run["kind"], run["bits"], run["rank"]): run["loss"] for run in runs}
    rows = []
    for (kind, bits, rank), ours in found.items():
        if kind != "ours" or ("stock", bits, rank) not in found:
            continue
        plain, stock = found["none", bits, 0], found["stock", bits, rank]
        for text in ours:
            lost = plain[text] - full[text]
            rows.append(
                {
                    "bits": bits,
                    "rank": rank,
                    "text": text,
                    "full": full[text],
                    "quantised": plain[text],
                    "stock": stock[text],
                    "ours": ours[text],
                    "stock share": (plain[text] - stock[text]) / lost,
                    "our share": (plain[text] - ours[text]) / lost,
                }
            )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    parser.add_argument("--bits", type=int, nargs="+", default=[2, 3])
    parser.add_argument("--ranks", type=int, nargs="+", default=[16, 32, 64])
    parser.add_argument("--windows", type=int, default=24, help="held-out windows of 512 tokens per text")
    parser.add_argument("--fresh", action="store_true", help="measure again what the results file already holds")
    options = parser.parse_args()

    texts = common.held_out()
    kept = common.RESULTS / "recovery.json"
    previous = json.loads(kept.read_text()) if kept.is_file() and not options.fresh else {}
    runs: list[dict[str, Any]] = previous.get("runs", [])
    full = previous.get("full") or common.losses(common.base_model(), texts, options.windows)
    wanted = [("none", bits, 0) for bits in options.bits]
    wanted += [(kind, bits, rank) for bits in options.bits for rank in options.ranks for kind in ("stock", "ours")]
    for kind, bits, rank in wanted:
        if not any((run["kind"], run["bits"], run["rank"]) == (kind, bits, rank) for run in runs):
            runs.append(measure(kind, bits, rank, texts, options.windows))
        setup = {"samples": SAMPLES, "seqlen": SEQLEN, "group_size": GROUP_SIZE, "mse": SCALE_SEARCH,
                 "windows": options.windows}  # fmt: skip
        result = {"setup": setup, "full": full, "runs": runs, "shares": shares(runs, full)}
        common.keep("recovery", result, as_json=False)
    common.keep("recovery", result, as_json=options.json)
    header = ("bits", "rank", "text", "full", "quantised", "stock", "ours", "stock share", "our share")
    common.table(header, [[row[name] for name in header] for row in result["shares"]])


if __name__ == "__main__":
    main()
