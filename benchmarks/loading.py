"""Do all ways to load an adapter give the same logits?

From one folder: GPTQModel with the plugin, GPTQModel without it (another process), and transformers + PEFT. Beside
it, the same comparison of GPTQModel with PEFT for an adapter that GPTQModel's own `Lora` made.

    python benchmarks/loading.py --json
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import common
import torch
from gptqmodel import BACKEND, GPTQModel, QuantizeConfig
from gptqmodel.adapter.adapter import Lora
from peft import PeftModel
from transformers import AutoModelForCausalLM

from gptqmodel_eora_ext import EoRA
from gptqmodel_eora_ext.autoload import OFF_SWITCH
from gptqmodel_eora_ext.hosts.terminal import quiet

RANK = 32
TOKENS = 256

WITHOUT_PLUGIN = """
import sys, torch
from gptqmodel import BACKEND, GPTQModel
ids = torch.load(sys.argv[2], weights_only=True)
model = GPTQModel.load(sys.argv[1], backend=BACKEND.GPTQ_TORCH).model
with torch.inference_mode():
    torch.save(model(ids[None]).logits, sys.argv[3])
"""


def logits(model: Any, ids: torch.Tensor) -> torch.Tensor:
    with torch.inference_mode():
        result: torch.Tensor = model(input_ids=ids[None]).logits
    return result.float()


def by_gptqmodel(checkpoint: Path, ids: torch.Tensor, adapter: Any = None) -> torch.Tensor:
    with quiet():
        model = GPTQModel.load(str(checkpoint), adapter=adapter, backend=BACKEND.GPTQ_TORCH)
    return logits(model.model, ids)


def by_peft(checkpoint: Path, adapter: Path, ids: torch.Tensor) -> torch.Tensor:
    return logits(PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(checkpoint), adapter), ids)


def without_plugin(checkpoint: Path, ids: torch.Tensor, folder: Path) -> torch.Tensor:
    torch.save(ids, folder / "ids.pt")
    command = [sys.executable, "-c", WITHOUT_PLUGIN, str(checkpoint), str(folder / "ids.pt"), str(folder / "out.pt")]
    subprocess.run(command, check=True, capture_output=True, env={**os.environ, OFF_SWITCH: "1"})
    result: torch.Tensor = torch.load(folder / "out.pt", weights_only=True)
    return result.float()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    parser.add_argument("--bits", type=int, default=4, help="a model that still computes sense; noise grows below 4")
    common.add_model(parser)
    options = parser.parse_args()
    with common.subject(options) as base, common.scratch() as folder:
        ids = common.held_out(base)["wikitext2"][:TOKENS]
        for name, adapter in (("ours", EoRA(rank=RANK)), ("stock", Lora(rank=RANK, path=str(folder / "lora")))):
            with quiet():
                model = GPTQModel.load(str(base.folder), QuantizeConfig(bits=options.bits, group_size=64))
                model.quantize(common.calibration(base, 8, 256), batch_size=common.BATCH_SIZE, adapter=adapter)
                model.save(str(folder / name))
            del model
        ours = by_gptqmodel(folder / "ours", ids)
        plain = without_plugin(folder / "ours", ids, folder)
        peft = by_peft(folder / "ours", folder / "ours" / "eora", ids)
        stock = by_gptqmodel(folder / "stock", ids, Lora(rank=RANK, path=str(folder / "lora")))
        stock_peft = by_peft(folder / "stock", folder / "lora", ids)
    rms = ours.square().mean().sqrt().item()
    stock_rms = stock.square().mean().sqrt().item()
    rows = [
        ["ours: with the plugin against without", (ours - plain).abs().max().item() / rms],
        ["ours: GPTQModel against PEFT", (ours - peft).abs().max().item() / rms],
        ["stock Lora: GPTQModel against PEFT", (stock - stock_peft).abs().max().item() / stock_rms],
    ]
    setup = {"bits": options.bits, "layers": options.layers or "all", "rank": RANK, "tokens": TOKENS}
    result = {"measured": common.measured(base), "setup": setup, "largest difference over rms": dict(rows)}
    common.keep(base.results("loading"), result, as_json=options.json)
    common.table(("comparison", "largest difference / rms of the logits"), rows)


if __name__ == "__main__":
    main()
