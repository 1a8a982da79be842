"""How Hugging Face's modules are called in a GGUF file, and in which order their rows lie there."""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch

from ...formats.gguf import GGUFError, gguf_package
from ...formats.gguf.model import GGUFModel

EXPERT = re.compile(r"\.experts\.(\d+)\.")
# Some models wrap their language model in one more module; llama.cpp's converter leaves its name out.
WRAPPERS = ("language_model.",)


@dataclass(frozen=True)
class Place:
    """Where a module's weight lies.

    Attributes:
        tensor: name in the file (`blk.0.attn_q.weight`).
        expert: which part of a tensor of experts; None for a matrix.
    """

    tensor: str
    expert: int | None = None


class TensorNames:
    """gguf-py's own tables, for the architecture of a file.

    Args:
        model: the file.

    Raises:
        GGUFError: for an architecture that the package `gguf` does not know.
    """

    def __init__(self, model: GGUFModel) -> None:
        gguf = gguf_package()
        known = {name: number for number, name in gguf.MODEL_ARCH_NAMES.items()}
        if model.architecture not in known:
            raise GGUFError(
                f"`{model.path}` is of the architecture `{model.architecture}`, which the installed package `gguf` "
                f"does not know. Update `gguf`."
            )
        self._table = gguf.get_tensor_name_map(known[model.architecture], model.layers)

    def place(self, module: str) -> Place | None:
        """Where a module's weight lies, by its full name; None for a name that the tables do not hold."""
        found = EXPERT.search(module)
        plain = EXPERT.sub(".experts.", module)
        for name in (plain, *(plain.replace(wrapper, "", 1) for wrapper in WRAPPERS)):
            tensor = self._table.get_name(name)
            if tensor is not None:
                return Place(f"{tensor}.weight", int(found[1]) if found else None)
        return None


def rotary_order(rows: int, heads: int) -> torch.Tensor:
    """The order of q's and k's rows in files of the architecture `llama` and its kin.

    Hugging Face rotates the first half of a head against its second half; llama.cpp there rotates neighbours, so the
    halves are interleaved: row (h, j, s) of the file is row (h, s, j) of the model.

    Args:
        rows: of the weight.
        heads: that they make up.

    Returns:
        Indices into the model's rows, in the file's order.
    """
    return torch.arange(rows).view(heads, 2, rows // heads // 2).transpose(1, 2).reshape(-1)
