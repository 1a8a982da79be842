"""Loss of a causal language model on a text, in nats per token."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy
import torch

from ..calibration import file_tokens

DEFAULT_WINDOW = 512
# Kernels that unpack a whole matrix per call cost the same for one window as for four; logits of more would be large.
WINDOWS_PER_FORWARD = 4


@dataclass(frozen=True)
class TextLoss:
    """Mean negative log-likelihood of a text.

    Attributes:
        nats: mean loss per predicted token.
        tokens: predicted tokens.
        windows: windows the text was cut into.
    """

    nats: float
    tokens: int
    windows: int

    @property
    def perplexity(self) -> float:
        return math.exp(self.nats)


def text_tokens(text: str | Path, tokenizer: Any, *, window: int, max_windows: int | None = None) -> torch.Tensor:
    """The tokens of a file, no more than the windows want: 1-D, int32.

    Args:
        text: a file, as `calibration.read_texts` takes it.
        tokenizer: the model's own.
        window: tokens per window.
        max_windows: windows at most; None for the whole text.

    Raises:
        TextError: a ValueError, for a file that cannot be read.
    """
    most = None if max_windows is None else window * max_windows
    return torch.from_numpy(numpy.asarray(file_tokens(text, tokenizer, most=most)))


def text_loss(
    model: Any,
    token_ids: torch.Tensor,
    *,
    window: int = DEFAULT_WINDOW,
    max_windows: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> TextLoss:
    """Return the loss on consecutive, non-overlapping windows; each predicts all but its first token.

    Args:
        model: a transformers causal language model.
        token_ids: 1-D, the whole text, of any integer dtype.
        window: tokens per window, at least 2.
        max_windows: stop after so many; None takes the whole text.
        progress: called with (windows done, windows in all) after each forward.

    Raises:
        ValueError: when the text is shorter than one window.
    """
    count = len(token_ids) // window
    if window < 2 or count == 0:
        raise ValueError(f"The text has {len(token_ids)} tokens; one window of {window} needs at least as many.")
    count = min(count, max_windows) if max_windows else count
    device = next(model.parameters()).device
    total = 0.0
    model.eval()
    with torch.inference_mode():
        for start in range(0, count, WINDOWS_PER_FORWARD):
            stop = min(start + WINDOWS_PER_FORWARD, count)
            ids = token_ids[start * window : stop * window].reshape(-1, window).to(device, torch.int64)
            for logits, targets in zip(model(input_ids=ids).logits, ids, strict=True):
                loss = torch.nn.functional.cross_entropy(logits[:-1].to(torch.float32), targets[1:], reduction="sum")
                total += float(loss)
            if progress is not None:
                progress(stop, count)
    predicted = count * (window - 1)
    return TextLoss(total / predicted, predicted, count)
