"""The command `eora inspect`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from ..adapter.summary import find_adapter, summarize
from ..evaluate.kernel_report import MANY_ROWS, kernel_report
from ..evaluate.sparsity import examine_model
from .options import Json
from .printing import errors, out
from .show import print_sparsity, print_summary

WORST_MODULES = 10


def inspect(
    path: Annotated[Path, typer.Argument(help="A checkpoint with an adapter, a pruned model, or an adapter folder.")],
    modules: Annotated[bool, typer.Option("--modules", help="List every module, not only the worst.")] = False,
    kernels: Annotated[
        bool, typer.Option("--kernels", help="List which kernel multiplies each module here, and why not a faster one.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Tell what an adapter is: ranks, bytes, objective, calibration, versions, error before and after per module.

    Of a pruned model: its zeros, whether they keep their pattern, and what that would take in a layout without zeros.
    """
    with errors():
        pruned = examine_model(path) if path.is_dir() else None
        if pruned is not None and find_adapter(path, required=False) is None:
            if as_json:
                out.print_json(json.dumps({"sparsity": pruned.as_json()}))
            else:
                print_sparsity(pruned)
            return
        summary = summarize(path)
        rows = kernel_report(path, summary) if kernels else []
    if as_json:
        listed: dict[str, Any] = {"kernels": [row.as_json() for row in rows]} if kernels else {}
        if pruned is not None:
            listed["sparsity"] = pruned.as_json()
        out.print_json(json.dumps({**summary.as_json(), **listed}))
        return
    if pruned is not None:
        print_sparsity(pruned)
    print_summary(summary)
    if kernels:
        table = Table(
            "module", "out × in", "bits", "group", "rank", "one row", f"{MANY_ROWS} rows", "why not a faster one"
        )
        for row in rows:
            table.add_row(row.module, f"{row.out_features} × {row.in_features}", str(row.bits), str(row.group_size),
                          str(row.rank), row.one_row, row.many_rows, row.reason)  # fmt: skip
        out.print(table)
        return
    worst = sorted(summary.modules.items(), key=lambda item: -item[1]["error_after"] / (item[1]["signal"] or 1))
    if not worst:
        if summary.details.get("refinement"):
            out.print("Refined by what the whole model loses: errors of single modules are not known.")
        else:
            out.print("No eora.json: another tool made this adapter, so errors are not known.")
        return
    shown = worst if modules else worst[:WORST_MODULES]
    table = Table("module", "rank", "tokens", "error before", "after", "left",
                  title=None if modules else "Largest errors",
                  caption="error: E‖ΔW x‖² / E‖W x‖², the output's relative error on calibration data")  # fmt: skip
    for name, report in shown:
        signal, before = report["signal"] or 1, report["error_before"]
        left = f"{report['error_after'] / before:.0%}" if before else "-"
        table.add_row(name, str(report["rank"]), str(report["tokens"]), f"{before / signal:.2%}",
                      f"{report['error_after'] / signal:.2%}", left)  # fmt: skip
    out.print(table)
