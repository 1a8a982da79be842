"""A refinement from beginning to end on a small model."""

from __future__ import annotations

import dataclasses
import signal
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from gptqmodel_eora_ext.adapter.errors import AdapterError
from gptqmodel_eora_ext.adapter.folder import AdapterFolder
from gptqmodel_eora_ext.adapter.naming import read_entry
from gptqmodel_eora_ext.adapter.settings import MODULES_BEFORE
from gptqmodel_eora_ext.adapter.summary import summarize
from gptqmodel_eora_ext.formats.names import ADAPTER_WEIGHTS
from gptqmodel_eora_ext.refine import CHOICES, COMPLETE, INTERRUPTED, RefineJob, RefineSettings, Trainee, refine_adapter
from gptqmodel_eora_ext.refine import evaluation as evaluation_module
from gptqmodel_eora_ext.refine import shared as shared_module
from gptqmodel_eora_ext.refine import training as training_module
from gptqmodel_eora_ext.refine.natural import STEPS
from gptqmodel_eora_ext.refine.outcome import DIVERGENCE, NOT_FINITE
from gptqmodel_eora_ext.refine.settings import NATURAL, parse_tokens
from gptqmodel_eora_ext.refine.shared import Dealt, dealt
from gptqmodel_eora_ext.system.files import unfinished_folder
from gptqmodel_eora_ext.system.kept import ResumeError

from .conftest import WINDOWS, linears, small_model


@pytest.fixture(autouse=True)
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have nothing but what a test is about end a run."""
    monkeypatch.setattr(training_module, "PATIENCE", 100)


def with_rate(job: RefineJob, rate: float) -> RefineJob:
    return dataclasses.replace(job, settings=dataclasses.replace(job.settings, learning_rate=rate))


@pytest.mark.parametrize("loss", CHOICES)
def test_refining_lowers_the_loss_and_tells_of_it(
    loss: str, trainee: Trainee, checkpoint: Path, source: AdapterFolder, job: RefineJob
) -> None:
    output = checkpoint / "refined"
    settings = dataclasses.replace(job.settings, loss=loss)
    if loss == NATURAL:
        settings = dataclasses.replace(settings, learning_rate=None)
    outcome = refine_adapter(trainee, checkpoint, source, output, dataclasses.replace(job, settings=settings))
    assert outcome.after < (0.995 if loss == "rilq" else 0.95) * outcome.before
    assert outcome.ended == COMPLETE
    assert outcome.steps == (len(STEPS) if loss == NATURAL else WINDOWS - WINDOWS // 5)
    entry = read_entry(checkpoint)
    assert entry is not None and entry.path == "refined"
    summary = summarize(checkpoint)
    refinement = summary.details["refinement"]
    assert [refinement[name] for name in ("loss", "before", "after")] == [loss, outcome.before, outcome.after]
    # Nothing is larger than it was, and errors of single modules are no measure any more.
    assert summary.bytes == summarize(source.path).bytes and not summary.modules
    assert set(summary.details[MODULES_BEFORE]) == set(summary.ranks)
    assert not unfinished_folder(output).exists()


def test_what_is_written_has_the_loss_that_is_told(
    trainee: Trainee, checkpoint: Path, source: AdapterFolder, job: RefineJob, ids: torch.Tensor
) -> None:
    """Divergence of the written adapter on all windows, by dense weights, beside that of the one before."""
    outcome = refine_adapter(trainee, checkpoint, source, checkpoint / "refined", job)
    wanted = small_model()(ids).logits.log_softmax(-1)

    def divergence(folder: AdapterFolder) -> torch.Tensor:
        model = small_model()
        for name, factors in folder.factors(list(folder.keys)):
            update = factors.lora_B @ factors.lora_A
            linears(model)[name].weight.data = trainee.weights[name].dense(torch.float32).T + update
        with torch.no_grad():
            found = model(ids).logits.log_softmax(-1)
        return (wanted.exp() * (wanted - found)).sum(-1).mean(-1).detach()

    order = torch.randperm(len(ids), generator=torch.Generator().manual_seed(0))[: WINDOWS // 5]
    assert float(divergence(source)[order].mean()) == pytest.approx(outcome.before, rel=1e-3)
    refined = AdapterFolder.open(checkpoint / "refined")
    assert float(divergence(refined)[order].mean()) == pytest.approx(outcome.after, rel=1e-3)


def written(folder: Path) -> dict[str, list[int]]:
    return {name: one.flatten().tolist() for name, one in load_file(folder / ADAPTER_WEIGHTS).items()}


def test_a_rate_that_ruins_it_ends_and_leaves_the_start(
    trainee: Trainee, checkpoint: Path, source: AdapterFolder, job: RefineJob
) -> None:
    outcome = refine_adapter(trainee, checkpoint, source, checkpoint / "refined", with_rate(job, 1e3))
    assert outcome.ended in (DIVERGENCE, NOT_FINITE) and outcome.steps < outcome.planned
    assert outcome.best is None and outcome.after == outcome.before
    assert written(checkpoint / "refined") == written(source.path)


def test_a_loss_that_is_no_number_ends_with_the_best_so_far(
    trainee: Trainee, checkpoint: Path, source: AdapterFolder, job: RefineJob, monkeypatch: pytest.MonkeyPatch
) -> None:
    usual = evaluation_module.window_loss

    def broken(*args: object, with_gradient: bool) -> tuple[float, torch.Tensor | None]:
        value, gradient = usual(*args, with_gradient=with_gradient)  # type: ignore[arg-type]
        steps.append(with_gradient)
        return (float("nan") if sum(steps) > 9 else value), gradient

    steps: list[bool] = []
    monkeypatch.setattr(evaluation_module, "window_loss", broken)
    outcome = refine_adapter(trainee, checkpoint, source, checkpoint / "refined", job)
    assert outcome.ended == NOT_FINITE and outcome.steps == 9 and 0 < outcome.best_step <= 9
    assert outcome.after < outcome.before


def test_interrupted_and_gone_on_with_ends_the_same(
    trainee: Trainee, checkpoint: Path, source: AdapterFolder, job: RefineJob
) -> None:
    whole = refine_adapter(trainee, checkpoint, source, checkpoint / "whole", job)

    def press(done: int, total: int, note: str) -> None:
        if done == 7:
            signal.raise_signal(signal.SIGINT)

    output = checkpoint / "parts"
    stopped = dataclasses.replace(job, training=press)
    first = refine_adapter(trainee, checkpoint, source, output, stopped)
    assert first.ended == INTERRUPTED and first.steps == 7
    assert first.after < first.before and written(output) != written(source.path)
    assert summarize(output).details["refinement"]["ended"] == INTERRUPTED
    taught: list[int] = []
    second = refine_adapter(
        trainee, checkpoint, source, output,
        dataclasses.replace(job, teaching=lambda done, total: taught.append(done)),
    )  # fmt: skip
    assert second.ended == COMPLETE and not taught  # the full-precision model was not run again
    assert second.validations == whole.validations and written(output) == written(checkpoint / "whole")


@pytest.mark.parametrize(("spacing", "first"), [(1e9, 7), (0, 8)])
def test_a_killed_run_goes_on_from_the_last_step_that_was_kept(
    spacing: float, first: int, trainee: Trainee, checkpoint: Path, source: AdapterFolder, job: RefineJob,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Each validation is kept, and steps as often as they cost little."""
    monkeypatch.setattr(training_module, "SPACING", spacing)

    def die(done: int, total: int, note: str) -> None:
        if done == 7:
            raise MemoryError

    refine_adapter(trainee, checkpoint, source, checkpoint / "whole", job)
    output = checkpoint / "parts"
    with pytest.raises(MemoryError):
        refine_adapter(trainee, checkpoint, source, output, dataclasses.replace(job, training=die))
    assert not output.exists()
    steps: list[int] = []
    watched = dataclasses.replace(job, training=lambda done, total, note: steps.append(done))
    outcome = refine_adapter(trainee, checkpoint, source, output, watched)
    assert steps[0] == first and written(output) == written(checkpoint / "whole")
    assert [step for step, _ in outcome.validations] == [0, 3, 6, 9, 12, 16]


def test_what_another_run_has_left_is_refused(
    trainee: Trainee, checkpoint: Path, source: AdapterFolder, job: RefineJob
) -> None:
    output = checkpoint / "parts"
    stop = dataclasses.replace(job, training=lambda *_: signal.raise_signal(signal.SIGINT))
    assert refine_adapter(trainee, checkpoint, source, output, stop).steps == 1
    other = with_rate(job, 0.002)
    with pytest.raises(ResumeError, match=r"learning_rate: [0-9.]+ then, 0\.002 now.*--restart"):
        refine_adapter(trainee, checkpoint, source, output, other)
    again = refine_adapter(trainee, checkpoint, source, output, dataclasses.replace(other, restart=True))
    assert again.ended == COMPLETE and len(again.validations) == 1 + 5


def test_further_passes_use_each_window_again_in_another_order(
    trainee: Trainee, checkpoint: Path, source: AdapterFolder, job: RefineJob
) -> None:
    once, twice = dealt(WINDOWS, seed=3), dealt(WINDOWS, seed=3, passes=2)
    count = len(once.training)
    assert twice.training[:count] == once.training != twice.training[count:]
    assert sorted(twice.training[count:]) == sorted(once.training)  # type: ignore[type-var]
    assert (twice.validating, twice.taught) == (once.validating, once.taught)
    single = refine_adapter(trainee, checkpoint, source, checkpoint / "single", job)
    asked = dataclasses.replace(job, settings=dataclasses.replace(job.settings, passes=2))
    double = refine_adapter(trainee, checkpoint, source, checkpoint / "double", asked)
    assert double.steps == 2 * single.steps and double.ended == COMPLETE
    assert double.after < single.after
    assert summarize(checkpoint / "double").details["refinement"]["passes"] == 2


@pytest.mark.parametrize("size", [2, 3])
def test_processes_keep_their_windows_in_further_passes(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """So that each needs no more of the full-precision model, and every step has a window in some process."""

    def of(rank: int, passes: int) -> Dealt:
        monkeypatch.setattr(shared_module, "current", lambda: SimpleNamespace(size=size, rank=rank))
        return dealt(WINDOWS, seed=3, passes=passes)

    once, thrice = ([of(rank, passes) for rank in range(size)] for passes in (1, 3))
    assert [one.taught for one in thrice] == [one.taught for one in once]
    steps = list(zip(*(one.training for one in thrice), strict=True))
    used = [window for step in steps for window in step if window is not None]
    assert sorted(used) == sorted(3 * sorted(dealt_alone(monkeypatch)))
    assert all(any(window is not None for window in step) for step in steps)


def dealt_alone(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    monkeypatch.setattr(shared_module, "current", lambda: None)
    return [window for window in dealt(WINDOWS, seed=3).training if window is not None]


def test_another_base_is_refused(
    trainee: Trainee, checkpoint: Path, source: AdapterFolder, job: RefineJob, tmp_path: Path
) -> None:
    other = small_model()
    other.get_output_embeddings().weight.data.mul_(1.2)
    other.save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match="output matrix"):
        refine_adapter(trainee, checkpoint, source, checkpoint / "refined",
                       dataclasses.replace(job, base=str(tmp_path / "other")))  # fmt: skip


def test_wrong_requests_are_refused_before_any_work(
    trainee: Trainee, checkpoint: Path, source: AdapterFolder, job: RefineJob
) -> None:
    with pytest.raises(ValueError, match="Name another folder"):
        refine_adapter(trainee, checkpoint, source, source.path, job)
    with pytest.raises(ValueError, match="token id 196"):
        refine_adapter(trainee, checkpoint, source, checkpoint / "x", dataclasses.replace(job, ids=job.ids + 100))
    trainee.weights["model.layers.0.mlp.up_proj"].weight = torch.zeros(96, 60)  # type: ignore[attr-defined]
    with pytest.raises(AdapterError, match="96 × 64"):
        refine_adapter(trainee, checkpoint, source, checkpoint / "x", job)


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"loss": "mse"}, "kl, rilq"),
        ({"tokens": "many"}, "160k"),
        ({"tokens": 2000}, "2560 or more"),
        ({"learning_rate": 0}, "above 0"),
        ({"seed": -1}, "at least 0"),
        ({"window": 1.5}, "integer"),
        ({"passes": 0}, "at least 1"),
        ({"passes": 2, "loss": "natural"}, "one step"),
    ],
)
def test_settings_out_of_range_are_named(asked: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        RefineSettings.settle(**asked)  # type: ignore[arg-type]
    assert next(iter(asked)) in str(caught.value)


def test_tokens_are_read_as_people_write_them() -> None:
    assert [parse_tokens(one, what="tokens") for one in (160_000, "160000", "160k", "1.5M")] == [
        160_000, 160_000, 160_000, 1_500_000
    ]  # fmt: skip
