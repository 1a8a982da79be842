"""Token ids are compared with what the model embeds, before any work."""

from __future__ import annotations

import torch


def require_token_ids(ids: torch.Tensor, vocabulary: int) -> None:
    """Refuse token ids that the model does not embed.

    Args:
        ids: integers of any shape, at least one.
        vocabulary: number of ids that the model embeds: 0 to ``vocabulary`` − 1.

    Raises:
        ValueError: naming the id.
    """
    smallest, largest = (int(one) for one in ids.aminmax())
    if smallest < 0 or largest >= vocabulary:
        found = smallest if smallest < 0 else largest
        raise ValueError(
            f"EoRA: calibration holds token id {found}, but the model embeds {vocabulary} ids. The tokenizer does not "
            f"fit the model, or padding has ids of its own: tokenize with the model's own tokenizer, and mark padding "
            f"in `attention_mask`."
        )
