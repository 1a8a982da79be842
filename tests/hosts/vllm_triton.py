"""vLLM's layers over the Triton kernels: run by `test_vllm.py` in its own process.

python -m pytest tests/hosts/vllm_triton.py                        on a GPU
TRITON_INTERPRET=1 python -m pytest tests/hosts/vllm_triton.py     anywhere
"""

from __future__ import annotations

import types

import pytest
import torch

from gptqmodel_eora_ext.hosts.vllm.parts import Part, Share
from gptqmodel_eora_ext.hosts.vllm.served import ServedLinear
from gptqmodel_eora_ext.kernels.reference import linear
from tests.kernels.on_device import DEVICE, packed_weight, random_factors, random_input

IN = 128


@pytest.fixture(scope="module")
def layer() -> ServedLinear:
    """Modules of two widths in one layer, of which the first two share launches."""
    weights = [packed_weight(2, 64, IN, 64, seed=1), packed_weight(2, 32, IN, 64, seed=2), packed_weight(4, 32, IN, 64)]
    factors = [random_factors(weights[0], 8), random_factors(weights[1], 4), None]
    parts = [
        Part(f"part{place}", Share(((0, weight.out_features),), (0, IN)), torch.device(DEVICE), weight, own)
        for place, (weight, own) in enumerate(zip(weights, factors, strict=True))
    ]
    # Its checkpoint's files are not asked for.
    return ServedLinear(types.SimpleNamespace(), parts, torch.randn(128, device=DEVICE))  # type: ignore[arg-type]


@pytest.mark.parametrize("rows", (1, 3))
def test_with_its_factors_without_and_with_others(layer: ServedLinear, rows: int) -> None:
    weights, own = [part.weight for part in layer.parts], [part.factors for part in layer.parts]
    others = [random_factors(weight, 4, seed=9) for weight in weights]
    x = random_input(rows, IN)
    for found, worn in (
        (layer(x), own),
        (layer.bare(x), [None] * 3),
        (layer.with_groups(x, layer.groups(others)), others),
    ):
        expected = torch.cat([linear(x, *pair) for pair in zip(weights, worn, strict=True)], dim=1)
        torch.testing.assert_close(found, expected + torch.cat(layer._biases), rtol=1e-3, atol=1e-3)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_in_a_cuda_graph(layer: ServedLinear) -> None:
    x = random_input(1, IN)
    layer(x)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = layer(x)
    other = random_input(1, IN, seed=7)
    x.copy_(other)
    graph.replay()
    torch.testing.assert_close(y, layer(other))
