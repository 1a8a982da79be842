"""Calibration text, from files or data sets, cut into token windows."""

from .windows import DEFAULT_SAMPLES, DEFAULT_SEQLEN, TASK_SHARE, mixed_windows, read_texts, windows

__all__ = ["DEFAULT_SAMPLES", "DEFAULT_SEQLEN", "TASK_SHARE", "mixed_windows", "read_texts", "windows"]
