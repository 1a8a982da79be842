"""What the factors are trained to lower, and its gradient at the last layer's output, some tokens at a time.

Scores are formed for as many tokens as fit `CHUNK_BYTES`, never for a whole window: of 512 tokens, 152,000 scores each
take 311 MB in float32, and a loss handles several such tensors. The vocabulary is never cut, since a softmax over parts
of it would need every score twice.

    kl      Σ over tokens of KL(p ‖ q) / tokens, p by the full-precision model, q by the quantised one
    rilq    ½ MSE(h, h*) + ½ cross entropy of the text, h the last hidden states after the final norm, h* those of the
            full-precision model (RILQ, arXiv 2412.01129, and its code: the mean is over tokens and channels)
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

# Of a chunk's scores in float32. Smaller chunks make the output matrix be read more often than it pays.
CHUNK_BYTES = 32 << 20
# Shares of the two parts of RILQ's loss.
RILQ_HIDDEN, RILQ_TEXT = 0.5, 0.5

# From outputs of the last layer, tokens × width, to the hidden states after the final norm and the scores.
Head = Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]]


@dataclass(frozen=True)
class Chunk:
    """Some tokens of a window.

    Attributes:
        rows: the quantised model's outputs of its last layer, tokens × width.
        teacher: the full-precision model's.
        labels: the token after each, −1 where there is none.
        tokens: of the whole window.
        labelled: tokens of the whole window that have a label.
    """

    rows: torch.Tensor
    teacher: torch.Tensor
    labels: torch.Tensor
    tokens: int
    labelled: int


def window_loss(
    loss: str,
    head: Head,
    hidden: torch.Tensor,
    teacher: torch.Tensor,
    ids: torch.Tensor,
    vocabulary: int,
    *,
    with_gradient: bool = True,
) -> tuple[float, torch.Tensor | None]:
    """The loss of a window, and its gradient.

    Args:
        loss: of `LOSSES`.
        head: what stands after the last layer.
        hidden: the quantised model's outputs of its last layer, tokens × width.
        teacher: the full-precision model's.
        ids: the window's tokens.
        vocabulary: scores a token.
        with_gradient: whether the gradient is wanted.

    Returns:
        The loss in nats a token (rilq: its own measure), and its gradient at ``hidden``, tokens × width.
    """
    of_chunk = LOSSES[loss]
    tokens = len(ids)
    labels = torch.cat([ids[1:], ids.new_full((1,), -1)])
    step = max(1, CHUNK_BYTES // (4 * vocabulary))
    value = 0.0
    gradient = torch.empty_like(hidden) if with_gradient else None
    for begin in range(0, tokens, step):
        part = slice(begin, begin + step)
        rows = hidden[part].detach().requires_grad_(with_gradient)
        chunk = Chunk(rows, teacher[part], labels[part], tokens, tokens - 1)
        value += of_chunk(head, chunk)
        if gradient is not None:
            assert rows.grad is not None
            gradient[part] = rows.grad
    return value, gradient


def _divergence(head: Head, chunk: Chunk) -> float:
    with torch.no_grad():
        wanted = head(chunk.teacher)[1].to(torch.float32).log_softmax(-1)
    with torch.set_grad_enabled(chunk.rows.requires_grad):
        scores = head(chunk.rows)[1]
    with torch.no_grad():
        found = scores.detach().to(torch.float32).log_softmax(-1)
        likely = wanted.exp()
        value = float(likely.mul(wanted - found).sum()) / chunk.tokens
        if chunk.rows.requires_grad:
            # Of KL(p ‖ softmax(s)) by s: softmax(s) − p.
            gradient = found.exp_().sub_(likely).div_(chunk.tokens).to(scores.dtype)
    if chunk.rows.requires_grad:
        scores.backward(gradient)
    return value


def _rilq(head: Head, chunk: Chunk) -> float:
    with torch.no_grad():
        wanted = head(chunk.teacher)[0].to(torch.float32)
    with torch.set_grad_enabled(chunk.rows.requires_grad):
        normed, scores = head(chunk.rows)
    with torch.no_grad():
        apart = normed.detach().to(torch.float32) - wanted
        elements = chunk.tokens * apart.shape[-1]
        found = scores.detach().to(torch.float32).log_softmax(-1)
        known = chunk.labels >= 0
        targets = chunk.labels.clamp_min(0)[:, None]
        text = -float((found.gather(-1, targets)[:, 0] * known).sum()) / chunk.labelled
        value = RILQ_HIDDEN * float(apart.square().sum()) / elements + RILQ_TEXT * text
        if chunk.rows.requires_grad:
            # Of the cross entropy by the scores: softmax − onehot, at tokens that have a label.
            by_scores = found.exp_().scatter_add_(-1, targets, -torch.ones_like(targets, dtype=found.dtype))
            by_scores *= (known * (RILQ_TEXT / chunk.labelled))[:, None]
            by_normed = apart * (2 * RILQ_HIDDEN / elements)
    if chunk.rows.requires_grad:
        torch.autograd.backward([normed, scores], [by_normed.to(normed.dtype), by_scores.to(scores.dtype)])
    return value


LOSSES: dict[str, Callable[[Head, Chunk], float]] = {"kl": _divergence, "rilq": _rilq}
