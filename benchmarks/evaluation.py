"""Does `eora eval` measure what others measure, and what do several adapters and the report cost?

    perplexity  full precision, beside a plain transformers loop, windows that follow each other and that slide
    tasks       accuracies beside lm-eval's own tasks and loader, on the same items
    adapters    one checkpoint with four adapters, beside five evaluations of a model that is loaded already
    report      seconds and bytes of a report, from the `report.json` that `eora demo` left (--demo FOLDER)

Items lie in the folder `evals` beside the texts (`EORA_BENCHMARK_DATA`).

    python benchmarks/evaluation.py --parts perplexity tasks --limit 100
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import common
import torch

from gptqmodel_eora_ext import EoRA
from gptqmodel_eora_ext.evaluate.items import read_items
from gptqmodel_eora_ext.evaluate.measure import Request, measure
from gptqmodel_eora_ext.evaluate.outcome import rows
from gptqmodel_eora_ext.evaluate.perplexity import Windows, text_loss
from gptqmodel_eora_ext.evaluate.report.page import make_report
from gptqmodel_eora_ext.evaluate.subjects import resolve
from gptqmodel_eora_ext.evaluate.tasks import task_request
from gptqmodel_eora_ext.evaluate.texts import demo_text
from gptqmodel_eora_ext.hosts.gptqmodel.generate import generate_adapter
from gptqmodel_eora_ext.hosts.terminal import quiet

PARTS = ("perplexity", "tasks", "adapters", "report")
EVALS = common.DATA.parent / "evals"
FILES = {
    "arc_challenge": "arc_challenge_test.json",
    "mathqa": "mathqa_test.json",
    "gsm8k": "gsm8k_test.jsonl",
    "lambada_openai": "lambada_test_openai.jsonl",
    "ifeval": "ifeval_input_data.jsonl",
}
STRIDE, WINDOWS = 128, 8
RANKS = (8, 16, 32, 64)
ADAPTER_WINDOWS = 16
SAMPLES, SEQLEN = 16, 256


def plain_loop(model: Any, ids: torch.Tensor, size: int, stride: int, windows: int) -> float:
    """Nats a token as transformers' own documentation computes perplexities: labels, context masked by −100."""
    total, count, seen = 0.0, 0, 0
    for window in range(windows):
        start = window * stride
        row = ids[start : start + size][None]
        labels = row.clone()
        labels[:, : max(0, seen - start)] = -100
        seen = start + size
        # The model shifts labels by one: the first of a window is predicted by none.
        predicted = int((labels[:, 1:] != -100).sum())
        with torch.inference_mode():
            total += float(model(row, labels=labels).loss) * predicted
        count += predicted
    return total / count


def perplexity(base: common.Subject) -> dict[str, Any]:
    model = common.base_model(base).float().eval()
    found = []
    for name, ids in common.held_out(base).items():
        for stride in (common.EVALUATION_WINDOW, STRIDE):
            ours = text_loss(model, ids, window=common.EVALUATION_WINDOW, max_windows=WINDOWS, stride=stride)
            plain = plain_loop(model, ids, common.EVALUATION_WINDOW, stride, WINDOWS)
            plain_perplexity = float(torch.tensor(plain, dtype=torch.float64).exp())
            found.append({"text": name, "stride": stride, "ours": ours.perplexity, "plain": plain_perplexity,
                          "difference": abs(ours.perplexity - plain_perplexity)})  # fmt: skip
    return {"rows": found}


def tasks(base: common.Subject, names: list[str], limit: int) -> dict[str, Any]:
    """Ours in this process; lm-eval's in one of its own, which knows nothing of this package."""
    asked = [task_request(name, read_items(EVALS / FILES[name], name)) for name in names]
    request = Request(
        resolve([], base=str(base.folder)), tasks=asked, limit=limit, shots=0, batch_size=common.BATCH_SIZE
    )
    record = measure(request)
    ours = {one["name"]: one["results"][0]["metrics"] for one in record["tasks"]}
    found = []
    for name in names:
        command = [sys.executable, __file__, "--stock", name, "--limit", str(limit), "--model", str(base.folder)]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        stock = json.loads(done.stdout.splitlines()[-1])
        found += [{"task": name, "metric": metric, "items": limit, "ours": ours[name][metric], "lm-eval": value,
                   "difference": abs(ours[name][metric] - value)} for metric, value in stock.items()]  # fmt: skip
    return {"rows": found, "lm-eval": common.version("lm-eval"), "shots": 0}


def stock_scores(base: common.Subject, name: str, limit: int) -> dict[str, float]:
    """lm-eval's own task, run by its own loader, its data set taken from the file as its origin gives it."""
    import datasets
    import lm_eval

    path = EVALS / FILES[name]
    text = path.read_text(encoding="utf-8")
    items = json.loads(text) if text.startswith("[") else [json.loads(line) for line in text.splitlines()]
    if name == "arc_challenge":
        items = [
            {
                "id": one["id"],
                "question": one["question"],
                "answerKey": one["answer"],
                "choices": {"text": [one[label] for label in one["label"]], "label": one["label"]},
            }
            for one in items
        ]
    if name == "mathqa":
        items = [{key: one[key] for key in ("Problem", "options", "correct")} for one in items]
    data = datasets.Dataset.from_list(items)
    datasets.load_dataset = lambda *args, **kwargs: datasets.DatasetDict(train=data, validation=data, test=data)
    found = lm_eval.simple_evaluate(
        model="hf", model_args={"pretrained": str(base.folder), "dtype": "bfloat16", "device": common.device()},
        tasks=[name], limit=limit, num_fewshot=0, batch_size=common.BATCH_SIZE, bootstrap_iters=0,
    )  # fmt: skip
    return {key.removesuffix(",none"): value for key, value in found["results"][name].items()
            if "," in key and "_stderr" not in key}  # fmt: skip


def adapters(base: common.Subject) -> dict[str, Any]:
    """Seconds of one evaluation of everything, and of five on models that are loaded already."""
    from gptqmodel import GPTQModel, QuantizeConfig

    calibration = common.calibration(base, SAMPLES, SEQLEN)
    text = demo_text("heldout")
    with common.scratch() as folder:
        with quiet():
            host = GPTQModel.load(str(base.folder), QuantizeConfig(bits=3, group_size=64))
            host.quantize(calibration, batch_size=common.BATCH_SIZE)
            host.save(str(folder / "out"))
            del host
            for rank in RANKS:
                made = EoRA(rank=rank, path=folder / f"r{rank}")
                generate_adapter(made, str(base.folder), folder / "out", calibration, batch_size=common.BATCH_SIZE)
        names = [None, *(folder / f"r{rank}" for rank in RANKS)]
        subjects = resolve([str(folder / "out"), *(str(one) for one in names if one)])
        start = time.perf_counter()
        record = measure(Request(subjects, texts=(text,), windows=Windows(512, None, ADAPTER_WINDOWS)))
        together = time.perf_counter() - start
        ids = torch.tensor(common.tokenizer(base)(text.read_text(encoding="utf-8")).input_ids)
        plain = []
        for adapter in names:
            with quiet():
                model = GPTQModel.load(str(folder / "out"), adapter=EoRA(path=adapter) if adapter else EoRA()).model
            start = time.perf_counter()
            loss = text_loss(model, ids, window=512, max_windows=ADAPTER_WINDOWS)
            plain.append({"seconds": time.perf_counter() - start, "nats": loss.nats})
            del model
    model_time = sum(one["seconds"] for one in plain)
    gaps = [abs(row["nats"] - one["nats"]) for row, one in zip(rows(record), plain, strict=True)]
    return {
        "seconds": together, "plain seconds": model_time, "ratio": together / model_time,
        "loads": sum(stage["name"].startswith("loading") for stage in record["stages"]),
        "stages": record["stages"], "largest difference in nats": max(gaps),
    }  # fmt: skip


def report(demo: Path) -> dict[str, Any]:
    with common.scratch() as folder:
        start = time.perf_counter()
        page = folder / "report.html"
        make_report(page, demo / "report.json")
        return {"seconds": time.perf_counter() - start, "bytes": page.stat().st_size,
                "report.json bytes": (demo / "report.json").stat().st_size}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--tasks", nargs="+", choices=FILES, default=list(FILES))
    parser.add_argument("--limit", type=int, default=100, help="items of a task")
    parser.add_argument("--demo", type=Path, default=Path("demo"), help="folder of `eora demo`")
    parser.add_argument("--stock", choices=FILES, help=argparse.SUPPRESS)
    common.add_model(parser)
    options = parser.parse_args()
    with common.subject(options) as base:
        if options.stock:
            print(json.dumps(stock_scores(base, options.stock, options.limit)))
            return
        for part in options.parts:
            found = {
                "perplexity": lambda: perplexity(base),
                "tasks": lambda: tasks(base, options.tasks, options.limit),
                "adapters": lambda: adapters(base),
                "report": lambda: report(options.demo),
            }[part]()
            # Read now, so that parts that were measured meanwhile by another process stay.
            result = common.kept(base.results("evaluation"))
            result[part] = {"measured": common.measured(base), **found}
            common.keep(base.results("evaluation"), result, as_json=False)
    if options.json:
        print(json.dumps(result, indent=2))
    for part, columns in (("perplexity", ("text", "stride", "ours", "plain", "difference")),
                          ("tasks", ("task", "metric", "items", "ours", "lm-eval", "difference"))):  # fmt: skip
        if part in result:
            common.table(columns, [[row[column] for column in columns] for row in result[part]["rows"]])
    for part, columns in (("adapters", ("seconds", "plain seconds", "ratio", "loads", "largest difference in nats")),
                          ("report", ("seconds", "bytes", "report.json bytes"))):  # fmt: skip
        if part in result:
            common.table(columns, [[result[part][column] for column in columns]])


if __name__ == "__main__":
    main()
