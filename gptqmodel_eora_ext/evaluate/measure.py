"""Several models measured on the same texts, tasks and prompts: each checkpoint is loaded once, whatever is put on it.

The full-precision model goes first; what it predicts is kept (in memory up to `KEPT_BYTES`, beyond that in a file
without a name), so that it is gone from memory when the quantised ones come.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any

import torch

from ..system.files import cache_folder
from ..system.memory import release_free_memory
from ..system.spill import Spill, spilling
from .describe import describe, surroundings
from .divergence import DIVERGENCE_WINDOWS, Reference
from .perplexity import Windows, predictions, summed_nats, text_tokens
from .record import FORMAT, file_sha256
from .speed import PROMPT_TOKENS, measure_speed, write
from .subjects import FULL_PRECISION, Subject, check_context, check_window
from .tasks import TaskRequest, Tasks, check_padding, opened_tasks
from .texts import demo_text

# Bytes of the full-precision model's logits that stay in memory; what is beyond lies on disk.
KEPT_BYTES = 1 << 30
# What a model writes after each prompt, in tokens.
WRITTEN_TOKENS = 40

Progress = Callable[[str], Callable[[int, int], None]]


@dataclass(frozen=True)
class Request:
    """What is measured.

    Attributes:
        subjects: the models; one at full precision that comes first is what others are compared with.
        texts: held-out files, as `calibration.read_texts` takes them.
        windows: how texts are cut.
        divergence_windows: windows of each text that the KL divergence is taken on.
        tasks: to score by lm-eval.
        tasks_path: folder with lm-eval tasks of the user's own (YAML).
        limit: items of a task, at most.
        shots: examples before a question; None for each task's own number.
        prompts: that every model continues, greedily.
        speed: whether tokens per second and peak memory are measured.
        batch_size: items of a task per forward.
        device: "cpu", "cuda" or "cuda:0"; None for CUDA where there is one.
        trust_remote_code: whether code that comes with a model or its tokenizer may run.
    """

    subjects: Sequence[Subject]
    texts: Sequence[Path] = ()
    windows: Windows = field(default_factory=Windows)
    divergence_windows: int = DIVERGENCE_WINDOWS
    tasks: Sequence[TaskRequest] = ()
    tasks_path: str | None = None
    limit: int | None = None
    shots: int | None = None
    prompts: Sequence[str] = ()
    speed: bool = False
    batch_size: int = 1
    device: str | None = None
    trust_remote_code: bool = False


def measure(request: Request, progress: Progress | None = None) -> dict[str, Any]:
    """Measure all models and return the record (`record` tells its fields): every item of every model, raw.

    Args:
        request: what is measured.
        progress: makes a `report(done, total)` callback for a named step.

    Raises:
        ValueError: for a window longer than a model's context, a text that cannot be read or is too short, a tokenizer
            with nothing to pad with, an unknown task, or models of different vocabularies.
    """
    from ..hosts.terminal import quiet

    check_context(request.subjects, request.windows.size if request.texts else 0)
    with (
        quiet(),
        opened_tasks(request.tasks, include_path=request.tasks_path, limit=request.limit, shots=request.shots) as tasks,
        spilling(KEPT_BYTES, cache_folder()) as spill,
    ):
        return _Run(request, tasks, spill, progress or (lambda what: lambda done, total: None)).record()


class _Run:
    def __init__(self, request: Request, tasks: Tasks, spill: Spill, progress: Progress) -> None:
        from transformers import AutoTokenizer

        self.request, self.tasks, self.progress = request, tasks, progress
        self.stages: list[dict[str, Any]] = []
        place = request.subjects[0].model
        self.tokenizer = AutoTokenizer.from_pretrained(place, trust_remote_code=request.trust_remote_code)
        if request.tasks:
            check_padding(self.tokenizer, place)
        with self._stage("reading texts"):
            self.ids = {text: self._tokens(text) for text in request.texts}
        compares = len(request.subjects) > 1 and request.subjects[0].kind == FULL_PRECISION
        self.references = {text: Reference(spill, request.divergence_windows) for text in request.texts if compares}
        self.texts: dict[Path, list[dict[str, Any]]] = {text: [] for text in request.texts}
        self.scores: dict[str, list[dict[str, Any]]] = {one.name: [] for one in request.tasks}
        self.speeds: list[dict[str, Any]] = []
        self.written: dict[str, list[dict[str, Any]]] = {prompt: [] for prompt in request.prompts}

    def _tokens(self, text: Path) -> torch.Tensor:
        windows = self.request.windows
        ids = text_tokens(text, self.tokenizer, window=windows.tokens or 1, max_windows=1 if windows.most else None)
        try:
            windows.starts(len(ids))
        except ValueError as error:
            raise ValueError(f"`{text}`: {error} Pass a longer text, or a smaller --window.") from None
        return ids

    @contextmanager
    def _stage(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.stages.append({"name": name, "seconds": round(time.perf_counter() - start, 2)})

    # Models ----------------------------------------------------------------------------------------------------

    def record(self) -> dict[str, Any]:
        """Everything that was measured."""
        for place, group in groupby(self.request.subjects, lambda one: one.model):
            self._measure_loaded(place, list(group))
        request = self.request
        return {
            "format": FORMAT,
            "settings": {
                "window": request.windows.size, "stride": request.windows.step, "max_windows": request.windows.most,
                "divergence_windows": request.divergence_windows, "limit": request.limit, "shots": request.shots,
                "batch_size": request.batch_size, "written_tokens": WRITTEN_TOKENS if request.prompts else None,
            },
            **surroundings(self._device),
            "models": [describe(one) for one in request.subjects],
            "texts": [
                {"name": text.stem, "file": str(text), "sha256": file_sha256(text), "windows": request.windows.title,
                 "results": self.texts[text]}
                for text in request.texts
            ],
            "tasks": [
                {
                    "name": one.title,
                    "task": one.name,
                    "file": str(one.items.path) if one.items else None,
                    "sha256": file_sha256(one.items.path) if one.items else None,
                    "metric": self.scores[one.name][0]["metric"],
                    "results": self.scores[one.name],
                }
                for one in request.tasks
            ],
            "speed": self.speeds,
            "samples": [{"prompt": prompt, "results": results} for prompt, results in self.written.items()],
            "stages": self.stages,
        }  # fmt: skip

    def _measure_loaded(self, place: str, subjects: Sequence[Subject]) -> None:
        """Load a model once, and measure it in each of the forms that are asked for."""
        with self._stage(f"loading {Path(place).name}"):
            model, put_on = self._load(place, subjects)
        check_window(model.config.to_dict(), self.request.windows.size if self.request.texts else 0, place)
        for subject in subjects:
            with put_on(subject.adapter):
                self._measure(subject, model)
        del model, put_on
        gc.collect()
        release_free_memory()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def _load(
        self, place: str, subjects: Sequence[Subject]
    ) -> tuple[Any, Callable[[Path | None], AbstractContextManager[None]]]:
        trusted = self.request.trust_remote_code
        if subjects[0].kind == FULL_PRECISION:
            from transformers import AutoModelForCausalLM

            model = AutoModelForCausalLM.from_pretrained(place, dtype="auto", trust_remote_code=trusted)
            return model.to(self._device).eval(), lambda adapter: nullcontext()
        from ..hosts.registry import loader

        # Also where there is no adapter: all quantised models are then multiplied by the same kernels.
        loaded = loader(Path(place))(
            Path(place), for_adapters=True, device=self.request.device, trust_remote_code=trusted
        )
        return loaded.model, loaded.with_adapter

    @property
    def _device(self) -> str:
        return self.request.device or ("cuda" if torch.cuda.is_available() else "cpu")

    def _measure(self, subject: Subject, model: Any) -> None:
        name, request = subject.name, self.request
        for text in request.texts:
            with self._stage(f"{name}: text {text.stem}"):
                found = self._text(model, text, self.progress(f"{name}: {text.stem}"))
                self.texts[text].append({"model": name, **found})
        for task in request.tasks:
            with self._stage(f"{name}: task {task.title}"):
                score = self.tasks.score(
                    task, model, self.tokenizer, batch_size=request.batch_size,
                    progress=self.progress(f"{name}: {task.title}"),
                )  # fmt: skip
            self.scores[task.name].append({
                "model": name, "metric": score.metric, "value": score.value, "metrics": score.metrics,
                "items": score.items,
            })  # fmt: skip
        if request.speed:
            with self._stage(f"{name}: speed"):
                ids = text_tokens(demo_text("heldout"), self.tokenizer, window=PROMPT_TOKENS, max_windows=1)
                self.speeds.append({"model": name, **measure_speed(model, ids, self.progress(f"{name}: speed"))})
        if request.prompts:
            with self._stage(f"{name}: writing"):
                self._write(name, model, self.progress(f"{name}: writing"))

    def _text(self, model: Any, text: Path, report: Callable[[int, int], None]) -> dict[str, Any]:
        """Each window's loss; beside the full-precision model also agreement and divergence, where that is another."""
        reference = self.references.get(text)
        begins = reference is not None and not self.texts[text]
        found: dict[str, Any] = {"nats": [], "tokens": []}
        pairs = predictions(model, self.ids[text], self.request.windows, report)
        for window, (logits, targets) in enumerate(pairs):
            found["nats"].append(summed_nats(logits, targets))
            found["tokens"].append(len(targets))
            if reference is None:
                continue
            if begins:
                reference.keep(logits)
                continue
            for key, value in reference.compare(window, logits).items():
                found.setdefault(key, []).append(value)
        return found

    def _write(self, name: str, model: Any, report: Callable[[int, int], None]) -> None:
        device = next(model.parameters()).device
        for number, prompt in enumerate(self.request.prompts):
            ids = torch.tensor([self.tokenizer(prompt).input_ids], device=device)
            text = self.tokenizer.decode(write(model, ids, WRITTEN_TOKENS, until_end=True), skip_special_tokens=True)
            self.written[prompt].append({"model": name, "text": text})
            report(number + 1, len(self.request.prompts))
