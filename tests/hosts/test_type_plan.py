"""Plans of ggml's types and ranks: within the size, no worse than a plain file, as llama-quantize takes them."""

from __future__ import annotations

import itertools
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gptqmodel_eora_ext.adapter.budget import budget_bytes
from gptqmodel_eora_ext.adapter.errors import AdapterError
from gptqmodel_eora_ext.adapter.layers import shape_of
from gptqmodel_eora_ext.formats.factors import FactorLayout
from gptqmodel_eora_ext.formats.gguf.lora import read_lora_header
from gptqmodel_eora_ext.formats.sizes import ModuleShape, factor_bytes
from gptqmodel_eora_ext.hosts.jobs import AdapterJob, TypePlanJob
from gptqmodel_eora_ext.hosts.registry import adapter_maker, type_planner
from gptqmodel_eora_ext.hosts.terminal import quiet
from gptqmodel_eora_ext.plan.forecast import UNCORRECTED, Forecast
from gptqmodel_eora_ext.plan.types import TypedModule, TypePlan, choose
from tests.gguf_files import tensor_of, write_model
from tests.hosts.test_llamacpp import linears, make, windows

KINDS = ("Q4_0", "Q5_0", "Q8_0")
# Four components a step, so that small cases have several ranks.
LAYOUT = FactorLayout(4, along_rank=True, multiple=4, step=4)


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10**6), share=st.floats(0, 1))
def test_the_choice_is_the_best_of_all(seed: int, share: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    modules = []
    for index in range(3):
        shape = ModuleShape(f"m{index}", 16, 8)
        gains = torch.rand(8, generator=generator, dtype=torch.float64)
        forecasts = {kind: Forecast(float(gains.sum()) / (one + 1), gains / (one + 2), UNCORRECTED)
                     for one, kind in enumerate(("small", "large"))}  # fmt: skip
        modules.append(TypedModule(shape, f"t{index}", {"small": 32, "large": 64}, forecasts))
    total = 96 + int(share * 400)
    plain = {kind: dict.fromkeys(("m0", "m1", "m2"), kind) for kind in ("small", "large")}
    found = choose(modules, total, model="m", host="h", factor_bits=16, layout=LAYOUT, plain=plain)
    assert found.nbytes <= total

    def cost(module: TypedModule, kind: str, rank: int) -> tuple[int, float]:
        left = module.forecasts[kind].total - float(module.forecasts[kind].gains[:rank].sum())
        return module.nbytes[kind] + factor_bytes(rank, module.shape, 16, LAYOUT), max(left, 0.0)

    each = [[cost(module, kind, rank) for kind in ("small", "large") for rank in (0, 4, 8)] for module in modules]
    best = min(
        sum(loss for _, loss in some) for some in itertools.product(*each) if sum(size for size, _ in some) <= total
    )
    assert found.loss == pytest.approx(best, abs=1e-9)


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10**6), share=st.floats(0, 1))
def test_modules_of_one_tensor_become_the_same(seed: int, share: float) -> None:
    """As the best of all choices that give them one type and one rank."""
    generator = torch.Generator().manual_seed(seed)
    modules = []
    for index, components in enumerate((8, 8, 4)):
        gains = torch.rand(components, generator=generator, dtype=torch.float64).sort(descending=True).values
        forecasts = {kind: Forecast(float(gains.sum()) / (one + 1), gains / (one + 2), UNCORRECTED)
                     for one, kind in enumerate(("small", "large"))}  # fmt: skip
        modules.append(TypedModule(ModuleShape(f"m{index}", 16, 8), "experts", {"small": 32, "large": 64}, forecasts))
    total = 96 + int(share * 400)
    found = choose(modules, total, model="m", host="h", factor_bits=16, layout=LAYOUT, plain={})
    assert found.nbytes <= total and len({(one.type, one.rank) for one in found.modules.values()}) == 1
    best = math.inf
    for kind, rank in itertools.product(("small", "large"), (0, 4, 8)):
        size = sum(one.nbytes[kind] + factor_bytes(rank, one.shape, 16, LAYOUT) for one in modules)
        left = [one.forecasts[kind].total - float(one.forecasts[kind].gains[:rank].sum()) for one in modules]
        if size <= total:
            best = min(best, sum(max(one, 0.0) for one in left))
    assert found.loss == pytest.approx(best, abs=1e-9)


def test_a_plan_of_experts(tmp_path: Path, tokenizer: Any) -> None:
    model = make("experts", tmp_path / "base", tokenizer)
    files = [write_model(model, tmp_path / f"{kind}.gguf", kind) for kind in KINDS]
    with quiet():
        found = type_planner("llamacpp")(TypePlanJob(str(tmp_path / "base"), files, "5.2bpw", 4, "relative", windows()))
    of_tensor: dict[str, set[tuple[str, int]]] = {}
    for one in found.plan.modules.values():
        of_tensor.setdefault(one.tensor, set()).add((one.type, one.rank))
    assert all(len(choices) == 1 for choices in of_tensor.values()) and any("exps" in name for name in of_tensor)
    found.write(tmp_path / "plan.json")
    lines = (tmp_path / "plan.types.txt").read_text().split()
    assert len(lines) == len(set(lines)) == len(of_tensor)


def test_a_plan_of_real_files(tmp_path: Path, tokenizer: Any) -> None:
    model = make("llama", tmp_path / "base", tokenizer)
    files = [write_model(model, tmp_path / f"{kind}.gguf", kind) for kind in KINDS]
    job = TypePlanJob(str(tmp_path / "base"), files, "5.2bpw", 4, "relative", windows())
    with quiet():
        found = type_planner("llamacpp")(job)
    plan = found.plan
    shapes = [shape_of(name, one) for name, one in linears(model).items()]
    assert set(plan.modules) == {shape.name for shape in shapes}
    assert plan.nbytes <= budget_bytes("5.2bpw", shapes)
    assert {one.type for one in plan.modules.values()} <= set(KINDS)
    for name, (nbytes, loss) in found.plain.items():
        kind = name.removesuffix(".gguf")
        assert nbytes == pytest.approx({"Q4_0": 4.5, "Q5_0": 5.5, "Q8_0": 8.5}[kind] * found.weights / 8)
        assert nbytes > plan.nbytes or loss >= plan.loss
    steps = found.write(tmp_path / "plan.json")
    assert TypePlan.read(tmp_path / "plan.json") == plan
    assert steps[0].startswith("llama-quantize") and str(tmp_path / "plan.types.txt") in steps[0]
    lines = (tmp_path / "plan.types.txt").read_text().split()
    for name, choice in plan.modules.items():
        fitting = [line.split("=")[1] for line in lines if re.search(line.split("=")[0], tensor_of(name))]
        assert fitting == [choice.type.lower()]
    # The ranks of a plan are those of the adapter. These are made up, since few components pay on so small a model.
    ranks = {name: 32 if name.endswith("_proj") and ".0." in name else 0 for name in plan.modules}
    job_of = AdapterJob(str(tmp_path / "base"), files[0], windows(), {"rank": 32, "factor_bits": 4}, ranks=ranks)
    with quiet():
        made = read_lora_header(adapter_maker(files[0])(job_of))
    assert made.ranks == {tensor_of(name): 32 for name, rank in ranks.items() if rank}
    with pytest.raises(ValueError, match="below what the smallest types on offer take"), quiet():
        type_planner("llamacpp")(TypePlanJob(str(tmp_path / "base"), files, "4bpw", 4, "relative", windows()))


def test_files_of_different_modules_are_refused(tmp_path: Path, tokenizer: Any) -> None:
    model = make("llama", tmp_path / "base", tokenizer)
    files = [
        write_model(model, tmp_path / "a.gguf", "Q4_0"),
        write_model(model, tmp_path / "b.gguf", "Q5_0", skipped=".v_proj"),
    ]
    with pytest.raises(ValueError, match=r"do not quantise the same modules \(.*v_proj"), quiet():
        type_planner("llamacpp")(TypePlanJob(str(tmp_path / "base"), files, "5bpw", 4, "relative", windows()))
    with pytest.raises(ValueError, match="No type planner"):
        type_planner("nobody")


@pytest.mark.parametrize("content", ["[]", "{}", '{"version": 1, "host": "llamacpp", "factor_bits": 4, "modules": 3}',
    '{"version": 1, "host": "llamacpp", "factor_bits": 4, "modules": {"m": {"tensor": "t", "type": "Q", "rank": -1}}}',
])  # fmt: skip
def test_broken_plans_are_refused(tmp_path: Path, content: str) -> None:
    path = tmp_path / "plan.json"
    path.write_text(content)
    with pytest.raises(AdapterError, match=r"plan\.json"):
        TypePlan.read(path)
