"""Which host serves what is asked: commands and the evaluation come here, and name no host.

Every host's folder has a `serves.py` with some of the functions below (`quantizer`, `pruner`, `adapter_maker`,
`loader`, `planner`, `trainee`, `file_refiner`, `layer_loop`, `full_precision`, `base_folder`, `imatrix_maker`,
`type_planner`, `exporter`). Each of them returns what serves the case, or None where the host does not serve it. Hosts
are asked in the order of `HOSTS`, and a host's library is imported only when the host is asked.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

from ..refine import Trainee
from .jobs import (
    AdapterJob,
    Compensated,
    Exported,
    ExportJob,
    FileRefiner,
    FullPrecision,
    ImatrixJob,
    Loader,
    LoopJob,
    PruneJob,
    QuantizeJob,
    TypePlanJob,
    TypePlanned,
)

# The hosts' folders, in the order in which they are asked.
HOSTS = ("llamacpp", "transformers", "gptqmodel", "autoround")


def quantizer(name: str) -> Callable[[QuantizeJob], Path]:
    """What quantises by ``name`` ("gptq", "autoround"); it returns the checkpoint's folder.

    Raises:
        ValueError: for a name that no host serves.

    Example:
        >>> job = QuantizeJob("Qwen/Qwen3-8B", Path("out"), windows, {"bits": 2, "group_size": 64}, {"rank": 64})
        >>> folder = quantizer("gptq")(job)
    """
    return _first("quantizer", name)


def pruner(method: str) -> Callable[[PruneJob], Path]:
    """What prunes by ``method`` ("sparsegpt", "wanda", "magnitude"); it returns the pruned model's folder.

    Raises:
        ValueError: for a name that no host serves.
    """
    return _first("pruner", method)


def adapter_maker(checkpoint: Path) -> Callable[[AdapterJob], Path]:
    """What makes adapters for a finished checkpoint; it returns the adapter's folder.

    Raises:
        ValueError: for a checkpoint that no host serves.
    """
    return _first("adapter_maker", checkpoint)


def loader(checkpoint: Path) -> Loader:
    """What loads a checkpoint.

    Raises:
        ValueError: for a checkpoint that no host serves.
    """
    return _first("loader", checkpoint)


def trainee(checkpoint: Path) -> Callable[..., Trainee]:
    """What opens a checkpoint to train an adapter for it, from its folder and, by keyword, `trust_remote_code` and
    `device`.

    Raises:
        ValueError: for a checkpoint that no host serves.
    """
    return _first("trainee", checkpoint)


def file_refiner(model: Path) -> FileRefiner:
    """What refines an adapter over a quantised file of a host's own (GGUF).

    Raises:
        ValueError: for a file that no host serves.
    """
    return _first("file_refiner", model)


def planner(name: str) -> Callable[[str, Mapping[str, Any], bool], FullPrecision]:
    """What opens a model to plan for the quantiser ``name``, from the model, the quantiser's settings, and whether
    model code from the hub may run. AutoRound's settings may tell `iters`, the steps of its trial on a few layers.

    Raises:
        ValueError: for a name that no host serves.
    """
    return _first("planner", name)


def layer_loop(base: str) -> Callable[[LoopJob], Compensated]:
    """What runs a full-precision model layer by layer and compensates quantised weights that come from elsewhere.

    Raises:
        ValueError: for a model that no host serves.
    """
    return _first("layer_loop", base)


def full_precision(base: str) -> Callable[[str, bool], FullPrecision]:
    """What opens a full-precision model in float32, from its name and whether model code from the hub may run.

    Raises:
        ValueError: for a model that no host serves.
    """
    return _first("full_precision", base)


def base_folder(base: str) -> str:
    """The folder of a full-precision model that lies in a file of a host's own (GGUF); any other name as it is.

    Raises:
        ValueError: for a file that no host unpacks.
    """
    path = Path(base)
    if not path.is_file():
        return base
    folder: str = _first("base_folder", path)(path)
    return folder


def imatrix_maker(model: Path) -> Callable[[ImatrixJob], int]:
    """What measures an importance matrix for a file; it returns the number of tensors in it.

    Raises:
        ValueError: for a file that no host serves.
    """
    return _first("imatrix_maker", model)


def type_planner(host: str) -> Callable[[TypePlanJob], TypePlanned]:
    """What plans types and ranks for a host's files.

    Raises:
        ValueError: for a name that no host serves.
    """
    return _first("type_planner", host)


def exporter(like: Path) -> Callable[[ExportJob], Exported]:
    """What writes our checkpoints and adapters in the format of a file.

    Raises:
        ValueError: for a file that no host serves.
    """
    return _first("exporter", like)


def _first(offer: str, asked: Any) -> Any:
    """What the first host that serves ``asked`` returns from the function ``offer`` of its `serves.py`."""
    for host in HOSTS:
        offered = getattr(import_module(f".{host}.serves", __package__), offer, None)
        if offered is not None and (found := offered(asked)) is not None:
            return found
    raise ValueError(f"No {offer.replace('_', ' ')} for `{asked}` among {', '.join(HOSTS)}.")
