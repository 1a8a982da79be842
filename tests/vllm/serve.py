"""Runs in the environment of `make vllm`: serves checkpoints by vLLM, and prints what they give as one line of JSON.

    python serve.py tasks.json

Each task is an object: `model`, `options` (of `vllm.LLM`), `prompts` (token ids), `tokens` (to generate), and `loras`,
a folder or null for each prompt. The answer to each has `losses` (of each prompt's tokens but the first, in nats) and
`generated` (token ids), or `error`.
"""

from __future__ import annotations

import contextlib
import gc
import json
import os
import sys
from pathlib import Path
from typing import Any

os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# The engine in this process, so that tasks follow one another, and errors are seen as they are.
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")

# Options that make a tiny server.
DEFAULTS = {"dtype": "float32", "enforce_eager": True, "max_model_len": 128, "max_num_seqs": 4}


def serve(task: dict[str, Any]) -> dict[str, Any]:
    """What a checkpoint gives for a task's prompts."""
    from vllm import LLM, SamplingParams
    from vllm.lora.request import LoRARequest

    llm = LLM(model=task["model"], **{**DEFAULTS, **task.get("options", {})})
    prompts = [{"prompt_token_ids": ids} for ids in task["prompts"]]
    folders = task.get("loras") or [None] * len(prompts)
    numbers = {folder: number + 1 for number, folder in enumerate(dict.fromkeys(one for one in folders if one))}
    loras = [LoRARequest(f"lora{numbers[one]}", numbers[one], one) if one else None for one in folders]
    asked = SamplingParams(max_tokens=task.get("tokens", 1), temperature=0, prompt_logprobs=0, ignore_eos=True)
    outputs = llm.generate(prompts, asked, lora_request=loras if numbers else None, use_tqdm=False)
    losses = []
    for output in outputs:
        pairs = zip(output.prompt_token_ids[1:], output.prompt_logprobs[1:], strict=True)
        losses.append([-known[token].logprob for token, known in pairs])
    return {"losses": losses, "generated": [list(output.outputs[0].token_ids) for output in outputs]}


def main() -> None:
    """Answer all tasks."""
    # vLLM prints to the standard output, which is for the answers.
    answers_to, sys.stdout = sys.stdout, sys.stderr
    answers = []
    for task in json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")):
        try:
            answers.append(serve(task))
        except BaseException as error:
            chain, shown = error, []
            while chain is not None:
                shown.append(f"{type(chain).__name__}: {chain}")
                chain = chain.__cause__ or chain.__context__
            answers.append({"error": "\n".join(shown)})
        gc.collect()
        with contextlib.suppress(Exception):
            from vllm.distributed.parallel_state import cleanup_dist_env_and_memory

            cleanup_dist_env_and_memory()
    print(json.dumps(answers), file=answers_to)


if __name__ == "__main__":
    main()
