"""Documents to tokens, and tokens to windows of one length. No more of a document is tokenised than windows need."""

from __future__ import annotations

import re
from array import array
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from .files import TextError
from .rows import Chat, Document, Part, read_file

DEFAULT_SAMPLES = 128
DEFAULT_SEQLEN = 512
# Of the windows, where there is text of a task: half serves the task without hurting the rest (EoRA, section 4).
TASK_SHARE = 0.5
# Characters that are tokenised at a time: some hundred thousand tokens, for which a tokenizer takes tens of megabytes.
CHUNK_CHARACTERS = 1 << 18
# Where text is cut. A tokenizer takes words with the space before them and lines with the break after them, so that
# nothing is joined over these places: byte-level tokenizers give the tokens of the whole text. One that puts a space
# before every text (SentencePiece) gives one token more at a cut. Text without a space or a line's end in a whole chunk
# is cut where the chunk ends.
BEFORE_WORD, AFTER_LINE = re.compile(r"(?<=\S) (?=\S)"), re.compile(r"(?<=\n)(?=\S)")
# A cut is looked for in the last so many characters of a chunk.
SEARCHED_CHARACTERS = 1 << 12


def windows(
    texts: Iterable[Document], tokenizer: Any, *, samples: int = DEFAULT_SAMPLES, seqlen: int = DEFAULT_SEQLEN
) -> list[dict[str, list[int]]]:
    """Tokenize documents, join them, and cut consecutive windows: what GPTQModel takes as calibration.

    Args:
        texts: documents, of `read_texts` or strings; read and tokenised until the windows are full.
        tokenizer: the model's own. Its end-of-sequence token goes between documents, its chat template (if there is a
            conversation) makes text of it.
        samples: windows at most.
        seqlen: tokens per window.

    Returns:
        `input_ids` and `attention_mask` of each window.

    Raises:
        TextError: a ValueError, for a document that cannot be read, and when the text does not fill one window.
    """
    tokens: list[int] = []
    for some in token_chunks(texts, tokenizer):
        tokens += some
        if len(tokens) >= samples * seqlen:
            break
    count = min(samples, len(tokens) // seqlen)
    if count == 0:
        raise TextError(f"Calibration: {len(tokens)} tokens do not fill one window of {seqlen}. Pass more text.")
    return [{"input_ids": tokens[i * seqlen : (i + 1) * seqlen], "attention_mask": [1] * seqlen} for i in range(count)]


def tokenized(texts: Any, model: str, samples: int, seqlen: int, trust_remote_code: bool) -> list[dict[str, list[int]]]:
    """Calibration windows of documents, in the model's own tokens.

    Args:
        texts: as for `windows`.
        model: a folder or a hub name.
        samples: windows.
        seqlen: tokens of each.
        trust_remote_code: whether code that comes with the tokenizer may run.
    """
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model, trust_remote_code=trust_remote_code)
    return windows(texts, tokenizer, samples=samples, seqlen=seqlen)


def mixed_windows(
    general: Iterable[Document],
    task: Iterable[Document] | None,
    tokenizer: Any,
    *,
    samples: int = DEFAULT_SAMPLES,
    seqlen: int = DEFAULT_SEQLEN,
    task_share: float = TASK_SHARE,
) -> list[dict[str, list[int]]]:
    """Windows of general text and of a task's, in turns. A task with too little text gives what it has.

    Args:
        general: documents.
        task: documents of the task; None for general text alone.
        tokenizer: the model's own.
        samples: windows at most, of both together.
        seqlen: tokens per window.
        task_share: of ``samples``, above 0 and below 1.

    Raises:
        ValueError: when one of them does not fill a window, or the share is not between 0 and 1.
    """
    if task is None:
        return windows(general, tokenizer, samples=samples, seqlen=seqlen)
    if not 0 < task_share < 1:
        raise ValueError(f"Calibration: the task's share must be between 0 and 1, got {task_share}.")
    wanted = min(max(1, round(samples * task_share)), samples - 1)
    special = windows(task, tokenizer, samples=wanted, seqlen=seqlen)
    plain = windows(general, tokenizer, samples=samples - len(special), seqlen=seqlen)
    # Spread evenly, so that every batch holds some of both.
    order = [((index + 0.5) / len(part), part[index]) for part in (plain, special) for index in range(len(part))]
    return [window for _, window in sorted(order, key=lambda one: one[0])]


def file_tokens(path: str | Path, tokenizer: Any, *, most: int | None = None) -> array[int]:
    """The tokens of a file, to evaluate on: documents joined as by `windows`, after the tokenizer's first token if any.

    Args:
        path: of a file, as `read_texts` takes it.
        tokenizer: the model's own.
        most: tokens that are wanted; reading ends with the chunk that has them. None reads the whole file.

    Returns:
        32-bit integers; 4 bytes a token.

    Raises:
        TextError: a ValueError, for a file or a row that cannot be read.
    """
    # A tokenizer that begins every text with a token of its own (Llama's) does so where there is no text, too.
    first = tokenizer("").input_ids[:1]
    found = array("i", first if first == [getattr(tokenizer, "bos_token_id", None)] else [])
    for some in token_chunks(read_file(path), tokenizer):
        found.extend(some)
        if most is not None and len(found) >= most:
            break
    return found


def token_chunks(texts: Iterable[Document], tokenizer: Any) -> Iterator[list[int]]:
    """Token ids of documents, a chunk of text at a time, with the end-of-sequence token after a text that is not last.

    A document of token ids goes as it is: it is a window already.
    """
    end = [tokenizer.eos_token_id] if tokenizer.eos_token_id is not None else []
    before: list[int] = []
    held = ""
    for text in texts:
        if isinstance(text, list):
            yield before + text
            before = []
            continue
        *chunks, held = _chunks(held + (_rendered(text, tokenizer) if isinstance(text, Chat) else text))
        if not isinstance(text, Part):
            chunks, held = [*chunks, held], ""
        for chunk in filter(None, chunks):
            yield before + _ids(chunk, tokenizer)
            before = []
        if not isinstance(text, Part) and text:
            before = end


def _chunks(text: str) -> Iterator[str]:
    """Text in chunks, cut where tokens are not joined; the last is what is left, perhaps nothing."""
    start = 0
    while len(text) - start > CHUNK_CHARACTERS:
        end = start + CHUNK_CHARACTERS
        cut = end
        for place in (BEFORE_WORD, AFTER_LINE):
            found = [match.start() for match in place.finditer(text, end - SEARCHED_CHARACTERS, end)]
            if found:
                cut = found[-1]
                break
        yield text[start:cut]
        start = cut
    yield text[start:]


def _rendered(chat: Chat, tokenizer: Any) -> str:
    """A conversation as the tokenizer's chat template writes it."""
    if not getattr(tokenizer, "chat_template", None):
        if chat.plain is not None:
            return chat.plain
        raise TextError(
            f"{chat.where} is a conversation, and the tokenizer has no chat template to write it by. Pass rows of "
            f"`text`, or the tokenizer of the chat model."
        )
    try:
        return str(tokenizer.apply_chat_template([dict(one) for one in chat.messages], tokenize=False))
    except Exception as error:
        raise TextError(f"{chat.where}: the tokenizer's chat template refuses the conversation: {error}") from error


def _ids(text: str, tokenizer: Any) -> list[int]:
    # A long text is no mistake here, so the tokenizer is not to warn of it.
    ids: list[int] = tokenizer(text, add_special_tokens=False, verbose=False).input_ids
    return ids
