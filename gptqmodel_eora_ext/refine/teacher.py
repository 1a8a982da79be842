"""What the full-precision model computes, kept in a file: the outputs of its last layer at every token.

The model is run one layer at a time, with the weights of that layer in memory. The outputs of the layers overwrite each
other in the mapped file, tokens × width in the dtype of the activations, which the system may hold on disk.

    probe   tokens × scores             scores of the first window's first tokens, by the model's own output matrix
    hidden  windows × tokens × width    outputs of the last layer
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from ..formats.mapped import mapped_tensors
from ..plan.checkpoint import CheckpointWeights, skeleton
from ..plan.layered import LayeredModel, Window
from ..system.files import replaced_file
from ..system.memory import release_free_memory
from .losses import Head
from .student import after_layers

# Tokens whose scores are kept, to see that the quantised model has the same output matrix.
PROBED = 8
# Both models compute the scores from the same rows and, in 16 bits, with the same rounding.
PROBE_TOLERANCE = 2**-5


class Teacher:
    """Reads what `keep_teacher` has written.

    Args:
        path: the file.

    Example:
        >>> teacher = Teacher(Path("teacher.safetensors"))
        >>> teacher.hidden(0).shape  # tokens × width
        torch.Size([512, 576])
    """

    def __init__(self, path: Path) -> None:
        self._file = safe_open(path, framework="pt")
        self._hidden = self._file.get_slice("hidden")

    def hidden(self, window: int) -> torch.Tensor:
        """Outputs of the full-precision model's last layer for a window, tokens × width."""
        return self._hidden[window : window + 1][0]

    def check_head(self, head: Head, named: str) -> None:
        """Refuse a quantised model whose norm and output matrix are not the full-precision model's.

        Args:
            head: the quantised model's, from outputs of the last layer.
            named: the full-precision model, for the message.

        Raises:
            ValueError: when its scores differ.
        """
        wanted = self._file.get_tensor("probe")
        with torch.no_grad():
            found = head(self.hidden(0)[: len(wanted)])[1].to(torch.float32).cpu()
        gap = float((found - wanted).norm() / wanted.norm()) if found.shape == wanted.shape else float("inf")
        if gap > PROBE_TOLERANCE:
            how = f"{gap:.1%}" if found.shape == wanted.shape else f"{tuple(found.shape)} for {tuple(wanted.shape)}"
            raise ValueError(
                f"EoRA: the checkpoint's output matrix and last norm give other scores than those of `{named}` "
                f"(difference {how}, expected at most {PROBE_TOLERANCE:.1%}). Refinement needs them as they were: name "
                f"the checkpoint's own base, or quantise without `lm_head`."
            )


def keep_teacher(
    base: str,
    modules: Sequence[str],
    ids: torch.Tensor,
    path: Path,
    dtype: torch.dtype,
    *,
    device: torch.device | str = "cpu",
    trust_remote_code: bool = False,
    report: Callable[[int, int], None] = lambda done, total: None,
) -> None:
    """Run the full-precision model on windows of tokens, and write the outputs of its last layer.

    Args:
        base: a folder, or a name on the Hugging Face hub.
        modules: full names of modules inside the layers.
        ids: windows × tokens.
        path: the file, which stays the old one until all is written.
        dtype: of the activations.
        device: where layers are computed.
        trust_remote_code: whether model code from the hub may run.
        report: called with (steps done, steps in all), a step a layer.

    Raises:
        NotImplementedError: for a model that cannot be run layer by layer.
        OSError: when the disk is full.
    """
    folder = base_folder(base)
    try:
        _run_layers(_from_files(folder, modules, dtype, device, trust_remote_code), ids, path, dtype, report)
    except NotImplementedError:
        # Weights that transformers converts as it loads (experts in one tensor) cannot be read layer by layer.
        _run_layers(_in_memory(folder, modules, dtype, device, trust_remote_code), ids, path, dtype, report)
    release_free_memory()


def base_folder(base: str) -> Path:
    """The folder of a model that is named by its folder or on the hub."""
    if Path(base).is_dir():
        return Path(base)
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(base, allow_patterns=["*.json", "*.safetensors", "*.py"]))


def _from_files(
    folder: Path, modules: Sequence[str], dtype: torch.dtype, device: torch.device | str, trust_remote_code: bool
) -> LayeredModel:
    shell = skeleton(folder, trust_remote_code=trust_remote_code)
    for parameter in shell.parameters():
        parameter.data = parameter.data.to(dtype)
    try:
        weights = CheckpointWeights(folder)
    except FileNotFoundError as error:
        raise NotImplementedError(str(error)) from error
    return LayeredModel(shell, weights, modules, device)


def _in_memory(
    folder: Path, modules: Sequence[str], dtype: torch.dtype, device: torch.device | str, trust_remote_code: bool
) -> LayeredModel:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, trust_remote_code=trust_remote_code)
    return LayeredModel(model.eval(), None, modules, device)


def _run_layers(
    model: LayeredModel, ids: torch.Tensor, path: Path, dtype: torch.dtype, report: Callable[[int, int], None]
) -> None:
    first = model.begin([{"input_ids": ids[:1]}])[0]
    shape = (*ids.shape, first.hidden.shape[-1])
    vocabulary = int(model.model.get_output_embeddings().weight.shape[0])  # type: ignore[operator]
    probe = (min(PROBED, shape[1]), vocabulary)
    with replaced_file(path) as unfinished, torch.no_grad():
        kept = mapped_tensors(unfinished, {"probe": (torch.float32, probe), "hidden": (dtype, shape)})
        hidden = kept["hidden"]
        windows: list[Window] = []
        for number, of_window in enumerate(ids):
            window = model.begin([{"input_ids": of_window[None]}])[0]
            hidden[number] = window.hidden[0]
            window.hidden = window.hidden.new_empty(0)
            if windows:
                _share_arguments(window, windows[0])
            windows.append(window)
        for index in range(len(model)):
            report(index, len(model))
            with model.layer(index) as layer:
                for number, window in enumerate(windows):
                    given = hidden[number : number + 1].to(model.device)
                    hidden[number] = model.run(layer, index, given, window)[0]
            release_free_memory()
        with after_layers(model) as head:
            kept["probe"].copy_(head(hidden[0, : probe[0]].to(model.device))[1])
    report(len(model), len(model))


def _share_arguments(window: Window, first: Window) -> None:
    """Have a window refer to the first one's masks and positions where they are equal: one copy of them in memory."""
    for index, (mine, theirs) in enumerate(zip(window.arguments, first.arguments, strict=True)):
        if _equal(mine, theirs):
            window.arguments[index] = theirs


def _equal(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
        return one is other or torch.equal(one, other)
    if isinstance(one, (tuple, list)) and isinstance(other, (tuple, list)):
        return len(one) == len(other) and all(map(_equal, one, other))
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(_equal(one[key], other[key]) for key in one)
    return one is other or (isinstance(one, (int, float, str)) and one == other)
