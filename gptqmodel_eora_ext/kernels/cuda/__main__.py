"""`python -m gptqmodel_eora_ext.kernels.cuda --build`: compile ahead of time, for instance into an image."""

from __future__ import annotations

import argparse
import sys

import torch

from ..compiling import BuildError
from .build import build


def capability(text: str) -> tuple[int, int]:
    """``9.0`` as numbers."""
    major, minor = text.split(".")
    return int(major), int(minor)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m gptqmodel_eora_ext.kernels.cuda", description=__doc__)
    parser.add_argument("--build", action="store_true", required=True, help="compile the kernels unless they are there")
    parser.add_argument("--capability", type=capability, help="of the GPU, for instance 9.0; else this machine's")
    options = parser.parse_args()
    if options.capability is None and not torch.cuda.is_available():
        print("error: there is no GPU here: say for which, for instance --capability 9.0", file=sys.stderr)
        return 1
    try:
        print(build(options.capability or torch.cuda.get_device_capability()))
    except BuildError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
