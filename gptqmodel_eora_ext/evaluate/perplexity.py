"""Loss of a causal language model on a text, in nats per token."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy
import torch

from ..calibration import file_tokens

DEFAULT_WINDOW = 512
# Kernels that unpack a whole matrix per call cost the same for one window as for four; logits of more would be large.
WINDOWS_PER_FORWARD = 4
# Rows of logits that are worked on at a time: in float32, 128 rows of a vocabulary of 150,000 are 77 MB.
ROWS = 128


@dataclass(frozen=True)
class Windows:
    """How a text is cut.

    Attributes:
        size: tokens of a window, at least 2.
        stride: tokens from the beginning of one window to that of the next. Smaller than ``size``, windows overlap
            (they slide), and each predicts only the tokens that the one before has not; the others are its context.
        most: windows at most; None for the whole text.

    Raises:
        ValueError: from `__post_init__`, for a size below 2, or a stride that is not from 1 to the size.
    """

    size: int = DEFAULT_WINDOW
    stride: int | None = None
    most: int | None = None

    def __post_init__(self) -> None:
        if self.size < 2:
            raise ValueError(f"a window must have at least 2 tokens, got {self.size}: its first is predicted by none.")
        if not 1 <= self.step <= self.size:
            raise ValueError(
                f"the stride is {self.stride}, expected 1 to {self.size}, the tokens of a window: a longer one would "
                f"leave out text in between."
            )

    @property
    def step(self) -> int:
        """The stride, also where none was named: windows then follow each other without overlap."""
        return self.size if self.stride is None else self.stride

    @property
    def title(self) -> str:
        """How the text was cut, in words."""
        if self.step == self.size:
            return f"non-overlapping windows of {self.size} tokens"
        return f"sliding windows of {self.size} tokens, each predicting its last {self.step}"

    @property
    def tokens(self) -> int | None:
        """Tokens that the windows want of a text; None for all."""
        return None if self.most is None else self.size + (self.most - 1) * self.step

    def starts(self, tokens: int) -> range:
        """Where windows begin in a text of so many tokens; what does not fill a window at the end is left out.

        Raises:
            ValueError: when the text is shorter than one window.
        """
        if tokens < self.size:
            raise ValueError(f"The text has {tokens} tokens; one window of {self.size} needs at least as many.")
        count = 1 + (tokens - self.size) // self.step
        return range(0, self.step * (min(count, self.most) if self.most else count), self.step)

    def first_predicted(self, start: int) -> int:
        """Place in the window of the first token that it predicts: none predicts the very first."""
        return 1 if start == 0 else max(1, self.size - self.step)


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


def predictions(
    model: Any,
    token_ids: torch.Tensor,
    windows: Windows,
    progress: Callable[[int, int], None] | None = None,
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """For each window, what the model predicts and what stands there.

    Args:
        model: a transformers causal language model.
        token_ids: 1-D, the whole text, of any integer dtype.
        windows: how it is cut.
        progress: called with (windows done, windows in all) after each forward.

    Yields:
        Logits (predicted tokens × vocabulary, the model's own dtype and device) and the tokens (int64).

    Raises:
        ValueError: when the text is shorter than one window.
    """
    starts = windows.starts(len(token_ids))
    device = next(model.parameters()).device
    model.eval()
    for batch in range(0, len(starts), WINDOWS_PER_FORWARD):
        some = starts[batch : batch + WINDOWS_PER_FORWARD]
        ids = torch.stack([token_ids[start : start + windows.size] for start in some]).to(device, torch.int64)
        with torch.inference_mode():
            found = model(input_ids=ids).logits
        for start, logits, row in zip(some, found, ids, strict=True):
            first = windows.first_predicted(start)
            yield logits[first - 1 : -1], row[first:]
        if progress is not None:
            progress(batch + len(some), len(starts))


def summed_nats(logits: torch.Tensor, targets: torch.Tensor) -> float:
    """−Σ log p(target) over rows of logits (tokens × vocabulary), in nats, taken in float32."""
    with torch.inference_mode():
        parts = zip(logits.split(ROWS), targets.split(ROWS), strict=True)
        return sum(
            float(torch.nn.functional.cross_entropy(some.to(torch.float32), expected, reduction="sum"))
            for some, expected in parts
        )


def text_loss(
    model: Any,
    token_ids: torch.Tensor,
    *,
    window: int = DEFAULT_WINDOW,
    max_windows: int | None = None,
    stride: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> TextLoss:
    """Return the loss on consecutive windows; each predicts all but its first token, or where they slide, the last
    ``stride`` ones.

    Args:
        model: a transformers causal language model.
        token_ids: 1-D, the whole text, of any integer dtype.
        window: tokens per window, at least 2.
        max_windows: stop after so many; None takes the whole text.
        stride: tokens from one window to the next; None for windows that do not overlap.
        progress: called with (windows done, windows in all) after each forward.

    Raises:
        ValueError: when the text is shorter than one window, or for a stride that is not from 1 to ``window``.
    """
    total, tokens, count = 0.0, 0, 0
    for logits, targets in predictions(model, token_ids, Windows(window, stride, max_windows), progress):
        total += summed_nats(logits, targets)
        tokens += len(targets)
        count += 1
    return TextLoss(total / tokens, tokens, count)
