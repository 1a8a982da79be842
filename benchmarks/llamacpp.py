"""What does an adapter win back in llama.cpp, what does it cost there, and does llama.cpp compute what was solved for?

SmolLM2 padded to 768 channels (`padded.py`), quantised by llama-quantize with our importance matrix. `make llamacpp`
first. Files are kept in a folder (`--work`), so that a run which was interrupted goes on.

    python benchmarks/llamacpp.py [--parts recovery refined speed logits cost] [--types IQ2_XS Q2_K Q3_K_S]
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import common
import llamacpp_tools as llama

from gptqmodel_eora_ext.formats.gguf.lora import read_lora_header
from gptqmodel_eora_ext.refine import DEFAULT_TOKENS

TYPES = ("IQ2_XS", "Q2_K", "Q3_K_S")
UNIFORM_RANK, FACTOR_BITS = 64, 4
# Windows of 512 tokens of C4: 8k tokens for adapters, twice as many for the importance matrix.
SAMPLES, IMATRIX_SAMPLES, SEQLEN = 16, 32, 512
PARTS = ("recovery", "refined", "speed", "logits", "cost")
RESULT = common.RESULTS / "llamacpp.json"
PROMPT, WRITTEN, REPEATS = "The history of the steam engine begins", 96, 5
LOGIT_TOKENS = 256
EORA = Path(sys.executable).with_name("eora")


class Work:
    """Files that parts share; each is made when it is first asked for."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        self.texts = {name: common.DATA / file for name, file in common.HELD_OUT.items() if name != "code"}
        self.calibration = common.DATA / common.CALIBRATION_TEXTS["c4"]

    @property
    def base(self) -> Path:
        """The padded model's folder."""
        path = self.folder / "padded"
        if not (path / "config.json").is_file():
            from padded import pad

            pad(common.smollm2(), path)
        return path

    @property
    def whole(self) -> Path:
        """The padded model in F16."""
        path = self.folder / "f16.gguf"
        return path if path.is_file() else llama.convert(self.base, path)

    @property
    def imatrix(self) -> Path:
        path = self.folder / "imatrix.gguf"
        if not path.is_file():
            eora("imatrix", self.base, self.whole, *self.data(IMATRIX_SAMPLES), "--out", path)
        return path

    def data(self, samples: int = SAMPLES) -> list[str | Path]:
        """Options of our commands that name the calibration."""
        return ["--calibration", self.calibration, "--samples", str(samples), "--seqlen", str(SEQLEN)]

    def nats(self, model: Path, chunks: int, adapter: Path | None = None) -> dict[str, float]:
        """Loss on each text; kept, so that an interrupted run measures nothing twice."""
        path = self.folder / "nats.json"
        known = json.loads(path.read_text()) if path.is_file() else {}
        found = {}
        for name, text in self.texts.items():
            key = " ".join([model.name, adapter.name if adapter else "", name, str(chunks)])
            if key not in known:
                known[key] = llama.nats(model, text, chunks, adapter)
                path.write_text(json.dumps(known, indent=1))
            found[name] = known[key]
        return found

    def quantized(self, kind: str) -> Path:
        path = self.folder / f"{kind}.gguf"
        return path if path.is_file() else llama.quantize(self.whole, path, kind, "--imatrix", self.imatrix)

    def uniform(self, kind: str) -> Path:
        """The adapter of one rank for all modules."""
        path = self.folder / f"{kind}-uniform.gguf"
        return path if path.is_file() else self._generate(kind, path, "--rank", str(UNIFORM_RANK))

    def chosen(self, kind: str) -> Path:
        """The adapter of the same bytes whose ranks are chosen module by module."""
        path = self.folder / f"{kind}-chosen.gguf"
        if path.is_file():
            return path
        return self._generate(kind, path, "--budget", f"{factor_bytes(self.uniform(kind))}b")

    def refined(self, kind: str, tokens: int) -> Path:
        """The adapter of chosen ranks, its factors trained together."""
        path = self.folder / f"{kind}-refined-{tokens}.gguf"
        if not path.is_file():
            eora("refine", self.quantized(kind), "--base", self.base, "--adapter", self.chosen(kind),
                 "--calibration", self.calibration, "--tokens", str(tokens), "--out", path)  # fmt: skip
        return path

    def _generate(self, kind: str, path: Path, *rank: str) -> Path:
        eora("generate", self.base, self.quantized(kind), *rank,
             "--factor-bits", str(FACTOR_BITS), *self.data(),
             "--batch-size", "4", "--out", path)  # fmt: skip
        return path


def eora(*arguments: str | Path) -> None:
    """Run our command; its report goes to stderr."""
    done = subprocess.run([str(EORA), *map(str, arguments)], stdout=sys.stderr)
    if done.returncode:
        raise SystemExit(f"eora {' '.join(map(str, arguments))} failed.")


def factor_bytes(adapter: Path) -> int:
    """Bytes of an adapter's factors."""
    return sum(info.nbytes for info in read_lora_header(adapter).header.tensors.values())


def recovery(work: Work, types: list[str], chunks: int, previous: dict[str, Any]) -> dict[str, Any]:
    """Figure 1: the share of lost nats that adapters of the same bytes win back."""
    found: dict[str, Any] = {**previous, "measured": common.measured(), "chunks": chunks}
    found["full"] = work.nats(work.whole, chunks)
    for kind in types:
        model = work.quantized(kind)
        row: dict[str, Any] = {"model bytes": model.stat().st_size}
        row["plain"] = work.nats(model, chunks)
        for label, adapter in (("uniform", work.uniform(kind)), ("chosen", work.chosen(kind))):
            row[f"{label} bytes"] = factor_bytes(adapter)
            row[label] = work.nats(model, chunks, adapter)
            row[f"{label} share"] = won_back(row["plain"], row[label], found["full"])
        row["ratio"] = {name: row["chosen share"][name] / row["uniform share"][name] for name in work.texts}
        found[kind] = row
        print(kind, json.dumps(row), file=sys.stderr, flush=True)
    return found


def won_back(plain: dict[str, float], adapted: dict[str, float], full: dict[str, float]) -> dict[str, float]:
    """Share of the lost nats that an adapter wins back, of each text."""
    return {name: (plain[name] - adapted[name]) / (plain[name] - full[name]) for name in plain}


def refined(work: Work, types: list[str], chunks: int, tokens: int, previous: dict[str, Any]) -> dict[str, Any]:
    """Figure 1 again, with the adapter of chosen ranks refined, beside one rank for all that is not."""
    found: dict[str, Any] = {**previous}
    full = work.nats(work.whole, chunks)
    for kind in types:
        model = work.quantized(kind)
        plain, start = work.nats(model, chunks), work.nats(model, chunks, work.uniform(kind))
        adapter = work.refined(kind, tokens)
        nats = work.nats(model, chunks, adapter)
        share, uniform = won_back(plain, nats, full), won_back(plain, start, full)
        found[kind] = {
            "tokens": tokens, "bytes": factor_bytes(adapter), "nats": nats, "share": share,
            "ratio": {name: share[name] / uniform[name] for name in share},
            "refinement": read_lora_header(adapter).details["refinement"], "measured": common.measured(),
        }  # fmt: skip
        print(kind, json.dumps(found[kind]), file=sys.stderr, flush=True)
    return found


def speed(work: Work, types: list[str]) -> dict[str, Any]:
    """Figure 4: tokens a second with the adapter over without, one thread; runs alternate, medians of both."""
    found: dict[str, Any] = {"measured": common.measured()}
    for kind in types:
        model, adapter = work.quantized(kind), work.chosen(kind)
        pairs = [
            (llama.tokens_per_second(model, PROMPT, WRITTEN),
             llama.tokens_per_second(model, PROMPT, WRITTEN, adapter))
            for _ in range(REPEATS)
        ]  # fmt: skip
        plain, adapted = (statistics.median(column) for column in zip(*pairs, strict=True))
        found[kind] = {"plain": plain, "with adapter": adapted, "ratio": adapted / plain, "runs": pairs}
        print(kind, json.dumps(found[kind]), file=sys.stderr, flush=True)
    return found


def logits(work: Work, types: list[str]) -> dict[str, Any]:
    """Figure 3: llama.cpp's logits against torch's with the file's own values, without an adapter and with it."""
    from llamacpp_logits import differences

    text = work.texts["wikitext2"].read_text(encoding="utf-8")
    found: dict[str, Any] = {"measured": common.measured()}
    for kind in types:
        found[kind] = differences(work.base, work.quantized(kind), work.chosen(kind), text, LOGIT_TOKENS)
        print(kind, json.dumps(found[kind]), file=sys.stderr, flush=True)
    return found


def cost(work: Work) -> dict[str, Any]:
    """Figure 5: peak memory and seconds of `generate`, in a process of its own."""
    command = [sys.executable, __file__, "--one", str(work.folder)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr[-3000:])
    return {"measured": common.measured(), **json.loads(done.stdout.splitlines()[-1])}


def one(folder: Path) -> None:
    """`generate` in this process, timed; printed as JSON."""
    from cost import high_water_mark
    from stopwatch import Stopwatch

    from gptqmodel_eora_ext.calibration import read_texts, windows
    from gptqmodel_eora_ext.capture import OutputErrorMoment, SecondMoment
    from gptqmodel_eora_ext.hosts.gptqmodel import compensation
    from gptqmodel_eora_ext.hosts.jobs import AdapterJob
    from gptqmodel_eora_ext.hosts.llamacpp import weights
    from gptqmodel_eora_ext.hosts.registry import adapter_maker
    from gptqmodel_eora_ext.hosts.terminal import quiet

    work = Work(folder)
    watch = Stopwatch()
    watch.watch(SecondMoment, "add", "second moments")
    watch.watch(OutputErrorMoment, "add", "second moments")
    watch.watch(compensation, "compensate", "solving")
    watch.watch(weights.GGUFModel, "read", "dequantising")
    tokenize = common.tokenizer(common.Subject("padded", work.base))
    data = windows(read_texts(str(work.calibration)), tokenize, samples=SAMPLES, seqlen=SEQLEN)
    file = work.quantized(TYPES[1])
    asked = {"rank": UNIFORM_RANK, "factor_bits": FACTOR_BITS}
    start = time.perf_counter()
    with quiet():
        job = AdapterJob(str(work.base), file, data, asked, output=folder / "cost.gguf", batch_size=4)
        adapter_maker(file)(job)
    print(json.dumps({"seconds": time.perf_counter() - start, "parts": dict(watch.seconds),
                      "peak bytes": high_water_mark()}))  # fmt: skip


def show(result: dict[str, Any]) -> None:
    """Print what was measured."""
    rows = []
    for kind, row in result.get("recovery", {}).items():
        if not isinstance(row, dict) or "chosen share" not in row:
            continue
        for text in row["plain"]:
            rows.append((kind, text, row["plain"][text], row["uniform"][text], row["chosen"][text],
                         row["uniform share"][text], row["chosen share"][text], row["ratio"][text]))  # fmt: skip
    common.table(("type", "text", "plain", "uniform", "chosen", "share", "share", "ratio"), rows)
    common.table(
        ("type", "text", "refined on", "nats", "share", "over uniform"),
        [
            (kind, text, row["tokens"], row["nats"][text], row["share"][text], row["ratio"][text])
            for kind, row in result.get("refined", {}).items()
            for text in row["nats"]
        ],
    )
    for part in ("speed", "logits", "cost"):
        if part in result:
            print(part, json.dumps({name: one for name, one in result[part].items() if name != "measured"}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--types", nargs="+", default=TYPES)
    parser.add_argument("--chunks", type=int, default=16, help="windows of 512 tokens a text")
    parser.add_argument("--tokens", type=int, default=DEFAULT_TOKENS, help="that the part refined trains on")
    parser.add_argument("--work", type=Path, default=llama.HOME / "benchmark")
    parser.add_argument("--one", type=Path, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.one is not None:
        one(asked.one)
        return
    if not llama.is_built():
        raise SystemExit(llama.MISSING)
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    work = Work(asked.work)
    result = common.kept(RESULT)
    for part in asked.parts:
        if part == "recovery":
            result[part] = recovery(work, list(asked.types), asked.chunks, result.get(part, {}))
        elif part == "refined":
            result[part] = refined(work, list(asked.types), asked.chunks, asked.tokens, result.get(part, {}))
        elif part == "cost":
            result[part] = cost(work)
        else:
            result[part] = {"speed": speed, "logits": logits}[part](work, list(asked.types))
        common.keep(RESULT, result)
    show(result)


if __name__ == "__main__":
    main()
