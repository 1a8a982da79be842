"""`python -m gptqmodel_eora_ext.kernels.cpu --build`: compile ahead of time, for instance into an image."""

from __future__ import annotations

import argparse
import sys

from ..compiling import BuildError
from .build import ISAS, best_isa, build


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m gptqmodel_eora_ext.kernels.cpu", description=__doc__)
    parser.add_argument("--build", action="store_true", required=True, help="compile the kernels unless they are there")
    parser.parse_args()
    try:
        path = build()
    except BuildError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"{path}\nthis processor uses: {ISAS[best_isa()]}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
