"""Former names of modules that users may import."""

import importlib

import pytest


@pytest.mark.parametrize("name", ["compensate", "kernel_report", "presets", "study", "summary"])
def test_a_former_name_gives_the_module_and_says_where_it_is(name: str) -> None:
    with pytest.warns(DeprecationWarning, match=rf"gptqmodel_eora_ext\.{name} is gptqmodel_eora_ext\."):
        found = importlib.import_module(f"gptqmodel_eora_ext.{name}")
    assert found.__name__.endswith(f".{name}")


def test_what_was_public_is_found_where_it_was() -> None:
    from gptqmodel_eora_ext.calibration import read_texts, windows
    from gptqmodel_eora_ext.hosts.gptqmodel.checkpoint import adapters_off

    assert all(map(callable, (read_texts, windows, adapters_off)))
