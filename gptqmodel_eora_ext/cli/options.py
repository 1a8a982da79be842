"""What the commands of `eora` share: their options, and how these are checked."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from ..adapter.options import AdapterOptions, as_flag
from ..adapter.presets import DEFAULT_BUDGET, DEFAULT_PRESET
from ..adapter.vocabulary import OBJECTIVES
from ..calibration import read_file, read_texts
from ..formats.autoround import BITS
from ..loop.resume import Keeping
from ..plan import Plan
from ..refine import RefineSettings
from ..system.kept import resume_folder
from .printing import errors, events, fail

QUANTIZED_BITS = (2, 3, 4, 8)
GROUP_SIZES = (-1, 16, 32, 64, 128, 256, 512, 1024)
DEFAULT_GROUP_SIZE = 64
# AutoRound's exports that hold an adapter beside them, and its own default of tuning steps.
FORMATS = ("auto_round", "auto_round:auto_gptq", "auto_gptq", "auto_round:auto_awq", "auto_awq")
ITERS = 200
# Options of `quantize` that a plan names.
PLANNED_OPTIONS = (
    "bits", "group_size", "rank", "budget", "sensitivity", "objective", "factor_bits", "preset", "sym",
    "desc_act", "mse",
)  # fmt: skip

# Options that change no result.
OF_NO_RESULT = ("force", "resume", "restart", "log_json")

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
    typer.Option(help="A file (text, JSON, JSON lines, CSV, TSV or Parquet, also gzip or Zstandard; rows of `text`, "
                      "`messages`, `conversations`, `instruction` or `input_ids`), or a dataset name, as "
                      "`allenai/c4:en`."),
]  # fmt: skip
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
RefineTokens = Annotated[
    str | None,
    typer.Option("--refine", help="Afterwards train the factors together on so many tokens of the calibration text, as "
                                  "`160k`, against the full-precision model; as `eora refine`, into `eora-refined`."),
]  # fmt: skip
TrustRemoteCode = Annotated[
    bool, typer.Option(help="Allow code that comes with the model or its tokenizer, from a folder or the hub.")
]
def _tell_events(wanted: bool) -> None:
    events.wanted = wanted


Resume = Annotated[
    bool,
    typer.Option("--resume/--no-resume", help="Keep finished layers beside what is written until it is, and go on "
                                              "after those that an interrupted run of the same command has left."),
]  # fmt: skip
Restart = Annotated[bool, typer.Option("--restart", help="Remove what an interrupted run has left, and begin anew.")]
LogJson = Annotated[
    bool,
    typer.Option("--log-json", callback=_tell_events, is_eager=True,
                 help="Progress, notes and errors as JSON lines on stderr, for schedulers."),
]  # fmt: skip
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]


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


def check_refine(tokens: str | None) -> None:
    """Fail unless this is nothing, or tokens enough to refine on."""
    if tokens is not None:
        with errors():
            RefineSettings.settle(tokens=tokens, label=lambda option: "--refine")


def check_group_size(group_size: int) -> None:
    """Fail unless GPTQModel quantises in groups of this size."""
    if group_size not in GROUP_SIZES:
        fail(f"--group-size must be one of {', '.join(map(str, GROUP_SIZES))}, got {group_size}.")


def check_model(model: str, *, may_be_file: bool = False) -> None:
    """Fail unless this is a model folder or has the form of a hub name.

    Args:
        model: what the user named.
        may_be_file: whether it may be a GGUF file, which `hosts.registry.base_folder` unpacks.
    """
    path = Path(model)
    if path.is_file() and not may_be_file:
        fail(f"`{model}` is a file. Pass the folder of the full-precision model, or its hub name.")
    if path.is_dir() and not (path / "config.json").is_file():
        fail(f"`{model}` has no config.json; it is no model folder.")
    if not path.exists() and (model.startswith(("/", ".", "~")) or model.count("/") != 1):
        fail(f"there is no model folder `{model}`. Pass a folder, or a hub name like `Qwen/Qwen3-8B`.")


def check_out(folder: Path, force: bool, *sources: str | Path) -> None:
    """Fail unless this is a folder that may be written into.

    Args:
        folder: to write to.
        force: whether it may hold something.
        sources: what is read from; nothing is written there, above or below, whatever ``force`` says.
    """
    for source in sources:
        check_apart(folder, source)
    if folder.exists() and not folder.is_dir():
        fail(f"`{folder}` is a file; pass a folder to write to.")
    if folder.is_dir() and any(folder.iterdir()) and not force:
        fail(f"`{folder}` is not empty. Choose another folder, or pass --force to write into it.")


def keeping_for(target: Path, resume: bool, restart: bool) -> Keeping | None:
    """Where the command that writes ``target`` keeps its state, which it has to remove; None with --no-resume."""
    if resume:
        return Keeping(resume_folder(target), begin_anew=restart, lasting=True)
    if restart:
        fail(
            "--restart removes what an interrupted run has left, and --no-resume looks for none. Leave one of them out."
        )
    return None


def request_of(context: typer.Context) -> dict[str, str]:
    """What the options ask, by which an interrupted command is recognised; those that change no result left out."""
    return {name: str(value) for name, value in sorted(context.params.items()) if name not in OF_NO_RESULT}


def check_apart(folder: Path, source: str | Path) -> None:
    """Fail where a folder to write to is one that is read from, lies in it, or holds it; links are followed."""
    if not Path(source).exists():
        return
    written, read = folder.resolve(), Path(source).resolve()
    if written == read or written in read.parents or read in written.parents:
        how = "is" if written == read else "lies in" if read in written.parents else "holds"
        fail(f"`{folder}` {how} `{source}`, which is read from and must stay as it is. Choose a folder apart from it.")


def read_calibration(source: str) -> Any:
    """The documents of a source; fail where there are none."""
    with errors():
        return read_texts(source)


def check_text(path: Path) -> None:
    """Fail unless this is a file that texts can be read from."""
    with errors():
        read_file(path)


def check_format(form: str, *widths: int) -> None:
    """Fail unless AutoRound has this export, for weights of these widths."""
    if form not in FORMATS:
        fail(f"--format must be one of {', '.join(FORMATS)}, got {form}.")
    served = BITS["awq" if "awq" in form else "gptq"]
    for bits in widths:
        if bits not in served:
            fail(f"--bits must be one of {', '.join(map(str, served))} in the format {form}, got {bits}.")


def given(context: typer.Context, name: str) -> bool:
    """Whether an option stands on the command line."""
    source = context.get_parameter_source(name)
    return source is not None and source.name == "COMMANDLINE"


def read_plan(context: typer.Context, path: Path) -> Plan:
    """The plan of a file; fail where it is broken, or where another option says what a plan says."""
    check_unplanned(context)
    with errors():
        return Plan.read(path)


def check_unplanned(context: typer.Context) -> None:
    """Fail where an option says what a plan says."""
    for name in PLANNED_OPTIONS:
        if given(context, name):
            fail(f"--plan says what --{name.replace('_', '-')} says; pass one of them.")
