"""Scores on tasks, by lm-eval (EleutherAI's evaluation harness)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

# lm-eval's own name of a metric without a filter.
PLAIN = ",none"
# Where a task has several, the one that its leaderboards show.
PREFERRED = ("acc_norm", "exact_match", "acc")


@dataclass(frozen=True)
class Score:
    """A task's score.

    Attributes:
        metric: lm-eval's name, such as "acc_norm".
        value: of it.
        metrics: all of the task's.
    """

    metric: str
    value: float
    metrics: dict[str, float]


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
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    found = simple_evaluate(
        model=HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size), tasks=[task],
        task_manager=_manager(include_path), limit=limit, bootstrap_iters=0, log_samples=False,
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
    return Score(metric, metrics[metric], metrics)


def _manager(include_path: str | None) -> Any:
    try:
        from lm_eval.tasks import TaskManager
    except ImportError:
        raise ValueError('Tasks are scored by lm-eval: pip install "gptqmodel-eora-ext[tasks]".') from None
    return TaskManager(include_path=include_path)
