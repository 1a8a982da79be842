"""What a record says: perplexities, divergences, scores, and which differences are more than noise."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .bootstrap import CONFIDENCE, LEAST_ITEMS, Difference, paired_difference
from .subjects import ADAPTED, FULL_PRECISION, QUANTISED

Record = Mapping[str, Any]
Result = Mapping[str, Any]
# A score of 0.413 is 41.3 points.
POINTS = 100.0


def nats(result: Result) -> float:
    """Loss of a model on a text, nats a token."""
    return float(sum(result["nats"]) / sum(result["tokens"]))


def perplexity(result: Result) -> float:
    """exp of the loss a token."""
    return math.exp(nats(result))


def agreement(result: Result) -> float | None:
    """Share of tokens where a model's likeliest next token is the full-precision model's; None without one."""
    return sum(result["same"]) / sum(result["tokens"]) if result.get("same") else None


def divergence(result: Result) -> float | None:
    """KL(full precision ‖ model) in nats a token, over the windows that it was taken on; None without any."""
    pairs = [(kl, tokens) for kl, tokens in zip(result.get("kl", ()), result["tokens"], strict=False) if kl is not None]
    return sum(kl for kl, _ in pairs) / sum(tokens for _, tokens in pairs) if pairs else None


def of_model(results: Sequence[Result], model: str) -> Result | None:
    """A model's result among those of all."""
    return next((one for one in results if one["model"] == model), None)


def rows(record: Record) -> list[dict[str, Any]]:
    """One row a model: what tables show, and `--json` prints. The first text's figures stand at the top, too."""
    found = []
    for model in record["models"]:
        name = model["name"]
        texts, tasks = {}, {}
        for text in record["texts"]:
            result = of_model(text["results"], name)
            if result is not None:
                texts[text["name"]] = {
                    "perplexity": perplexity(result),
                    "nats": nats(result),
                    "tokens": sum(result["tokens"]),
                    "kl": divergence(result),
                    "same": agreement(result),
                    "windows": text["windows"],
                }
        for task in record["tasks"]:
            result = of_model(task["results"], name)
            if result is not None:
                items = result.get("items")
                tasks[task["name"]] = {
                    "metric": task["metric"],
                    "value": result["value"],
                    "items": None if items is None else len(items),
                }
        first: dict[str, Any] = next(iter(texts.values()), {})
        row: dict[str, Any] = {
            "model": name,
            "kind": model["kind"],
            **{key: first[key] for key in ("perplexity", "nats", "tokens") if key in first},
            "bytes": None if model["bytes"] is None else model["bytes"] + model["adapter_bytes"],
            "adapter_bytes": model["adapter_bytes"],
            "bits_per_weight": (model.get("quantised") or {}).get("bits_per_weight"),
            "texts": texts,
            "tasks": tasks,
        }
        speed = of_model(record["speed"], name)
        if speed is not None:
            row |= {key: speed[key] for key in ("tokens_per_second", "peak_bytes")}
        found.append(row)
    return found


@dataclass(frozen=True)
class Comparison:
    """One model beside another on the same items.

    Attributes:
        what: the text or task.
        model, other: their names.
        difference: the model's value less the other's: nats a token of a text, points of a task.
        is_text: whether lower is better, and items are windows.
    """

    what: str
    model: str
    other: str
    difference: Difference
    is_text: bool

    @property
    def is_better(self) -> bool:
        """Whether the model's value is the better one, noise or not."""
        return self.difference.value < 0 if self.is_text else self.difference.value > 0

    @property
    def sentence(self) -> str:
        """The comparison in words: "gsm8k: out + eora is better than out by 2.1 ± 0.8 points, n = 500"."""
        value, unit = abs(self.difference.value), "nats a token" if self.is_text else "points"
        digits = 3 if self.is_text else 1
        items = f"n = {self.difference.items}{' windows' if self.is_text else ''}"
        half = self.difference.half_width
        if half is None:
            return (
                f"{self.what}: {self.model} and {self.other} differ by {value:.{digits}f} {unit}, {items}: too few to "
                f"tell from noise (at least {LEAST_ITEMS})"
            )
        size = f"{value:.{digits}f} ± {half:.{digits}f} {unit}, {items}"
        if self.difference.is_noise:
            return f"{self.what}: {self.model} and {self.other} differ within noise: {size}"
        return f"{self.what}: {self.model} is {'better' if self.is_better else 'worse'} than {self.other} by {size}"


INTERVAL_NOTE = f"±: half of the {CONFIDENCE} % interval of a paired bootstrap over the same items"


def comparisons(record: Record) -> list[Comparison]:
    """Every adapter beside its own checkpoint, and every other quantised model beside the first of them."""
    found = []
    for model, other in _pairs(record["models"]):
        for text in record["texts"]:
            pair = [of_model(text["results"], name) for name in (model, other)]
            if pair[0] is not None and pair[1] is not None and pair[0]["tokens"] == pair[1]["tokens"]:
                gap = paired_difference(pair[0]["nats"], pair[1]["nats"], pair[0]["tokens"])
                found.append(Comparison(text["name"], model, other, gap, is_text=True))
        for task in record["tasks"]:
            values = [_values(of_model(task["results"], name)) for name in (model, other)]
            if values[0] and values[1] and values[0].keys() == values[1].keys():
                first, second = ([POINTS * some[item] for item in values[0]] for some in values)
                found.append(Comparison(task["name"], model, other, paired_difference(first, second), is_text=False))
    return found


def _pairs(models: Sequence[Mapping[str, Any]]) -> list[tuple[str, str]]:
    quantised = [one for one in models if one["kind"] != FULL_PRECISION]
    found = []
    for one in quantised[1:]:
        own = next((other for other in quantised if other["kind"] == QUANTISED and other["path"] == one["path"]), None)
        other = own if one["kind"] == ADAPTED and own is not None else quantised[0]
        if other is not one:
            found.append((one["name"], other["name"]))
    return found


def _values(result: Result | None) -> dict[Any, float]:
    return {} if result is None else {item["id"]: item["value"] for item in result.get("items") or ()}
