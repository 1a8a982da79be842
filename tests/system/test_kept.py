"""What a run keeps: written whole or not at all, read back bit for bit, and refused where it is of another run."""

from __future__ import annotations

import errno
import json
import os
import resource
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gptqmodel_eora_ext.system.files import no_room, replaced_folder
from gptqmodel_eora_ext.system.kept import (
    LAYOUT,
    RUN,
    InUse,
    ResumeError,
    Stopped,
    differences,
    kept_state,
    resume_folder,
)  # fmt: skip
from gptqmodel_eora_ext.system.randomness import random_state, set_random_state
from gptqmodel_eora_ext.system.state_file import read_state, state_bytes, write_state
from gptqmodel_eora_ext.system.tensor_file import DTYPES

ASKED = {"adapter": {"rank": 8}, "data": "abc"}

tensors = st.builds(
    lambda dtype, shape: torch.randint(0, 100, shape, dtype=torch.int64).to(dtype),
    st.sampled_from(list(DTYPES)), st.lists(st.integers(0, 3), max_size=3),
)  # fmt: skip
numbers = st.floats(allow_nan=False) | st.integers(-(2**70), 2**70)
leaves = st.none() | st.booleans() | numbers | st.text(max_size=5) | tensors
states = st.recursive(
    leaves,
    lambda inner: st.lists(inner, max_size=3)
    | st.lists(inner, max_size=3).map(tuple)
    | st.dictionaries(st.text(max_size=3) | st.integers(), inner, max_size=3),
    max_leaves=8,
)


def same(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor):
        def raw(tensor: torch.Tensor) -> torch.Tensor:
            return tensor.contiguous().view(-1).view(torch.uint8)

        return one.dtype == other.dtype and one.shape == other.shape and torch.equal(raw(one), raw(other))
    if isinstance(one, dict):
        return list(one) == list(other) and all(same(one[key], other[key]) for key in one)
    if isinstance(one, (list, tuple)):
        return type(one) is type(other) and len(one) == len(other) and all(map(same, one, other))
    return type(one) is type(other) and one == other


@settings(max_examples=60, deadline=None)
@given(state=states)
def test_a_state_comes_back_as_it_was(state: Any, tmp_path_factory: pytest.TempPathFactory) -> None:
    file = tmp_path_factory.mktemp("state") / "state.safetensors"
    write_state(file, state)
    assert same(state, read_state(file))
    first = file.read_bytes()
    write_state(file, state)
    assert file.read_bytes() == first


def test_known_tensors_are_not_written_and_shared_ones_once(tmp_path: Path) -> None:
    mask, hidden = torch.ones(100), torch.randn(10)
    state = {"mask": mask, "rows": [hidden, hidden, hidden[2:5]]}
    assert state_bytes(state, {id(mask): "mask"}) == hidden.nbytes + 3 * 4
    write_state(tmp_path / "state", state, {id(mask): "mask"})
    found = read_state(tmp_path / "state", {"mask": mask})
    assert found["mask"] is mask and torch.equal(found["rows"][2], hidden[2:5])
    with pytest.raises(TypeError, match="object"):
        write_state(tmp_path / "state", object())


def test_random_generators_go_on(tmp_path: Path) -> None:
    import random

    import numpy as np

    def draw() -> tuple[Any, ...]:
        return random.random(), float(np.random.rand()), torch.rand(3).tolist(), random.sample(range(99), 3)

    before = random_state()
    write_state(tmp_path / "state", before)
    drawn = draw()
    set_random_state(read_state(tmp_path / "state"))
    assert draw() == drawn


def test_another_request_is_refused_with_what_differs(tmp_path: Path) -> None:
    root = resume_folder(tmp_path / "out")
    with kept_state(root, ASKED) as kept:
        assert not kept.goes_on
        kept.keep("next", {"layers": 3})
    with kept_state(root, ASKED) as kept:
        assert kept.goes_on and kept.read("next") == {"layers": 3}
    with pytest.raises(ResumeError, match=r"\(adapter\.rank: 8 then, 4 now; data: \"abc\" then, null now\)"):
        kept_state(root, {"adapter": {"rank": 4}}).__enter__()
    with kept_state(root, {"adapter": {"rank": 4}}, begin_anew=True) as kept:
        assert not kept.goes_on and "next" not in kept
        kept.keep("next", 1)
    with kept_state(root, ASKED, supersede=True) as kept:
        assert not kept.goes_on and "next" not in kept
        kept.finish()
    assert not root.exists()


def test_layouts_of_other_versions_damage_and_other_processes_are_told(tmp_path: Path) -> None:
    root = tmp_path / "kept"
    with kept_state(root, ASKED) as kept:
        kept.keep("next", [torch.ones(4)])
        with pytest.raises(InUse, match="another process"):
            kept_state(root, ASKED).__enter__()
    whole = (root / "next.safetensors").read_bytes()
    (root / "next.safetensors").write_bytes(whole[:-3])
    with kept_state(root, ASKED) as kept, pytest.raises(ResumeError, match=r"next\.safetensors.*cannot be read.*Rem"):
        kept.read("next")
    told = json.loads((root / RUN).read_text())
    (root / RUN).write_text(json.dumps({**told, "layout": 99}))
    with pytest.raises(ResumeError, match=f"keeps layout 99; this one keeps {LAYOUT}"):
        kept_state(root, ASKED).__enter__()
    (root / RUN).write_text("{")
    with pytest.raises(ResumeError, match="damaged"):
        kept_state(root, ASKED).__enter__()


def test_what_differs_softly_is_told(tmp_path: Path) -> None:
    heard: list[str] = []
    for threads in (2, 4):
        with kept_state(tmp_path / "kept", ASKED, soft={"threads": threads}, tell_soft=heard.append) as kept:
            kept.keep("next", 0)
    assert heard == ["threads: 2 then, 4 now"]


@contextmanager
def files_of_at_most(nbytes: int) -> Iterator[None]:
    """What a quota does: files cannot grow beyond so many bytes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    usual = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (nbytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, usual)


def test_without_room_the_older_state_stays(tmp_path: Path) -> None:
    with kept_state(tmp_path / "kept", ASKED) as kept:
        kept.keep("next", torch.zeros(4))
        with files_of_at_most(20_000), pytest.raises(OSError, match=r"takes 0\.4 MB here .* are free.*next") as found:
            kept.keep("next", torch.ones(100_000))
        assert found.value.errno == errno.EFBIG and no_room(found.value)
        assert torch.equal(kept.read("next"), torch.zeros(4))
        assert {file.name for file in kept.root.iterdir()} == {"next.safetensors", "lock", RUN}
        kept.keep("next", torch.ones(100_000))
    assert not no_room(PermissionError()) and not no_room(None)


def test_a_save_that_finds_no_room_names_the_folder_whoever_found_it(tmp_path: Path) -> None:
    """The tokenizers library tells a full disk as a plain exception."""
    with pytest.raises(OSError, match=r"No space left on device while it was saved.*out") as found:  # noqa: SIM117
        with replaced_folder(tmp_path / "out"):
            raise Exception("No space left on device (os error 28)")
    assert found.value.errno == errno.ENOSPC and not list(tmp_path.iterdir())


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_run_after_the_step(number: signal.Signals, tmp_path: Path) -> None:
    usual = signal.getsignal(number)
    with kept_state(tmp_path / "kept", ASKED) as kept:
        kept.step_done()
        os.kill(os.getpid(), number)
        kept.keep("next", 1)
        with pytest.raises(Stopped, match="the same call goes on"):
            kept.step_done()
    assert signal.getsignal(number) is usual
    with kept_state(tmp_path / "kept", ASKED) as kept:
        assert kept.read("next") == 1


def test_differences_are_paths() -> None:
    assert differences({"a": [1], "b": {"c": 1}}, {"a": [1], "b": {"c": 2, "d": None}}) == ["b.c: 1 then, 2 now"]
