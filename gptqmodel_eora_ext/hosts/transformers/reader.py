"""A checkpoint's modules as transformers loads them, one layer in memory at a time.

transformers loads a whole model. Here it is given a file that holds one layer's tensors alone, and what is missing
stays on the meta device, where it takes no memory. So the format's own reader of transformers unpacks the layer,
whatever it is, and neither its names nor its layout have to be known here.
"""

from __future__ import annotations

import json
import re
import shutil
import tempfile
import threading
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from ...formats.names import MODEL_CONFIG
from ...plan.checkpoint import skeleton

# The part of a checkpoint that is read together: up to the first number in a module's name, which is that of the layer.
LAYER = re.compile(r"(.*?\.\d+)\.")
# Formats that transformers turns into plain weights while it loads them, where it is told to. It does so by itself on a
# CPU, but not on a GPU.
DEQUANTISED_ON_LOADING = ("fp8", "mxfp4")
# What a weight is stored in that is not quantised.
FLOATING = ("BF16", "F16", "F32", "F64")
# Where nothing says how a checkpoint is quantised.
PLAIN = "plain"


class LayerReader:
    """Reads a checkpoint's modules. Safe to ask from several threads.

    In memory: one layer as the checkpoint stores it, and its tensors once more while it is read. The same goes for the
    folder of temporary files.

    Args:
        folder: the checkpoint's, with `config.json` and safetensors files.
        trust_remote_code: whether model code that comes with it may run.

    Attributes:
        folder: as given.
        method: `quant_method` of its config; `PLAIN` without.
        model: its architecture, all weights on the meta device.

    Raises:
        ValueError: for a folder without safetensors files. Pickles are not opened.
    """

    def __init__(self, folder: Path, *, trust_remote_code: bool = False) -> None:
        self.folder = folder
        self.method = quant_method(folder) or PLAIN
        self._files = {key: path for path in sorted(folder.glob("*.safetensors")) for key in _keys(path)}
        if not self._files:
            raise ValueError(
                f"EoRA: `{folder}` holds no *.safetensors file. Save the model with `save_pretrained`; other files "
                f"(pickles) are not opened, since they may run code."
            )
        self.model = skeleton(folder, trust_remote_code=trust_remote_code)
        self._trust = trust_remote_code
        self._owners = {owner for key in self._files for owner in _owners(key)}
        self._part: tuple[str, torch.nn.Module] | None = None
        self._lock = threading.RLock()

    def place(self, name: str) -> str | None:
        """What a module is called in the files, where prefixes may differ (`language_model.`); None if it is not there.

        Args:
            name: full module name.
        """
        part = part_of(name)
        for found in (part, *self._longer(part), *_shorter(part)):
            if found in self._owners:
                stored = found + name.removeprefix(part)
                return stored if stored in self._owners else None
        return None

    def inside(self, name: str) -> list[str]:
        """What the files hold in the layer of a module: paths inside the layer, without the tensors' own names."""
        place = self.place(part_of(name)) or part_of(name)
        found = (key.removeprefix(f"{place}.").rpartition(".")[0] for key in self._files if key.startswith(f"{place}."))
        return sorted({one for one in found if one})

    def is_dense(self, name: str) -> bool:
        """Whether the files hold a module's weight as plain numbers of 16 bits or more, with nothing but a bias."""
        place = self.place(name)
        tensors = {key.removeprefix(f"{place}.") for key in self._files if key.startswith(f"{place}.")}
        if "weight" not in tensors or not tensors <= {"weight", "bias"}:
            return False
        with safe_open(self._files[f"{place}.weight"], framework="pt") as file:
            return file.get_slice(f"{place}.weight").get_dtype() in FLOATING

    def tensors_of(self, name: str) -> list[str]:
        """Names of the tensors that the files hold for a module."""
        place = self.place(name)
        return sorted(key.removeprefix(f"{place}.") for key in self._files if key.startswith(f"{place}."))

    def module(self, name: str) -> torch.nn.Module:
        """A module with its weights on the CPU, as transformers loads it; the layer around it is kept until another's
        module is asked for.

        Raises:
            ValueError: for a format whose library is not installed, or that transformers cannot read here.
        """
        part = part_of(name)
        with self._lock:
            if self._part is None or self._part[0] != part:
                self._part = None
                self._part = part, self._load(part)
            return self._part[1].get_submodule(name)

    def shape(self, name: str) -> tuple[int, ...] | None:
        """Shape of a module's weight in the checkpoint's architecture, as it is held; None where it has no such one."""
        try:
            weight = self.model.get_submodule(name).weight
        except AttributeError:
            return None
        return tuple(weight.shape) if isinstance(weight, torch.Tensor) else None

    def _load(self, part: str) -> torch.nn.Module:
        from transformers import AutoConfig

        place = self.place(part)
        tensors: dict[str, torch.Tensor] = {}
        metadata = {"format": "pt"}
        for path in sorted(set(self._files.values())):
            with safe_open(path, framework="pt") as file:
                # torchao describes its tensors there.
                metadata |= file.metadata() or {}
                tensors |= {key: file.get_tensor(key) for key in file.keys() if key.startswith(f"{place}.")}  # noqa: SIM118
        config = AutoConfig.from_pretrained(self.folder, trust_remote_code=self._trust)
        described = getattr(config, "quantization_config", None)
        if self.method in DEQUANTISED_ON_LOADING:
            described = described if isinstance(described, dict) else described.to_dict()  # type: ignore[union-attr]
            config.quantization_config = {**described, "dequantize": True}
        with tempfile.TemporaryDirectory(prefix="eora-layer-") as scratch:
            save_file(tensors, Path(scratch) / "model.safetensors", metadata=metadata)
            # transformers looks there for how to generate text.
            shutil.copyfile(self.folder / MODEL_CONFIG, Path(scratch) / MODEL_CONFIG)
            try:
                return self._partial().from_pretrained(scratch, config=config, dtype="auto").eval()
            except (ImportError, RuntimeError, NotImplementedError) as error:
                raise ValueError(
                    f"EoRA: transformers does not open `{self.folder}` ({self.method}) here: {error} Install what it "
                    f"names, or use a machine that the format is for."
                ) from error

    def _partial(self) -> Any:
        """The model's class, but for tensors that the file lacks: they stay on the meta device.

        transformers would make them up and fill them with random numbers, after all others are loaded. That step is
        left out here. Where a release of it calls the step differently, the layer is still right, and takes more
        memory.
        """
        cls = type(self.model)
        without = staticmethod(lambda model, load_config, loading_info: loading_info)
        return type(cls.__name__, (cls,), {"__module__": cls.__module__, "_finalize_model_loading": without})

    def _longer(self, part: str) -> Iterable[str]:
        return (owner for owner in sorted(self._owners) if owner.endswith(f".{part}"))


def quant_method(folder: Path) -> str | None:
    """`quant_method` of a model's `config.json`, in lower case; None where that tells of no quantisation."""
    path = folder / MODEL_CONFIG
    if not path.is_file():
        return None
    found = json.loads(path.read_text(encoding="utf-8")).get("quantization_config")
    if not isinstance(found, dict) or not found:
        return None
    method = found.get("quant_method")
    if method is None and (found.get("load_in_4bit") or found.get("load_in_8bit")):
        method = "bitsandbytes"
    return str(method or "unnamed").lower()


def part_of(name: str) -> str:
    """What a module is read together with: its layer, or the module alone where it is in none."""
    found = LAYER.match(f"{name}.")
    return found[1] if found else name


def _keys(path: Path) -> list[str]:
    with safe_open(path, framework="pt") as file:
        return list(file.keys())


def _owners(key: str) -> Iterator[str]:
    """Paths of all modules around a tensor."""
    while key := key.rpartition(".")[0]:
        yield key


def _shorter(part: str) -> Iterator[str]:
    """A layer's name without its first components, down to the list that it is in and its number."""
    while part.count(".") > 1:
        part = part.partition(".")[2]
        yield part
