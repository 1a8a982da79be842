"""Calibration text, from files or data sets, cut into token windows."""

from .files import TextError
from .rows import read_file, read_rows, read_texts
from .windows import DEFAULT_SAMPLES, DEFAULT_SEQLEN, TASK_SHARE, file_tokens, mixed_windows, tokenized, windows

__all__ = [
    "DEFAULT_SAMPLES",
    "DEFAULT_SEQLEN",
    "TASK_SHARE",
    "TextError",
    "file_tokens",
    "mixed_windows",
    "read_file",
    "read_rows",
    "read_texts",
    "tokenized",
    "windows",
]
