"""What the end-to-end tests share."""

from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(scope="module", autouse=True)
def without_compiling() -> Iterator[None]:
    """GPTQModel compiles its torch kernel's unpacking for every shape, for minutes in all; eager, it gives the same."""
    with torch.compiler.set_stance("force_eager"):
        yield
