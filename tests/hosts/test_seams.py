"""The contract with GPTQModel: what the seams expect of it, and that they can be undone."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from gptqmodel import BACKEND, GPTQModel, QuantizeConfig
from gptqmodel.adapter.adapter import ADAPTER_MAPPING, Lora, normalize_adapter
from gptqmodel.models._const import DEVICE
from gptqmodel.models.base import BaseQModel
from gptqmodel.nn_modules.qlinear import BaseQuantLinear
from gptqmodel.quantization.config import FORMAT, METHOD
from gptqmodel.utils import importer
from gptqmodel.utils.importer import select_quant_linear
from packaging.version import Version

from gptqmodel_eora_ext import EoRA
from gptqmodel_eora_ext.hosts.gptqmodel import seams
from gptqmodel_eora_ext.hosts.seam import Seam


def kernels() -> list[Any]:
    return [kernel for kernel in seams._subclasses(BaseQuantLinear) if kernel.SUPPORTS_ADAPTERS is not None]


def test_every_seam_has_the_expected_shape() -> None:
    """Fails, naming the seam, when a new GPTQModel changes what the plugin relies on."""
    seams.uninstall()
    try:
        assert [problem for seam in seams.list_seams() if (problem := seam.problem())] == []
        assert seams.relied_on_problems() == []
    finally:
        seams.install()


def test_installed_by_import_alone() -> None:
    assert seams.installed()
    assert ADAPTER_MAPPING["eora"] is EoRA


def test_kernels_accept_eora_exactly_where_they_accept_lora() -> None:
    assert any(Lora in kernel.SUPPORTS_ADAPTERS for kernel in kernels())
    for kernel in kernels():
        assert (EoRA in kernel.SUPPORTS_ADAPTERS) == (Lora in kernel.SUPPORTS_ADAPTERS), kernel
        assert kernel.SUPPORTS_ADAPTERS.count(EoRA) <= 1


def test_a_kernel_without_adapters_refuses_by_itself() -> None:
    refusing = next(kernel for kernel in kernels() if not kernel.SUPPORTS_ADAPTERS)
    accepted, error = BaseQuantLinear._validate_shared.__func__(refusing, adapter=EoRA(rank=4))  # type: ignore[attr-defined]
    assert not accepted and "does not support adapter: EoRA(rank=4" in str(error)


def test_selection_finds_a_kernel_for_an_eora_adapter() -> None:
    kernel = select_quant_linear(
        bits=2, group_size=64, desc_act=False, sym=True, device=DEVICE.CPU, backend=BACKEND.GPTQ_TORCH,
        format=FORMAT.GPTQ, quant_method=METHOD.GPTQ, pack=False, pack_dtype=torch.int32,
        adapter=EoRA(rank=4),
    )  # fmt: skip
    assert EoRA in kernel.SUPPORTS_ADAPTERS


def test_undone_and_done_again() -> None:
    patched = BaseQModel.quantize
    order = importer.AUTO_BACKEND_KERNEL_MAPPING[METHOD.GPTQ][FORMAT.GPTQ]
    assert next(iter(order)) == seams.FUSED_KEY
    seams.uninstall()
    try:
        assert not seams.installed() and seams.FUSED_KEY not in order
        assert "eora" not in ADAPTER_MAPPING
        assert BaseQModel.quantize is patched.__wrapped__  # type: ignore[attr-defined]
        assert not any(EoRA in kernel.SUPPORTS_ADAPTERS for kernel in kernels())
        assert GPTQModel.adapter.generate.__func__.__qualname__.startswith("GPTQModel")
    finally:
        seams.install()
    assert ADAPTER_MAPPING["eora"] is EoRA
    seams.install()
    assert BaseQModel.quantize.__wrapped__ is patched.__wrapped__  # type: ignore[attr-defined]


def test_a_host_of_another_shape_is_refused_and_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    seams.uninstall()
    with monkeypatch.context() as patch:
        patch.setattr(BaseQModel, "quantize", lambda self, calibration: None)
        with pytest.raises(seams.SeamError, match=r"BaseQModel\.quantize lacks the parameters .*'adapter'"):
            seams.install()
        assert not seams.installed() and "eora" not in ADAPTER_MAPPING
    seams.install()


def test_another_order_of_kernels_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    seams.uninstall()
    with monkeypatch.context() as patch:
        patch.setattr(importer, "AUTO_BACKEND_KERNEL_MAPPING", {METHOD.GPTQ: {FORMAT.GPTQ: []}})
        with pytest.raises(seams.SeamError, match=r"AUTO_BACKEND_KERNEL_MAPPING.* is no ordered dict of kernels"):
            seams.install()
        assert not seams.installed()
    seams.install()


def test_an_error_in_the_middle_leaves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    seams.uninstall()
    original = BaseQModel.quantize
    with monkeypatch.context() as patch:
        patch.setattr(seams, "_register_adapter", lambda: (_ for _ in ()).throw(RuntimeError("in the middle")))
        with pytest.raises(RuntimeError, match="in the middle"):
            seams.install()
        assert not seams.installed() and BaseQModel.quantize is original
    seams.install()
    assert seams.installed() and BaseQModel.quantize is not original


def test_an_inherited_attribute_is_inherited_again() -> None:
    class Base:
        def call(self) -> int:
            return 1

    class Host(Base):
        pass

    undo = Seam(Host, "call", ("self",), lambda original: lambda self: original(self) + 1).apply()
    assert Host().call() == 2 and Base().call() == 1
    undo()
    assert Host().call() == 1 and "call" not in vars(Host)


def test_an_old_host_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    seams.uninstall()
    with monkeypatch.context() as patch:
        patch.setattr(seams, "host_version", lambda: Version("7.6.1"))
        seams.install_or_log()
        with pytest.raises(seams.SeamError, match=r"needs gptqmodel >= 7\.7\.0, found 7\.6\.1"):
            EoRA(rank=4)
    seams.install()


def test_a_newer_host_is_told_of(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(seams, "host_version", lambda: Version("8.1.0"))
    with caplog.at_level(logging.WARNING):
        seams.host_known().check()
    assert "gptqmodel 8.1.0 is newer than the tested 7.7.0" in caplog.text


def test_at_least_two_cpu_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    import gptqmodel

    monkeypatch.delenv("GPTQMODEL_CPU_WORKERS", raising=False)
    for processors in (1, 2, 64):
        monkeypatch.setattr("os.cpu_count", lambda processors=processors: processors)
        assert gptqmodel._default_cpu_workers() >= 2


@pytest.mark.parametrize("form", [EoRA(rank=8, path="a"), {"name": "eora", "rank": 8, "path": "a"}])
def test_quantize_config_takes_both_forms(form: Any) -> None:
    adapter = QuantizeConfig(bits=2, group_size=64, adapter=form).adapter
    assert isinstance(adapter, EoRA) and (adapter.rank, adapter.path) == (8, "a")
    assert normalize_adapter(adapter.to_dict()).to_dict() == adapter.to_dict()


@pytest.mark.parametrize(
    ("rank", "message"),
    [
        (0, "at least 1, got 0"),
        (-3, "at least 1, got -3"),
        (1.5, r"must be an integer, got 1\.5 \(float\)"),
        ("8", r"must be an integer, got '8' \(str\)"),
        (True, "must be an integer, got True"),
    ],
)
def test_bad_ranks(rank: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        EoRA(rank=rank)
    with pytest.raises(ValueError, match="Invalid adapter config"):
        QuantizeConfig(bits=2, group_size=64, adapter={"name": "eora", "rank": rank})


def test_bad_path() -> None:
    with pytest.raises(ValueError, match=r"`path` must be a folder's path, got 3 \(int\)"):
        EoRA(rank=4, path=3)  # type: ignore[arg-type]
