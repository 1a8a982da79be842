"""`python -m tests.families STEP FOLDER TYPE …`: a step of `steps.py`, or `make`, for model types; a line for each."""

from __future__ import annotations

import gc
import importlib
import sys
import time
from contextlib import redirect_stdout
from functools import partial
from pathlib import Path

import torch

from .models import make
from .steps import STEPS, Found

# What a step imports, besides transformers.
HOSTS = {"gptqmodel": ("gptqmodel",), "without": ("gptqmodel",), "autoround": ("auto_round", "peft")}


def main(step: str, folder: Path, model_types: list[str]) -> None:
    # Hosts collect garbage after every module, and would go through all that imports have made each time.
    with redirect_stdout(sys.stderr):
        for host in HOSTS.get(step, ()):
            importlib.import_module(host)
    gc.freeze()
    for model_type in model_types:
        start = time.process_time()
        found = Found(folder, step, model_type)
        # Hosts print progress; only the lines of this script go to the standard output.
        with redirect_stdout(sys.stderr), torch.compiler.set_stance("force_eager"):
            if step == "make":
                found.attempt("made", partial(make, model_type, folder / "base" / model_type))
            else:
                found.attempt("step", partial(STEPS[step], folder, model_type, found))
        found.write()
        words = ", ".join(found.logits) or ("" if found.refused else "made")
        seconds = time.process_time() - start
        print(f"{step} {model_type} {seconds:.1f} s: {words}", *map(": ".join, found.refused.items()), sep="\n    ")
        sys.stdout.flush()


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), sys.argv[3:])
