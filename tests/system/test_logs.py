"""Which log lines are shown within a block."""

import logging

import pytest

from gptqmodel_eora_ext.system.logs import only_from


def test_lines_below_are_left_out_and_the_level_comes_back() -> None:
    log = logging.getLogger("tests.only_from")
    log.setLevel(logging.INFO)
    with pytest.raises(ZeroDivisionError), only_from(logging.WARNING, log.name):
        assert not log.isEnabledFor(logging.INFO) and log.isEnabledFor(logging.WARNING)
        with only_from(logging.INFO, log.name):
            assert not log.isEnabledFor(logging.INFO)
        raise ZeroDivisionError
    assert log.level == logging.INFO


def test_a_library_that_changes_the_root_logger_shows_nothing_more() -> None:
    log, root = logging.getLogger("tests.only_from.root"), logging.getLogger()
    before = root.level
    try:
        with only_from(logging.WARNING, log.name):
            root.setLevel(logging.INFO)
            assert not log.isEnabledFor(logging.INFO) and log.isEnabledFor(logging.WARNING)
        assert log.level == logging.NOTSET
    finally:
        root.setLevel(before)
