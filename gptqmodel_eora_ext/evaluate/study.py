"""Quantise a model with AutoRound, make adapters for it in several sizes, evaluate each: one folder, step by step.

Every step leaves a file; started again with the same options, the study goes on after the last finished one, and
AutoRound after the last finished block.
"""

from __future__ import annotations

import contextlib
import gc
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..calibration import mixed_windows, read_texts
from ..system.files import write_json
from .size import weight_bytes

QUANTIZER = "autoround"
STATE = "study.json"
QUANTIZED = "quantised"
ADAPTERS = "adapters"
RESUME = ".autoround"
FULL_PRECISION = "full precision"
# Options that may be others when a study is started again: adapters, texts and tasks can be added, and neither a device
# nor the trust in a model's code makes another study of it.
EXTENSIBLE = ("ranks", "budgets", "texts", "lm_eval", "lm_eval_path", "device", "trust_remote_code")

Progress = Callable[[str], Callable[[int, int], None]]


@dataclass(frozen=True)
class StudyOptions:
    """What is studied.

    Attributes:
        model: full-precision model, a folder or a hub name.
        calibration: general text, as `read_texts` takes it.
        task: text of a task, which makes half of the calibration; None for general text alone.
        texts: held-out text files to evaluate on.
        lm_eval: tasks of lm-eval to score.
        lm_eval_path: folder with tasks of the user's own.
        limit: documents of a task, at most.
        ranks: of adapters, the same for every module.
        budgets: of adapters with a rank for each module.
        factor_bits: of all adapters.
        bits, group_size, sym, iters, format: AutoRound's.
        samples, seqlen, batch_size: calibration windows, tokens of each, windows per forward.
        window, max_windows: tokens of an evaluation window, and how many at most.
        device: "cpu", "cuda" or "cuda:0"; None for CUDA where there is one.
        trust_remote_code: whether code that comes with the model or its tokenizer may run.
    """

    model: str
    calibration: str
    task: str | None
    texts: tuple[str, ...]
    lm_eval: tuple[str, ...]
    lm_eval_path: str | None
    limit: int | None
    ranks: tuple[int, ...]
    budgets: tuple[str, ...]
    factor_bits: int
    bits: int
    group_size: int
    sym: bool
    iters: int
    format: str
    samples: int
    seqlen: int
    batch_size: int
    window: int
    max_windows: int | None
    device: str | None
    trust_remote_code: bool = False

    @property
    def adapters(self) -> dict[str, dict[str, Any]]:
        """Name of each adapter → what `EoRA` takes."""
        common = {"factor_bits": self.factor_bits}
        width = "" if self.factor_bits == 16 else f"-{self.factor_bits}bit"
        chosen: dict[str, dict[str, Any]] = {f"r{rank}{width}": {"rank": rank, **common} for rank in self.ranks}
        for budget in self.budgets:
            chosen[f"budget-{budget}{width}"] = {"rank": "auto", "budget": budget, **common}
        return chosen


class Study:
    """A study in a folder, which goes on where an earlier one with the same options has stopped.

    Args:
        folder: where the checkpoint, the adapters and the results go.
        options: what is studied.

    Raises:
        ValueError: when the folder holds a study with other options.

    Example:
        >>> study = Study(Path("study"), options)
        >>> study.run(lambda title: lambda done, total: print(title, done, total))
        >>> [(row["model"], row["scores"]) for row in study.results()]
    """

    def __init__(self, folder: Path, options: StudyOptions) -> None:
        self.folder = folder
        self.options = options
        self._path = folder / STATE
        given = json.loads(json.dumps(asdict(options)))
        self.state: dict[str, Any] = {"options": given, "steps": {}, "losses": {}, "scores": {}}
        if self._path.is_file():
            known = json.loads(self._path.read_text(encoding="utf-8"))
            for name, value in given.items():
                if name not in EXTENSIBLE and known["options"].get(name) != value:
                    raise ValueError(
                        f"Study: `{folder}` was begun with {name}={known['options'].get(name)!r}, now {value!r} is "
                        f"asked. Use another folder, or the options it was begun with."
                    )
            self.state |= {**known, "options": given}

    def run(self, progress: Progress) -> None:
        """Do the steps that are not done yet.

        Args:
            progress: makes, from a step's name, a function that is called with (done, total).
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        self._keep()
        self._quantize()
        for name, options in self.options.adapters.items():
            self._make_adapter(name, options, progress)
        for name in (FULL_PRECISION, QUANTIZED, *self.options.adapters):
            self._evaluate(name, progress)

    def _keep(self) -> None:
        write_json(self._path, self.state)

    def _done(self, step: str, **facts: Any) -> None:
        self.state["steps"][step] = facts
        self._keep()

    @property
    def checkpoint(self) -> Path:
        """The quantised model's folder, once it is there."""
        return self.folder / str(self.state["steps"][QUANTIZED]["folder"])

    # Steps -----------------------------------------------------------------------------------------------------

    def _quantize(self) -> None:
        if QUANTIZED in self.state["steps"]:
            return
        options = self.options
        from ..hosts.jobs import QuantizeJob
        from ..hosts.registry import quantizer

        start = time.perf_counter()
        job = QuantizeJob(
            model=options.model,
            output=self.folder / QUANTIZED,
            windows=self._windows(),
            settings={
                "bits": options.bits, "group_size": options.group_size, "sym": options.sym, "iters": options.iters,
                "format": options.format,
            },
            batch_size=options.batch_size,
            trust_remote_code=options.trust_remote_code,
            device=self._device,
        )  # fmt: skip
        with _resumable(self.folder / RESUME):
            folder = quantizer(QUANTIZER)(job)
        self._free()
        place = folder.relative_to(self.folder).as_posix()
        self._done(QUANTIZED, folder=place, seconds=round(time.perf_counter() - start, 1))
        shutil.rmtree(self.folder / RESUME, ignore_errors=True)

    def _make_adapter(self, name: str, options: dict[str, Any], progress: Progress) -> None:
        if name in self.state["steps"]:
            return
        from ..hosts.jobs import AdapterJob
        from ..hosts.registry import adapter_maker
        from ..hosts.terminal import quiet

        start = time.perf_counter()
        with quiet():
            job = AdapterJob(
                base=self.options.model,
                checkpoint=self.checkpoint,
                windows=self._windows(),
                adapter=options,
                output=self.folder / ADAPTERS / name,
                batch_size=self.options.batch_size,
                loading={"device": self._device, "trust_remote_code": self.options.trust_remote_code},
                report=progress(f"adapter {name}"),
            )
            adapter_maker(self.checkpoint)(job)
        self._free()
        self._done(name, folder=f"{ADAPTERS}/{name}", seconds=round(time.perf_counter() - start, 1))

    def _evaluate(self, name: str, progress: Progress) -> None:
        losses, scores = (self.state[kind].setdefault(name, {}) for kind in ("losses", "scores"))
        texts = [text for text in self.options.texts if text not in losses]
        tasks = [task for task in self.options.lm_eval if task not in scores]
        if not texts and not tasks:
            return
        from ..hosts.terminal import quiet

        with quiet():
            tokenizer = self._tokenizer()
            model = self._load(name)
            for text in texts:
                losses[text] = self._loss(model, tokenizer, text, progress(f"{name} on {Path(text).stem}"))
                self._keep()
            for task in tasks:
                scores[task] = self._score(model, tokenizer, task)
                self._keep()
        del model
        self._free()

    def _loss(self, model: Any, tokenizer: Any, text: str, report: Callable[[int, int], None]) -> dict[str, Any]:
        from .perplexity import text_loss, text_tokens

        options = self.options
        ids = text_tokens(text, tokenizer, window=options.window, max_windows=options.max_windows)
        found = text_loss(model, ids, window=options.window, max_windows=options.max_windows, progress=report)
        return {"nats": found.nats, "perplexity": found.perplexity, "tokens": found.tokens}

    def _score(self, model: Any, tokenizer: Any, task: str) -> dict[str, Any]:
        from .tasks import score_task

        options = self.options
        found = score_task(
            model, tokenizer, task, include_path=options.lm_eval_path, limit=options.limit,
            batch_size=options.batch_size,
        )  # fmt: skip
        return {"metric": found.metric, "value": found.value, "metrics": found.metrics}

    def _load(self, name: str) -> Any:
        if name == FULL_PRECISION:
            from transformers import AutoModelForCausalLM

            return AutoModelForCausalLM.from_pretrained(
                self.options.model, dtype="auto", trust_remote_code=self.options.trust_remote_code
            ).to(self._device)
        from ..hosts.registry import loader

        adapter = self.folder / ADAPTERS / name if name != QUANTIZED else None
        load = loader(self.checkpoint)
        trusted = self.options.trust_remote_code
        return load(self.checkpoint, adapter, device=self._device, trust_remote_code=trusted).model

    def _tokenizer(self) -> Any:
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(self.options.model, trust_remote_code=self.options.trust_remote_code)

    def _windows(self) -> list[dict[str, list[int]]]:
        options, tokenizer = self.options, self._tokenizer()
        task = read_texts(options.task) if options.task else None
        return mixed_windows(
            read_texts(options.calibration), task, tokenizer, samples=options.samples, seqlen=options.seqlen
        )

    @property
    def _device(self) -> str:
        import torch

        return self.options.device or ("cuda" if torch.cuda.is_available() else "cpu")

    @staticmethod
    def _free() -> None:
        import torch

        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    # Results ---------------------------------------------------------------------------------------------------

    def results(self) -> list[dict[str, Any]]:
        """A row for each model, ready for JSON; to be called after `run`.

        Returns:
            Rows with `model`, `losses` by text and `scores` by task. Rows of quantised models also have `bytes` of the
            base, `adapter_bytes`, `bits_added` per quantised weight, `seconds` to make, and `recovered`: by text and
            task, the share of what quantising lost that is won back; None where it lost nothing.
        """
        weights = _quantized_weights(self.checkpoint)
        base_bytes = weight_bytes(self.checkpoint)
        rows = []
        for name in (FULL_PRECISION, QUANTIZED, *self.options.adapters):
            losses = {text: self.state["losses"][name][text] for text in self.options.texts}
            scores = {task: self.state["scores"][name][task] for task in self.options.lm_eval}
            row: dict[str, Any] = {"model": name, "losses": losses, "scores": scores}
            if name != FULL_PRECISION:
                adapter = self.folder / ADAPTERS / name
                adapter_bytes = weight_bytes(adapter) if name != QUANTIZED else 0
                row |= {"bytes": base_bytes, "adapter_bytes": adapter_bytes, "bits_added": 8 * adapter_bytes / weights}
                row["recovered"] = {
                    **{text: self._recovered(name, "losses", text, "nats") for text in self.options.texts},
                    **{task: self._recovered(name, "scores", task, "value") for task in self.options.lm_eval},
                }
                row["seconds"] = self.state["steps"][name]["seconds"]
            rows.append(row)
        return rows

    def _recovered(self, name: str, kind: str, what: str, value: str) -> float | None:
        """The share of what quantising lost on a text or task that a model wins back; None where it lost nothing."""
        known = self.state[kind]
        full, none, found = (known[one][what][value] for one in (FULL_PRECISION, QUANTIZED, name))
        worse = none > full if kind == "losses" else none < full
        return (none - found) / (none - full) if worse else None


def _quantized_weights(checkpoint: Path) -> int:
    """Number of quantised weights of a checkpoint that AutoRound made."""
    from ..formats.autoround import packed_modules, packing, read_config

    config = read_config(checkpoint)
    assert config is not None
    modules = packed_modules(checkpoint, packing(config, str(checkpoint)))
    return sum(one.out_features * one.in_features for _, one in modules)


@contextlib.contextmanager
def _resumable(folder: Path) -> Iterator[None]:
    """Have AutoRound keep its progress in ``folder``, unless the user has named another."""
    name = "AR_RESUME_DIR"
    known = os.environ.get(name)
    if known is None:
        os.environ[name] = str(folder)
    try:
        yield
    finally:
        if known is None:
            del os.environ[name]


def text_names(texts: Sequence[str]) -> dict[str, str]:
    """Short names of files for the head of a table; the whole path where two would be called the same."""
    stems = [Path(text).stem for text in texts]
    return {text: stem if stems.count(stem) == 1 else text for text, stem in zip(texts, stems, strict=True)}
