"""`eora ensemble` and `eora chat` as commands, on a tiny model: tokens are bytes, domains are alphabets."""

from __future__ import annotations

import copy
import json
import pickle
import random
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from gptqmodel import GPTQModel, QuantizeConfig
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from typer.testing import CliRunner, Result

from gptqmodel_eora_ext import AdapterError, EoRA, cli, ensemble_of
from gptqmodel_eora_ext.evaluate.ensemble import NONE, ROUTED, SHARED_ALONE, TOLD
from gptqmodel_eora_ext.hosts.terminal import quiet

from .ensembles import tiny_checkpoint

ALPHABETS = {"shared": "abcdefghijklm", "math": "0123456789+=", "code": "(){}[]<>_.:;", "law": "NOPQRSTUVWXYZ"}
CHARACTERS, SEQLEN = 16000, 64
MAKING = ("--samples", "32", "--seqlen", str(SEQLEN), "--batch-size", "4", "--sensitivity", "uniform")


def text(kind: str, characters: int, seed: int = 0) -> str:
    return "".join(random.Random(f"{kind} {seed}").choices(ALPHABETS[kind], k=characters))


def bytes_tokenizer() -> PreTrainedTokenizerFast:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    made = Tokenizer(models.BPE(vocab={one: index for index, one in enumerate([*alphabet, "<end>"])}, merges=[]))
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=made, eos_token="<end>", pad_token="<end>")


def eora(*arguments: object, **more: Any) -> Result:
    return CliRunner().invoke(cli.app, [str(one) for one in arguments], **more)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with base, checkpoint, its ensemble (made by the command), controls, and a file of each kind of text."""
    place = tmp_path_factory.mktemp("commands")
    base, checkpoint = tiny_checkpoint(place, bytes_tokenizer())
    for kind in ALPHABETS:
        (place / f"{kind}.txt").write_text(text(kind, CHARACTERS))
        (place / f"{kind}-test.txt").write_text(text(kind, CHARACTERS, seed=1))
    (place / "three.txt").write_text("abc")
    done = eora("ensemble", "make", base, checkpoint, checkpoint / "eora", "--shared", place / "shared.txt",
                "--domain", f"math={place / 'math.txt'}", "--domain", f"code={place / 'code.txt'}", "--budget", "r12",
                "--controls", place / "controls", *MAKING)  # fmt: skip
    assert done.exit_code == 0, done.output
    assert all(name in done.output for name in ("shared", "math", "code"))
    return place


@pytest.fixture(scope="module")
def model(place: Path) -> Any:
    """The checkpoint, loaded by its ensemble's folder."""
    with quiet():
        return GPTQModel.load(str(place / "checkpoint" / "eora"))


def test_route(place: Path) -> None:
    prompts = [text("math", 40, 7), text("code", 40, 7), text("shared", 40, 7), "hi"]
    for path in (place / "checkpoint", place / "checkpoint" / "eora"):
        done = eora("ensemble", "route", path, *prompts, "--json")
        assert done.exit_code == 0, done.output
        routes = json.loads(done.stdout)["routes"]
        assert [one["nearest"] for one in routes] == ["math", "code", "shared", ""]
        assert routes[0]["weights"]["math"] > 0.5 and routes[1]["weights"]["code"] > 0.5 and routes[3]["fallen_back"]
    shown = eora("ensemble", "route", place / "checkpoint", *prompts, env={"COLUMNS": "160"})
    assert shown.exit_code == 0 and "too short" in shown.output and "shared alone" in shown.output


def test_eval(place: Path) -> None:
    asked = ("ensemble", "eval", place / "checkpoint", "--domain", f"math={place / 'math-test.txt'}", "--control",
             f"total={place / 'controls' / 'total'}", "--window", 64, "--prompt", 32, "--max-windows", 2)  # fmt: skip
    found = json.loads(eora(*asked, "--json").stdout)
    assert list(found["losses"]) == [NONE, SHARED_ALONE, ROUTED, TOLD, "total"]
    assert found["routed_to"] == {"math": {"math": 1.0}} and found["windows"] == {"math": 2}
    # The router gives almost all weight to the member that is told.
    assert found["losses"][ROUTED]["math"] == pytest.approx(found["losses"][TOLD]["math"], rel=1e-3)
    shown = eora(*asked)
    assert shown.exit_code == 0 and "math: 100% nearest to math; 0% fell back, of 2 windows" in shown.output


def test_a_chat_whose_prompts_become_a_domain(place: Path, tmp_path: Path) -> None:
    said = [text("law", 1000, seed) for seed in (3, 4)]
    log = tmp_path / "prompts.jsonl"
    for one in said:
        done = eora("chat", place / "checkpoint", "--max-new-tokens", 2, "--prompts", log, input=f"{one}\n\n")
        assert done.exit_code == 0 and "weights: shared alone" in done.output, done.output
    logged = [json.loads(line) for line in log.read_text().splitlines()]
    assert [one in row["text"] for one, row in zip(said, logged, strict=True)] == [True, True]
    assert all(row["nearest"] and row["fallen_back"] for row in logged)
    checkpoint = tmp_path / "checkpoint"
    shutil.copytree(place / "checkpoint", checkpoint)
    add = ("ensemble", "add", place / "base", checkpoint, checkpoint / "eora", "--budget", "r2", *MAKING)
    done = eora(*add, "--domain", f"law={log}")
    assert done.exit_code == 0 and "law" in done.output, done.output
    routed = json.loads(eora("ensemble", "route", checkpoint, text("law", 40, 7), "--json").stdout)["routes"][0]
    assert routed["nearest"] == "law" and routed["weights"]["law"] > 0.5


def test_mistakes_are_one_line(place: Path, tmp_path: Path) -> None:
    base, checkpoint, ensemble = place / "base", place / "checkpoint", place / "checkpoint" / "eora"
    law = f"law={place / 'law.txt'}"
    math, three = f"math={place / 'math.txt'}", f"math={place / 'three.txt'}"
    make = ("ensemble", "make", base, checkpoint, tmp_path / "o", "--shared", place / "shared.txt", *MAKING)
    elsewhere = tmp_path / "elsewhere"
    shutil.copytree(ensemble, elsewhere / "eora")
    settings = elsewhere / "eora" / "adapter_config.json"
    settings.write_text(settings.read_text().replace(str(checkpoint), str(elsewhere / "nowhere")))
    refused: list[tuple[tuple[object, ...], str]] = [
        ((*make, "--domain", three), "math: Calibration: 3 tokens do not fill one window of 64"),
        ((*make, "--domain", math, "--domain", f"MATH={place / 'law.txt'}"), "there is a member 'math' already"),
        ((*make, "--domain", math, "--shared-part", 1.5), "--shared-part must be between 0 and 1, got 1.5"),
        ((*make, "--domain", math, "--depth", 9), "the router looks behind layer 9, and the model has 4"),
        (("ensemble", "add", base, checkpoint, ensemble, "--domain", math), "there is a member 'math' already"),
        (("ensemble", "add", base, checkpoint, ensemble, "--domain", law, *MAKING, "--seqlen", 16),
         "windows of law have 16 tokens; this router needs 64"),
        (("ensemble", "route", elsewhere / "eora", "text"), "was made for is not in"),
        (("ensemble", "route", base, "text"), "names no ensemble"),
        (("ensemble", "eval", checkpoint, "--domain", three), "3 tokens"),
        (("ensemble", "eval", checkpoint, "--domain", math, "--control", "a=nowhere"), "nowhere"),
        (("ensemble", "eval", checkpoint, "--domain", math, "--prompt", 600), "the prompt has 600 tokens"),
        (("ensemble", "export", ensemble, ensemble, "--force"), "which is read from and must stay as it is"),
        (("chat", place / "controls" / "total"), "is no ensemble"),
        (("chat", checkpoint, "--prompts", tmp_path / "no" / "x.jsonl"), "there is no folder"),
    ]  # fmt: skip
    for arguments, message in refused:
        done = eora(*arguments)
        lines = [line for line in done.output.splitlines() if line.startswith("error:")]
        assert done.exit_code == 2 and len(lines) == 1 and message in lines[0], (arguments, done.output)
    assert not (tmp_path / "o").exists() and not (ensemble / "members" / "law").exists()


def test_an_ensembles_folder_is_loaded(model: Any, place: Path, tmp_path: Path) -> None:
    assert ensemble_of(model).members == ("math", "code")
    ensemble = str(place / "checkpoint" / "eora")
    with pytest.raises(ValueError, match="names another adapter"):
        GPTQModel.load(ensemble, adapter=EoRA(path=place / "controls" / "total"))
    with pytest.raises(ValueError, match="is not quantised again"):
        GPTQModel.load(ensemble, QuantizeConfig(bits=4))
    # In the folder of another model it is known by its fingerprint, and its checkpoint by its adapter_config.json.
    other = tmp_path / "base"
    shutil.copytree(place / "base", other)
    shutil.copytree(ensemble, other / "eora")
    with quiet():
        loaded = GPTQModel.load(str(other / "eora"))
    assert loaded.model_local_path == str(place / "checkpoint")
    shutil.rmtree(other / "eora" / "members" / "math")
    with pytest.raises(AdapterError, match="math"):
        GPTQModel.load(str(other / "eora"))


def test_copies_route_by_themselves(model: Any) -> None:
    ids = bytes_tokenizer()([text("math", 40, 8), text("code", 40, 8)], return_tensors="pt").input_ids
    original = ensemble_of(model)
    seen: list[Any] = []
    original.observers.append(lambda routing, ids: seen.append(routing))

    def logits(of: Any) -> torch.Tensor:
        with torch.inference_mode():
            found: torch.Tensor = of(input_ids=ids).logits
        return found

    expected = logits(model.model)
    for other in (copy.deepcopy(model.model), pickle.loads(pickle.dumps(model.model))):
        ensemble = ensemble_of(other)
        assert ensemble is not original and ensemble.last is None and not ensemble.observers
        torch.testing.assert_close(logits(other), expected)
        assert ensemble.last is not None and ensemble.last.nearest == ("math", "code")
        assert ensemble.route(ids).nearest == ("math", "code")
        # Neither is weighed by what the other was told.
        with ensemble.told({}):
            assert not torch.equal(logits(other), expected)
            torch.testing.assert_close(logits(model.model), expected)
    assert len(seen) == 3
    original.observers.clear()


def test_a_moved_model_and_its_state(model: Any) -> None:
    ids = bytes_tokenizer()([text("math", 40, 8)], return_tensors="pt").input_ids
    with torch.inference_mode():
        before = model.model(input_ids=ids).logits
        state = model.model.state_dict()
        # As with one adapter, factors are no parameters of the model.
        assert not any("lora" in name or "eora" in name for name in state)
        model.model.load_state_dict(state)
        torch.testing.assert_close(model.model.to("cpu")(input_ids=ids).logits, before)
        dtype = next(iter(state.values())).dtype
        cast = model.model.to(torch.float32)(input_ids=ids).logits
    assert float((cast - before.float()).abs().max()) < 0.05 * float(cast.abs().max())
    last = ensemble_of(model).last
    assert last is not None and last.nearest == ("math",)
    model.model.to(dtype)
