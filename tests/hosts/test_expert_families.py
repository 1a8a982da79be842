"""The table of docs/budget.md lists every model type that GPTQModel defines and whose experts lie in one tensor."""

from __future__ import annotations

import re
from pathlib import Path

import transformers
from gptqmodel.models.auto import MODEL_MAP
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES, model_type_to_module_name

# How transformers makes a tensor of all experts: experts × two more dimensions.
ONE_TENSOR = re.compile(r"nn\.Parameter\(\s*torch\.(?:empty|zeros|randn|ones)\(\s*self\.\w*experts[^)]*,[^)]*,")


def of_one_tensor() -> set[str]:
    models = Path(transformers.__file__).parent / "models"
    found = set()
    for model_type in MODEL_MAP.keys() & CONFIG_MAPPING_NAMES.keys():
        room = model_type_to_module_name(model_type)
        code = models / room / f"modeling_{room}.py"
        if code.is_file() and ONE_TENSOR.search(code.read_text(encoding="utf-8")):
            found.add(model_type)
    return found


def test_every_family_is_in_the_table() -> None:
    text = (Path(__file__).parents[2] / "docs" / "budget.md").read_text(encoding="utf-8")
    table = text[text.index("| | model types |") :].partition("\n\n")[0]
    listed = re.findall(r"`(\w+)`", table)
    assert len(listed) == len(set(listed))
    assert set(listed) == of_one_tensor()
