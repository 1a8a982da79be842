"""Is an ensemble worth more than one adapter of mixed text, does its router find the domain, and what do weights cost?

Domains are GSM8K questions, Python source and an encyclopedia; C4 is the shared text, and with `--web` a domain as
well. Of each text the last part is held out. Recovered share = (loss_none − loss) / (loss_none − loss_full), of the
tokens that follow a prompt of 64. The controls are one adapter of all texts, in the bytes of all members together
("total") and in those that serve a prompt ("active"), made with the same windows.

    python benchmarks/ensemble.py --checkpoint /tmp/ensemble            # all parts; what is made there is used again
    python benchmarks/ensemble.py --checkpoint /tmp/ensemble --parts routing --foreign german.txt
    python benchmarks/ensemble.py --checkpoint /tmp/tiny --tiny         # a dry run: few windows, 4 layers

Legal text is that of the licences in /usr/share/common-licenses, where the system has them. No text in another language
is among the benchmark data; `--foreign` names a file of it.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import common
import torch
from gptqmodel import GPTQModel, QuantizeConfig

from gptqmodel_eora_ext.adapter.ensemble.folder import SHARED, EnsembleFolder
from gptqmodel_eora_ext.adapter.errors import read_json
from gptqmodel_eora_ext.evaluate.ensemble import NONE, PROMPT, ROUTED, continuation_nats, ensemble_losses, windows_of
from gptqmodel_eora_ext.hosts.ensemble import ensemble_of
from gptqmodel_eora_ext.hosts.ensemble_making import EnsembleJob, make_ensemble
from gptqmodel_eora_ext.hosts.registry import loader
from gptqmodel_eora_ext.hosts.terminal import quiet
from gptqmodel_eora_ext.kernels.row_weights import RowWeights
from gptqmodel_eora_ext.system.files import write_json

PARTS = ("losses", "routing", "cost")
BITS, GROUP_SIZE, SCALE_SEARCH = 2, 64, 2.4
# Windows that the checkpoint is quantised with, and of each text those that factors and the router are made of.
QUANTIZER_SAMPLES, SAMPLES, ROUTER_SAMPLES, SEQLEN = 64, 64, 1024, 256
TEXTS = {"math": "math_gsm8k_train_qa.txt", "code": common.CODE, "wiki": "wiki_enwiki106_gensim.txt"}
WEB, WEB_SEEN, WEB_HELD_OUT = "web", "web_c4_1480docs_train.txt", "web_c4_1480docs_heldout.txt"
# Of a text that is one file, the last tenth is held out.
SEEN = 0.9
LICENCES = Path("/usr/share/common-licenses")
LENGTHS, PROMPTS = (32, 128), 256
WIDTHS, CALLS = ((576, 1536), (4096, 4096)), 400


def texts(held_out: bool) -> dict[str, str]:
    """Of each domain and the shared text, the part that is seen or the one that is held out."""
    found = {}
    for name, file in TEXTS.items():
        if file == common.CODE:
            found[name] = common.read_part(file, seen=not held_out)
            continue
        text = common.read(file)
        cut = int(len(text) * SEEN)
        found[name] = text[cut:] if held_out else text[:cut]
    return {**found, WEB: common.read(WEB_HELD_OUT if held_out else WEB_SEEN)}


def spread(ids: list[int], count: int, size: int) -> list[list[int]]:
    """So many windows of a text, evenly from all of it."""
    step = max(size, (len(ids) - size) // max(count - 1, 1))
    return [ids[start : start + size] for start in range(0, len(ids) - size + 1, step)][:count]


def made_with(options: argparse.Namespace) -> dict[str, Any]:
    """What the ensemble and its controls depend on."""
    return {"budget": options.budget, "shared part": options.shared_part, "factor bits": options.factor_bits,
            "web": options.web}  # fmt: skip


def make(options: argparse.Namespace, base: common.Subject, folder: Path) -> None:
    """The checkpoint, its ensemble and the controls, where they are not there; those of another setup are refused."""
    checkpoint = folder / "checkpoint"
    samples, router = (4, 16) if options.tiny else (SAMPLES, ROUTER_SAMPLES)
    if not checkpoint.is_dir():
        windows = common.calibration(base, samples if options.tiny else QUANTIZER_SAMPLES, SEQLEN)
        with quiet():
            host = GPTQModel.load(str(base.folder), QuantizeConfig(bits=BITS, group_size=GROUP_SIZE, mse=SCALE_SEARCH))
            host.quantize(windows, batch_size=4)
            host.save(str(checkpoint))
    asked, noted = made_with(options), folder / "made_with.json"
    if EnsembleFolder.is_one(checkpoint / "eora"):
        found = read_json(noted)
        if found != asked:
            raise SystemExit(f"`{folder}` was made with {found}, and {asked} is asked. Name another --checkpoint.")
        return
    tokenize = common.tokenizer(base)
    cut = {
        name: [{"input_ids": one, "attention_mask": [1] * SEQLEN}
               for one in spread(tokenize(text, add_special_tokens=False).input_ids, router, SEQLEN)]
        for name, text in texts(held_out=False).items()
    }  # fmt: skip
    shared = cut[WEB] if options.web else cut.pop(WEB)
    job = EnsembleJob(
        base=str(base.folder), checkpoint=checkpoint, output=checkpoint / "eora", shared=shared, domains=cut,
        budget=options.budget, samples=samples, shared_part=options.shared_part, background=not options.web,
        controls=folder / "controls", batch_size=4,
        adapter={"factor_bits": options.factor_bits, "sensitivity": "uniform" if options.tiny else "fisher"},
    )  # fmt: skip
    with quiet():
        make_ensemble(job)
    write_json(noted, asked)


def losses(options: argparse.Namespace, base: common.Subject, folder: Path) -> dict[str, Any]:
    """Recovered shares by domain."""
    window = 128 if options.tiny else common.EVALUATION_WINDOW
    most = 2 if options.tiny else options.windows
    tokenize = common.tokenizer(base)
    ids = {name: torch.tensor(tokenize(text[: common.HELD_OUT_CHARACTERS]).input_ids)
           for name, text in texts(held_out=True).items()}  # fmt: skip
    with quiet():
        loaded = loader(folder / "checkpoint")(folder / "checkpoint")
    controls = {name: folder / "controls" / name for name in ("total", "active")}
    found = ensemble_losses(loaded, ids, controls=controls, window=window, max_windows=most)
    del loaded
    full_model = common.base_model(base)
    full = {}
    for name, text in ids.items():
        cut = list(windows_of(text, window, most))
        full[name] = sum(continuation_nats(full_model, one, PROMPT) for one in cut) / (len(cut) * (window - PROMPT))
    shares = {
        contender: {name: (found.losses[NONE][name] - one[name]) / (found.losses[NONE][name] - full[name]) for name in
        full} for contender, one in found.losses.items()
    }  # fmt: skip
    means = {name: sum(one.values()) / len(one) for name, one in shares.items()}
    over = {
        name: {
            "mean": means[ROUTED] / means[name],
            "least": min(shares[ROUTED][one] / shares[name][one] for one in full),
        }
        for name in controls
    }
    opened = EnsembleFolder.open(folder / "checkpoint" / "eora")
    return {"full": full, **dataclasses.asdict(found), "recovered": shares, "mean recovered": means,
            "routed over": over,
            "bytes": {"ensemble": opened.nbytes, **{name: path.joinpath("adapter_model.safetensors").stat().st_size
                                                    for name, path in controls.items()}}}  # fmt: skip


def routing(options: argparse.Namespace, base: common.Subject, folder: Path) -> dict[str, Any]:
    """Where prompts go: own domain, another, or the shared adapter alone."""
    tokenize = common.tokenizer(base)
    kinds = texts(held_out=True)
    if LICENCES.is_dir():
        files = sorted(path for path in LICENCES.iterdir() if path.is_file() and not path.is_symlink())
        kinds["legal"] = "\n".join(path.read_text(errors="replace") for path in files)
    if options.foreign is not None:
        kinds["foreign"] = options.foreign.read_text(errors="replace")
    with quiet():
        loaded = loader(folder / "checkpoint")(folder / "checkpoint")
    ensemble = ensemble_of(loaded.model)
    result: dict[str, Any] = {}
    for kind, text in kinds.items():
        ids = tokenize(text, add_special_tokens=False, verbose=False).input_ids
        for length in LENGTHS:
            cut = torch.tensor(spread(ids, 16 if options.tiny else PROMPTS, length))
            nearest: list[str] = []
            for batch in cut.split(16):
                found = ensemble.route(batch)
                # The shared text's own class is the shared adapter alone, too.
                nearest += ["shared alone" if back or one == SHARED else one
                            for one, back in zip(found.nearest, found.fallen_back, strict=True)]  # fmt: skip
            result.setdefault(kind, {})[str(length)] = {
                one: round(nearest.count(one) / len(nearest), 4) for one in sorted(set(nearest))
            }  # fmt: skip
    return result


def cost(options: argparse.Namespace, base: common.Subject, folder: Path) -> dict[str, Any]:
    """One row with weights and without, the router beside its prompt, a row of a mixed batch beside the row alone."""
    from gptqmodel_eora_ext.formats.factors import Factors
    from gptqmodel_eora_ext.formats.packed_weights import PackedWeight, pack_words
    from gptqmodel_eora_ext.kernels.cpu.repack import repack_weight
    from gptqmodel_eora_ext.kernels.fused import FusedLinear

    result: dict[str, Any] = {"call": {}}
    members = (32, 16, 8, 8)
    weights = torch.tensor([[1.0, 0.5, 0.3, 0.2]])
    for in_features, out_features in WIDTHS:
        groups = in_features // GROUP_SIZE
        packed = PackedWeight(
            pack_words(torch.randint(0, 4, (in_features, out_features)), BITS),
            pack_words(torch.full((groups, out_features), 2).T, BITS).T.contiguous(),
            torch.rand(groups, out_features).half(), None, BITS, GROUP_SIZE, in_features, out_features,
        )  # fmt: skip
        plain = Factors(torch.randn(64, in_features).bfloat16(), torch.randn(64, out_features).bfloat16())
        weight = repack_weight(packed)
        one = FusedLinear(weight, plain)
        several = FusedLinear(weight, dataclasses.replace(plain, members=members))
        x, given = torch.randn(1, in_features, dtype=torch.bfloat16), RowWeights(weights)
        # In turns, so that whatever else the machine does meets both; the smaller half of the times counts.
        times = alternated(
            functools.partial(one, x), lambda: several(x, given.for_rows(1)), 20 if options.tiny else CALLS  # noqa: B023
        )  # fmt: skip
        result["call"][f"{in_features} × {out_features}"] = {
            "without µs": times[0] * 1e6, "with µs": times[1] * 1e6, "ratio": times[1] / times[0]
        }  # fmt: skip
    with quiet():
        loaded = loader(folder / "checkpoint")(folder / "checkpoint")
    ensemble = ensemble_of(loaded.model)
    tokenize = common.tokenizer(base)
    ids = {name: tokenize(text[:4000], add_special_tokens=False).input_ids[:128]
           for name, text in texts(held_out=True).items()}  # fmt: skip
    batch = torch.tensor(list(ids.values()))
    with torch.inference_mode():
        together = loaded.model(input_ids=batch).logits.float()
        gaps = []
        for row in range(len(batch)):
            alone = loaded.model(input_ids=batch[row : row + 1]).logits.float()[0]
            gaps.append(float((together[row] - alone).norm() / alone.norm()))
        shares = []
        for _ in range(2 if options.tiny else 10):
            start = time.perf_counter()
            loaded.model(input_ids=batch[:1])
            took = time.perf_counter() - start
            routing = ensemble.last
            assert routing is not None
            shares.append(routing.seconds / took)
    return {**result, "router share of a prompt of 128": sorted(shares)[len(shares) // 2],
            "relative gap of a row in a mixed batch": max(gaps)}  # fmt: skip


def alternated(first: Callable[[], Any], second: Callable[[], Any], calls: int) -> tuple[float, float]:
    """Seconds of a call of each, the median of the smaller half."""
    times: tuple[list[float], list[float]] = ([], [])
    for _ in range(calls):
        for call, found in zip((first, second), times, strict=True):
            start = time.perf_counter()
            call()
            found.append(time.perf_counter() - start)
    halves = [sorted(found)[: max(1, calls // 2)] for found in times]
    return halves[0][len(halves[0]) // 2], halves[1][len(halves[1]) // 2]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    common.add_model(parser)
    parser.add_argument("--checkpoint", type=Path, required=True, help="folder to keep what is made in")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--budget", default="0.5bpw", help="of all factors of the ensemble")
    parser.add_argument("--shared-part", type=float, help="of the budget; by default forecasts choose")
    parser.add_argument("--factor-bits", type=int, default=4)
    parser.add_argument("--web", action="store_true", help="have C4 be a domain, too")
    parser.add_argument("--windows", type=int, default=48, help="of each held-out text")
    parser.add_argument("--foreign", type=Path, help="text in another language")
    parser.add_argument("--tiny", action="store_true", help="a dry run, whose figures say nothing")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    if options.tiny and not options.layers:
        options.layers = 4
    with common.subject(options) as base:
        path = base.results("ensemble_tiny" if options.tiny else "ensemble")
        setup = made_with(options)
        result = {**common.kept(path, setup), "setup": setup}
        make(options, base, options.checkpoint)
        for part in options.parts:
            measure = {"losses": losses, "routing": routing, "cost": cost}[part]
            result[part] = {**measure(options, base, options.checkpoint), "measured": common.measured(base)}
            common.keep(path, result, as_json=options.json)


if __name__ == "__main__":
    main()
