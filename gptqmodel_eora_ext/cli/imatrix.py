"""The command `eora imatrix`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..calibration import DEFAULT_SAMPLES, DEFAULT_SEQLEN, tokenized
from ..system.progress import counted
from .options import Calibration, Model, Samples, SeqLen, TrustRemoteCode, check_model, read_calibration
from .printing import errors, fail, progress_bars, say


def imatrix(
    model: Model,
    gguf: Annotated[Path, typer.Argument(help="The model's GGUF file, not quantised, which names the tensors.")],
    calibration: Calibration,
    output: Annotated[Path, typer.Option("--out", help="The file for `llama-quantize --imatrix`.")],
    samples: Samples = DEFAULT_SAMPLES,
    seqlen: SeqLen = DEFAULT_SEQLEN,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Measure an importance matrix for llama.cpp's quantiser, on the data that adapters are made with."""
    check_model(model, may_be_file=True)
    if not gguf.is_file():
        fail(f"there is no file `{gguf}`.")
    if output.is_dir() or output.resolve() == gguf.resolve():
        fail(f"`{output}` is {'a folder' if output.is_dir() else 'the model'}; name a file of its own to write.")
    texts = read_calibration(calibration)

    from ..hosts.jobs import ImatrixJob
    from ..hosts.registry import base_folder, imatrix_maker
    from ..hosts.terminal import quiet

    with errors(), progress_bars() as bar, quiet():
        model = base_folder(model)
        job = ImatrixJob(
            base=model,
            model=gguf,
            windows=tokenized(texts, model, samples, seqlen, trust_remote_code),
            output=output,
            source=calibration,
            trust_remote_code=trust_remote_code,
            bar=lambda title: counted(bar(title)),
        )
        count = imatrix_maker(gguf)(job)
    say(f"{count} tensors measured, written to {output}")
