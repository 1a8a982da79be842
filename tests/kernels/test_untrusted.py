"""Files that are damaged or made to do harm: a named error or the right result, never a read past a tensor's end.

`make asan` runs this file and the kernels' tests once more under AddressSanitizer, which sees what a test cannot.
"""

from __future__ import annotations

import ctypes
import itertools
import json
import random
import resource
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from gptqmodel_eora_ext.adapter.factors import ModuleFactors
from gptqmodel_eora_ext.adapter.folder import AdapterError, AdapterFolder
from gptqmodel_eora_ext.adapter.save import save_adapter
from gptqmodel_eora_ext.formats.factors import Factors, QuantizedFactor
from gptqmodel_eora_ext.formats.names import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from gptqmodel_eora_ext.formats.packed_weights import LayoutError, PackedWeight
from gptqmodel_eora_ext.kernels.cpu.build import FAULTS, best_isa, library, require_fine
from gptqmodel_eora_ext.kernels.cpu.factors import repack_factors
from gptqmodel_eora_ext.kernels.cpu.linear import _MEMORY, CpuLinear, _Linear
from gptqmodel_eora_ext.kernels.cpu.repack import repack_weight
from gptqmodel_eora_ext.kernels.fused import FusedLinear
from gptqmodel_eora_ext.kernels.reference import linear
from tests.kernels.cases import packed_weight, random_factors, random_input

pytestmark = pytest.mark.skipif(library() is None, reason="no C++ compiler")

NAME = "model.layers.0.mlp.down_proj"
OUT, IN, RANK = 40, 200, 6
# Ranks of an ensemble's members, RANK together.
MEMBERS = (2, 0, 4)
# What a number of a header may say instead.
NUMBERS: tuple[Any, ...] = (
    0, -1, 1, 2, 3, 5, 6, 7, 8, 16, 32, 40, 63, 64, 199, 200, 201, 2**31 - 1, 2**31, 2**40, 2**63, 10**30, 1e300, 7.5,
    float("inf"), float("nan"), True, None, "8", [8],
)  # fmt: skip
DTYPES = (torch.uint8, torch.int8, torch.int32, torch.int64, torch.float16, torch.bfloat16, torch.float32, torch.bool)
ROUNDING = 1e-5
# Faults that `eora_check` alone looks for: what is read as an index, once.
INDEX_FAULTS = (FAULTS.index("starts of segments"), FAULTS.index("order of inputs"))
# A number of a header that were believed would take gigabytes.
MOST_MEMORY_KIB = 500 << 10


def reshaped(tensor: torch.Tensor, rng: random.Random) -> torch.Tensor:
    """The tensor in another shape: some numbers fewer, more, or in another order."""
    flat = tensor.reshape(-1)
    along = rng.randrange(max(tensor.ndim, 1))
    ways: list[Callable[[], torch.Tensor]] = [
        lambda: flat,
        lambda: tensor[None],
        lambda: tensor.reshape(*tensor.shape, 1),
        lambda: flat[0],
        lambda: tensor.mT if tensor.ndim == 2 else flat[:-1],
        lambda: tensor.narrow(along, 0, rng.randrange(tensor.shape[along])),
        lambda: torch.cat([tensor] * rng.randrange(2, 4), along),
        lambda: torch.cat([tensor, tensor.narrow(along, 0, 1)], along),
        lambda: flat[:0],
        lambda: tensor[:1],
    ]
    return rng.choice(ways)().contiguous()


def recast(tensor: torch.Tensor, rng: random.Random) -> torch.Tensor:
    """The tensor in another dtype: its values, or its bytes read as others."""
    dtype = rng.choice([one for one in DTYPES if one != tensor.dtype])
    if rng.random() < 0.5 and dtype != torch.bool and tensor.shape[-1] * tensor.element_size() % dtype.itemsize == 0:
        return tensor.contiguous().view(dtype)
    return tensor.to(dtype)


def other_values(tensor: torch.Tensor, rng: random.Random) -> torch.Tensor:
    """The tensor with other numbers, of which only indices can do harm."""
    if tensor.is_floating_point():
        return tensor * rng.choice([0, -1, 1e4])
    bounds = torch.iinfo(tensor.dtype)
    return torch.full_like(tensor, rng.choice([bounds.min, bounds.max, -1 if bounds.min else 1, 0, 3]))


DAMAGES = (reshaped, recast, other_values)


def same(y: torch.Tensor, expected: torch.Tensor) -> bool:
    return torch.allclose(y.double(), expected, rtol=ROUNDING, atol=ROUNDING * float(expected.abs().max()))


# Packed factors ---------------------------------------------------------------------------------------------------


def write(folder: Path, bits: int) -> PackedWeight:
    """An adapter of one module with packed factors, and the weight that it belongs to."""
    weight = packed_weight(4, OUT, IN, 64)
    factors = random_factors(weight, RANK, bits)
    down, up = factors.down, factors.up
    assert isinstance(down, QuantizedFactor) and isinstance(up, QuantizedFactor)
    made = ModuleFactors(
        lora_A=down.dequantize(), lora_B=up.dequantize().T.contiguous(), requested_rank=RANK, tokens=1, signal=1.0,
        error_before=1.0, error_after=0.5, packed=(down, up),
    )  # fmt: skip
    save_adapter(folder, {NAME: made}, base_model="base", module_names=[NAME], details={"objective": "eora"})
    return weight


def multiply(folder: Path, weight: PackedWeight) -> list[str]:
    """Read the adapter, multiply with it, and compare with the oracle over what was read: names of the modules."""
    opened = AdapterFolder.open(folder)
    names = []
    for name, read in opened.factors(list(opened.keys)):
        names.append(name)
        factors = Factors(*read.packed) if read.packed else Factors(read.lora_A, read.lora_B.T)
        factors.check(weight)
        x = random_input(1, IN)
        y = FusedLinear(repack_weight(weight), factors)(x)
        assert same(y, linear(x.double(), weight, factors, accumulate=torch.float64))
    return names


def damage_tensor(folder: Path, rng: random.Random) -> str:
    path = folder / ADAPTER_WEIGHTS
    tensors = load_file(path)
    key, damage = rng.choice(sorted(tensors)), rng.choice(DAMAGES)
    tensors[key] = damage(tensors[key], rng)
    save_file(tensors, path, metadata={"features": json.dumps({NAME: [IN, OUT]})})
    return f"{key}: {damage.__name__} {tensors[key].dtype} {list(tensors[key].shape)}"


def damage_header(folder: Path, rng: random.Random) -> str:
    number = rng.choice(NUMBERS)
    what = rng.choice(["in", "out", "factor_bits", "factor_group_size", "r", "rank_pattern"])
    if what in ("in", "out"):
        path = folder / ADAPTER_WEIGHTS
        features = [number, OUT] if what == "in" else [IN, number]
        save_file(load_file(path), path, metadata={"features": json.dumps({NAME: features})})
    else:
        path = folder / ADAPTER_CONFIG
        config = json.loads(path.read_text())
        config[what] = {NAME: number} if what == "rank_pattern" else number
        path.write_text(json.dumps(config))
    return f"{what} = {number!r}"


def damage_file(folder: Path, rng: random.Random) -> str:
    path = folder / ADAPTER_WEIGHTS
    content = bytearray(path.read_bytes())
    if rng.random() < 0.5:
        length = rng.randrange(len(content))
        path.write_bytes(content[:length])
        return f"cut at {length}"
    header = 8 + int.from_bytes(content[:8], "little")
    place, byte = rng.randrange(header), rng.randrange(256)
    content[place] = byte
    path.write_bytes(content)
    return f"byte {place} = {byte}"


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("damage", [damage_tensor, damage_header, damage_file])
def test_packed_factors(tmp_path: Path, bits: int, damage: Callable[[Path, random.Random], str]) -> None:
    refused = 0
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for seed in range(120):
        folder = tmp_path / str(seed)
        weight = write(folder, bits)
        told = damage(folder, random.Random(seed))
        try:
            multiply(folder, weight)
        except (AdapterError, LayoutError) as error:
            refused += 1
            assert "dapter" in str(error), told
        except Exception as error:
            raise AssertionError(f"{told}: {error!r}") from error
    assert refused > 60
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < MOST_MEMORY_KIB


@pytest.mark.parametrize("bits", [8, 4])
def test_undamaged_factors(tmp_path: Path, bits: int) -> None:
    """The same files without the damage are read, and compute what the oracle does."""
    assert multiply(tmp_path, write(tmp_path, bits)) == [NAME]


def test_a_message_names_what_was_found_and_what_to_do(tmp_path: Path) -> None:
    weight = write(tmp_path, 8)
    path = tmp_path / ADAPTER_WEIGHTS
    tensors = load_file(path)
    key = f"base_model.model.{NAME}.lora_A.qweight"
    tensors[key] = tensors[key][:, :1].contiguous()
    save_file(tensors, path, metadata={"features": json.dumps({NAME: [IN, OUT]})})
    with pytest.raises(AdapterError, match=rf"{NAME}.*lora_A: the shape of the codes should be \[6, 200\].*\[6, 1\]"):
        multiply(tmp_path, weight)


@pytest.mark.parametrize(
    ("lora_A", "told"),
    [
        (torch.zeros(RANK * IN), r"lora_A\.weight` as torch\.float32 \(1200,\); expected a matrix"),
        (torch.zeros(RANK, IN, dtype=torch.int64), r"lora_A\.weight` as torch\.int64 .*; expected a matrix"),
    ],
)
def test_factors_that_are_no_matrices(tmp_path: Path, lora_A: torch.Tensor, told: str) -> None:
    weight = packed_weight(4, OUT, IN, 64)
    made = ModuleFactors(torch.zeros(RANK, IN), torch.zeros(OUT, RANK), RANK, 1, 1.0, 1.0, 0.5)
    save_adapter(tmp_path, {NAME: made}, base_model="base", module_names=[NAME], details={})
    path = tmp_path / ADAPTER_WEIGHTS
    tensors = load_file(path)
    tensors[f"base_model.model.{NAME}.lora_A.weight"] = lora_A
    save_file(tensors, path)
    with pytest.raises(AdapterError, match=told):
        multiply(tmp_path, weight)


# Packed weights ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_packed_weights(bits: int) -> None:
    good = packed_weight(bits, OUT, IN, 64, sym=False, desc_act=True)
    refused, x = 0, random_input(2, IN)
    for seed in range(200):
        rng = random.Random(seed)
        if rng.random() < 0.7:
            what = rng.choice(["qweight", "qzeros", "scales", "g_idx"])
            changed = rng.choice(DAMAGES)(getattr(good, what), rng)
            told = f"{what}: {changed.dtype} {list(changed.shape)}"
        else:
            what, changed = rng.choice(["bits", "group_size", "in_features", "out_features"]), rng.choice(NUMBERS)
            told = f"{what} = {changed!r}"
        try:
            weight = replace(good, **{what: changed})
            y = FusedLinear(repack_weight(weight), None)(x)
        except LayoutError as error:
            assert str(error).startswith("weight: "), told
            refused += 1
            continue
        except Exception as error:
            raise AssertionError(f"{told}: {error!r}") from error
        wanted = linear(x.double(), weight, accumulate=torch.float64)
        finite = wanted.isfinite()
        assert same(y[finite], wanted[finite]) if finite.any() else True, told
    assert 60 < refused < 200


def test_factors_of_another_weight() -> None:
    weight, other = packed_weight(2, OUT, IN, 64), packed_weight(2, OUT, IN + 64, 64)
    with pytest.raises(LayoutError, match="factors are for out × in = 40 × 264, the weight is 40 × 200"):
        FusedLinear(repack_weight(weight), random_factors(other, 4))
    with pytest.raises(LayoutError, match=r"the bias should have length 40, found \[1\]"):
        FusedLinear(repack_weight(weight), None, torch.ones(1))


# The compiled functions -------------------------------------------------------------------------------------------


def entries(layer: CpuLinear, x: torch.Tensor, y: torch.Tensor) -> dict[str, Callable[[], int]]:
    """Every compiled function that takes a layer."""
    kernels, memory = layer.kernels, (x.data_ptr(), x.nbytes)
    one, out = (ctypes.c_void_p * 1)(layer.address), (y.data_ptr(), y.nbytes)
    tile = torch.empty(IN, 48)
    t = torch.zeros(len(x), RANK, dtype=torch.bfloat16)
    alone = torch.zeros(len(x), RANK)
    halves = x.to(torch.bfloat16)
    y_halves = torch.empty(len(x), OUT, dtype=torch.bfloat16)
    weights, read = torch.ones(len(x), len(MEMBERS)), torch.ones(len(MEMBERS))

    def of_members(tensor: torch.Tensor) -> tuple[int | None, int]:
        # Asked for in each call, which keeps the tensor alive until then.
        return (tensor.data_ptr(), tensor.nbytes) if layer._struct.members else (None, 0)

    def linears() -> int:
        return kernels.eora_linears(one, 1, *memory, 0, len(x), *of_members(weights), *out, best_isa(), 1)

    def dequantize() -> int:
        return kernels.eora_dequantize(layer.address, 0, 3, tile.data_ptr(), tile.nbytes, 48, best_isa(), 1)

    def matmul() -> int:
        return kernels.eora_matmul(layer.address, halves.data_ptr(), halves.nbytes, t.data_ptr(), t.nbytes, len(x),
                                   *of_members(read), y_halves.data_ptr(), y_halves.nbytes, OUT, 1)  # fmt: skip

    def components() -> int:
        return kernels.eora_components(one, 1, *memory, 0, len(x), alone.data_ptr(), alone.nbytes, best_isa(), 1)

    return {
        "check": lambda: kernels.eora_check(layer.address),
        "linears": linears,
        "components": components,
        "dequantize": dequantize,
        "matmul": matmul,
    }


@pytest.mark.parametrize("factor_bits", [16, 8, 4])
@pytest.mark.parametrize("group_size", [64, 40])
def test_sizes_that_the_compiled_functions_are_told(factor_bits: int, group_size: int) -> None:
    """Each number of the struct is made another: all functions refuse it, or all stay within their memory."""
    weight = packed_weight(3, OUT, IN, group_size, sym=False)
    repacked = repack_weight(weight)
    factors = repack_factors(replace(random_factors(weight, RANK, factor_bits), members=MEMBERS))
    x, y = random_input(2, IN), torch.empty(2, OUT)
    numbers = [name for name, _ in _Linear._fields_ if name not in _MEMORY]
    told: set[str] = set()
    for field, number in itertools.product(numbers, (0, 1, -1, 2, 7, 47, 64, 2**30, 2**31 - 1)):
        layer = CpuLinear(repacked, factors, torch.ones(OUT))
        if getattr(layer._struct, field) == number:
            continue
        setattr(layer._struct, field, number)
        faults = {name: call() for name, call in entries(layer, x, y).items()}
        if faults["check"] and faults["check"] not in INDEX_FAULTS:
            assert all(faults.values()), (field, number, faults)
        if faults["check"]:
            told.add(field)
    unread = {"down_scales_bytes", "up_scales_bytes"} if factor_bits == 16 else set()
    unread |= {"order_bytes"} if repacked.order is None else set()
    assert {f"{name}_bytes" for name in _MEMORY} - unread <= told
    assert {"bits", "in_features", "out_features", "segments", "units", "strips", "members"} <= told


def test_indices_that_the_compiled_functions_are_told() -> None:
    weight = packed_weight(2, OUT, IN, 40, desc_act=True)
    repacked = repack_weight(weight)
    assert repacked.order is not None
    for index, value in ((0, IN), (3, -2), (5, 2**31 - 1)):
        order = repacked.order.clone()
        order[index] = value
        with pytest.raises(LayoutError, match="layer: the compiled kernels refuse order of inputs"):
            CpuLinear(replace(repacked, order=order))
    for index, value in ((0, 1), (2, 10**6), (-1, 1)):
        starts = repacked.starts.clone()
        starts[index] = value
        with pytest.raises(LayoutError, match=r"refuse (starts of segments|features, rank or units|codes)"):
            CpuLinear(replace(repacked, starts=starts))


def test_what_a_call_is_handed_is_checked() -> None:
    weight = packed_weight(2, OUT, IN, 64)
    layer, x, y = CpuLinear(repack_weight(weight)), random_input(2, IN), torch.empty(2, OUT)
    refusals = [
        entries(layer, x[:, :-1].contiguous(), y)["linears"](),
        entries(layer, x, y[:, :-1].contiguous())["linears"](),
        layer.kernels.eora_check(layer.address),
    ]
    assert [FAULTS[fault] for fault in refusals] == ["x", "y", ""]
    with pytest.raises(LayoutError, match=r"q_proj: the compiled kernels refuse x: .* Load the checkpoint"):
        require_fine(refusals[0], "q_proj")
