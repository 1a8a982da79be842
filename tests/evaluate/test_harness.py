"""Tasks from local files are scored as lm-eval scores them by itself: same items, same prompts, same numbers.

`make test-tasks` runs these; IFEval's needs nltk's data `punkt_tab`, which the make target takes from a wheel on PyPI.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM

from gptqmodel_eora_ext.evaluate.items import READERS, read_items
from gptqmodel_eora_ext.evaluate.tasks import check_instruction_checker, check_tasks, opened_tasks, task_request

pytestmark = pytest.mark.harness

COUNT = 6
ROWS: dict[str, list[dict[str, Any]]] = {
    "arc_challenge": [
        {"id": str(one), "question": f"What is {one} + 1?", "answerKey": "AB"[one % 2],
         "choices": {"text": [str(one + one % 2), str(one + 1)], "label": ["A", "B"]}} for one in range(COUNT)
    ],
    "mathqa": [
        {"Problem": f"what is {one} + 1 ?", "options": f"a ) {one} , b ) {one + 1} , c ) 90 , d ) 91 , e ) 92",
         "correct": "b"} for one in range(COUNT)
    ],
    "gsm8k": [
        {"question": f"What is {one} + 1?", "answer": f"It is {one + 1}.\n#### {one + 1}"} for one in range(COUNT)
    ],
    "lambada_openai": [{"text": f"I counted to {one}, then came the number {one + 1}"} for one in range(COUNT)],
    "hellaswag": [
        {"ctx_a": f"A man has {one} hats.", "ctx_b": "he", "activity_label": "Hats", "label": str(one % 2),
         "endings": ["wears one.", "eats the [title] sea."]} for one in range(COUNT)
    ],
    "piqa": [{"goal": f"cut {one} apples", "sol1": "use a knife", "sol2": "use soup", "label": one % 2}
             for one in range(COUNT)],
    "winogrande": [{"sentence": f"The dog chased {one} cats because the _ was angry.", "option1": "dog",
                    "option2": "stone", "answer": "1"} for one in range(COUNT)],
    "ifeval": [
        {"key": one, "prompt": "Write two words.", "instruction_id_list": ["punctuation:no_comma",
         "length_constraints:number_words"], "kwargs": [{}, {"relation": "at least", "num_words": 1 + 2000 * one}]}
        for one in range(2)  # each is up to 1,280 tokens long
    ],
}  # fmt: skip


@pytest.fixture(scope="module")
def model(two_layers: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(two_layers, dtype="auto").eval()


@pytest.mark.parametrize("task", ROWS)
def test_scores_are_lm_evals(
    task: str, model: Any, two_layers: Path, tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Beside lm-eval's own task, loaded and run by lm-eval, with its data set replaced by these rows."""
    import datasets
    import lm_eval

    if task == "ifeval":
        try:
            check_instruction_checker()
        except ValueError as error:
            pytest.skip(str(error))
    path = tmp_path / f"{task}.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS[task]))
    seen: list[tuple[int, int]] = []
    shots = 2 if task == "gsm8k" else None
    request = task_request(task, read_items(path, task))
    with opened_tasks([request], include_path=None, limit=None, shots=shots) as tasks:
        ours = tasks.score(request, model, tokenizer, batch_size=2, progress=lambda *done: seen.append(done))
        if task != "ifeval":
            again = tasks.score(request, model, tokenizer, batch_size=2)
            assert ours == again  # nothing of one model's run stays for the next one's
    assert seen and seen[-1][0] == seen[-1][1]
    rows = datasets.Dataset.from_list(ROWS[task])
    splits = datasets.DatasetDict(train=rows, validation=rows, test=rows)
    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **kwargs: splits)
    found = lm_eval.simple_evaluate(
        model="hf", model_args={"pretrained": str(two_layers), "dtype": "bfloat16", "device": "cpu"}, tasks=[task],
        batch_size=2, num_fewshot=0 if task != "gsm8k" else 2, bootstrap_iters=0,
    )  # fmt: skip
    own = {name.removesuffix(",none"): value for name, value in found["results"][task].items()
           if "," in name and "_stderr" not in name}  # fmt: skip
    if task != "gsm8k":  # whose examples come from a data set of its own there
        assert ours.metrics == pytest.approx(own)
    assert set(ours.metrics) == set(own)
    count = len(ROWS[task])
    assert ours.items is not None and [item["id"] for item in ours.items] == list(range(count))
    assert sum(item["value"] for item in ours.items) / count == pytest.approx(ours.value)


def test_every_task_that_files_are_read_for_is_here() -> None:
    assert set(ROWS) | {"arc_easy"} == set(READERS)


def test_items_of_ones_own(model: Any, tokenizer: Any, tmp_path: Path) -> None:
    """A model that is right about everything and one that is wrong, by items that it is asked about."""
    choices, answers = tmp_path / "gsm8k.jsonl", tmp_path / "answers.jsonl"
    plain = [{"question": f"Say {word}", "choices": [word, "xq zz vvvv"], "answer": 0} for word in ("yes", "no", "one")]
    choices.write_text("".join(json.dumps(row) + "\n" for row in plain))
    # Different ones: lm-eval takes no example from an item that reads like the one that is asked.
    said = [{"question": f"Say {word}", "answer": word} for word in ("yes", "no", "one")]
    answers.write_text("".join(json.dumps(row) + "\n" for row in said))
    requests = [task_request(None, read_items(path, None)) for path in (choices, answers)]
    assert [one.title for one in requests] == ["gsm8k", "answers"]  # the name of a file is no task's
    with opened_tasks(requests, include_path=None, limit=2, shots=1) as tasks:
        chosen, told = (tasks.score(one, model, tokenizer, batch_size=1) for one in requests)
    assert (chosen.metric, told.metric) == ("acc_norm", "exact_match")
    assert chosen.items is not None and told.items is not None
    assert len(chosen.items) == len(told.items) == 2
    assert all(isinstance(item["given"], str) for item in told.items)
    for item in chosen.items:
        better = max(range(2), key=lambda one: item["given"][one] / len(plain[item["id"]]["choices"][one]))
        assert item["value"] == float(better == 0)


def test_tasks_that_are_unknown() -> None:
    with pytest.raises(ValueError, match="lm-eval knows no task `no_such_task`"):
        check_tasks(["gsm8k", "no_such_task"], None)
