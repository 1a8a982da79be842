"""Files of texts: what they are is told by their content, and what cannot be read is refused by name and line."""

from __future__ import annotations

import csv
import gzip
import json
import os
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gptqmodel_eora_ext.calibration import TextError, read_texts
from gptqmodel_eora_ext.calibration import files as text_files
from gptqmodel_eora_ext.calibration import rows as text_rows

TEXTS = ["The river runs past the house.", "Grüße,\n“quoted” texts; and more\tof them"]
LINES = "".join(json.dumps({"text": text}) + "\n" for text in TEXTS)


def read(path: Path) -> list[Any]:
    return list(read_texts(path))


def zstd(content: bytes) -> bytes:
    sink = pyarrow.BufferOutputStream()
    with pyarrow.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(content)
    return sink.getvalue().to_pybytes()


@pytest.mark.parametrize("name", ["a.json", "a.JSONL", "a.ndjson", "a.txt", "a", "a.json.gz", "c4[en]*?.jsonl"])
@pytest.mark.parametrize("packed", [bytes, gzip.compress, zstd])
def test_json_lines_under_any_name_and_compression(tmp_path: Path, name: str, packed: Any) -> None:
    (tmp_path / "c4e.jsonl").write_text('{"text": "another file"}\n')
    path = tmp_path / name
    path.write_bytes(packed(LINES.encode()))
    assert read(path) == TEXTS


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_encodings_and_line_ends(tmp_path: Path, encoding: str) -> None:
    (tmp_path / "a.txt").write_bytes("Grüße\r\nof two\rlines".encode(encoding))
    assert read(tmp_path / "a.txt") == ["Grüße\nof two\nlines"]
    (tmp_path / "a.jsonl").write_bytes(LINES.encode(encoding))
    assert read(tmp_path / "a.jsonl") == TEXTS


@pytest.mark.parametrize("form", [{"indent": 1}, {}])
def test_json_arrays_and_one_row_over_several_lines(tmp_path: Path, form: dict[str, Any]) -> None:
    (tmp_path / "a.json").write_text(json.dumps([{"text": text} for text in TEXTS], **form))
    assert read(tmp_path / "a.json") == TEXTS
    (tmp_path / "b").write_text(json.dumps(TEXTS, **form))
    assert read(tmp_path / "b") == TEXTS
    (tmp_path / "c.json").write_text(json.dumps({"text": TEXTS[1], "more": [1, {}]}, **form))
    assert read(tmp_path / "c.json") == TEXTS[1:]


@pytest.mark.parametrize(("name", "delimiter"), [("a.csv", ","), ("a.CSV", ";"), ("a.tsv", "\t"), ("a.csv.gz", ",")])
def test_tables(tmp_path: Path, name: str, delimiter: str) -> None:
    plain = tmp_path / "plain"
    with plain.open("w", newline="") as file:
        written = csv.writer(file, delimiter=delimiter)
        written.writerows([["id", "text"], *enumerate(TEXTS)])
    (tmp_path / name).write_bytes(gzip.compress(plain.read_bytes()) if name.endswith("gz") else plain.read_bytes())
    assert read(tmp_path / name) == TEXTS


def test_parquet(tmp_path: Path) -> None:
    table = pyarrow.table({"id": [1, 2], "text": TEXTS})
    pyarrow.parquet.write_table(table, tmp_path / "shard.PARQUET")
    assert read(tmp_path / "shard.PARQUET") == TEXTS
    pyarrow.parquet.write_table(table.drop(["text"]), tmp_path / "b.parquet")
    with pytest.raises(TextError, match=r"b\.parquet`: has the columns \['id'\]; expected one of text"):
        read(tmp_path / "b.parquet")
    (tmp_path / "c.parquet").write_bytes((tmp_path / "shard.PARQUET").read_bytes()[:-20])
    with pytest.raises(TextError, match="is damaged or cut short"):
        read(tmp_path / "c.parquet")


def test_prose_may_begin_with_a_bracket(tmp_path: Path) -> None:
    for text in ("[Verse 1] The river", "{ curly } river", "text,label\nno table by its name"):
        (tmp_path / "a.txt").write_text(text)
        assert read(tmp_path / "a.txt") == [text]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"one\ntwo\nth\xe9re", r"line 3: byte 0xe9 at offset 10 is no UTF-8\. Save the file as UTF-8"),
        ("a.txt", "\ufeffone".encode() + b"\n\xff", r"line 2: byte 0xff at offset 7 is no UTF-8"),
        ("a.txt", b"cut \xc3", r"line 1: byte 0xc3 at offset 4 is no UTF-8"),
        ("a.txt", b"two\n\x00", "line 2: holds NUL characters"),
        ("a.txt", "without a mark".encode("utf-16-le"), "UTF-16 without its mark"),
        ("a.txt", "any".encode("utf-32"), "is UTF-32"),
        ("a.txt", b" \n \n", "holds no text, only white space"),
        ("a.txt", b"", "is empty"),
        ("a.txt.gz", gzip.compress(b"", mtime=0), "is empty"),
        ("a.txt.gz", gzip.compress(b"text" * 99, mtime=0)[:-9], "is damaged or cut short"),
        ("a.zip", b"PK\x03\x04" + bytes(9), "is a ZIP archive"),
        ("a.pdf", b"%PDF-1.7", "is PDF. Pass text"),
        ("a.pkl", b"\x80\x04\x95", "is a pickle"),
        ("a.parquet", b"some text", "is no Parquet file"),
        ("a.jsonl", b'{"text": "a"}\n\n{"text": "b', r"line 3: no complete JSON row .* cut short"),
        ("a.jsonl", b'{"text": "a"}\nnull\n', "line 2 is null; expected an object"),
        ("a.jsonl", b'{"text": "a"}\n{"text": null}\n', "line 2 has `text` null"),
        ("a.jsonl", b'{"text": "a"}\n{"body": 1}\n', r"line 2 has the columns \['body'\]; expected one of text"),
        ("a.jsonl", b'{"text": 5}\n', "line 1: `text` is a int, expected a text"),
        ("a.jsonl", b"some prose", "line 1: no complete JSON row"),
        ("a.json", b'[{"text": "a"},\n{"text": "b"', "line 2: no complete JSON value"),
        ("a.json", b'[{"text": "a"}\n', r"line 2: there is no `\]`"),
        ("a.json", b'[{"text": "a"}]\nx', "line 2: something stands where the file should end"),
        ("a.csv", b"id,body\n1,a\n", r"line 1: has the columns \['id', 'body'\]"),
        ("a.csv", b"id,text\n1,a\n2\n", "line 3: has 1 cells, expected 2"),
        ("a.csv", b'id,text\n1,"a\n2,b', "line 2: no complete row"),
    ],
)
def test_what_cannot_be_read_is_named(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(TextError, match=message) as raised:
        read(tmp_path / name)
    assert str(tmp_path / name) in str(raised.value)


def test_folders_pipes_and_missing_files(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for name, message in (("", "is a folder"), ("pipe", "is a pipe"), ("no.txt", "there is no file")):
        with pytest.raises(TextError, match=message):
            read_texts(tmp_path / name)
    for missing in ("no.JSONL", "no.jsonl.gz", "./no", "a/b/c"):
        with pytest.raises(TextError, match="there is no file"):
            read_texts(missing)


def test_a_file_made_to_fill_the_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text_files, "UNSUSPECTED_BYTES", 1 << 20)
    for name, packed in (("a.gz", gzip.compress), ("a.zst", zstd)):
        (tmp_path / name).write_bytes(packed(b"a b " * (1 << 20)))
        with pytest.raises(TextError, match="unpacks to more than 400 times"):
            read(tmp_path / name)
    monkeypatch.setattr(text_rows, "LONGEST_ROW", 1000)
    for name in ("a.jsonl", "a.json"):
        begins = '[{"text": "' if name == "a.json" else '{"text": "'
        (tmp_path / name).write_text(begins + "a" * 3000 + '"' + " " * 500_000)
        with pytest.raises(TextError, match="1000 characters"):
            read(tmp_path / name)


@given(texts=st.lists(st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\x00\r")), min_size=1),
       block=st.integers(1, 9), form=st.sampled_from(["lines", "array", "pretty"]))  # fmt: skip
@settings(max_examples=60, deadline=None)
def test_blocks_of_any_size_give_the_same_rows(
    tmp_path_factory: pytest.TempPathFactory, texts: list[str], block: int, form: str
) -> None:
    path = tmp_path_factory.mktemp("rows") / "a.json"
    rows: list[Any] = [{"text": text} for text in texts]
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    path.write_text(lines if form == "lines" else json.dumps(rows, indent=1 if form == "pretty" else None))
    file = text_files.identify(path)
    whole, text_files.BLOCK_BYTES = text_files.BLOCK_BYTES, block
    try:
        assert list(text_rows._documents(file)) == texts
    finally:
        text_files.BLOCK_BYTES = whole
