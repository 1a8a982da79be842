"""Pruning a model from Python, whichever host has the layer loop."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from ..adapter.validate import validate_choice
from ..calibration import DEFAULT_SAMPLES, DEFAULT_SEQLEN, read_texts, tokenized
from ..formats.sparsity import Pattern
from ..solve import METHODS
from .jobs import PruneJob, Windows
from .registry import pruner


def prune(
    model: str,
    output: str | Path,
    calibration: str | Iterable[Any],
    *,
    method: str = METHODS[0],
    pattern: str = "2:4",
    bits: int | None = None,
    group_size: int = 64,
    adapter: Mapping[str, Any] | None = None,
    dynamic: Mapping[str, Any] | None = None,
    samples: int = DEFAULT_SAMPLES,
    seqlen: int = DEFAULT_SEQLEN,
    batch_size: int = 1,
    trust_remote_code: bool = False,
    report: Callable[[int, int], None] | None = None,
) -> Path:
    """Prune a model, and compensate each module right after it is pruned.

    The layers run one after another. What is kept in memory is one layer, the inputs of the next, and up to 1 GiB of
    pruned weights, the rest of which lies in a file.

    Args:
        model: at full precision, a folder or a hub name.
        output: folder for the pruned model; the adapter goes into its folder `eora`.
        calibration: a file or data set, as `eora prune --calibration` takes it, or documents; or windows of token ids:
            mappings of `input_ids` and `attention_mask`.
        method: "sparsegpt", "wanda" or "magnitude".
        pattern: "2:4", "4:8", or the share of zeros, "0.5".
        bits: with "sparsegpt", quantise the weights that are kept as well: 2, 3, 4 or 8. The folder is then a
            checkpoint of GPTQModel whose zeros are exact.
        group_size: weights per scale, with ``bits``.
        adapter: what `EoRA` takes, `{"rank": 64}` or `{"budget": "0.5bpw", "factor_bits": 4}`; None to prune alone.
        dynamic: as in GPTQModel's `QuantizeConfig`: `{r"-:.*down_proj": {}}` leaves modules as they are.
        samples: windows of texts.
        seqlen: tokens per window of texts.
        batch_size: windows per forward.
        trust_remote_code: whether code that comes with the model or its tokenizer may run.
        report: called with (layers done, layers in all).

    Returns:
        The folder. Any host opens it as a model of its own.

    Raises:
        ValueError: for an unknown method or pattern, a pattern that does not divide a module's inputs, missing data, or
            broken weights.
        NotImplementedError: for experts that GPTQModel would pass over, or weights that the files hold under other
            names.
        ModuleError: when pruning or compensating a module fails.

    Example:
        >>> prune("Qwen/Qwen3-8B", "out", "c4.jsonl", pattern="2:4", adapter={"rank": 64})
    """
    validate_choice(method, METHODS, what="method")
    Pattern.parse(pattern)
    if adapter is None and (named := _names_a_rank(dynamic)) is not None:
        raise ValueError(
            f"EoRA: dynamic[{named!r}] names the rank of an adapter, and `adapter` is None: the model is pruned alone. "
            f"Pass `adapter` too, or leave the rank out."
        )
    documents: Any = read_texts(calibration) if isinstance(calibration, str) else list(calibration)
    if isinstance(documents, list) and documents and isinstance(documents[0], Mapping) and "input_ids" in documents[0]:
        cut: Windows = documents
    else:
        cut = tokenized(documents, model, samples, seqlen, trust_remote_code)
    job = PruneJob(
        model=model,
        output=Path(output),
        windows=cut,
        method=method,
        pattern=pattern,
        bits=bits,
        group_size=group_size,
        adapter=adapter,
        dynamic=dynamic,
        batch_size=batch_size,
        trust_remote_code=trust_remote_code,
        report=report,
    )
    return pruner(method)(job)


def _names_a_rank(dynamic: Mapping[str, Any] | None) -> str | None:
    """The first entry of `dynamic` that asks for an adapter of some rank."""
    return next((pattern for pattern, override in (dynamic or {}).items()
                 if isinstance(override, Mapping) and isinstance(override.get("adapter"), Mapping)
                 and override["adapter"].get("rank")), None)  # fmt: skip
