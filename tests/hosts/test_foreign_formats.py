"""Formats whose libraries are no dependency: `make test-formats` installs them beside the others."""

from __future__ import annotations

from pathlib import Path

import pytest

from .foreign_models import FORMATS, Format
from .test_foreign import Batches, check, make

pytestmark = pytest.mark.formats

OF_LIBRARIES = {name: one for name, one in FORMATS.items() if one.needs}


@pytest.mark.parametrize("form", OF_LIBRARIES.values(), ids=list(OF_LIBRARIES))
def test_formats(form: Format, two_layers: Path, calibration: Batches, tmp_path: Path) -> None:
    pytest.importorskip(form.needs)
    checkpoint = form.make(two_layers, tmp_path / "checkpoint")
    if form.activations:
        assert (make(two_layers, checkpoint, calibration, tmp_path / "adapter") / "eora.json").is_file()
    else:
        check(two_layers, checkpoint, calibration, tmp_path / "adapter", **form.loading())


def test_blocks_of_fp8(two_layers: Path, calibration: Batches, tmp_path: Path) -> None:
    checkpoint = FORMATS["fp8, in blocks"].make(two_layers, tmp_path / "fp8")
    check(two_layers, checkpoint, calibration, tmp_path / "adapter")
