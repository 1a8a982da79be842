"""What an error at a module's output costs in loss: the second moment of the loss's gradient there.

With g = ∂(loss summed over the tokens of a window)/∂y at a token, and e the error of the output y at it, the loss rises
by about ½ E[(gᵀ e)²] ≈ ½ tr(G E) nats a token, G = E[g gᵀ] and E = E[e eᵀ]: the Fisher information, errors taken
to be independent of gradients and of one another, as in K-FAC (arXiv 1503.05671) and HAWQ (arXiv 1911.03852). With
labels drawn from the model itself G is the true Fisher, which is the curvature of the divergence from the
full-precision model; with the text's own labels it is the empirical one.

Errors are not quite independent of gradients: a token that all others attend to has large gradients and an input of
its own. So the inputs are also summed weighed by ‖g‖², which tells how far that goes in each module
(`ranks.TokenCorrection`).
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from ..adapter.validate import validate_choice
from ..adapter.vocabulary import SENSITIVITIES
from ..capture import DiagonalMoment, SecondMoment
from ..solve import error_loss
from ..system.files import replaced_file
from .checkpointing import activation_bytes_of, checkpointing

log = logging.getLogger(__name__)

# Both moments of all modules together may take this many bytes; beyond, only their diagonals are kept.
FULL_BYTES = 4 << 30
# Activations of a batch may take this many bytes; beyond, layers keep their inputs alone and are run again.
ACTIVATION_BYTES = 2 << 30
# Values of each weight that its fingerprint reads.
FINGERPRINT_VALUES = 64
FORMAT = "eora-sensitivity-2"
TINY = 1e-30


@dataclass(frozen=True)
class Sensitivity:
    """Second moments of inputs and output gradients, by module.

    Attributes:
        output_moments: G, out × out or its diagonal, float32. Nats a token over squared output.
        second_moments: C of the full-precision model's inputs, in × in or its diagonal; modules that read one input
            share one tensor.
        weighted_moments: E[‖g‖² x xᵀ] / E‖g‖², in × in or its diagonal; none where there are no gradients.
        tokens: that they stand on.
        kind: one of `SENSITIVITIES`.
        fingerprint: of model, data, kind and seed.
    """

    output_moments: Mapping[str, torch.Tensor]
    second_moments: Mapping[str, torch.Tensor]
    weighted_moments: Mapping[str, torch.Tensor]
    tokens: int
    kind: str
    fingerprint: str

    def save(self, path: Path) -> None:
        """Write to a safetensors file; shared moments once."""
        names: dict[int, str] = {}
        tensors: dict[str, torch.Tensor] = {f"G.{name}": moment for name, moment in self.output_moments.items()}
        tensors |= {f"W.{name}": moment for name, moment in self.weighted_moments.items()}
        sources = {}
        for name, moment in self.second_moments.items():
            leader = names.setdefault(id(moment), name)
            sources[name] = leader
            tensors[f"C.{leader}"] = moment
        header = {"format": FORMAT, "tokens": str(self.tokens), "kind": self.kind,
                  "fingerprint": self.fingerprint, "sources": json.dumps(sources)}  # fmt: skip
        path.parent.mkdir(parents=True, exist_ok=True)
        with replaced_file(path) as temporary:
            save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, temporary, metadata=header)

    @classmethod
    def load(cls, path: Path) -> Sensitivity:
        """Read what `save` wrote.

        Raises:
            ValueError: for a file of another format.
        """
        with safe_open(path, framework="pt") as file:
            header = file.metadata() or {}
            if header.get("format") != FORMAT:
                raise ValueError(f"`{path}` is no sensitivity file of the format {FORMAT}: {header.get('format')!r}.")
            read = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        return cls(
            output_moments={key[2:]: tensor for key, tensor in read.items() if key.startswith("G.")},
            second_moments={name: read[f"C.{leader}"] for name, leader in json.loads(header["sources"]).items()},
            weighted_moments={key[2:]: tensor for key, tensor in read.items() if key.startswith("W.")},
            tokens=int(header["tokens"]),
            kind=header["kind"],
            fingerprint=header["fingerprint"],
        )


def measure_sensitivity(
    model: torch.nn.Module,
    modules: Mapping[str, torch.nn.Linear],
    batches: Sequence[Mapping[str, Any]],
    *,
    kind: str = "fisher",
    seed: int = 0,
    gradient_tokens: int | None = None,
    full_bytes: int = FULL_BYTES,
    activation_bytes: int = ACTIVATION_BYTES,
    progress: Callable[[Sequence[Mapping[str, Any]]], Iterable[Mapping[str, Any]]] = iter,
) -> Sensitivity:
    """One pass of a causal language model, forward and backward, over calibration windows.

    Where activations of all layers are too many, layers keep their inputs alone and are run again for the backward, so
    that one layer's are in memory.

    Args:
        model: takes `input_ids` and `attention_mask`, gives `logits`; its weights get no gradients.
        modules: linear layers by name (`in_features`, `out_features`).
        batches: `input_ids` (and `attention_mask`), windows × tokens each; each is one forward.
        kind: "fisher": labels sampled from the model; "empirical": the text's own; "relative": no gradients, G is the
            identity over the mean squared output E‖W x‖², so that modules are compared by relative error.
        seed: of the sampling.
        gradient_tokens: the first batches that have so many tokens are run backward; the others forward alone, for C.
            None: all are.
        full_bytes: bytes that full moments may take; beyond, diagonals are kept.
        activation_bytes: bytes that the activations of a batch may take; beyond, layers are run again.
        progress: wraps the batches, to show how far the pass is.

    Raises:
        ValueError: for an unknown kind, or a module whose gradient holds NaN or infinity.
    """
    validate_choice(kind, SENSITIVITIES, what="kind")
    full = 4 * sum(2 * one.in_features**2 + one.out_features**2 for one in modules.values()) <= full_bytes
    checkpointed = activation_bytes_of(model, modules.values(), batches) > activation_bytes
    watch = _Watch(modules, full=full, checkpointed=checkpointed)
    generator = torch.Generator().manual_seed(seed)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    was_training = model.training
    model.eval()
    for parameter in trained:
        parameter.requires_grad_(False)
    try:
        with (
            watch,
            checkpointing(model, modules.values(), watch.recomputing) if checkpointed else nullcontext(),
        ):
            left = float("inf") if gradient_tokens is None else gradient_tokens
            for batch in progress(batches):
                with torch.set_grad_enabled(kind != "relative" and left > 0):
                    _run(model, batch, watch, kind, generator)
                left -= torch.as_tensor(batch["input_ids"]).numel()
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)
        model.train(was_training)
    return watch.result(kind, fingerprint(model, modules, batches, kind, seed, gradient_tokens))


def model_inputs(model: torch.nn.Module, batch: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """`input_ids` and `attention_mask` of a batch, windows × tokens, where the model takes them; no mask counts all."""
    device = model.get_input_embeddings().weight.device  # type: ignore[operator]
    ids = torch.atleast_2d(torch.as_tensor(batch["input_ids"], device=device))
    mask = batch.get("attention_mask")
    mask = torch.ones_like(ids) if mask is None else torch.as_tensor(mask, device=device).reshape(ids.shape)
    return {"input_ids": ids, "attention_mask": mask}


def _run(
    model: torch.nn.Module, batch: Mapping[str, Any], watch: _Watch, kind: str, generator: torch.Generator
) -> None:
    inputs = model_inputs(model, batch)
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    watch.begin(mask.bool())
    embedded = model.get_input_embeddings()(ids)  # type: ignore[operator]
    if not torch.is_grad_enabled():
        model(inputs_embeds=embedded, attention_mask=mask, use_cache=False)
        return
    logits = model(inputs_embeds=embedded.requires_grad_(), attention_mask=mask, use_cache=False).logits
    scored = watch.keep[:, 1:]
    with torch.no_grad():
        likely = logits[:, :-1].float().softmax(-1).cpu()
        if kind == "empirical":
            targets = ids[:, 1:, None].cpu()
        else:
            # By the inverse of the distribution: one random number a token, where multinomial draws one a label.
            sums = likely.cumsum(-1)
            drawn = torch.rand(sums[..., :1].shape, generator=generator) * sums[..., -1:]
            targets = torch.searchsorted(sums, drawn).clamp_max(sums.shape[-1] - 1)
        # Of the cross entropy, with no pass over all labels for its value.
        gradient = torch.zeros_like(logits)
        gradient[:, :-1] = likely.scatter_add_(-1, targets, -torch.ones_like(targets, dtype=likely.dtype)).to(
            ids.device
        )
        gradient[:, :-1] *= scored[..., None]
    logits.backward(gradient)


@dataclass
class _Watch:
    """Hooks on modules that sum all moments.

    A module's gradients meet its inputs, which are kept until then. Of a ``checkpointed`` layer, they meet those of its
    second run, in either order: the gradient of the last output comes before that run, the others after it.
    """

    modules: Mapping[str, torch.nn.Linear]
    full: bool
    checkpointed: bool
    keep: torch.Tensor = field(default_factory=lambda: torch.empty(0))

    def __post_init__(self) -> None:
        self._gradients = {name: self._sum(one.out_features, name) for name, one in self.modules.items()}
        self._inputs: dict[str, Any] = {}
        self._leaders: dict[str, str] = {}
        self._seen: dict[int, tuple[torch.Tensor, str]] = {}
        self._weighted: dict[str, Any] = {}
        # ‖g‖² of all tokens, by module.
        self._squares: dict[str, float] = {}
        self._waiting: dict[str, tuple[str, torch.Tensor]] = {}
        self._handles = ExitStack()
        self._recomputing = False

    def begin(self, keep: torch.Tensor) -> None:
        """A batch, and its tokens that count."""
        self.keep = keep
        self._waiting.clear()

    @contextmanager
    def recomputing(self) -> Iterator[None]:
        """A layer is run again for its backward: its modules were seen before, and gradients reach the first run."""
        self._recomputing = True
        try:
            yield
        finally:
            self._recomputing = False

    def _sum(self, features: Any, name: str) -> Any:
        return SecondMoment(int(features), name) if self.full else DiagonalMoment(int(features), name)

    def __enter__(self) -> None:
        for name, module in self.modules.items():
            self._handles.callback(module.register_forward_pre_hook(self._again(name)).remove)
            self._handles.callback(module.register_forward_hook(self._hook(name)).remove)

    def __exit__(self, *exception: object) -> None:
        self._handles.close()

    def _hook(self, name: str) -> Callable[..., None]:
        def hook(module: torch.nn.Linear, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
            if self._recomputing:
                return
            rows, keep = inputs[0], self.keep
            fits = keep.shape == rows.shape[:-1]
            mask = keep if fits else None
            self._add_inputs(name, module, rows, mask)
            if output.requires_grad:
                if not self.checkpointed:
                    self._meet(name, "inputs", rows.detach())
                output.register_hook(lambda gradient: self._add_gradients(name, gradient, mask))

        return hook

    def _again(self, name: str) -> Callable[..., None]:
        """A second run may end with the last input that it is for, before the module's output."""

        def hook(module: torch.nn.Linear, inputs: tuple[torch.Tensor, ...]) -> None:
            if self._recomputing:
                self._meet(name, "inputs", inputs[0].detach())

        return hook

    def _add_gradients(self, name: str, gradient: torch.Tensor, keep: torch.Tensor | None) -> None:
        self._gradients[name].add(gradient, keep)
        if keep is not None:
            gradient = gradient * keep[..., None]
        self._meet(name, "gradient", gradient)

    def _meet(self, name: str, what: str, tensor: torch.Tensor) -> None:
        """Sum ‖g‖² x xᵀ once both are there."""
        waiting = self._waiting.pop(name, None)
        if waiting is None or waiting[0] == what:
            self._waiting[name] = what, tensor
            return
        gradient, rows = (tensor, waiting[1]) if what == "gradient" else (waiting[1], tensor)
        if gradient.shape[:-1] != rows.shape[:-1]:
            # Of two calls of one module.
            return
        squares = gradient.to(torch.float32).square().sum(-1, keepdim=True)
        if name not in self._weighted:
            self._weighted[name] = self._sum(rows.shape[-1], name)
        self._weighted[name].add(rows * squares.sqrt())
        self._squares[name] = self._squares.get(name, 0.0) + float(squares.sum())

    def _add_inputs(self, name: str, module: torch.nn.Linear, rows: torch.Tensor, keep: torch.Tensor | None) -> None:
        """Sum x xᵀ, once for modules that read the same tensor."""
        if name not in self._leaders:
            known = self._seen.get(id(rows))
            # The tensor is kept beside its id, which another could have once it is gone.
            self._leaders[name] = known[1] if known is not None and known[0] is rows else name
            self._seen = {id(rows): (rows, self._leaders[name])}
        if self._leaders[name] != name:
            return
        if name not in self._inputs:
            self._inputs[name] = self._sum(module.in_features, name)
        # Nothing of this may enter the graph, which the layer's second run must match.
        self._inputs[name].add(rows.detach(), keep)

    def result(self, kind: str, found: str) -> Sensitivity:
        self._seen = {}
        for moment in (*self._inputs.values(), *self._gradients.values()):
            moment.require_finite()
        inputs = {name: moment.mean() for name, moment in self._inputs.items()}
        second_moments = {name: inputs[leader] for name, leader in self._leaders.items()}
        unseen = set(self.modules) - set(self._leaders)
        if unseen:
            log.warning("%d modules were not reached by the calibration data, for instance %s.",
                        len(unseen), min(unseen))  # fmt: skip
        if kind == "relative":
            output_moments = {
                name: torch.full((module.out_features,), 1 / max(_signal(module, second_moments[name]), TINY))
                for name, module in self.modules.items()
                if name not in unseen
            }
        else:
            output_moments = {name: one.mean() for name, one in self._gradients.items() if name not in unseen}
        return Sensitivity(
            output_moments=output_moments,
            second_moments=second_moments,
            weighted_moments={
                name: one.mean() * (one.tokens / max(self._squares[name], TINY)) for name, one in self._weighted.items()
            },
            tokens=max((moment.tokens for moment in self._inputs.values()), default=0),
            kind=kind,
            fingerprint=found,
        )


def _signal(module: torch.nn.Linear, second_moment: torch.Tensor) -> float:
    """E‖W x‖², mean squared norm of a module's output."""
    weight = module.weight.data.float().cpu()
    return 2 * error_loss(weight, second_moment, torch.ones(len(weight)))


def fingerprint(
    model: torch.nn.Module,
    modules: Iterable[str],
    batches: Sequence[Mapping[str, Any]],
    kind: str,
    seed: int = 0,
    gradient_tokens: int | None = None,
) -> str:
    """A digest of what a sensitivity depends on: some values of each weight, the data, the kind, the seed."""
    digest = hashlib.sha256(json.dumps([FORMAT, sorted(modules), kind, seed, gradient_tokens]).encode())
    for name, parameter in model.named_parameters():
        flat = parameter.detach().flatten()
        some = flat[:: max(len(flat) // FINGERPRINT_VALUES, 1)].float().cpu()
        digest.update(f"{name} {tuple(parameter.shape)}".encode() + some.numpy().tobytes())
    for batch in batches:
        for key in ("input_ids", "attention_mask"):
            if batch.get(key) is not None:
                digest.update(torch.as_tensor(batch[key]).to(torch.int64).cpu().numpy().tobytes())
    return digest.hexdigest()
