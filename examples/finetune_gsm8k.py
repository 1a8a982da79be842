"""Fine-tune a 2-bit model on GSM8K with trl, from four starts of the same rank, and show which start pays.

    zero     A random, B zero: QLoRA's
    svd      the weights' error alone, by singular values: LoftQ's
    eora     the error weighed by the layers' inputs
    refined  that, trained further by what the whole model loses against full precision

    python examples/finetune_gsm8k.py --data gsm8k_train.jsonl --out finetuned
    python examples/finetune_gsm8k.py --data gsm8k_train.jsonl --model Qwen/Qwen3-8B --starts zero eora --steps 1000

--data is GSM8K's train split: a .jsonl of `question` and `answer`, or a text of `Question: …` and `Answer: …`. The
model is quantised once, and every start is an adapter over the same checkpoint. Run it again after an interruption:
what is done is kept, and a training goes on from its last evaluation. Needs the extra `finetune`.
"""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path
from typing import Any

import peft
import torch
from datasets import Dataset
from gptqmodel import GPTQModel, QuantizeConfig
from transformers import AutoTokenizer
from trl import SFTConfig, SFTTrainer

from gptqmodel_eora_ext import EoRA, load_peft, refine_checkpoint
from gptqmodel_eora_ext.adapter.folder import AdapterFolder
from gptqmodel_eora_ext.adapter.packing import export_packed
from gptqmodel_eora_ext.evaluate.models import smollm2

STARTS = ("zero", "svd", "eora", "refined")
PAIR = re.compile(r"Question: (?P<question>.*?)\nAnswer: (?P<answer>.*?)(?=\n\nQuestion: |\Z)", re.DOTALL)
HELD_OUT = 64
# Evaluations of a training beside the one before it; its rate grows up to the second of them.
EVALUATIONS = 20
CALIBRATION = 64
PACKED_BITS = 4


def problems(path: Path) -> Dataset:
    """Questions and answers as trl takes them; the loss is taken on the answer alone."""
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".jsonl":
        pairs = [json.loads(line) for line in text.splitlines() if line.strip()]
    else:
        pairs = [found.groupdict() for found in PAIR.finditer(text)]
    if len(pairs) < 2 * HELD_OUT:
        raise SystemExit(f"{path} holds {len(pairs)} problems; expected GSM8K's train split, of some 7,000.")
    return Dataset.from_list(
        [{"prompt": f"Question: {one['question'].strip()}\nAnswer:", "completion": f" {one['answer'].strip()}"}
         for one in pairs]
    )  # fmt: skip


def texts(rows: Dataset) -> list[str]:
    return [one["prompt"] + one["completion"] for one in rows]


def quantised(options: argparse.Namespace, rows: Dataset) -> Path:
    """The checkpoint that all starts share; its own adapter is the start "eora"."""
    folder: Path = options.out / "model"
    if not (folder / "config.json").is_file():
        config = QuantizeConfig(bits=options.bits, group_size=64, mse=2.4 if options.bits == 2 else 0.0)
        model = GPTQModel.load(options.model, config)
        model.quantize(texts(rows.select(range(CALIBRATION))), adapter=EoRA(rank=options.rank), batch_size=4)
        model.save(str(folder))
    return folder


def start(name: str, options: argparse.Namespace, checkpoint: Path, rows: Dataset) -> Path:
    """The adapter's folder that a training begins with."""
    folder: Path = options.out / f"start-{name}"
    eora = checkpoint / "eora"
    if name == "eora":
        return eora
    if (folder / "adapter_config.json").is_file():
        return folder
    if name == "svd":
        GPTQModel.adapter.generate(
            adapter=EoRA(rank=options.rank, objective="svd", path=str(folder)), model_id_or_path=options.model,
            quantized_model_id_or_path=str(checkpoint), calibration_dataset=texts(rows.select(range(CALIBRATION))),
        )  # fmt: skip
    elif name == "refined":
        refine_checkpoint(checkpoint, options.model, texts(rows), adapter=eora, output=folder, tokens=options.refine)
    else:
        model = load_peft(GPTQModel.load(str(checkpoint)), eora, is_trainable=True)
        torch.manual_seed(0)
        for module in model.modules():
            if isinstance(module, peft.tuners.lora.LoraLayer):
                module.reset_lora_parameters("default", init_lora_weights=True)
        model.save_pretrained(str(folder))
    return folder


def train(name: str, options: argparse.Namespace, checkpoint: Path, rows: Dataset, held_out: Dataset) -> dict[str, Any]:
    """Held-out losses by step, and with the factors packed after the last."""
    done: Path = options.out / f"{name}.json"
    if done.is_file():
        found: dict[str, Any] = json.loads(done.read_text(encoding="utf-8"))
        return found
    folder, run = options.out / f"trained-{name}", options.out / f"run-{name}"
    every = max(options.steps // EVALUATIONS, 1)
    arguments = SFTConfig(
        output_dir=str(run), max_steps=options.steps, per_device_train_batch_size=options.batch_size,
        learning_rate=options.learning_rate, lr_scheduler_type="cosine", warmup_steps=2 * every, max_length=512,
        eval_strategy="steps", eval_steps=every, eval_on_start=True, save_strategy="steps", save_steps=every,
        save_total_limit=1, logging_steps=every, report_to=[], seed=0, bf16=torch.cuda.is_available(),
        use_cpu=not torch.cuda.is_available(), per_device_eval_batch_size=options.batch_size,
    )  # fmt: skip
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    model = load_peft(GPTQModel.load(str(checkpoint)), start(name, options, checkpoint, rows), is_trainable=True)
    trainer = SFTTrainer(model=model, processing_class=tokenizer, train_dataset=rows, eval_dataset=held_out,
                         args=arguments)  # fmt: skip
    trainer.train(resume_from_checkpoint=any(run.glob("checkpoint-*")))
    losses = {str(entry["step"]): entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry}
    model.save_pretrained(str(folder))
    packed = options.out / f"trained-{name}-{PACKED_BITS}bit"
    export_packed(AdapterFolder.open(folder), packed, PACKED_BITS)
    del model, trainer.model
    trainer.model = load_peft(GPTQModel.load(str(checkpoint)), packed, is_trainable=True)
    result = {"losses": losses, "packed": trainer.evaluate()["eval_loss"]}
    done.write_text(json.dumps(result, indent=1), encoding="utf-8")
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="GSM8K's train split")
    parser.add_argument("--model", default=None, help="full-precision model; SmolLM2-135M-Instruct by default")
    parser.add_argument("--out", type=Path, default=Path("finetuned"))
    parser.add_argument("--starts", nargs="+", choices=STARTS, default=list(STARTS))
    parser.add_argument("--bits", type=int, choices=(2, 3, 4), default=2)
    parser.add_argument("--rank", type=int, default=32)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--learning-rate", type=float, default=2e-4)
    parser.add_argument("--refine", default="40k", help="tokens that the start `refined` is trained on first")
    options = parser.parse_args()
    options.model = options.model or str(smollm2())
    options.out.mkdir(parents=True, exist_ok=True)
    rows = problems(options.data)
    held_out, rows = rows.select(range(HELD_OUT)), rows.select(range(HELD_OUT, len(rows)))
    checkpoint = quantised(options, rows)
    found = {name: train(name, options, checkpoint, rows, held_out) for name in options.starts}
    print(f"\nHeld-out loss, nats a token of the answer, {HELD_OUT} problems\n")
    print(f"| step | {' | '.join(found)} |\n|---|{'---|' * len(found)}")
    for step in next(iter(found.values()))["losses"]:
        print(f"| {step} |", " | ".join(f"{one['losses'][step]:.3f}" for one in found.values()), "|")
    print(f"| in {PACKED_BITS} bits |", " | ".join(f"{one['packed']:.3f}" for one in found.values()), "|")


if __name__ == "__main__":
    main()
