"""The command `eora prune`."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import typer

from ..adapter.summary import summarize
from ..adapter.validate import validate_choice
from ..adapter.vocabulary import OBJECTIVES
from ..calibration import DEFAULT_SAMPLES, DEFAULT_SEQLEN, tokenized
from ..evaluate.sparsity import examine_model
from ..formats.sparsity import Pattern
from ..solve import METHODS, SPARSEGPT
from .options import (
    DEFAULT_GROUP_SIZE,
    QUANTIZED_BITS,
    BatchSize,
    Budget,
    Calibration,
    FactorBits,
    GroupSize,
    Model,
    Objective,
    PresetName,
    Rank,
    Rounds,
    Samples,
    Sensitivity,
    SeqLen,
    TrustRemoteCode,
    adapter_options,
    check_group_size,
    check_model,
    check_out,
    given,
    read_calibration,
)
from .printing import errors, fail, progress_bars, say
from .show import print_sparsity, print_summary

# Options that say what the adapter is.
OF_ADAPTER = ("rank", "budget", "preset", "sensitivity", "objective", "factor_bits", "rounds")


def prune(
    context: typer.Context,
    model: Model,
    output: Annotated[
        Path, typer.Argument(metavar="OUT", help="Folder for the pruned model; the adapter goes inside.")
    ],
    calibration: Calibration,
    method: Annotated[
        str,
        typer.Option(
            help="sparsegpt changes the weights that stay, so that the output changes least; wanda weighs by "
            "the size of inputs; magnitude looks at weights alone."
        ),
    ] = METHODS[0],
    pattern: Annotated[
        str, typer.Option(help="Of the zeros: 2:4, 4:8, or a share without a pattern, as 0.5 or 50%.")
    ] = "2:4",
    bits: Annotated[
        int | None,
        typer.Option(help="With sparsegpt, quantise the weights that are kept at once: 2, 3, 4 or 8. OUT is then a "
                          "checkpoint in GPTQ's format, whose zeros are exact."),
    ] = None,
    group_size: GroupSize = DEFAULT_GROUP_SIZE,
    rank: Rank = None,
    budget: Budget = None,
    preset: PresetName = None,
    sensitivity: Sensitivity = None,
    objective: Objective = OBJECTIVES[0],
    factor_bits: FactorBits = None,
    rounds: Rounds = None,
    adapter: Annotated[bool, typer.Option(help="Make an adapter; without, the model is pruned alone.")] = True,
    samples: Samples = DEFAULT_SAMPLES,
    seqlen: SeqLen = DEFAULT_SEQLEN,
    batch_size: BatchSize = 1,
    force: Annotated[bool, typer.Option(help="Write into a folder that is not empty.")] = False,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Prune a model, and compensate each module right after it is pruned."""
    with errors():
        validate_choice(method, METHODS, what="--method")
        Pattern.parse(pattern, what="--pattern")
    if bits is not None:
        _check_bits(bits, method)
        check_group_size(group_size)
    elif given(context, "group_size"):
        fail("--group-size is of scales, which weights that are not quantised do not have. Pass --bits as well.")
    chosen = adapter_options(rank, budget, objective, factor_bits, sensitivity, preset, rounds) if adapter else None
    for name in () if adapter else OF_ADAPTER:
        if given(context, name):
            fail(f"--no-adapter makes no adapter, and --{name.replace('_', '-')} says what it is to be. Leave one out.")
    check_model(model)
    check_out(output, force, model)
    texts = read_calibration(calibration)

    from ..hosts.jobs import PruneJob
    from ..hosts.registry import pruner
    from ..hosts.terminal import quiet

    start = time.perf_counter()
    with errors(), progress_bars() as bar, quiet():
        job = PruneJob(
            model=model,
            output=output,
            windows=tokenized(texts, model, samples, seqlen, trust_remote_code),
            method=method,
            pattern=pattern,
            bits=bits,
            group_size=group_size,
            adapter=chosen,
            batch_size=batch_size,
            trust_remote_code=trust_remote_code,
            report=bar("pruning layers"),
        )
        pruner(method)(job)
    pruned = examine_model(output)
    if pruned is not None:
        print_sparsity(pruned)
    if adapter:
        print_summary(summarize(output), time.perf_counter() - start)
    if bits is not None:
        say(f'Load it:  GPTQModel.load("{output}")')
        return
    say(f'Load it:  AutoModelForCausalLM.from_pretrained("{output}")')
    if adapter:
        say(f'     and  PeftModel.from_pretrained(model, "{output}/eora")')


def _check_bits(bits: int, method: str) -> None:
    """Fail unless pruning and quantising at once can be done so."""
    if bits not in QUANTIZED_BITS:
        fail(f"--bits must be one of {', '.join(map(str, QUANTIZED_BITS))}, got {bits}.")
    if method != SPARSEGPT:
        fail(f"--bits quantises as SparseGPT prunes; got --method {method}. Pass --method {SPARSEGPT}.")
