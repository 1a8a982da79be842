"""Commands that are killed, or run out of disk, and started again: they end with the bytes of a run never disturbed.

The long set (`make test-resume`) kills SmolLM2, cut to six layers, at twenty moments. By default a small random model
is killed once.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
from typer.testing import CliRunner

from gptqmodel_eora_ext.cli import app
from gptqmodel_eora_ext.system.kept import resume_folder

pytestmark = pytest.mark.e2e

SEED = 20
KILLS_EACH = 5
LAYERS = 6
RESUME = 75
ADAPTERS = {"rank": ["--rank", "16"], "budget": ["--budget", "0.5bpw", "--factor-bits", "4"]}
QUANTIZERS = {"gptq": [], "autoround": ["--quantizer", "autoround", "--iters", "3"]}
# Earlier a process only imports its libraries.
EARLIEST = 0.15
# A run that ended before it was to be killed is killed at this share of that moment.
SOONER = 0.8
QUANTISING = "quantising layers"


@dataclass
class Ended:
    """How a command has ended."""

    status: int
    seconds: float
    events: list[dict[str, Any]]
    stderr: str

    @property
    def layers(self) -> list[int]:
        """Numbers of layers done, as they were told."""
        return [one["done"] for one in self.events if one["event"] == "progress" and one["what"] == QUANTISING]

    @property
    def error(self) -> str:
        return next(one["text"] for one in self.events if one["event"] == "error")


def command(
    home: Path, *arguments: str, kill_after: float | None = None, with_signal: signal.Signals = signal.SIGKILL,
    after_layers: int | None = None, **environment: str,
) -> Ended:  # fmt: skip
    """Run `eora` in a process of its own, whose caches lie in ``home``; end it by a signal after so many seconds, or
    once it has told of so many layers."""
    known = {**os.environ, "XDG_CACHE_HOME": str(home), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "2", **environment}
    begun = time.monotonic()
    process = subprocess.Popen(
        [sys.executable, "-m", "gptqmodel_eora_ext.cli", *arguments, "--log-json"],
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=known, start_new_session=True,
    )  # fmt: skip
    lines: list[str] = []
    assert process.stderr is not None
    clock = threading.Timer(kill_after if kill_after is not None else threading.TIMEOUT_MAX, process.send_signal,
                            [with_signal])  # fmt: skip
    clock.daemon = True
    clock.start()
    for line in process.stderr:
        lines.append(line)
        if after_layers is not None and f'"what": "{QUANTISING}", "done": {after_layers},' in line:
            process.send_signal(with_signal)
    status = process.wait()
    clock.cancel()
    events = [json.loads(line) for line in lines if line.startswith('{"time"')]
    return Ended(status, time.monotonic() - begun, events, "".join(lines))


def written(out: Path) -> dict[str, Any]:
    """What a checkpoint consists of, all that tells times or temporary folders left out."""
    files: dict[str, Any] = {
        str(path.relative_to(out)): path.read_bytes() for path in sorted(out.rglob("*.safetensors"))
    }
    details = json.loads((out / "eora" / "eora.json").read_text())
    return {**files, "details": {key: one for key, one in details.items() if key != "seconds"}}


def finished(out: Path) -> bool:
    """Whether a command has done all that it had to: it gives up what it keeps when nothing is left to do."""
    return out.exists() and not resume_folder(out).exists()


def save(model: Any, folder: Path, tokenizer: Any) -> Path:
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory, tokenizer: Any) -> Path:
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer), hidden_size=64, intermediate_size=128, num_hidden_layers=3,
            num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=True,
        )
    )  # fmt: skip
    return save(model.to(torch.bfloat16), tmp_path_factory.mktemp("tiny"), tokenizer)


@pytest.fixture(scope="module")
def six_layers(smollm2: Path, tmp_path_factory: pytest.TempPathFactory, tokenizer: Any) -> Path:
    model = AutoModelForCausalLM.from_pretrained(smollm2, dtype="auto")
    model.model.layers = model.model.layers[:LAYERS]
    model.config.num_hidden_layers = LAYERS
    model.config.layer_types = None
    return save(model, tmp_path_factory.mktemp("six-layers"), tokenizer)


@pytest.fixture(scope="module")
def text() -> str:
    from gptqmodel_eora_ext.evaluate.demo import demo_text

    return str(demo_text("calibration"))


def quantising(model: Path, out: Path, text: str, *more: str) -> list[str]:
    return ["quantize", str(model), str(out), "--bits", "2", "--group-size", "32", "--calibration", text,
            "--samples", "8", "--seqlen", "64", *more]  # fmt: skip


def test_killed_and_started_again(
    tiny: Path, text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Killed in a process of its own; gone on with, and compared with a run never disturbed, in this one."""
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    options = ADAPTERS["rank"]
    first = command(tmp_path / "home", *quantising(tiny, killed, text, *options), after_layers=2)
    assert first.status == -signal.SIGKILL and not killed.exists() and resume_folder(killed).is_dir()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    for out, begins_at in ((killed, 1), (whole, 0)):
        capfd.readouterr()
        result = CliRunner().invoke(app, [*quantising(tiny, out, text, *options), "--log-json"])
        assert result.exit_code == 0, result.output
        told = [json.loads(line) for line in capfd.readouterr().err.splitlines() if line.startswith('{"time"')]
        assert next(one["done"] for one in told if one["what"] == QUANTISING) >= begins_at
    assert written(killed) == written(whole)
    assert not resume_folder(killed).exists()


@pytest.mark.resume
@pytest.mark.parametrize("adapter", ADAPTERS)
@pytest.mark.parametrize("quantizer", QUANTIZERS)
def test_killed_at_random_moments(
    quantizer: str, adapter: str, six_layers: Path, text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Five moments each, twenty in all: the same bytes, and at most one layer done twice."""
    options = [*ADAPTERS[adapter], *QUANTIZERS[quantizer]]
    whole = tmp_path / "whole"
    undisturbed = command(tmp_path / "home", *quantising(six_layers, whole, text, *options))
    assert undisturbed.status == 0, undisturbed.stderr
    expected = written(whole)
    # Of a string, so that it is the same in every process.
    moments = random.Random(f"{SEED} {quantizer} {adapter}")
    for number in range(KILLS_EACH):
        out, home = tmp_path / f"out-{number}", tmp_path / f"home-{number}"
        arguments = quantising(six_layers, out, text, *options)
        after = undisturbed.seconds * moments.uniform(EARLIEST, 1.0)
        while (killed := command(home, *arguments, kill_after=after)).status == 0 or finished(out):
            # The machine was less busy than before, and the run has ended first; or was leaving, with all done.
            assert written(out) == expected
            shutil.rmtree(out)
            after *= SOONER
        assert killed.status == -signal.SIGKILL, killed.stderr
        resumed = command(home, *arguments)
        with capsys.disabled():
            print(f"\n{quantizer}, {adapter}: killed after {after:.1f} of {undisturbed.seconds:.1f} s, "
                  f"at layers {killed.layers[-1:]}, resumed at {resumed.layers[:1]}")  # fmt: skip
        assert resumed.status == 0, resumed.stderr
        assert written(out) == expected
        assert not resume_folder(out).exists()
        if killed.layers and resumed.layers:
            # The first that is told of is done; the last that was may not have been kept yet.
            assert resumed.layers[0] >= killed.layers[-1]


@pytest.mark.resume
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_asked_to_stop(number: signal.Signals, tiny: Path, text: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    arguments = quantising(tiny, out, text, *ADAPTERS["rank"])
    stopped = command(tmp_path / "home", *arguments, after_layers=1, with_signal=number)
    assert stopped.status == RESUME and "the same call goes on" in stopped.error
    assert next(one for one in stopped.events if one["event"] == "error")["resume"] is True
    resumed = command(tmp_path / "home", *arguments)
    assert resumed.status == 0 and resumed.layers[0] >= 1


@pytest.mark.resume
def test_another_request_is_refused_and_may_begin_anew(tiny: Path, text: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    command(tmp_path / "home", *quantising(tiny, out, text, "--rank", "8"), after_layers=1)
    other = quantising(tiny, out, text, "--rank", "4")
    refused = command(tmp_path / "home", *other)
    assert refused.status == 2 and "adapter.rank: 8 then, 4 now" in refused.error and "--restart" in refused.error
    data = command(tmp_path / "home", *quantising(tiny, out, text, "--rank", "8"), "--seqlen", "48")
    assert data.status == 2 and "calibration.sha256" in data.error
    anew = command(tmp_path / "home", *other, "--restart")
    assert anew.status == 0 and json.loads((out / "eora" / "adapter_config.json").read_text())["r"] == 4


@contextlib.contextmanager
def small_disk(folder: Path, size: int) -> Iterator[None]:
    """A tmpfs of so many bytes; skipped where this process may not mount one."""
    folder.mkdir()
    made = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "none", str(folder)], capture_output=True)
    if made.returncode:
        pytest.skip("no tmpfs can be mounted here")
    try:
        yield
    finally:
        subprocess.run(["umount", str(folder)], check=True)


@pytest.mark.resume
@pytest.mark.parametrize("kibibytes", [4, 40, 110, 180, 2000, 7000])
def test_a_full_disk(kibibytes: int, tiny: Path, text: str, tmp_path: Path) -> None:
    """The disk is full at the first write, while layers are kept, or while the checkpoint is written."""
    whole, disk = tmp_path / "whole", tmp_path / "disk"
    options = ADAPTERS["rank"]
    assert command(tmp_path / "home", *quantising(tiny, whole, text, *options)).status == 0
    with small_disk(disk, kibibytes << 10):
        arguments = quantising(tiny, disk / "out", text, *options)
        full = command(tmp_path / "home", *arguments)
        assert full.status == RESUME, full.stderr
        assert "the same c" in full.error and "Free some space" in full.error and str(disk) in full.error
        subprocess.run(["mount", "-o", "remount,size=100m", str(disk)], check=True)
        resumed = command(tmp_path / "home", *arguments)
        assert resumed.status == 0, resumed.stderr
        assert written(disk / "out") == written(whole)
