"""Runs shared between processes give the bits of a run of one process; what cannot be shared is refused."""

from __future__ import annotations

import json
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors import safe_open
from typer.testing import CliRunner

from gptqmodel_eora_ext.cli import app
from gptqmodel_eora_ext.cli.printing import RESUME
from gptqmodel_eora_ext.evaluate.demo import demo_text
from gptqmodel_eora_ext.system.kept import resume_folder
from gptqmodel_eora_ext.system.peers import LOST_STATUS

from ..processes import Ended, run, start, wait

pytestmark = pytest.mark.e2e

EORA = ["-m", "gptqmodel_eora_ext.cli"]
SHORT = ["--calibration", str(demo_text("calibration")), "--samples", "6", "--seqlen", "64"]
# As each of several has: the number of threads changes bits on some processors.
ONE_THREAD = {"OMP_NUM_THREADS": "1"}


def random_model(folder: Path, tokenizer: Any, kind: str = "Llama", **more: Any) -> Path:
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(
        vocab_size=len(tokenizer), hidden_size=128, intermediate_size=256, num_attention_heads=4, num_key_value_heads=2,
        head_dim=32, tie_word_embeddings=True, initializer_range=0.1, **{"num_hidden_layers": 2, **more},
    )  # fmt: skip
    getattr(transformers, f"{kind}ForCausalLM")(config).to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory, tokenizer: Any) -> Path:
    return random_model(tmp_path_factory.mktemp("tiny"), tokenizer)


def done(command: list[str], size: int, env: dict[str, str] | None = None) -> list[Ended]:
    ended = run([*EORA, *command], size, env)
    assert [one.status for one in ended] == [0] * size, "\n".join(one.output for one in ended)
    return ended


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    found = {}
    for path in sorted(folder.rglob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            found |= {f"{path.parent.relative_to(folder)}/{key}": file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    return found


def assert_same(one: Path, several: Path) -> None:
    """Weights, scales and factors bit for bit, and what is told of each module."""
    expected, found = tensors(one), tensors(several)
    assert expected.keys() == found.keys() and expected
    for name, tensor in expected.items():
        assert torch.equal(tensor, found[name]), name
    told, again = (json.loads(next(folder.rglob("eora.json")).read_text()) for folder in (one, several))
    assert told["modules"] == again["modules"]
    assert told["calibration"] == again["calibration"]
    assert told.get("allocation") == again.get("allocation")


def test_two_processes_write_what_one_process_of_two_threads_writes(tiny: Path, tmp_path: Path) -> None:
    command = ["quantize", str(tiny), "--bits", "2", "--group-size", "32", "--rank", "8", *SHORT]
    # In the process of the tests, which has imported GPTQModel already.
    alone = CliRunner().invoke(app, [*command, str(tmp_path / "one")])
    assert alone.exit_code == 0, alone.output
    first, second = done([*command, str(tmp_path / "two")], 2)
    assert_same(tmp_path / "one", tmp_path / "two")
    # Rank 0 tells of the run, the other nothing.
    assert "rank 8" in first.output and "rank 8" not in second.output
    assert not resume_folder(tmp_path / "two").exists()


def interrupted(command: list[str], number: signal.Signals, cache: Path) -> list[Ended]:
    """Run a command in two processes; the second gets a signal once two layers of three are quantised."""
    first, second = start([*EORA, *command, "--log-json"], 2, {"XDG_CACHE_HOME": str(cache)})
    assert first.stdout is not None
    told = ""
    for line in first.stdout:
        told += line
        if 'layers", "done": 2,' in line:
            second.send_signal(number)
    ended = wait([first, second])
    return [Ended(ended[0].status, told), ended[1]]


def layers(ended: Ended) -> list[int]:
    """Numbers of layers done, as they were told."""
    lines = [json.loads(line) for line in ended.output.splitlines() if line.startswith('{"time"')]
    return [one["done"] for one in lines if one["event"] == "progress" and one["what"].endswith(" layers")]


@pytest.mark.distributed
@pytest.mark.parametrize("asked", [["--rank", "8"], ["--budget", "0.5bpw", "--factor-bits", "4"]],
                         ids=["rank", "budget"])  # fmt: skip
def test_killed_and_gone_on_with_by_other_numbers_of_processes(
    asked: list[str], tokenizer: Any, tmp_path: Path
) -> None:
    """Two processes, one of them killed; then one, and three, end with the bytes of a run never disturbed."""
    model = random_model(tmp_path / "model", tokenizer, num_hidden_layers=3)

    def to(out: str) -> list[str]:
        return ["quantize", str(model), str(tmp_path / out), "--bits", "2", "--group-size", "32", *asked, *SHORT]

    done(to("whole"), 2, {"XDG_CACHE_HOME": str(tmp_path / "cache whole")})
    first, second = interrupted(to("1"), signal.SIGKILL, tmp_path / "cache")
    assert second.status == -signal.SIGKILL and first.status == LOST_STATUS, first.output
    assert "was killed or has crashed" in first.output and not (tmp_path / "1").exists()
    shutil.copytree(resume_folder(tmp_path / "1"), resume_folder(tmp_path / "3"))
    for size in (1, 3):
        resumed = done([*to(str(size)), "--log-json"], size, {"XDG_CACHE_HOME": str(tmp_path / f"cache {size}")})
        assert layers(resumed[0])[0] >= 1
        assert_same(tmp_path / "whole", tmp_path / str(size))
        assert not resume_folder(tmp_path / str(size)).exists()


@pytest.mark.distributed
def test_stopped_refused_and_gone_on_with(tokenizer: Any, tmp_path: Path) -> None:
    """An adapter for a finished checkpoint: asked of one process, both stop after a layer; what the folder is not for
    is refused in both."""
    model = random_model(tmp_path / "model", tokenizer, num_hidden_layers=3)
    base = str(tmp_path / "base")
    done(["quantize", str(model), base, "--bits", "2", "--group-size", "32", "--rank", "4", *SHORT], 1)

    def to(out: str, rank: int = 8) -> list[str]:
        return ["generate", str(model), base, "--rank", str(rank), "--out", str(tmp_path / out),
                *SHORT]  # fmt: skip

    done(to("whole"), 1)
    for one in interrupted(to("made"), signal.SIGTERM, tmp_path / "cache"):
        assert one.status == RESUME and "the same call goes on" in one.output, one.output
    refused = run([*EORA, *to("made", 4)], 2)
    assert [one.status for one in refused] == [2, 2]
    assert "adapter.rank: 8 then, 4 now" in refused[0].output and "--restart" in refused[0].output
    resumed = done([*to("made"), "--log-json"], 3)
    assert layers(resumed[0])[0] >= 2
    assert_same(tmp_path / "whole", tmp_path / "made")
    interrupted(to("anew"), signal.SIGKILL, tmp_path / "cache")
    done([*to("anew", 4), "--restart"], 2)
    assert json.loads((tmp_path / "anew" / "adapter_config.json").read_text())["r"] == 4


@pytest.mark.distributed
@pytest.mark.parametrize("asked", [["--rank", "16"], ["--preset", "balanced"], ["--rank", "8", "--rounds", "2"]])
def test_four_processes_on_two_layers_of_smollm2(asked: list[str], two_layers: Path, tmp_path: Path) -> None:
    command = ["quantize", str(two_layers), "--bits", "2", *asked, *SHORT]
    done([*command, str(tmp_path / "one")], 1, {**ONE_THREAD, "XDG_CACHE_HOME": str(tmp_path / "cache one")})
    done([*command, str(tmp_path / "four")], 4, {"XDG_CACHE_HOME": str(tmp_path / "cache four")})
    assert_same(tmp_path / "one", tmp_path / "four")


@pytest.mark.distributed
def test_experts_that_some_processes_have_no_tokens_for(tokenizer: Any, tmp_path: Path) -> None:
    model = random_model(tmp_path / "model", tokenizer, "Qwen3Moe", num_experts=8, num_experts_per_tok=1,
                         moe_intermediate_size=64, decoder_sparse_step=1)  # fmt: skip
    command = ["quantize", str(model), "--bits", "2", "--group-size", "32", "--rank", "4", *SHORT]
    # Of the few tokens of an expert products depend on the number of threads.
    done([*command, str(tmp_path / "one")], 1)
    done([*command, str(tmp_path / "three")], 3)
    assert_same(tmp_path / "one", tmp_path / "three")


@pytest.mark.distributed
def test_adapters_plans_and_refinement(tiny: Path, tmp_path: Path) -> None:
    done(["quantize", str(tiny), str(tmp_path / "base"), "--bits", "2", "--group-size", "32", "--rank", "4", *SHORT], 1)
    for size, name in ((1, "one"), (3, "three")):
        env = {"XDG_CACHE_HOME": str(tmp_path / f"cache {name}")}
        done(["generate", str(tiny), str(tmp_path / "base"), "--rank", "8", "--out", str(tmp_path / f"made-{name}"),
              *SHORT], size, env)  # fmt: skip
        done(["plan", str(tiny), "--total", "3.5bpw", "--group-size", "32", "--out", str(tmp_path / f"{name}.json"),
              *SHORT], size, env)  # fmt: skip
        done(["refine", str(tmp_path / "base"), "--base", str(tiny), "--calibration", str(demo_text("calibration")),
              "--tokens", "1k", "--window", "64", "--out", str(tmp_path / f"refined-{name}")], size, env)  # fmt: skip
    assert_same(tmp_path / "made-one", tmp_path / "made-three")
    assert (tmp_path / "one.json").read_text() == (tmp_path / "three.json").read_text()
    one, three = (
        json.loads((tmp_path / f"refined-{name}" / "eora.json").read_text())["refinement"] for name in ("one", "three")
    )
    # A step of three processes takes three windows, of which the last step may lack some.
    assert three["windows_a_step"] == 3 and "windows_a_step" not in one
    assert three["planned_steps"] == -(-one["planned_steps"] // 3)
    assert three["before"] == pytest.approx(one["before"], rel=1e-6)
    assert three["after"] < three["before"]


@pytest.mark.distributed
def test_what_cannot_be_shared_is_refused_before_work(tiny: Path, tmp_path: Path) -> None:
    # A recipe picks widths and groups itself.
    recipe = ["quantize", str(tiny), str(tmp_path / "out"), *SHORT]
    quantize = [*recipe, "--bits", "2", "--group-size", "32"]
    cases = [
        (["eval", str(tiny), "--text", "x.txt"], "error: `eora eval` runs in one process, and 2 were started."),
        ([*quantize, "--rank", "8", "--samples", "1"], "1 calibration batches cannot be shared out between 2"),
        ([*quantize, "--rank", "8", "--objective", "output"], 'objective "output" cannot be shared out'),
        ([*quantize, "--quantizer", "autoround", "--rank", "8"], "AutoRound's tuning, each step of which begins"),
        ([*recipe, "--total", "3bpw"], "a recipe (--total) cannot be shared out between processes"),
    ]  # fmt: skip
    for command, message in cases:
        first, second = run([*EORA, *command], 2)
        assert message in " ".join(first.output.split()), first.output
        assert first.status == 2 and second.status != 0
        assert not (tmp_path / "out").exists()


@pytest.mark.distributed
def test_nodes_with_different_data_are_refused(tiny: Path, tmp_path: Path) -> None:
    """Every rank's command is right by itself; the files of one name differ from node to node."""
    text = demo_text("calibration").read_text(encoding="utf-8")
    for rank in range(2):
        (tmp_path / str(rank)).mkdir()
        (tmp_path / str(rank) / "text.txt").write_text(text[5000 * rank :], encoding="utf-8")
    script = (
        "import os, runpy; os.chdir(os.environ['RANK']); "
        "runpy.run_module('gptqmodel_eora_ext.cli', run_name='__main__')"
    )
    command = ["quantize", str(tiny), "out", "--group-size", "32", "--rank", "8", "--calibration", "text.txt",
               "--samples", "6", "--seqlen", "64"]  # fmt: skip
    ended = run(["-c", script, *command], 2, folder=tmp_path)
    told = " ".join(ended[0].output.split())
    assert "differ in calibration data: rank 0 has '6 windows, sha256" in told and ", rank 1 (" in told
    assert ended[0].status == 2 and ended[1].status != 0
