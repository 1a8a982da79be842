"""Scores on tasks by lm-eval, EleutherAI's evaluation harness, on items of its hub data sets or of local files."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from ..system.logs import only_from
from .items import ALIASES, CHOICE, Items

# lm-eval's own name of a metric without a filter.
PLAIN = ",none"
# Where a task has several, the one that its leaderboards show.
PREFERRED = ("acc_norm", "exact_match", "acc")
# Where lm-eval describes the tasks that files are read for, below its folder `tasks`.
DESCRIPTIONS = {
    "arc_challenge": "arc/arc_challenge.yaml",
    "arc_easy": "arc/arc_easy.yaml",
    "mathqa": "mathqa/mathqa.yaml",
    "gsm8k": "gsm8k/gsm8k.yaml",
    "lambada_openai": "lambada/lambada_openai.yaml",
    "hellaswag": "hellaswag/hellaswag.yaml",
    "piqa": "piqa/piqa.yaml",
    "winogrande": "winogrande/default.yaml",
    "ifeval": "ifeval/ifeval.yaml",
}
# The split that a file's items make. Examples before a question come from it, too; lm-eval never shows an item itself.
SPLIT = "items"
# Before the name of a task of the user's own, which may be called like one of lm-eval's.
OWN = "own_"
MEAN = {"aggregation": "mean", "higher_is_better": True}
# lm-eval may ask a model several times; here it asks once.
FIRST = {"function": "take_first"}
QUESTION = "Question: {{question}}\nAnswer:"


@dataclass(frozen=True)
class Score:
    """A task's score.

    Attributes:
        metric: lm-eval's name, such as "acc_norm".
        value: of it.
        metrics: all of the task's.
        items: each item's: `id` (its number in the file), `value` of the metric, and `given`: what the model wrote, or
            the log-likelihoods of the choices. None for a metric that is no mean over items.
    """

    metric: str
    value: float
    metrics: dict[str, float]
    items: list[dict[str, Any]] | None = None


@dataclass(frozen=True)
class TaskRequest:
    """A task to score: lm-eval's name, and the items of a file in place of the hub's, or none."""

    name: str
    items: Items | None = None

    @property
    def title(self) -> str:
        """What the task is called in tables."""
        return self.name.removeprefix(OWN)


def task_request(name: str | None, items: Items | None) -> TaskRequest:
    """A request for a named task, or for items of the user's own."""
    if items is not None:
        return TaskRequest(f"{OWN}{items.task}" if items.kind else items.task, items)
    assert name is not None
    return TaskRequest(ALIASES.get(name, name))


def check_tasks(tasks: Sequence[str], include_path: str | None) -> None:
    """Refuse tasks that lm-eval does not know, before any work.

    Args:
        tasks: lm-eval's names.
        include_path: folder with tasks of the user's own (YAML).

    Raises:
        ValueError: for an unknown task, or where lm-eval is not installed.
    """
    manager = _manager(include_path)
    unknown = [task for task in tasks if not manager.match_tasks([task])]
    if unknown:
        raise ValueError(
            f"lm-eval knows no task {', '.join(f'`{task}`' for task in unknown)}. "
            f"`lm-eval ls tasks` lists them; tasks of your own are found by the folder of their YAML files."
        )


def score_task(
    model: Any, tokenizer: Any, task: str, *, include_path: str | None, limit: int | None, batch_size: int
) -> Score:
    """Run one task, with the task's own number of shots.

    Args:
        model: a transformers model; quantised and adapted as it is loaded.
        tokenizer: its tokenizer.
        task: lm-eval's name.
        include_path: folder with tasks of the user's own.
        limit: documents, at most.
        batch_size: of requests.

    Raises:
        ValueError: for a task without a number for a result.
    """
    return _run(_manager(include_path), task, model, tokenizer, limit=limit, shots=None, batch_size=batch_size)


class Tasks:
    """Tasks ready to be scored on any number of models.

    Args:
        requests: what to score.
        include_path: folder with tasks of the user's own (YAML).
        limit: items of a task, at most.
        shots: examples before each question; None for the task's own number.
        folder: for files that lm-eval reads; it has to stay while tasks are scored.

    Raises:
        ValueError: where lm-eval, or what IFEval's checker needs, is not installed, or for an unknown task.
    """

    def __init__(
        self,
        requests: Sequence[TaskRequest],
        *,
        include_path: str | None,
        limit: int | None,
        shots: int | None,
        folder: Path,
    ) -> None:
        self.requests = tuple(requests)
        self.limit, self.shots = limit, shots
        named = [one.name for one in requests if one.items is None]
        self._managers: dict[bool, Any] = {}
        if named:
            check_tasks(named, include_path)
            self._managers[False] = _manager(include_path)
        if any(one.name == "ifeval" for one in requests):
            check_instruction_checker()
        local = [one for one in requests if one.items is not None]
        if local:
            _require()
            for one in local:
                _describe(one, folder)
            self._managers[True] = _manager(str(folder), include_defaults=False)

    def score(
        self,
        request: TaskRequest,
        model: Any,
        tokenizer: Any,
        *,
        batch_size: int,
        progress: Callable[[int, int], None] | None = None,
    ) -> Score:
        """Score a model on one of the tasks; ``progress`` is called with (requests done, requests in all).

        Raises:
            ValueError: for a data set that cannot be loaded, or a task without a number for a result.
        """
        manager = self._managers[request.items is not None]
        return _run(
            manager,
            request.name,
            model,
            tokenizer,
            limit=self.limit,
            shots=self.shots,
            batch_size=batch_size,
            progress=progress,
        )


@contextmanager
def opened_tasks(
    requests: Sequence[TaskRequest], *, include_path: str | None, limit: int | None, shots: int | None
) -> Iterator[Tasks]:
    """`Tasks` whose files are removed at the end."""
    with TemporaryDirectory(prefix="eora-tasks-", ignore_cleanup_errors=True) as folder:
        yield Tasks(requests, include_path=include_path, limit=limit, shots=shots, folder=Path(folder))


def check_instruction_checker() -> None:
    """Refuse IFEval where a part of its instruction checker is missing, before any work.

    Raises:
        ValueError: naming the part and how to get it.
    """
    _require()
    try:
        import immutabledict  # noqa: F401
        import langdetect  # noqa: F401
        import nltk
    except ImportError as error:
        raise ValueError(
            f"IFEval's instruction checker needs {error.name}: pip install 'gptqmodel-eora-ext[eval]'."
        ) from None
    try:
        nltk.data.find("tokenizers/punkt_tab")
    except LookupError:
        raise ValueError(
            "IFEval's instruction checker splits text into sentences by nltk's data `punkt_tab`, which is not here: "
            "python -m nltk.downloader punkt_tab. Without a network, copy the folder `tokenizers/punkt_tab` from "
            "another machine and name its parent's parent in NLTK_DATA."
        ) from None


def check_padding(tokenizer: Any, where: str) -> None:
    """Refuse a tokenizer with nothing to pad with: lm-eval would add a token that the model does not embed.

    Raises:
        ValueError: naming the tokenizer's file.
    """
    if tokenizer.pad_token_id is None and tokenizer.unk_token_id is None and tokenizer.eos_token_id is None:
        raise ValueError(
            f"`{where}/tokenizer_config.json` names no pad_token, and no unk_token or eos_token to pad with in its "
            f'place; tasks are scored in batches, which need one. Add "pad_token" there: any token that the model '
            f"embeds will do, since padding is masked out."
        )


# lm-eval -------------------------------------------------------------------------------------------------------


def _run(
    manager: Any,
    task: str,
    model: Any,
    tokenizer: Any,
    *,
    limit: int | None,
    shots: int | None,
    batch_size: int,
    progress: Callable[[int, int], None] | None = None,
) -> Score:
    from lm_eval import simple_evaluate

    with _without_chatter():
        found = simple_evaluate(
            model=_wrapped(model, tokenizer, batch_size, progress), tasks=[task], task_manager=manager, limit=limit,
            num_fewshot=shots, bootstrap_iters=0, log_samples=True,
        )  # fmt: skip
    results = found["groups"] if task in found.get("groups", {}) else found["results"]
    metrics = {
        name.removesuffix(PLAIN): float(value)
        for name, value in results[task].items()
        if "," in name and "_stderr" not in name and isinstance(value, (int, float))
    }
    if not metrics:
        raise ValueError(f"lm-eval gave no score for the task `{task}`: {results[task]}.")
    metric = next((name for name in PREFERRED if name in metrics), next(iter(metrics)))
    return Score(metric, metrics[metric], metrics, _items(found["samples"], metric))


@contextmanager
def _without_chatter() -> Iterator[None]:
    """None of lm-eval's log lines below an error (a model handed over, a seed set), and none of the data sets' bars."""
    import datasets

    bars = not datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        with only_from(logging.ERROR, "lm_eval"):
            yield
    finally:
        if bars:
            datasets.enable_progress_bars()


def _wrapped(model: Any, tokenizer: Any, batch_size: int, progress: Callable[[int, int], None] | None) -> Any:
    """A model as lm-eval takes it, with our progress in place of its bars."""
    from lm_eval.models.huggingface import HFLM

    class Quiet(HFLM):  # type: ignore[misc]
        total = done = 0

        def _begin(self, requests: Sequence[Any]) -> None:
            self.total, self.done = len(requests), 0

        def _count(self, rows: int) -> None:
            self.done = min(self.done + rows, self.total)
            if progress is not None:
                progress(self.done, self.total)

        def loglikelihood(self, requests: Any, disable_tqdm: bool = True) -> Any:
            self._begin(requests)
            found = super().loglikelihood(requests, disable_tqdm=True)
            self._count(self.total)
            return found

        def generate_until(self, requests: Any, disable_tqdm: bool = True) -> Any:
            self._begin(requests)
            return super().generate_until(requests, disable_tqdm=True)

        def _model_call(self, inps: Any, *args: Any, **kwargs: Any) -> Any:
            found = super()._model_call(inps, *args, **kwargs)
            self._count(len(inps))
            return found

        def _model_generate(self, context: Any, *args: Any, **kwargs: Any) -> Any:
            found = super()._model_generate(context, *args, **kwargs)
            self._count(len(context))
            return found

    return Quiet(pretrained=model, tokenizer=tokenizer, batch_size=batch_size)


def _items(samples: Mapping[str, Sequence[Mapping[str, Any]]], metric: str) -> list[dict[str, Any]] | None:
    """Each item's value of a metric; None where an item has no number for it."""
    name, _, chosen = metric.partition(",")
    found = []
    for task, some in samples.items():
        for sample in some:
            if chosen and sample["filter"] != chosen:
                continue
            value = sample.get(name)
            if not isinstance(value, (bool, int, float)):
                return None
            number = sample["doc_id"]
            item = number if len(samples) == 1 else f"{task}/{number}"
            found.append({"id": item, "value": float(value), "given": _given(sample["resps"])})
    return sorted(found, key=lambda item: (isinstance(item["id"], str), item["id"]))


def _given(responses: Sequence[Sequence[Any]]) -> Any:
    """What a model wrote, or its log-likelihood of each choice (lm-eval gives them with whether greedy writes it)."""
    given = [some[0] for some in responses]
    if all(isinstance(one, str) for one in given):
        return given[0] if len(given) == 1 else given
    return [round(float(one[0] if isinstance(one, (tuple, list)) else one), 4) for one in given]


def _describe(request: TaskRequest, folder: Path) -> None:
    """Write a file's items and a description that has lm-eval read them. JSON is YAML."""
    assert request.items is not None
    rows = folder / f"{request.name}.jsonl"
    rows.write_text("".join(json.dumps(row) + "\n" for row in request.items.rows), encoding="utf-8")
    description: dict[str, Any] = {
        "task": request.name,
        "dataset_path": "json",
        "dataset_name": None,
        "dataset_kwargs": {"data_files": {SPLIT: str(rows)}, "cache_dir": str(folder / "cache")},
        "training_split": None,
        "validation_split": None,
        "test_split": SPLIT,
        "fewshot_split": SPLIT,
    }
    if request.items.kind is None:
        import lm_eval.tasks

        place = Path(lm_eval.tasks.__file__).parent / DESCRIPTIONS[request.name]
        description |= {"include": str(place), "tag": None}
    elif request.items.kind == CHOICE:
        description |= {
            "output_type": "multiple_choice", "doc_to_text": QUESTION, "doc_to_choice": "choices",
            "doc_to_target": "answer", "metric_list": [{"metric": "acc", **MEAN}, {"metric": "acc_norm", **MEAN}],
        }  # fmt: skip
    else:
        description |= {
            "output_type": "generate_until", "doc_to_text": QUESTION, "doc_to_target": "{{answer}}",
            "generation_kwargs": {"until": ["\n", "Question:"], "do_sample": False},
            "filter_list": [{"name": "none", "filter": [{"function": "remove_whitespace"}, FIRST]}],
            "metric_list": [{"metric": "exact_match", **MEAN, "ignore_case": True, "ignore_punctuation": True}],
        }  # fmt: skip
    (folder / f"{request.name}.yaml").write_text(json.dumps(description), encoding="utf-8")


def _require() -> None:
    try:
        import lm_eval  # noqa: F401
    except ImportError:
        raise ValueError("Tasks are scored by lm-eval: pip install 'gptqmodel-eora-ext[eval]'.") from None


def _manager(include_path: str | None, *, include_defaults: bool = True) -> Any:
    _require()
    from lm_eval.tasks import TaskManager

    return TaskManager(include_path=include_path, include_defaults=include_defaults)
