"""The command `eora`; one file a command."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from .._version import __version__
from .card import card
from .chat import chat
from .demo import demo
from .ensemble import ensemble
from .evaluate import evaluate
from .export import export
from .generate import generate
from .imatrix import imatrix
from .inspect import inspect
from .launch import several
from .plan import plan
from .printing import out
from .prune import prune
from .quantize import quantize
from .refine import refine
from .report import report
from .study import EXAMPLE as STUDY_EXAMPLE
from .study import study


class _App(typer.Typer):
    """The command; started by `torchrun`, it works together with the others."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with several():
            return super().__call__(*args, **kwargs)


app = _App(
    name="eora",
    help="Training-free low-rank adapters that win back what quantisation loses, for GPTQModel.",
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_show_locals=False,
)


@app.callback(invoke_without_command=True)
def _main(version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False) -> None:
    if version:
        out.print(__version__)
        raise typer.Exit


def _example(text: str) -> str:
    return f"Example:  eora {text}"


app.command(epilog=_example("quantize Qwen/Qwen3-8B out/qwen3-8b-2bit --bits 2 --rank 64 --calibration c4.jsonl"))(
    quantize
)
app.command(
    epilog=_example("prune Qwen/Qwen3-8B out/qwen3-8b-24 --pattern 2:4 --rank 64 --calibration c4.jsonl")
)(prune)
app.command(
    epilog=_example("generate Qwen/Qwen3-8B out/qwen3-8b-2bit --rank 64 --calibration c4.jsonl --out adapters/r64")
)(generate)
app.command(
    epilog=_example("refine out/qwen3-8b-2bit --base Qwen/Qwen3-8B --calibration c4.jsonl --tokens 160k")
)(refine)
app.command(epilog=_example("imatrix Qwen/Qwen3-8B qwen3-f16.gguf --calibration c4.jsonl --out imatrix.gguf"))(imatrix)
app.command(epilog=_example("inspect out/qwen3-8b-2bit --modules"))(inspect)
app.command(epilog=_example("plan Qwen/Qwen3-8B --calibration c4.jsonl --total 2.5bpw --out plan.json"))(plan)
app.command(epilog=_example("export out/qwen3-8b-2bit --peft adapters/plain"))(export)
app.command(
    name="eval",
    epilog=_example("eval out/qwen3-8b-2bit adapters/r64 --base Qwen/Qwen3-8B --text heldout.txt --task gsm8k"),
)(evaluate)
app.command(epilog=_example("report results/report.html"))(report)
app.add_typer(ensemble, name="ensemble")
app.command(epilog=_example("chat out/qwen3-8b-2bit"))(chat)
app.command(epilog=_example("card out/qwen3-8b-2bit --base-model Qwen/Qwen3-8B --data results/report.json"))(card)
app.command(epilog=_example("demo --out demo"))(demo)
app.command(epilog=STUDY_EXAMPLE)(study)
