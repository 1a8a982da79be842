"""A causal language model that is run one layer at a time, with the weights of one layer in memory.

What a layer is given beside its input (masks, positions, rotary embeddings) is what the model itself gives it: its own
forward is run with stubs in place of the layers, which only note down their arguments. What stands after the last layer
is run in the same way. So nothing here knows an architecture; the layers have to be a `ModuleList`, and each has to
take the output of the one before.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from ..adapter.layers import use_linear_layers
from .checkpoint import Weights, sampled_rows


@dataclass
class Window:
    """Windows of tokens on their way through the layers.

    Attributes:
        ids: windows × tokens.
        keep: tokens that count, windows × tokens, bool; padding does not.
        hidden: the input of the next layer, windows × tokens × width.
        arguments: what each layer is given beside it.
    """

    ids: torch.Tensor
    keep: torch.Tensor
    hidden: torch.Tensor
    arguments: list[tuple[tuple[Any, ...], dict[str, Any]]]


class _LastLayer(Exception):
    """Ends a forward of the model whose part after the layers is not wanted."""


class LayeredModel:
    """Runs a model layer by layer.

    Args:
        model: transformers' causal language model; parameters on the meta device are read when they are needed.
        weights: where they are read from; None for a model in memory.
        modules: full names of modules inside the layers. The `ModuleList` that holds them all is that of the layers.
        device: where layers are computed.

    Raises:
        NotImplementedError: when ``modules`` are not in the layers of one `ModuleList`.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        weights: Weights | None,
        modules: Sequence[str],
        device: torch.device | str = "cpu",
    ) -> None:
        self.model = model
        self.device = torch.device(device)
        self._weights = weights
        self.list_name = _layers_name(model, modules)
        layers = model.get_submodule(self.list_name)
        self.layers = [f"{self.list_name}.{index}" for index in range(len(layers))]  # type: ignore[arg-type]
        # Whether a layer returns a tuple; found out by the first recording.
        self._tuples: bool | None = None

    def __len__(self) -> int:
        return len(self.layers)

    @contextmanager
    def layer(self, index: int) -> Iterator[torch.nn.Module]:
        """Yield a layer with its weights on the device; they are let go of when the block ends.

        A `Conv1D` (GPT-2) is a `Linear` meanwhile, so that what measures a layer has only one kind of module to know.

        Raises:
            NotImplementedError: for a parameter that the checkpoint does not hold under its name.
        """
        name = self.layers[index]
        with self.present([name]):
            layer = self.model.get_submodule(name)
            put_back = use_linear_layers(layer)
            try:
                yield layer
            finally:
                put_back()

    def run(self, layer: torch.nn.Module, index: int, hidden: torch.Tensor, window: Window) -> torch.Tensor:
        """The output of a layer, windows × tokens × width.

        Args:
            layer: as `layer` yields it.
            index: of the layer.
            hidden: its input, windows × tokens × width.
            window: tells what the layer is given beside its input.
        """
        args, kwargs = window.arguments[index]
        output = layer(hidden, *args, **kwargs)
        return output[0] if isinstance(output, tuple) else output

    def begin(self, batches: Sequence[Mapping[str, Any]]) -> list[Window]:
        """Embed batches of windows, so that their `hidden` is the input of the first layer.

        Args:
            batches: `input_ids` and `attention_mask`, windows × tokens each; without a mask every token counts.

        Raises:
            NotImplementedError: for a model whose layers are not called one after another.
        """
        head = self._head_name()
        outside = [name for name in self._outside() if name != head]
        with self.present(outside), torch.no_grad():
            return [self._embedded(batch) for batch in batches]

    @contextmanager
    def head(self) -> Iterator[Callable[[torch.Tensor], torch.Tensor]]:
        """Yield a function from outputs of the last layer, tokens × width, to scores, tokens × labels.

        That function raises `NotImplementedError` for a model that gives no scores, or that fails on text alone.
        """
        embeddings = self.model.get_input_embeddings()  # type: ignore[operator]
        path = next(name for name, module in self.model.named_modules() if module is embeddings)
        with self.present([name for name in self._outside() if name != path]):
            yield self._scores

    def samples(self, rows: int) -> Iterator[tuple[str, Sequence[int], torch.Tensor]]:
        """Yield name, shape and ``rows`` rows of every tensor, on the CPU, by which one model is told from another."""
        if self._weights is not None:
            yield from self._weights.samples(rows)
            return
        for name, parameter in self.model.named_parameters():
            whole = parameter.detach()
            places = sampled_rows(whole.shape, rows)
            yield name, whole.shape, (whole[places] if places else whole).cpu()

    def _scores(self, hidden: torch.Tensor) -> torch.Tensor:
        rows = hidden[None]
        mask = torch.ones(rows.shape[:2], dtype=torch.long, device=self.device)

        def stub(index: int) -> Callable[..., Any]:
            def forward(*args: Any, **kwargs: Any) -> Any:
                passed = rows if index == len(self) - 1 else _input(args, kwargs)
                return (passed,) if self._tuples else passed

            return forward

        named = f"{type(self.model).__name__}{_type_of(self.model)}"
        with self._stubbed(stub):
            try:
                output = self.model(inputs_embeds=rows.detach(), attention_mask=mask, use_cache=False)
            except (AttributeError, KeyError, TypeError, IndexError) as error:
                # Llama 4 that also sees, for instance: what it returns lacks what its own head asks for.
                raise NotImplementedError(
                    f"EoRA: {named} fails on text alone, after its layers ({type(error).__name__}: {error}), so what "
                    f"an error costs cannot be measured. Name a rank in place of the budget."
                ) from error
        scores: torch.Tensor | None = getattr(output, "logits", None)
        if scores is None:
            raise NotImplementedError(
                f"EoRA: {named} has no head that scores tokens, so what an error costs cannot be measured. Open the "
                f"model by a class that has one, or name a rank in place of the budget."
            )
        return scores[0]

    def _embedded(self, batch: Mapping[str, Any]) -> Window:
        ids = torch.atleast_2d(torch.as_tensor(batch["input_ids"], device=self.device))
        mask = batch.get("attention_mask")
        mask = torch.ones_like(ids) if mask is None else torch.as_tensor(mask, device=self.device).reshape(ids.shape)
        for tuples in (False, True) if self._tuples is None else (self._tuples,):
            window = self._recorded(ids, mask, tuples)
            if window is not None and window.hidden.shape[:-1] == ids.shape:
                self._tuples = tuples
                return window
        raise NotImplementedError(
            f"EoRA: {type(self.model).__name__}{_type_of(self.model)} does not call the layers of `{self.list_name}` "
            f"one after another, each on the output of the one before, one vector a token, so sensitivities cannot be "
            f"measured. Name a rank in place of the budget."
        )

    def _recorded(self, ids: torch.Tensor, mask: torch.Tensor, tuples: bool) -> Window | None:
        """Embed a batch by running the model with stubs that return tensors, or tuples where ``tuples`` is set.

        None where the stubs were not called one after another, each on the output of the one before: the model wants
        the other kind of return value, or it is not built like that.
        """
        seen: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
        passed: list[torch.Tensor] = []

        def stub(index: int) -> Callable[..., Any]:
            def forward(*args: Any, **kwargs: Any) -> Any:
                given = _input(args, kwargs)
                kwargs.pop("hidden_states", None)
                if index != len(seen) or (passed and given is not passed[0]):
                    raise _LastLayer
                if not passed:
                    passed.append(given)
                seen.append((args[1:], kwargs))
                if index == len(self) - 1:
                    raise _LastLayer
                return (given,) if tuples else given

            return forward

        with self._stubbed(stub):
            try:
                self.model(input_ids=ids, attention_mask=mask, use_cache=False)
            except _LastLayer:
                pass
            except (AttributeError, TypeError, IndexError, ValueError):
                # A model that gets a tuple where it expects a tensor, or the reverse, fails after the first layer,
                # each in its own way. An error before that has another cause.
                if not seen:
                    raise
        return Window(ids, mask.bool(), passed[0], seen) if len(seen) == len(self) else None

    @contextmanager
    def _stubbed(self, stub: Callable[[int], Callable[..., Any]]) -> Iterator[None]:
        layers = [self.model.get_submodule(name) for name in self.layers]
        # A library that dispatches layers may have put a `forward` of its own on the instance; it is put back.
        own = [vars(layer).get("forward") for layer in layers]
        for index, layer in enumerate(layers):
            layer.forward = stub(index)
        try:
            yield
        finally:
            for layer, forward in zip(layers, own, strict=True):
                del layer.forward
                if forward is not None:
                    layer.forward = forward

    def _outside(self) -> list[str]:
        """Modules that hold parameters or buffers of their own and lie in no layer."""
        return [
            name
            for name, module in self.model.named_modules()
            if (module._parameters or module._buffers) and not f"{name}.".startswith(f"{self.list_name}.")
        ]

    def _head_name(self) -> str | None:
        head = self.model.get_output_embeddings()  # type: ignore[operator]
        return next((name for name, module in self.model.named_modules() if module is head), None)

    def weight(self, name: str) -> torch.Tensor:
        """A copy of a linear module's weight, out × in, on the CPU in its own dtype.

        Raises:
            NotImplementedError: for a weight that the checkpoint does not hold under its name.
        """
        with self.present([name]):
            weight: torch.Tensor = self.model.get_submodule(name).weight  # type: ignore[assignment]
            return weight.detach().to("cpu", copy=True)

    @contextmanager
    def present(self, names: Sequence[str]) -> Iterator[None]:
        """Have modules of these names, and all inside them, hold their tensors on the device, without gradients.

        Raises:
            NotImplementedError: for a parameter that the checkpoint does not hold under its name.
        """
        owners = [owner for name in names for owner in self.model.get_submodule(name).modules()]
        stores: list[dict[str, Any]] = [store for owner in owners for store in (owner._parameters, owner._buffers)]
        originals = [dict(store) for store in stores]
        try:
            if self._weights is not None:
                for name in names:
                    self._weights.fill(self.model, name)
            for store in stores:
                for key, tensor in store.items():
                    if tensor is not None:
                        here = tensor.detach().to(self.device)
                        if here.is_inference():
                            # A host may have read it in inference mode. Gradients cannot run through such a tensor.
                            here = here.clone()
                        is_parameter = isinstance(tensor, torch.nn.Parameter)
                        store[key] = torch.nn.Parameter(here, requires_grad=False) if is_parameter else here
            yield
        finally:
            for store, original in zip(stores, originals, strict=True):
                store.clear()
                store.update(original)


def _input(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """What a layer is to work on: its first argument, by place or by name."""
    return args[0] if args else kwargs.get("hidden_states")


def _type_of(model: torch.nn.Module) -> str:
    """A model's type as its config names it, for messages; nothing where it has none."""
    found = getattr(getattr(model, "config", None), "model_type", None)
    return f" (model type {found})" if found else ""


def _layers_name(model: torch.nn.Module, modules: Sequence[str]) -> str:
    """The full name of the outermost `ModuleList` that holds all modules."""
    lists = [name for name, module in model.named_modules() if isinstance(module, torch.nn.ModuleList)]
    for name in lists:
        if modules and all(one.startswith(f"{name}.") for one in modules):
            return name
    raise NotImplementedError(
        f"EoRA: the modules to quantise, for instance {min(modules, default='none')}, are not all in one list of "
        f"layers of {type(model).__name__}{_type_of(model)}, so sensitivities cannot be measured layer by layer. "
        f"Name a rank in place of the budget."
    )
