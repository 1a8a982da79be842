"""What the commands of `eora` share: their options, and how they check, report and fail."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from ..adapter.errors import AdapterError
from ..adapter.options import AdapterOptions, as_flag
from ..adapter.presets import DEFAULT_BUDGET, DEFAULT_PRESET
from ..adapter.vocabulary import OBJECTIVES
from ..calibration import read_texts, windows
from ..plan import Plan

# Reports go to stdout; bars and notes to stderr, so that `--json` can be piped.
out = Console()
err = Console(stderr=True)

QUANTIZED_BITS = (2, 3, 4, 8)
GROUP_SIZES = (-1, 16, 32, 64, 128, 256, 512, 1024)
DEFAULT_GROUP_SIZE = 64
# Options of `quantize` that a plan names.
PLANNED_OPTIONS = (
    "bits", "group_size", "rank", "budget", "sensitivity", "objective", "factor_bits", "preset", "sym",
    "desc_act", "mse",
)  # fmt: skip

Model = Annotated[str, typer.Argument(help="Full-precision model: a folder, or a name on the Hugging Face hub.")]
Rank = Annotated[
    int | None, typer.Option(help="Components per module. 16 to 256 are usual. Without it, a budget is given out.")
]
Budget = Annotated[
    str | None,
    typer.Option(help="In place of --rank: bytes of all factors, as `300MB`, `0.25bpw` (bits per quantised weight) or "
                      f"`r32` (what a 16-bit rank 32 takes). Each module gets the rank that buys most. "
                      f"Without either, {DEFAULT_BUDGET}."),
]  # fmt: skip
Sensitivity = Annotated[
    str | None,
    typer.Option(help="For --budget, what an error is taken to cost: fisher or empirical (gradients), or relative; "
                      "uniform for one rank for all. By default as the preset says."),
]  # fmt: skip
PresetName = Annotated[
    str | None,
    typer.Option("--preset", help=f"fast, balanced or best: factor bits, sensitivity and rounds that go together; "
                                  f"{DEFAULT_PRESET} where neither rank nor budget is given."),
]  # fmt: skip
Rounds = Annotated[
    int | None, typer.Option(help="Times that each module is quantised, for its adapter the last time; default 1.")
]
Calibration = Annotated[
    str,
    typer.Option(help="Text (.txt), JSON lines (.jsonl, column `text`) or a dataset name (`allenai/c4:en`)."),
]
Samples = Annotated[int, typer.Option(help="Calibration windows.", min=1)]
SeqLen = Annotated[int, typer.Option(help="Tokens per calibration window.", min=16)]
BatchSize = Annotated[int, typer.Option(help="Windows per forward.", min=1)]
Objective = Annotated[str, typer.Option(help="What the factors minimise: eora, output, diagonal or svd.")]
FactorBits = Annotated[
    int | None,
    typer.Option(
        help="Bits of a stored factor: 16 (plain PEFT), 8 or 4 (packed). By default as the preset says, or 16."
    ),
]
GroupSize = Annotated[int, typer.Option(help="Weights per scale; -1 for a whole row.")]
PlanFile = Annotated[
    Path | None, typer.Option("--plan", help="A plan.json of `eora plan`: bits, ranks and grid of every module.")
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]


def fail(message: str) -> NoReturn:
    """Tell a mistake and leave with status 2."""
    err.print(f"[bold red]error:[/] {message}", highlight=False)
    raise typer.Exit(2)


@contextmanager
def errors() -> Iterator[None]:
    """Mistakes in the input end with one line; anything else keeps its traceback."""
    try:
        yield
    except (AdapterError, ValueError, NotImplementedError, NotADirectoryError) as error:
        fail(str(error))


@contextmanager
def progress_bars() -> Iterator[Callable[[str], Callable[[int, int], None]]]:
    """A bar with an estimate; yields a maker of `report(done, total)` callbacks."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
               TextColumn("left"), TimeRemainingColumn())  # fmt: skip
    with Progress(*columns, console=err) as progress:

        def start(what: str) -> Callable[[int, int], None]:
            task = progress.add_task(what, total=None)
            return lambda done, total: progress.update(task, completed=done, total=total)

        yield start


def adapter_options(
    rank: int | None,
    budget: str | None,
    objective: str,
    factor_bits: int | None,
    sensitivity: str | None,
    preset: str | None = None,
    rounds: int | None = None,
) -> dict[str, Any]:
    """What `EoRA` takes, checked before anything is loaded."""
    if rank is None and objective in OBJECTIVES[1:]:
        fail(f"--objective {objective} needs a --rank: under a budget, components of `{OBJECTIVES[0]}` are weighed.")
    asked: dict[str, Any] = {
        "rank": rank, "budget": budget, "objective": objective, "factor_bits": factor_bits,
        "sensitivity": sensitivity, "preset": preset, "rounds": rounds,
    }  # fmt: skip
    with errors():
        AdapterOptions.settle(**asked, label=as_flag)
    return {name: value for name, value in asked.items() if value is not None}


def counted(report: Callable[[int, int], None]) -> Callable[[Iterable[Any]], Iterator[Any]]:
    """Wrap a sequence so that ``report`` hears how far it is."""

    def wrap(items: Iterable[Any]) -> Iterator[Any]:
        known = list(items)
        for done, item in enumerate(known):
            report(done, len(known))
            yield item
        report(len(known), len(known))

    return wrap


def check_group_size(group_size: int) -> None:
    """Fail unless GPTQModel quantises in groups of this size."""
    if group_size not in GROUP_SIZES:
        fail(f"--group-size must be one of {', '.join(map(str, GROUP_SIZES))}, got {group_size}.")


def check_model(model: str) -> None:
    """Fail unless this is a model folder or has the form of a hub name."""
    path = Path(model)
    if path.is_dir() and not (path / "config.json").is_file():
        fail(f"`{model}` has no config.json; it is no model folder.")
    if not path.exists() and (model.startswith(("/", ".", "~")) or model.count("/") != 1):
        fail(f"there is no model folder `{model}`. Pass a folder, or a hub name like `Qwen/Qwen3-8B`.")


def check_out(folder: Path, force: bool) -> None:
    """Fail unless this is a folder that may be written into."""
    if folder.is_file():
        fail(f"`{folder}` is a file; pass a folder to write to.")
    if folder.is_dir() and any(folder.iterdir()) and not force:
        fail(f"`{folder}` is not empty. Choose another folder, or pass --force to write into it.")


def read_calibration(source: str) -> Any:
    """The documents of a source; fail where there are none."""
    with errors():
        return read_texts(source)


def tokenized(texts: Any, model: str, samples: int, seqlen: int, trust_remote_code: bool) -> list[dict[str, list[int]]]:
    """Calibration windows of documents, in the model's own tokens."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model, trust_remote_code=trust_remote_code)
    return windows(texts, tokenizer, samples=samples, seqlen=seqlen)


def read_plan(context: typer.Context, path: Path) -> Plan:
    """The plan of a file; fail where it is broken, or where another option says what a plan says."""
    for name in PLANNED_OPTIONS:
        source = context.get_parameter_source(name)
        if source is not None and source.name == "COMMANDLINE":
            fail(f"--plan says what --{name.replace('_', '-')} says; pass one of them.")
    with errors():
        return Plan.read(path)
