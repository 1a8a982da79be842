"""What the end-to-end tests share."""

import gc
from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(scope="module", autouse=True)
def without_compiling() -> Iterator[None]:
    """GPTQModel compiles its torch kernel's unpacking for every shape, for minutes in all; eager, it gives the same."""
    with torch.compiler.set_stance("force_eager"):
        yield


@pytest.fixture(scope="module", autouse=True)
def little_garbage() -> Iterator[None]:
    """Leave what imports have made out of garbage collection. Hosts collect after every module, for a second each time
    where the same libraries are imported that a test process imports."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()
