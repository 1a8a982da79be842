"""GGUF files: headers that lie, types against gguf-py, adapters against gguf-py's reader."""

from __future__ import annotations

import struct
import sys
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gptqmodel_eora_ext.formats.gguf import GGUFError
from gptqmodel_eora_ext.formats.gguf.blocks import GGUF_LAYOUT, from_blocks, to_blocks
from gptqmodel_eora_ext.formats.gguf.header import KEPT_ARRAY, read_header
from gptqmodel_eora_ext.formats.gguf.lora import LoraPair, read_lora, read_lora_header, write_lora
from gptqmodel_eora_ext.formats.gguf.model import GGUFModel, read_tensor
from gptqmodel_eora_ext.formats.sizes import ModuleShape, factor_bytes
from gptqmodel_eora_ext.solve.quantized import quantize_factor

TYPES = ("F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "TQ1_0", "TQ2_0")
# gguf-py dequantises these and cannot quantise them; any bytes are a block of them.
BYTES_ONLY = ("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ1_S", "IQ4_XS")


def write(path: Path, tensors: dict[str, tuple[np.ndarray, str]], kind: str = "model", **texts: str) -> Path:
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_type(kind)
    writer.add_block_count(1)
    writer.add_array("kept", [3, 4])
    writer.add_array("long", list(range(KEPT_ARRAY + 1)))
    writer.add_array("words", ["a", "bc"])
    for key, value in texts.items():
        writer.add_string(key, value)
    for name, (values, label) in tensors.items():
        number = gguf.GGMLQuantizationType[label]
        raw = values if values.dtype == np.uint8 else gguf.quants.quantize(values, number)
        writer.add_tensor(name, raw, raw_dtype=number)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture
def file(tmp_path: Path) -> Path:
    generator = np.random.default_rng(0)
    tensors = {f"blk.0.{kind}": (generator.standard_normal((6, 256), dtype=np.float32), kind) for kind in TYPES}
    for kind in BYTES_ONLY:
        nbytes = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]][1]
        tensors[f"blk.0.{kind}"] = (generator.integers(0, 64, (6, nbytes), dtype=np.uint8), kind)
    return write(tmp_path / "model.gguf", tensors)


def test_every_type_is_read_as_gguf_py_reads_it(file: Path) -> None:
    model = GGUFModel(file)
    for tensor in gguf.GGUFReader(file).tensors:
        expected = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        found = model.read(tensor.name)
        assert found.dtype == torch.float32 and found.shape == (6, 256)
        np.testing.assert_array_equal(found.numpy(), expected)
        np.testing.assert_array_equal(model.read(tensor.name, [4, 1]).numpy(), expected[[4, 1]])


def test_short_arrays_are_kept_and_long_ones_passed_over(file: Path) -> None:
    header = read_header(file)
    assert header.fields["kept"] == (3, 4) and "long" not in header.fields and "words" not in header.fields
    assert header.architecture == "llama" and GGUFModel(file).layers == 1


def test_three_dimensions_are_read_expert_by_expert(tmp_path: Path) -> None:
    values = np.random.default_rng(0).standard_normal((3, 4, 64), dtype=np.float32)
    model = GGUFModel(write(tmp_path / "m.gguf", {"blk.0.ffn_up_exps.weight": (values, "Q8_0")}))
    for expert in range(3):
        found = model.read("blk.0.ffn_up_exps.weight", expert=expert).numpy()
        np.testing.assert_allclose(found, values[expert], atol=0.05)
    with pytest.raises(GGUFError, match="3 dimensions"):
        model.read("blk.0.ffn_up_exps.weight")


def test_a_file_cut_anywhere_is_refused(file: Path, tmp_path: Path) -> None:
    whole = file.read_bytes()
    cut = tmp_path / "cut.gguf"
    for length in (0, 3, 4, 20, 24, 60, 200, len(whole) // 2, len(whole) - 33):
        cut.write_bytes(whole[:length])
        with pytest.raises(GGUFError, match="cut"):
            read_header(cut)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(place=st.integers(0, 2000), value=st.integers(0, 255), count=st.integers(1, 8))
def test_a_broken_header_is_refused_or_read(file: Path, place: int, value: int, count: int) -> None:
    """Whatever stands in the header: an error that names the file, or a header within the file; nothing else."""
    broken = bytearray(file.read_bytes())
    broken[place : place + count] = bytes([value]) * count
    other = file.with_name("broken.gguf")
    other.write_bytes(broken)
    try:
        header = read_header(other)
    except GGUFError as error:
        assert "broken.gguf" in str(error)
    else:
        assert all(one.offset + one.nbytes <= len(broken) for one in header.tensors.values())


HUGE = 1 << 60


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (struct.pack("<IQQ", 3, HUGE, 0), "announces"),
        (struct.pack("<IQQ", 3, 0, HUGE), "announces"),
        (struct.pack("<IQQ", 3, 0, 1) + struct.pack("<Q", HUGE), "to have"),
        (struct.pack("<IQQ", 3, 0, 1) + struct.pack("<Q1sIIQ", 1, b"a", 9, 4, HUGE), "to take"),
        (struct.pack("<IQQ", 3, 0, 1) + struct.pack("<Q1sIIQ", 1, b"a", 9, 8, HUGE), "announces"),
        (struct.pack("<IQQ", 3, 0, 1) + struct.pack("<Q1sIIQ", 1, b"a", 9, 9, HUGE), "array of type 9"),
        (struct.pack("<IQQ", 3, 1, 0) + struct.pack("<Q1sIQQIQ", 1, b"w", 2, HUGE, HUGE, 0, 0), "cut off"),
        (struct.pack("<IQQ", 3, 1, 0) + struct.pack("<Q1sIQQIQ", 1, b"w", 2, 32, 1, 2, HUGE), "cut off"),
        (struct.pack("<IQQ", 3, 1, 0) + struct.pack("<Q1sIQQIQ", 1, b"w", 2, 33, 1, 2, 0), "blocks of 32"),
        (struct.pack("<IQQ", 3, 1, 0) + struct.pack("<Q1sIQQIQ", 1, b"w", 2, 32, 1, 999, 0), "type number 999"),
        (struct.pack("<IQQ", 3, 1, 0) + struct.pack("<Q1sIQQIQ", 1, b"w", 9, 32, 1, 2, 0), "9 dimensions"),
        (struct.pack("<IQQ", 1, 0, 0), "version 1"),
        (struct.pack(">IQQ", 3, 0, 0), "big-endian"),
    ],
)
def test_absurd_numbers_are_refused_by_name(tmp_path: Path, body: bytes, message: str) -> None:
    path = tmp_path / "hostile.gguf"
    path.write_bytes(b"GGUF" + body + bytes(8))
    with pytest.raises(GGUFError, match=message):
        read_header(path)


def test_a_missing_package_is_named_with_its_extra(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(ValueError, match=r"pip install 'gptqmodel-eora-ext\[gguf\]'"):
        read_header(file)


def test_split_models_are_read_whole_or_the_missing_part_is_named(tmp_path: Path) -> None:
    def part(number: int, name: str) -> Path:
        path = tmp_path / f"m-{number:05d}-of-00002.gguf"
        writer = gguf.GGUFWriter(path, "llama")
        writer.add_uint16("split.no", number - 1)
        writer.add_uint16("split.count", 2)
        writer.add_tensor(name, np.ones((2, 32), dtype=np.float32))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return path

    first, second = part(1, "blk.0.a"), part(2, "blk.0.b")
    for path in (first, second):
        assert set(GGUFModel(path).tensors) == {"blk.0.a", "blk.0.b"}
    first.rename(tmp_path / "other.gguf")
    with pytest.raises(GGUFError, match=r"m-00001-of-00002\.gguf` is missing"):
        GGUFModel(second)
    with pytest.raises(GGUFError, match="llama-gguf-split --merge"):
        GGUFModel(tmp_path / "other.gguf")


def test_an_adapter_is_no_model(tmp_path: Path) -> None:
    path = tmp_path / "lora.gguf"
    write_lora(path, "llama", {"blk.0.a": LoraPair(torch.ones(2, 32), torch.ones(8, 2))}, name="n", details={})
    with pytest.raises(GGUFError, match="kind `adapter`, expected a model"):
        GGUFModel(path)
    with pytest.raises(GGUFError, match="expected an adapter"):
        read_lora_header(write(tmp_path / "model.gguf", {}))


@pytest.mark.parametrize("bits", [8, 4])
def test_blocks_are_those_of_ggml(bits: int) -> None:
    """The bytes, read by gguf-py, are the values that the factor stands for; and they are as many as are budgeted."""
    values = torch.randn(5, 96, generator=torch.Generator().manual_seed(0))
    factor = quantize_factor(values, bits, group_size=GGUF_LAYOUT.group_size)
    blocks = to_blocks(factor)
    kind = gguf.GGMLQuantizationType.Q8_0 if bits == 8 else gguf.GGMLQuantizationType.Q4_0
    np.testing.assert_array_equal(gguf.quants.dequantize(blocks, kind), factor.dequantize().numpy())
    assert blocks.nbytes == factor.nbytes
    again = from_blocks(torch.from_numpy(blocks), bits, 96)
    assert torch.equal(again.codes, factor.codes) and torch.equal(again.scales, factor.scales)
    shape = ModuleShape("m", out_features=40, in_features=64)
    lora_A, lora_B = (quantize_factor(torch.randn(*one), bits, group_size=32) for one in ((32, 64), (40, 32)))
    assert factor_bytes(32, shape, bits, GGUF_LAYOUT) == to_blocks(lora_A).nbytes + to_blocks(lora_B).nbytes


def test_an_adapter_is_what_llama_cpp_reads(tmp_path: Path) -> None:
    """Kind, type, alpha 0 (so that the scale is 1 at every rank), shapes with the fastest dimension first."""
    path = tmp_path / "lora.gguf"
    lora_A, lora_B = torch.randn(3, 64), torch.randn(8, 3)
    pairs = {"blk.0.attn_q.weight": LoraPair(lora_A, lora_B)}
    write_lora(path, "qwen2", pairs, name="an adapter", details={"rank": 3})
    reader = gguf.GGUFReader(path)
    fields = {name: field.contents() for name, field in reader.fields.items()}
    assert fields["general.type"] == "adapter" and fields["adapter.type"] == "lora"
    assert fields["general.architecture"] == "qwen2" and fields["adapter.lora.alpha"] == 0.0
    shapes = {tensor.name: tuple(int(one) for one in tensor.shape) for tensor in reader.tensors}
    assert shapes == {"blk.0.attn_q.weight.lora_a": (64, 3), "blk.0.attn_q.weight.lora_b": (3, 8)}
    header = read_lora_header(path)
    assert header.ranks == {"blk.0.attn_q.weight": 3} and header.factor_bits == 16 and header.details == {"rank": 3}
    stored = read_tensor(header.header.tensors["blk.0.attn_q.weight.lora_a"])
    assert torch.equal(stored, lora_A.half().float())
    found_A, found_B = read_lora(header)["blk.0.attn_q.weight"]
    assert torch.equal(found_A, lora_A.half()) and torch.equal(found_B, lora_B.half())  # type: ignore[arg-type]
    with pytest.raises(GGUFError, match="no module has factors"):
        write_lora(path, "qwen2", {}, name="n", details={})
    with pytest.raises(GGUFError, match="too large for float16"):
        write_lora(path, "qwen2", {"w": LoraPair(lora_A * 1e6, lora_B)}, name="n", details={})
