"""How much of the loss that quantisation costs does an adapter win back, against GPTQModel's own `Lora`?

Recovered share = (loss_q − loss_adapter) / (loss_q − loss_full), loss in nats per token on held-out text. Same model,
calibration, rank and process for both. At 2 bits also: factors in 8 and 4 bits, at the bytes of a 16-bit rank 32.
Results are kept after every run, so that an interrupted benchmark goes on.

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
from gptqmodel_eora_ext.solve import GROUP_SIZE as FACTOR_GROUP_SIZE

# 8k tokens: a run takes minutes on two cores, and every cell of both contenders sees the same tokens.
SAMPLES, SEQLEN = 32, 256
GROUP_SIZE = 64
# GPTQModel's search for scales (`mse`), by bits. With it off, 2 bits g64 leaves SmolLM2 at a loss above that of a
# uniform guess (11.3 nats against 10.8), where a share of what was lost says nothing. At 3 bits it is not needed.
SCALE_SEARCH = {2: 2.4, 3: 0.0}
# Packed factors are compared at the bytes of this rank in 16 bits, on a model of these bits.
PACKED_AGAINST_RANK, PACKED_BITS = 32, 2
SCALE_BITS = 16

Cell = tuple[str, int, int, int]


def rank_of_same_bytes(factor_bits: int) -> int:
    """The largest rank whose packed factors, scales included, take no more than 16-bit ones of the reference rank."""
    return int(PACKED_AGAINST_RANK * 16 / (factor_bits + SCALE_BITS / FACTOR_GROUP_SIZE))


def cell_of(run: dict[str, Any]) -> Cell:
    return run["kind"], run["bits"], run["rank"], run.get("factor_bits", 16)


def measure(cell: Cell, texts: dict[str, Any], windows: int) -> dict[str, Any]:
    """Quantise, save, load, evaluate."""
    kind, bits, rank, factor_bits = cell
    with common.scratch() as folder, quiet():
        adapter = {
            "none": lambda: None,
            "stock": lambda: Lora(rank=rank, path=str(folder / "lora")),
            "ours": lambda: EoRA(rank=rank, factor_bits=factor_bits),
        }[kind]()
        AdapterCache.reset()
        config = QuantizeConfig(bits=bits, group_size=GROUP_SIZE, mse=SCALE_SEARCH[bits])
        model = GPTQModel.load(str(common.smollm2()), config)
        start = time.perf_counter()
        model.quantize(common.calibration(SAMPLES, SEQLEN), batch_size=common.BATCH_SIZE, adapter=adapter)
        seconds = time.perf_counter() - start
        model.save(str(folder / "model"))
        del model
        adapter_file = folder / "model" / "eora" / "adapter_model.safetensors"
        adapter_bytes = adapter_file.stat().st_size if kind == "ours" else None
        reload = Lora(rank=rank, path=str(folder / "lora")) if kind == "stock" else None
        losses = common.losses(common.densified(folder / "model", reload), texts, windows)
    return {
        "kind": kind,
        "bits": bits,
        "rank": rank,
        "factor_bits": factor_bits,
        "seconds": seconds,
        "adapter bytes": adapter_bytes,
        "loss": losses,
    }


def shares(runs: list[dict[str, Any]], full: dict[str, float]) -> list[dict[str, Any]]:
    """One row a cell: recovered shares of both contenders."""
    found = {cell_of(run): run["loss"] for run in runs}
    rows = []
    for (kind, bits, rank, factor_bits), ours in found.items():
        if kind != "ours" or ("stock", bits, rank, factor_bits) not in found:
            continue
        plain, stock = found["none", bits, 0, 16], found["stock", bits, rank, 16]
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


def packed_shares(runs: list[dict[str, Any]], full: dict[str, float]) -> list[dict[str, Any]]:
    """One row a text and width of factors, at the same bytes: recovered share, and its ratio to 16 bits."""
    found = {cell_of(run): run for run in runs}
    packed = [(bits, rank_of_same_bytes(bits)) for bits in (8, 4)]
    reference = found.get(("ours", PACKED_BITS, PACKED_AGAINST_RANK, 16))
    if reference is None:
        return []
    plain = found["none", PACKED_BITS, 0, 16]["loss"]
    rows = []
    for factor_bits, rank in [(16, PACKED_AGAINST_RANK), *packed]:
        run = found.get(("ours", PACKED_BITS, rank, factor_bits))
        for text in plain if run else ():
            rows.append(
                {
                    "factor_bits": factor_bits,
                    "rank": rank,
                    "adapter bytes": run.get("adapter bytes"),
                    "text": text,
                    "share": (plain[text] - run["loss"][text]) / (plain[text] - full[text]),
                    "ratio": (plain[text] - run["loss"][text]) / (plain[text] - reference["loss"][text]),
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
    wanted: list[Cell] = [("none", bits, 0, 16) for bits in options.bits]
    wanted += [(kind, bits, rank, 16) for bits in options.bits for rank in options.ranks for kind in ("stock", "ours")]
    if PACKED_BITS in options.bits:
        wanted += [("ours", PACKED_BITS, rank_of_same_bytes(bits), bits) for bits in (8, 4)]
    for cell in wanted:
        if cell not in map(cell_of, runs):
            runs.append(measure(cell, texts, options.windows))
        setup = {"samples": SAMPLES, "seqlen": SEQLEN, "group_size": GROUP_SIZE, "mse": SCALE_SEARCH,
                 "windows": options.windows}  # fmt: skip
        result = {"setup": setup, "full": full, "runs": runs, "shares": shares(runs, full),
                  "same bytes": packed_shares(runs, full)}  # fmt: skip
        common.keep("recovery", result, as_json=False)
    common.keep("recovery", result, as_json=options.json)
    header = ("bits", "rank", "text", "full", "quantised", "stock", "ours", "stock share", "our share")
    common.table(header, [[row[name] for name in header] for row in result["shares"]])
    if result["same bytes"]:
        header = ("factor_bits", "rank", "adapter bytes", "text", "share", "ratio")
        common.table(header, [[row[name] for name in header] for row in result["same bytes"]])


if __name__ == "__main__":
    main()
