"""The report's headline: the one sentence that a reader takes away, no stronger than what was measured."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..outcome import comparisons, rows
from ..size import readable
from ..subjects import FULL_PRECISION

# Sizes within this share of each other are called the same.
SAME_SIZE = 0.02


def headline(record: Mapping[str, Any]) -> list[str]:
    """One to three sentences about the last quantised model beside the first.

    It is told in perplexity of the first text, or the first task's score where there is no text.
    """
    found = rows(record)
    quantised = [row for row in found if row["kind"] != FULL_PRECISION]
    full = next((row for row in found if row["kind"] == FULL_PRECISION), None)
    if not quantised:
        return [f"{found[0]['model']}, measured as it is."]
    first, last = quantised[0], quantised[-1]
    sentences = []
    if record["texts"]:
        name = record["texts"][0]["name"]
        told = f"On {name}, {last['model']} has a perplexity of {last['texts'][name]['perplexity']:.1f}"
        if last is not first:
            told += f"; {first['model']}{_beside(first, last)} has {first['texts'][name]['perplexity']:.1f}"
        if full is not None:
            told += f"; at full precision it is {full['texts'][name]['perplexity']:.1f}"
        sentences.append(told + ".")
        if full is not None and last is not first:
            lost, left = (row["texts"][name]["nats"] - full["texts"][name]["nats"] for row in (first, last))
            told = f"It loses {left:.2f} nats a token where {first['model']} loses {lost:.2f}"
            if 0 < left < lost:
                told += f": {100 * (1 - left / lost):.0f} % less"
            sentences.append(f"{told}.")
    elif record["tasks"]:
        one = record["tasks"][0]["name"]
        scores = ", ".join(f"{row['model']} {100 * row['tasks'][one]['value']:.1f} %" for row in found)
        sentences.append(f"On {one}: {scores}.")
    if any(one.difference.is_noise for one in comparisons(record)):
        sentences.append("Some differences are within noise; they are named below.")
    return sentences or [f"{last['model']}, measured as it is."]


def _beside(first: Mapping[str, Any], last: Mapping[str, Any]) -> str:
    """How the first model's size compares with the last one's."""
    if not first["bytes"] or not last["bytes"]:
        return ""
    ratio = first["bytes"] / last["bytes"]
    if abs(ratio - 1) <= SAME_SIZE:
        return f", of the same size ({readable(first['bytes'])} and {readable(last['bytes'])}),"
    larger = "larger" if ratio > 1 else "smaller"
    return f", {larger} ({readable(first['bytes'])} and {readable(last['bytes'])}),"
