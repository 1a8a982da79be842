"""Watching an ensemble while it serves: counts, a rolling report, metrics for Prometheus, an alarm, and prompts if
asked.

Nothing is written and no text is kept unless it is asked for: `report`, `metrics` and `prompts` are off by default.
"""

from __future__ import annotations

import json
import logging
import math
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from ...system.files import write_json
from .drift import DriftTest
from .router import Routing

log = logging.getLogger(__name__)

# Prompts that the rolling figures are over.
ROLLING = 1000
# Prompts and seconds between two writings of the report.
REPORT_EVERY, REPORT_SECONDS = 100, 10.0
BINS = 10


class Watch:
    """Counts what an ensemble chooses; an observer for `Ensemble.observers`. Safe to call from several threads.

    Args:
        members: names.
        report: file for the rolling report, JSON, rewritten every `REPORT_EVERY` prompts, `REPORT_SECONDS` apart at
            least; None for none.
        metrics: whether to count in `prometheus_client`'s default registry, which the process serves as it likes.
        prompts: file that prompts are added to, JSON lines of `text`, as `eora ensemble add` reads them; None, the
            default, keeps no text.
        decode: token ids to text, for ``prompts``.
        rolling: prompts that the rolling figures are over.

    Raises:
        ImportError: for metrics without the package `prometheus-client`.
        ValueError: for prompts without ``decode``.

    Example:
        >>> watch = Watch(ensemble.members, report=Path("report.json"))
        >>> ensemble.observers.append(watch)
    """

    def __init__(
        self,
        members: Sequence[str],
        *,
        report: Path | None = None,
        metrics: bool = False,
        prompts: Path | None = None,
        decode: Callable[[torch.Tensor], str] | None = None,
        rolling: int = ROLLING,
    ) -> None:
        if prompts is not None and decode is None:
            raise ValueError("Ensemble: prompts can be logged as text alone; pass the tokenizer's `decode`.")
        self.members = tuple(members)
        self.drift = DriftTest()
        self._rows: deque[tuple[tuple[float, ...], bool, float]] = deque(maxlen=rolling)
        self._losses: dict[str, list[float]] = {}
        self._report, self._prompts, self._decode = report, prompts, decode
        self._written = (0, -math.inf)
        self._lock = threading.Lock()
        self._metrics = _Metrics(self.members) if metrics else None

    def __call__(self, routing: Routing, ids: torch.Tensor | None = None) -> None:
        """Count the prompts of a batch.

        Args:
            routing: of the batch.
            ids: the prompts' tokens, prompts × tokens; read only where prompts are logged.
        """
        with self._lock:
            for row, weights in enumerate(routing.weights.tolist()):
                entropy = _entropy(weights)
                self._rows.append((tuple(weights), routing.fallen_back[row], entropy))
                had = self.drift.alarm is not None
                # A prompt too short to tell, or told its weights, is no evidence.
                alarmed = self.drift.add(routing.tails[row]) if routing.nearest[row] else had
                if alarmed and not had:
                    log.warning("EoRA: after %d prompts traffic is unlike the text that the ensemble was made for.",
                                self.drift.prompts)  # fmt: skip
                if self._metrics is not None:
                    self._metrics.count(weights, routing.fallen_back[row], entropy, self.drift)
                if self._prompts is not None and ids is not None and self._decode is not None:
                    with self._prompts.open("a", encoding="utf-8") as file:
                        text = {"text": self._decode(ids[row]), "nearest": routing.nearest[row],
                                "fallen_back": routing.fallen_back[row]}  # fmt: skip
                        file.write(json.dumps(text, ensure_ascii=False) + "\n")
            self._write()

    def record_loss(self, domain: str, nats: float, tokens: int) -> None:
        """Count the loss of a text whose continuation is known.

        Args:
            domain: what the text is of.
            nats: sum over its tokens.
            tokens: how many.
        """
        with self._lock:
            sums = self._losses.setdefault(domain, [0.0, 0.0])
            sums[0] += nats
            sums[1] += tokens
            if self._metrics is not None:
                self._metrics.loss.labels(domain).set(sums[0] / sums[1])

    def figures(self) -> dict[str, Any]:
        """The report: of the last `rolling` prompts, but for the alarm, which sees all."""
        with self._lock:
            return self._figures()

    def _figures(self) -> dict[str, Any]:
        rows = list(self._rows)
        count = max(len(rows), 1)
        histograms = {name: [0] * BINS for name in self.members}
        for weights, _, _ in rows:
            for name, weight in zip(self.members, weights, strict=True):
                histograms[name][min(int(weight * BINS), BINS - 1)] += 1
        return {
            "prompts": self.drift.prompts,
            "rolling": len(rows),
            "weights": {
                name: {"mean": sum(row[0][index] for row in rows) / count, "histogram": histograms[name]}
                for index, name in enumerate(self.members)
            },
            "entropy": sum(row[2] for row in rows) / count,
            "fallback": sum(row[1] for row in rows) / count,
            "loss": {name: nats / tokens for name, (nats, tokens) in self._losses.items()},
            "drift": {
                "statistic": self.drift.statistic, "threshold": self.drift.threshold, "alarm": self.drift.alarm,
            },
        }  # fmt: skip

    def _write(self) -> None:
        if self._report is None:
            return
        prompts, at = self._written
        now = time.monotonic()
        due = self.drift.prompts - prompts >= REPORT_EVERY and now - at >= REPORT_SECONDS
        if due or at == -math.inf:
            write_json(self._report, self._figures())
            self._written = (self.drift.prompts, now)


class _Metrics:
    """What Prometheus sees."""

    def __init__(self, members: Sequence[str]) -> None:
        try:
            from prometheus_client import Counter, Gauge, Histogram
        except ImportError as error:
            raise ImportError("EoRA: metrics need the package prometheus-client: "
                              "pip install 'gptqmodel-eora-ext[watch]'.") from error  # fmt: skip
        self._members = members
        self.prompts = Counter("eora_ensemble_prompts", "Prompts that were routed")
        self.fallback = Counter("eora_ensemble_fallback", "Prompts that the shared adapter served alone")
        buckets = tuple((index + 1) / BINS for index in range(BINS))
        self.weights = Histogram("eora_ensemble_weight", "Weight of a member", ["member"], buckets=buckets)
        self.entropy = Histogram("eora_ensemble_entropy", "Entropy of a prompt's weights, nats")
        self.loss = Gauge("eora_ensemble_loss", "Nats per token where references exist", ["domain"])
        self.drift = Gauge("eora_ensemble_drift", "Statistic of the test for drift; alarm at its threshold")
        self.alarm = Gauge("eora_ensemble_alarm", "1 since traffic has moved away")

    def count(self, weights: Sequence[float], fallen_back: bool, entropy: float, drift: DriftTest) -> None:
        """Take a prompt in."""
        self.prompts.inc()
        self.fallback.inc(int(fallen_back))
        for name, weight in zip(self._members, weights, strict=True):
            self.weights.labels(name).observe(weight)
        self.entropy.observe(entropy)
        self.drift.set(drift.statistic)
        self.alarm.set(int(drift.alarm is not None))


def _entropy(weights: Sequence[float]) -> float:
    """Of the weights and of what is left for the shared adapter alone, nats."""
    shares = [*weights, max(0.0, 1 - sum(weights))]
    return -sum(one * math.log(one) for one in shares if one > 0)
