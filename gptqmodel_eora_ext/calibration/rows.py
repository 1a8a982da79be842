"""Rows of a file or a data set, each a document: a text, a conversation, or token ids."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .files import (
    ARRAY,
    COMPRESSED_SUFFIXES,
    CSV,
    LINES,
    PARQUET,
    ROW_SUFFIXES,
    TEXT,
    TEXT_SUFFIXES,
    TSV,
    VALUES,
    TextError,
    TextFile,
    identify,
)

# A row is read by the first of these that it has; `text` goes first, since it is what others were rendered to.
TEXT_COLUMN, MESSAGES, SHAREGPT = "text", "messages", "conversations"
INSTRUCTION, TOKEN_IDS = "instruction", "input_ids"
OTHER_TEXT_COLUMNS = ("content", "prompt")
# What Alpaca's rows may have beside an instruction.
ALPACA_INPUT, ALPACA_OUTPUT, MASK = "input", "output", "attention_mask"
COLUMNS = (TEXT_COLUMN, MESSAGES, SHAREGPT, INSTRUCTION, TOKEN_IDS, *OTHER_TEXT_COLUMNS)
READ_COLUMNS = (*COLUMNS, ALPACA_INPUT, ALPACA_OUTPUT, MASK)
# ShareGPT's names of who speaks.
SPEAKERS = {
    "human": "user", "user": "user", "gpt": "assistant", "chatgpt": "assistant", "assistant": "assistant",
    "model": "assistant", "bot": "assistant", "system": "system", "tool": "tool", "observation": "tool",
}  # fmt: skip
# Characters of a row. A longer one is no row but a file of another kind, and would have to be held as a whole.
LONGEST_ROW = 1 << 26
# Rows of a Parquet file that are held at a time.
PARQUET_ROWS = 256
DELIMITERS = {CSV: ",;\t|", TSV: "\t"}


class Part(str):
    """A piece of a document that goes on in the next piece; the last piece is a plain `str`."""

    __slots__ = ()


@dataclass(frozen=True)
class Chat:
    """A conversation, which the tokenizer's chat template turns into text.

    Attributes:
        messages: each with `role` and `content`.
        where: names the row in a message.
        plain: the text for a tokenizer without a chat template; None where there has to be one.
    """

    messages: tuple[Mapping[str, Any], ...]
    where: str
    plain: str | None = None


Document = str | Chat | list[int]


def read_texts(source: str | Path, *, split: str = "train") -> Iterable[Document]:
    """Return the documents of a source, read as they are asked for.

    Args:
        source: the path of a file (`files` tells which kinds are read; no character of it is a pattern), or a data
            set's name, with its configuration after a colon (`allenai/c4:en`). A plain text is one document, given in
            pieces where it is long. A row is one document: `text` (`content`, `prompt`), `messages`, `conversations`
            (ShareGPT), `instruction` with `input` and `output` (Alpaca), or `input_ids`.
        split: split of a named data set.

    Returns:
        Texts, `Chat`s, or lists of token ids, which `windows` takes.

    Raises:
        TextError: a ValueError, for a source that cannot be read; on the way for a row that cannot, with its line.
    """
    path = Path(source).expanduser()
    if path.exists() or _names_a_file(str(source)):
        return _documents(identify(path))
    name, _, configuration = str(source).partition(":")
    return _named_data_set(name, configuration, split)


def read_file(path: str | Path) -> Iterable[Document]:
    """The documents of a file, like `read_texts`; a name that is no file is never taken for a data set's.

    Raises:
        TextError: a ValueError, as for `read_texts`.
    """
    return _documents(identify(Path(path).expanduser()))


def read_rows(path: str | Path) -> Iterator[tuple[str, Any]]:
    """The JSON values of a file, a value a line or in an array, each with the name of its place: "`file`, line 3".

    Raises:
        TextError: a ValueError, for a file that is no JSON, is empty, or cannot be read; on the way for a broken row.
    """
    file = identify(Path(path).expanduser())
    readers = {LINES: _json_lines, VALUES: _json_values, ARRAY: _json_values}
    if file.kind not in readers:
        raise file.error(f"is {file.kind}; expected JSON lines, or a JSON array of objects.")
    return readers[file.kind](file)


def _names_a_file(source: str) -> bool:
    suffixes = (*ROW_SUFFIXES, *TEXT_SUFFIXES, *COMPRESSED_SUFFIXES)
    return source.startswith(("/", ".", "~")) or source.count("/") > 1 or source.lower().endswith(suffixes)


def _named_data_set(name: str, configuration: str, split: str) -> Iterator[Document]:
    from datasets import load_dataset

    try:
        rows = load_dataset(name, configuration or None, split=split, streaming=True)
    except Exception as error:
        raise TextError(
            f"there is no file `{name}`, and as a data set it cannot be loaded: {type(error).__name__}: {error}"
        ) from error
    return (document(row, f"`{name}`, row {number}") for number, row in enumerate(rows, 1))


# Rows of a file ------------------------------------------------------------------------------------------------


def _documents(file: TextFile) -> Iterator[Document]:
    if file.kind == TEXT:
        return _plain_text(file)
    readers = {LINES: _json_lines, VALUES: _json_values, ARRAY: _json_values, CSV: _table, TSV: _table,
               PARQUET: _parquet}  # fmt: skip
    return (document(row, where) for where, row in readers[file.kind](file))


def _plain_text(file: TextFile) -> Iterator[str]:
    """The text in pieces, all but the last of them `Part`s."""
    held, blank = "", True
    for piece in file.characters():
        if held:
            yield Part(held)
        held, blank = piece, blank and piece.isspace()
    if blank:
        raise file.error("holds no text, only white space.")
    yield held


def lines(file: TextFile) -> Iterator[tuple[int, str]]:
    """A file's lines with their numbers, counted from 1; line ends stay.

    Raises:
        TextError: for a line that is longer than a row may be.
    """
    number, length = 1, 0
    begun: list[str] = []
    for piece in file.characters():
        *ended, rest = piece.split("\n")
        for end in ended:
            yield number, "".join((*begun, end, "\n"))
            number, begun, length = number + 1, [], 0
        begun.append(rest)
        length += len(rest)
        if length > LONGEST_ROW:
            raise file.error(f"has more than {LONGEST_ROW} characters in a row. Give each row a line.", number)
    if length:
        yield number, "".join(begun)


def _json_lines(file: TextFile) -> Iterator[tuple[str, Any]]:
    for number, line in lines(file):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            cut = "" if line.endswith("\n") else " The file seems to be cut short."
            raise file.error(f"no complete JSON row ({error}).{cut}", number) from None
        yield f"`{file.path}`, line {number}", row


def _json_values(file: TextFile) -> Iterator[tuple[str, Any]]:
    """The elements of an array, or values one after another, decoded as the file is read."""
    read = _JsonReader(file)
    is_array = file.kind == ARRAY
    if is_array:
        read.expect("[")
    while (following := read.skip(", \t\n" if is_array else " \t\n")) not in ("", "]"):
        line = read.line
        yield f"`{file.path}`, line {line}", read.value()
    if is_array:
        read.expect("]")
    if following and read.skip(" \t\n"):
        raise file.error("something stands where the file should end.", read.line)


class _JsonReader:
    """Decodes JSON values from a file's characters, of which it holds no more than a value needs.

    Attributes:
        line: of what comes next.
    """

    def __init__(self, file: TextFile) -> None:
        self.line = 1
        self._file = file
        self._pieces = file.characters()
        self._decoder = json.JSONDecoder()
        self._text, self._at = "", 0

    def skip(self, characters: str) -> str:
        """Pass over some characters; return the one that follows, or nothing at the end of the file."""
        while True:
            while self._at < len(self._text):
                if self._text[self._at] not in characters:
                    return self._text[self._at]
                self.line += self._text[self._at] == "\n"
                self._at += 1
            if not self._grow(1):
                return ""

    def expect(self, bracket: str) -> None:
        """Pass over a bracket."""
        if self.skip(" \t\n") != bracket:
            raise self._file.error(f"there is no `{bracket}` where one is due; the file may be cut short.", self.line)
        self._at += 1

    def value(self) -> Any:
        """The value that comes next. One that does not end in what was read is decoded again with twice as much."""
        while True:
            left = len(self._text) - self._at
            try:
                value, end = self._decoder.raw_decode(self._text, self._at)
            except (ValueError, RecursionError) as error:
                if left <= LONGEST_ROW and self._grow(left):
                    continue
                cut = "the file may be cut short" if left <= LONGEST_ROW else f"looked for in {LONGEST_ROW} characters"
                raise self._file.error(f"no complete JSON value ({error}); {cut}.", self.line) from None
            # A number at the end of what was read may have more digits to come.
            if end == len(self._text) and isinstance(value, (int, float)) and self._grow(1):
                continue
            self.line += self._text.count("\n", self._at, end)
            self._at = end
            return value

    def _grow(self, wanted: int) -> bool:
        """Read at least so many more characters, if there are any; tell whether there were."""
        pieces = [self._text[self._at :]]
        came = 0
        while came < wanted and (piece := next(self._pieces, None)) is not None:
            pieces.append(piece)
            came += len(piece)
        self._text, self._at = "".join(pieces), 0
        return came > 0


def _table(file: TextFile) -> Iterator[tuple[str, Any]]:
    # Python's limit is made for spreadsheets; texts are longer. It holds for the process and is only ever raised.
    csv.field_size_limit(max(csv.field_size_limit(), LONGEST_ROW))
    number, header = next(lines(file))
    delimiters = DELIMITERS[file.kind]
    columns, delimiter = max(
        ((next(csv.reader([header], delimiter=one)), one) for one in delimiters),
        key=lambda read: sum(column.strip() in COLUMNS for column in read[0]),
    )
    columns = [column.strip() for column in columns]
    if not set(columns) & set(COLUMNS):
        raise file.error(f"has the columns {columns}; expected one of {', '.join(COLUMNS)}.", number)
    reader = csv.reader((line for _, line in lines(file)), delimiter=delimiter, strict=True)
    next(reader)
    begins = reader.line_num + 1
    while True:
        try:
            cells = next(reader, None)
        except csv.Error as error:
            raise file.error(f"no complete row ({error}).", begins) from None
        if cells is None:
            return
        if cells:
            if len(cells) != len(columns):
                raise file.error(f"has {len(cells)} cells, expected {len(columns)} as in the head.", begins)
            yield f"`{file.path}`, line {begins}", dict(zip(columns, cells, strict=True))
        begins = reader.line_num + 1


def _parquet(file: TextFile) -> Iterator[tuple[str, Any]]:
    import pyarrow
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.ParquetFile(file.path)
        names = table.schema_arrow.names
        known = [name for name in READ_COLUMNS if name in names]
        if not set(known) & set(COLUMNS):
            raise file.error(f"has the columns {names}; expected one of {', '.join(COLUMNS)}.")
        number = 0
        for batch in table.iter_batches(batch_size=PARQUET_ROWS, columns=known):
            for row in batch.to_pylist():
                number += 1
                yield f"`{file.path}`, row {number}", row
    except (pyarrow.ArrowException, OSError) as error:
        raise file.error(f"is damaged or cut short: pyarrow says `{error}`.") from None


# A row ---------------------------------------------------------------------------------------------------------


def document(row: Any, where: str) -> Document:
    """The document of a row.

    Args:
        row: columns by name, or a text.
        where: names the row in a message.

    Raises:
        TextError: for a row that is null, has none of the known columns, or has something else in them.
    """
    if isinstance(row, str):
        return row
    if not isinstance(row, Mapping):
        found = "null" if row is None else f"a {type(row).__name__}"
        raise TextError(f"{where} is {found}; expected an object with one of {', '.join(COLUMNS)}.")
    column = next((name for name in COLUMNS if row.get(name) is not None), None)
    if column is None:
        nulls = [name for name in COLUMNS if name in row]
        found = f"`{nulls[0]}` null" if nulls else f"the columns {sorted(map(str, row))}"
        raise TextError(f"{where} has {found}; expected one of {', '.join(COLUMNS)}.")
    if column == TOKEN_IDS:
        return _token_ids(row, where)
    if column in (MESSAGES, SHAREGPT):
        return Chat(tuple(_messages(row[column], f"{where}: `{column}`")), where)
    if not isinstance(row[column], str):
        raise TextError(f"{where}: `{column}` is a {type(row[column]).__name__}, expected a text.")
    return _alpaca(row, where) if column == INSTRUCTION else str(row[column])


def _alpaca(row: Mapping[str, Any], where: str) -> Chat:
    for name in (ALPACA_INPUT, ALPACA_OUTPUT):
        if not isinstance(row.get(name), (str, type(None))):
            raise TextError(f"{where}: `{name}` is a {type(row[name]).__name__}, expected a text.")
    asked = "\n\n".join(part for part in (row[INSTRUCTION], row.get(ALPACA_INPUT)) if part)
    answer = row.get(ALPACA_OUTPUT)
    messages = [{"role": "user", "content": asked}, *([{"role": "assistant", "content": answer}] if answer else [])]
    return Chat(tuple(messages), where, plain="\n\n".join(message["content"] for message in messages))


def _messages(turns: Any, where: str) -> Iterator[Mapping[str, Any]]:
    if not isinstance(turns, Sequence) or isinstance(turns, str) or not turns:
        raise TextError(f"{where} is {str(turns)[:40]!r}, expected a list of messages.")
    for turn in turns:
        if not isinstance(turn, Mapping):
            raise TextError(f"{where} holds {str(turn)[:40]!r}, expected messages with `role` and `content`.")
        if "from" in turn:
            role, content = SPEAKERS.get(str(turn["from"]).lower()), turn.get("value")
            if role is None:
                raise TextError(f"{where}: `from` is {turn['from']!r}, expected one of {', '.join(SPEAKERS)}.")
            turn = {"role": role, "content": content}
        # A call of a tool has no content of its own.
        if not isinstance(turn.get("role"), str) or (turn.get("content") is None and not turn.get("tool_calls")):
            raise TextError(f"{where} holds {str(dict(turn))[:60]}, expected messages with `role` and `content`.")
        yield turn


def _token_ids(row: Mapping[str, Any], where: str) -> list[int]:
    ids, mask = (_flat(row.get(name)) for name in (TOKEN_IDS, MASK))
    if ids is None or not all(isinstance(one, int) and not isinstance(one, bool) and one >= 0 for one in ids):
        raise TextError(f"{where}: `{TOKEN_IDS}` is {str(row[TOKEN_IDS])[:40]}, expected a list of ids of at least 0.")
    if mask is None:
        return ids
    if len(mask) != len(ids):
        raise TextError(f"{where}: `{MASK}` has {len(mask)} values, `{TOKEN_IDS}` {len(ids)}.")
    return [one for one, counted in zip(ids, mask, strict=True) if counted]


def _flat(values: Any) -> list[Any] | None:
    """A list, also one that stands alone inside another, as a tokenizer's batch of one does."""
    if isinstance(values, list) and len(values) == 1 and isinstance(values[0], list):
        values = values[0]
    return values if isinstance(values, list) else None
