"""The inputs of a layer's modules and the gradients at their outputs, kept token by token."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack

import torch

from ..capture import RoutedRows, SecondMoment, require_finite
from ..solve import Moment, RowMoment, diagonal_of


class InputRows:
    """Keeps the inputs of modules, tokens × in without padding, in their own dtype, from all forwards within its `with`
    block.

    Modules that read the same tensor share one copy, under the name of the first to read it.

    Args:
        name: full name of a layer.
        layer: that layer, its weights in memory.
        modules: linear layers in it, by full name.

    Attributes:
        keep: tokens of the windows under way that count, windows × tokens, bool; set before each forward.
        leaders: module → the one whose copy it shares. Modules that no token reached are not in it.
    """

    def __init__(self, name: str, layer: torch.nn.Module, modules: Mapping[str, torch.nn.Linear]) -> None:
        self.keep = torch.empty(0)
        self.leaders: dict[str, str] = {}
        self._rows: dict[str, list[torch.Tensor]] = {}
        self._seen: dict[int, tuple[torch.Tensor, str]] = {}
        self._name = name
        self._layer = layer
        self._modules = modules
        self._handles = ExitStack()

    def begin(self, keep: torch.Tensor) -> None:
        """To be called before each forward, with the tokens that count: windows × tokens, bool."""
        self.keep = keep
        self._seen = {}

    def __enter__(self) -> InputRows:
        self._routed = self._handles.enter_context(RoutedRows(self._layer, lambda: self.keep))
        for name, module in self._modules.items():
            self._handles.callback(module.register_forward_pre_hook(self._hook(name)).remove)
        return self

    def __exit__(self, *exception: object) -> None:
        self._handles.close()
        # It refers back to this object. In a circle of references all rows would stay until garbage is collected.
        del self._routed
        self._seen = {}

    def rows(self, leader: str) -> torch.Tensor:
        """All inputs that were kept under a module's name, tokens × in. It is one of the values of ``leaders``."""
        return torch.cat(self._rows[leader])

    def _hook(self, name: str) -> Callable[..., None]:
        path = name.removeprefix(f"{self._name}.")

        def hook(module: torch.nn.Linear, inputs: tuple[torch.Tensor, ...]) -> None:
            rows = _real_rows(inputs[0].detach(), self._routed.real(path, inputs[0]))
            if not len(rows):
                return
            # The tensor is kept beside its id: if it were freed, another tensor could get the same id.
            leader = self._seen.setdefault(id(inputs[0]), (inputs[0], name))[1]
            if self.leaders.setdefault(name, leader) == name:
                self._rows.setdefault(name, []).append(rows)

        return hook


class OutputGradients:
    """Keeps the gradients at the outputs of modules, in their own dtype and in the order of `InputRows`, from all
    backward passes within its `with` block.

    Args:
        name: full name of a layer.
        layer: that layer, its weights in memory.
        modules: linear layers in it, by full name.

    Attributes:
        keep: as in `InputRows`.
        gradients: module → its gradients, tokens × out, one tensor a backward pass.
    """

    def __init__(self, name: str, layer: torch.nn.Module, modules: Mapping[str, torch.nn.Linear]) -> None:
        self.keep = torch.empty(0)
        self.gradients: dict[str, list[torch.Tensor]] = {}
        self._name = name
        self._layer = layer
        self._modules = modules
        self._handles = ExitStack()

    def __enter__(self) -> OutputGradients:
        self._routed = self._handles.enter_context(RoutedRows(self._layer, lambda: self.keep))
        for name, module in self._modules.items():
            self._handles.callback(module.register_forward_hook(self._hook(name)).remove)
        return self

    def __exit__(self, *exception: object) -> None:
        self._handles.close()
        # As in `InputRows`.
        del self._routed

    def _hook(self, name: str) -> Callable[..., None]:
        path = name.removeprefix(f"{self._name}.")

        def hook(module: torch.nn.Linear, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
            if not output.requires_grad:
                # What picks tokens (DeepSeek-V3.2's indexer) is run without, and has no sensitivity.
                return
            real = self._routed.real(path, inputs[0])

            def add(gradient: torch.Tensor) -> None:
                rows = _real_rows(gradient.detach(), real)
                if len(rows):
                    self.gradients.setdefault(name, []).append(rows)

            output.register_hook(add)

        return hook


def _real_rows(tensor: torch.Tensor, real: torch.Tensor | None) -> torch.Tensor:
    """The rows of (…, features) that are no padding, by a mask of the leading dimensions: tokens × features."""
    return tensor.reshape(-1, tensor.shape[-1]) if real is None else tensor[real]


def moment_of(rows: torch.Tensor, name: str, count: float | None = None) -> Moment:
    """The second moment of rows in whichever form is smaller: features × features, or the rows themselves.

    Args:
        rows: n × features, any floating dtype.
        name: the module, for messages.
        count: what the sum is divided by; n if left out.

    Returns:
        float32, on the device of ``rows``.

    Raises:
        ValueError: when a row holds NaN or infinity.
    """
    tokens, features = rows.shape
    divisor = float(max(tokens, 1) if count is None else count)
    if tokens < features:
        moment: Moment = RowMoment(rows.to(torch.float32), divisor)
    else:
        total = SecondMoment(features, name)
        total.add(rows)
        moment = total.mean(rows.device) * (tokens / divisor)
    require_finite(diagonal_of(moment), name)
    return moment
