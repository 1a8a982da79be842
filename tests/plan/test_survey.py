"""What sensitivities are measured on."""

import torch

from gptqmodel_eora_ext.plan.survey import KIND_TOKENS, PASS_TOKENS, SENSITIVITY_TOKENS, first_tokens, unseen_tokens


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


def test_kinds_are_measured_on_tokens_that_sensitivities_do_not_stand_on() -> None:
    width = 128
    data = [batch(1, width)] * (SENSITIVITY_TOKENS // width) + [batch(3, width), batch(5, width)]
    seen = first_tokens(data, SENSITIVITY_TOKENS)
    unseen = unseen_tokens(data)
    assert [len(one["input_ids"]) for one in unseen] == [4] and 4 * width == KIND_TOKENS
    assert not any(one["input_ids"].data_ptr() == other["input_ids"].data_ptr() for one in seen for other in unseen)


def test_of_little_data_kinds_are_measured_on_the_last() -> None:
    data = [batch(1, KIND_TOKENS // 2) for _ in range(3)]
    assert [one["input_ids"].shape for one in unseen_tokens(data)] == [(1, KIND_TOKENS // 2)] * 2
    assert len(unseen_tokens([batch(1, 10)])) == 1


def test_of_a_long_window_kinds_are_measured_on_the_beginning() -> None:
    [found] = unseen_tokens([batch(2, 4 * KIND_TOKENS)])
    assert {name: one.shape for name, one in found.items()} == {
        "input_ids": (1, KIND_TOKENS),
        "attention_mask": (1, KIND_TOKENS),
    }
