"""A process in the environment of `make vllm` that serves checkpoints, asked and answering in lines of JSON.

A question has `model`, `options` (of `vllm.LLM`), `prompts` (token ids), `tokens` (how many to generate), `losses`
(whether those of the prompts are wanted) and `loras` (a folder or null for each prompt; left out for none). The answer
has `generated` (token ids of each prompt), `losses` (nats of each prompt's tokens but the first), `seconds` that
generating took, `processor_seconds` that all threads took for it, `bytes` that loading and generating have added to the
process, or `error`. A model stays until another is asked for.
"""

from __future__ import annotations

import contextlib
import gc
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# The engine in this process, so that errors are seen as they are, and memory is counted in one place.
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")

# Options that make a tiny server. So few blocks of keys and values take no time to be zeroed.
DEFAULTS = {"dtype": "float32", "enforce_eager": True, "max_model_len": 128, "max_num_seqs": 4,
            "num_gpu_blocks_override": 64}  # fmt: skip


def resident() -> int:
    """Bytes of this process in memory."""
    pages = Path("/proc/self/statm").read_text().split()[1]
    return int(pages) * os.sysconf("SC_PAGE_SIZE")


class Worker:
    """Answers questions about one model after another."""

    def __init__(self) -> None:
        self._known: tuple[str, dict[str, Any]] | None = None
        self._llm: Any = None
        self._before = 0
        # vLLM knows an adapter by its number as long as a model stays.
        self._numbers: dict[str, int] = {}

    def answer(self, task: dict[str, Any]) -> dict[str, Any]:
        """What the model gives for the prompts."""
        from vllm import SamplingParams
        from vllm.lora.request import LoRARequest

        llm = self._model(task["model"], {**DEFAULTS, **task.get("options", {})})
        prompts = [{"prompt_token_ids": ids} for ids in task["prompts"]]
        folders = task.get("loras") or [None] * len(prompts)
        for one in folders:
            if one:
                self._numbers.setdefault(one, len(self._numbers) + 1)
        loras = [LoRARequest(one, self._numbers[one], one) if one else None for one in folders]
        asked = SamplingParams(max_tokens=task.get("tokens", 1), temperature=0, ignore_eos=True,
                               prompt_logprobs=0 if task.get("losses") else None)  # fmt: skip
        start, spent = time.perf_counter(), time.process_time()
        outputs = llm.generate(prompts, asked, lora_request=loras if any(folders) else None, use_tqdm=False)
        seconds, processor = time.perf_counter() - start, time.process_time() - spent
        losses = []
        if task.get("losses"):
            for output in outputs:
                pairs = zip(output.prompt_token_ids[1:], output.prompt_logprobs[1:], strict=True)
                losses.append([-known[token].logprob for token, known in pairs])
        generated = [list(output.outputs[0].token_ids) for output in outputs]
        return {"losses": losses, "generated": generated, "seconds": seconds, "processor_seconds": processor,
                "bytes": resident() - self._before}  # fmt: skip

    def _model(self, model: str, options: dict[str, Any]) -> Any:
        from vllm import LLM

        if self._known != (model, options):
            self._forget()
            self._before = resident()
            self._llm = LLM(model=model, **options)
            self._known = (model, options)
        return self._llm

    def _forget(self) -> None:
        from vllm.distributed.parallel_state import cleanup_dist_env_and_memory

        self._llm, self._known = None, None
        gc.collect()
        with contextlib.suppress(Exception):
            cleanup_dist_env_and_memory()


def main() -> None:
    """Answer until the questions end."""
    # vLLM and the processes that it starts print to the standard output, which is for the answers.
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    worker = Worker()
    for line in sys.stdin:
        try:
            answer = worker.answer(json.loads(line))
        except Exception as error:
            chain: BaseException | None = error
            shown = []
            while chain is not None:
                shown.append(f"{type(chain).__name__}: {chain}")
                chain = chain.__cause__ or chain.__context__
            answer = {"error": "\n".join(shown)}
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main()
