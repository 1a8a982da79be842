"""An ensemble end to end on a tiny model: made, loaded, routed, told, extended, evaluated, and refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from gptqmodel import GPTQModel
from typer.testing import CliRunner

from gptqmodel_eora_ext import AdapterError, EoRA, cli, ensemble_of
from gptqmodel_eora_ext.adapter.ensemble.folder import ENSEMBLE_FILE, EnsembleFolder, export_pair
from gptqmodel_eora_ext.adapter.ensemble.watch import Watch
from gptqmodel_eora_ext.evaluate.ensemble import NONE, ROUTED, SHARED_ALONE, TOLD, ensemble_losses
from gptqmodel_eora_ext.hosts.conversation import Conversation
from gptqmodel_eora_ext.hosts.ensemble import checkpoint_of
from gptqmodel_eora_ext.hosts.ensemble_making import add_member, make_ensemble
from gptqmodel_eora_ext.hosts.registry import loader
from gptqmodel_eora_ext.hosts.terminal import quiet

from .ensembles import VOCABULARY, job, prompts, tiny_checkpoint, windows

# Rows of one batch are computed by other tiles than a row alone; in float32 these roundings are all that is left.
ROUNDING = 1e-4


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, tokenizer: Any) -> tuple[Path, Path]:
    """Base and checkpoint, which names its ensemble."""
    base, checkpoint = tiny_checkpoint(tmp_path_factory.mktemp("ensemble"), tokenizer)
    with quiet():
        make_ensemble(job(base, checkpoint, checkpoint / "eora"))
    return base, checkpoint


@pytest.fixture(scope="module")
def model(made: tuple[Path, Path]) -> Any:
    with quiet():
        loaded = GPTQModel.load(str(made[1]), dtype=torch.float32)
    loaded.model.to(torch.float32)
    return loaded


def logits(model: Any, ids: torch.Tensor, **more: Any) -> torch.Tensor:
    with torch.inference_mode():
        found: torch.Tensor = model.model(input_ids=ids, **more).logits
    return found


def generated(model: Any, ids: torch.Tensor, mask: torch.Tensor | None = None, **more: Any) -> torch.Tensor:
    mask = torch.ones_like(ids) if mask is None else mask
    found: torch.Tensor = model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=4, do_sample=False, **more)
    return found


def test_each_row_is_routed(model: Any) -> None:
    ids = prompts("math", "code", "shared", "math")
    generated(model, ids)
    routing = ensemble_of(model).last
    assert routing is not None and routing.nearest == ("math", "code", "shared", "math")
    assert routing.weights[0, 0] > 0.5 and routing.weights[1, 1] > 0.5 and routing.weights[2].sum() < 0.5


def test_a_row_in_a_mixed_batch_is_the_row_alone(model: Any) -> None:
    ids = prompts("math", "code", "shared")
    together = logits(model, ids)
    for row in range(3):
        alone = logits(model, ids[row : row + 1])[0]
        assert float((together[row] - alone).abs().max()) < ROUNDING * float(alone.abs().max())


def test_members_change_what_is_computed(model: Any) -> None:
    ids, ensemble = prompts("math"), ensemble_of(model)
    found = {}
    for name, told in (("shared", {}), ("math", {"math": 1.0}), ("code", {"code": 1.0})):
        with ensemble.told(told):
            found[name] = logits(model, ids)
    assert not torch.equal(found["shared"], found["math"]) and not torch.equal(found["math"], found["code"])


def test_a_told_pair_is_its_exported_adapter(model: Any, made: tuple[Path, Path], tmp_path: Path) -> None:
    export_pair(EnsembleFolder.open(made[1] / "eora"), "code", tmp_path / "pair")
    ids = prompts("code")
    with quiet():
        other = GPTQModel.load(str(made[1]), adapter=EoRA(path=tmp_path / "pair"), dtype=torch.float32)
    other.model.to(torch.float32)
    with ensemble_of(model).told({"code": 1.0}):
        found = logits(model, ids)
    torch.testing.assert_close(found, logits(other, ids), rtol=1e-4, atol=1e-4)


def test_weights_stay_with_the_cache(model: Any) -> None:
    """Token by token with a cache, the logits are those of the whole prompt under the prompt's weights."""
    ids, ensemble = prompts("math", "code", length=40), ensemble_of(model)
    with torch.inference_mode():
        first = model.model(input_ids=ids[:, :32], use_cache=True)
        cache = getattr(first, "cache", None) or first.past_key_values
        known = ensemble.weights_of(cache)
        # Another prompt in between, as when two requests take turns.
        logits(model, prompts("shared"))
        name = "cache" if hasattr(first, "cache") else "past_key_values"
        steps = [model.model(input_ids=ids[:, at : at + 1], **{name: cache}).logits for at in range(32, 40)]
    assert known is not None
    rows = [dict(zip(ensemble.members, row.tolist(), strict=True)) for row in known]
    with ensemble.told(rows):
        whole = logits(model, ids)
    torch.testing.assert_close(torch.cat(steps, dim=1), whole[:, 32:], rtol=1e-3, atol=1e-4)


def test_a_cache_of_unknown_weights_is_refused(model: Any) -> None:
    from transformers import DynamicCache

    ids = prompts("math")
    cache = DynamicCache()
    cache.update(torch.zeros(1, 2, 3, 16), torch.zeros(1, 2, 3, 16), 0)
    with pytest.raises(AdapterError, match="whose weights are not known"):
        logits(model, ids, past_key_values=cache)


def test_padding_and_beams(model: Any) -> None:
    ids = prompts("math", "code")
    mask = torch.ones_like(ids)
    mask[1, :12] = 0
    generated(model, ids, mask)
    assert ensemble_of(model).last.nearest == ("math", "code")
    generated(model, ids, mask, num_beams=2, weights=[{"code": 1.0}, {}])
    assert ensemble_of(model).last.weights.tolist() == [[0.0, 1.0]] * 2 + [[0.0, 0.0]] * 2


def test_told_by_hand(model: Any) -> None:
    ids = prompts("math", "code", "shared")
    generated(model, ids, weights=[{"code": 0.5, "math": 0.25}, None, {}])
    weights = ensemble_of(model).last.weights.tolist()
    assert weights[0] == [0.25, 0.5] and weights[1][1] > 0.5 and weights[2] == [0.0, 0.0]
    for told, message in (({"law": 1.0}, "no member 'law'"), ({"math": -1.0}, "the weight of math is -1.0")):
        with pytest.raises(AdapterError, match=message):
            generated(model, ids, weights=told)


def test_watching(model: Any) -> None:
    ensemble = ensemble_of(model)
    watch = Watch(ensemble.members)
    ensemble.observers.append(watch)
    generated(model, prompts("math", "code", "shared"))
    ensemble.observers.remove(watch)
    assert watch.figures()["prompts"] == 3


def test_the_shared_adapter_opens_alone(made: tuple[Path, Path], model: Any, tmp_path: Path) -> None:
    checkpoint = tmp_path / "checkpoint"
    shutil.copytree(made[1], checkpoint)
    (checkpoint / "eora" / ENSEMBLE_FILE).unlink()
    with quiet():
        plain = GPTQModel.load(str(checkpoint), dtype=torch.float32)
    plain.model.to(torch.float32)
    ids = prompts("math")
    with ensemble_of(model).told({}):
        torch.testing.assert_close(logits(model, ids), logits(plain, ids), rtol=1e-4, atol=1e-4)
    with pytest.raises(AdapterError, match="loaded without one"):
        ensemble_of(plain)


def test_no_saving_as_one_adapter(model: Any, tmp_path: Path) -> None:
    with pytest.raises(NotImplementedError, match="not saved as one adapter"):
        model.save(str(tmp_path / "copy"))


def test_members_correct_what_the_shared_adapter_leaves(made: tuple[Path, Path]) -> None:
    """A member's error before it is the shared adapter's error after it, by the member's text and not by the shared."""
    folder = EnsembleFolder.open(made[1] / "eora")
    for member in folder.folders.values():
        reports = (member.details or {})["modules"]
        adapted = {name: one for name, one in reports.items() if one["rank"]}
        assert {int(name.split(".")[2]) for name in adapted} == {2, 3}
        assert all(one["error_after"] < one["error_before"] for one in adapted.values())


def test_losses(made: tuple[Path, Path], tmp_path: Path) -> None:
    export_pair(EnsembleFolder.open(made[1] / "eora"), None, tmp_path / "alone")
    texts = {name: torch.tensor([one for window in windows(name, 4, seed=50) for one in window["input_ids"]])
             for name in ("math", "shared")}  # fmt: skip
    with quiet():
        loaded = loader(made[1])(made[1])
    found = ensemble_losses(loaded, texts, controls={"alone": tmp_path / "alone"}, window=64, prompt=32, max_windows=2)
    assert set(found.losses) == {NONE, SHARED_ALONE, ROUTED, TOLD, "alone"}
    assert found.windows == {"math": 2, "shared": 2} and found.routed_to["math"]["math"] == 1.0
    for name in texts:
        assert found.losses["alone"][name] == pytest.approx(found.losses[SHARED_ALONE][name], rel=2e-3)
    assert found.losses[TOLD]["shared"] == found.losses[SHARED_ALONE]["shared"]


def test_a_conversation(model: Any, tokenizer: Any) -> None:
    class Small:
        """The tokenizer's words, folded into the tiny model's vocabulary."""

        chat_template, eos_token_id = None, None

        def __call__(self, text: str, **options: Any) -> Any:
            found = tokenizer(text, **options)
            found["input_ids"] = [one % VOCABULARY for one in found.input_ids]
            return found

        def decode(self, ids: Any, **options: Any) -> str:
            return str(tokenizer.decode(ids, **options))

    conversation = Conversation(model.model, Small(), ensemble_of(model), max_new_tokens=3)
    first = conversation.say("one two three four five six seven eight nine ten eleven twelve thirteen fourteen")
    second = conversation.say("and so on")
    assert not first.rerouted
    assert second.rerouted or second.weights == first.weights


def test_adding_a_domain_leaves_the_others(made: tuple[Path, Path], tmp_path: Path) -> None:
    base, checkpoint = made[0], tmp_path / "checkpoint"
    shutil.copytree(made[1], checkpoint)
    output = checkpoint / "eora"
    before = {path: path.read_bytes() for path in output.rglob("*") if path.is_file()}
    more = job(base, checkpoint, output, ("foreign",), budget="r2")
    with quiet():
        add_member(more)
        model = GPTQModel.load(str(checkpoint))
    changed = {path.name for path, content in before.items() if path.read_bytes() != content}
    assert changed == {ENSEMBLE_FILE, "router.safetensors"}
    assert ensemble_of(model).members == ("math", "code", "foreign")
    generated(model, prompts("foreign", "math"))
    assert ensemble_of(model).last.nearest == ("foreign", "math")
    with pytest.raises(AdapterError, match="there is a member 'foreign' already"):
        add_member(more)


def test_the_ensemble_of_another_checkpoint(made: tuple[Path, Path], tmp_path: Path, tokenizer: Any) -> None:
    _, other = tiny_checkpoint(tmp_path, tokenizer, seed=1)
    with quiet(), pytest.raises(AdapterError, match=r"member math .* was made for another checkpoint"):
        GPTQModel.load(str(other), adapter=EoRA(path=made[1] / "eora"))


def test_texts_that_are_too_short(made: tuple[Path, Path], tmp_path: Path) -> None:
    asked = job(*made, tmp_path / "out")
    asked.domains["math"] = [{"input_ids": [1, 2, 3], "attention_mask": [1] * 3}]
    with pytest.raises(AdapterError, match="the text of domain math has 3 tokens; at least 128"):
        make_ensemble(asked)
    assert not (tmp_path / "out").exists()


def test_commands(made: tuple[Path, Path], tmp_path: Path) -> None:
    runner = CliRunner()
    ensemble = str(made[1] / "eora")
    done = runner.invoke(cli.app, ["ensemble", "export", ensemble, str(tmp_path / "p"), "--member", "math"])
    assert done.exit_code == 0, done.output
    assert checkpoint_of(made[1] / "eora") == (made[1].resolve(), made[1] / "eora")
    refused = {
        ("export", str(made[1] / "eora"), str(tmp_path / "q"), "--member", "law"): "no member 'law'",
        ("make", str(made[0]), str(made[1]), str(tmp_path / "o"), "--shared", "x.txt"): "no domain is named",
        ("make", str(made[0]), str(made[1]), str(tmp_path / "o"), "--shared", "x.txt", "--domain", "a=x", "--domain",
         "A=y"): "there is a member 'a' already",
        ("make", str(made[0]), str(made[1]), str(tmp_path / "o"), "--shared", "x", "--domain", "math"): "name=value",
        ("route", str(tmp_path), "text"): "is no ensemble",
    }  # fmt: skip
    for arguments, message in refused.items():
        done = runner.invoke(cli.app, ["ensemble", *arguments])
        assert done.exit_code == 2 and message in " ".join(done.output.split()), done.output


def test_help() -> None:
    for command in ("make", "add", "route", "eval", "export"):
        done = CliRunner().invoke(cli.app, ["ensemble", command, "--help"])
        assert done.exit_code == 0 and f"eora ensemble {command}" in " ".join(done.output.split())
    assert "eora chat" in CliRunner().invoke(cli.app, ["chat", "--help"]).output


def test_the_file_says_what_it_is(made: tuple[Path, Path]) -> None:
    content = json.loads((made[1] / "eora" / ENSEMBLE_FILE).read_text())
    assert list(content["members"]) == ["math", "code"] and content["router"]["classes"] == ["shared", "math", "code"]
    assert json.loads((made[1] / "quantize_config.json").read_text())["adapter"]["path"] == "eora"
