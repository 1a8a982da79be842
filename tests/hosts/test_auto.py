"""What sensitivities are measured on."""

import torch

from gptqmodel_eora_ext.hosts.gptqmodel.auto import PASS_TOKENS, SENSITIVITY_TOKENS, first_tokens


def batch(rows: int, width: int, *, masked: bool = True) -> dict[str, torch.Tensor]:
    ids = torch.arange(rows * width).view(rows, width)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)} if masked else {"input_ids": ids}


def test_passes_hold_few_windows_and_end_in_time() -> None:
    width = PASS_TOKENS // 4
    passes = first_tokens([batch(6, width), batch(100, width, masked=False)], SENSITIVITY_TOKENS)
    assert [len(one["input_ids"]) for one in passes[:3]] == [4, 2, 4]
    assert all(one["input_ids"].numel() <= PASS_TOKENS for one in passes)
    assert all(one["attention_mask"].shape == one["input_ids"].shape for one in passes)
    found = sum(one["input_ids"].numel() for one in passes)
    assert SENSITIVITY_TOKENS <= found < SENSITIVITY_TOKENS + PASS_TOKENS


def test_a_long_window_goes_alone() -> None:
    passes = first_tokens([batch(2, 3 * PASS_TOKENS)], SENSITIVITY_TOKENS)
    assert [one["input_ids"].shape for one in passes] == [(1, 3 * PASS_TOKENS)] * 2


def test_less_data_than_wanted_is_all_taken() -> None:
    passes = first_tokens([batch(1, 10)], SENSITIVITY_TOKENS)
    assert len(passes) == 1 and torch.equal(passes[0]["input_ids"], torch.arange(10)[None])
