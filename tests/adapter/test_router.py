"""The router on texts that are Gaussian by construction: who goes where, what falls back, and what it keeps."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from gptqmodel_eora_ext.adapter.ensemble.division import STEPS, Division, Sample, divide
from gptqmodel_eora_ext.adapter.ensemble.pooling import pooled, summed
from gptqmodel_eora_ext.adapter.ensemble.router import LENGTHS, Router, Routing
from gptqmodel_eora_ext.adapter.errors import AdapterError

HIDDEN, WINDOWS, TOKENS = 24, 48, 64
MEMBERS = ("math", "code")


def text(kind: int, windows: int = WINDOWS, tokens: int = TOKENS, *, seed: int = 0) -> torch.Tensor:
    """What a layer shows, around a centre of the kind's own; of every prompt a little around that."""
    centre = torch.randn(HIDDEN, generator=torch.Generator().manual_seed(1000 + kind))
    generator = torch.Generator().manual_seed(seed + 17 * kind)
    prompt = 0.2 * torch.randn(windows, 1, HIDDEN, generator=generator)
    return centre + prompt + torch.randn(windows, tokens, HIDDEN, generator=generator)


def sums(kind: int, windows: int = WINDOWS, tokens: int = TOKENS) -> torch.Tensor:
    return summed([text(kind, windows, tokens)])


def routed(router: Router, *seen: torch.Tensor, mask: torch.Tensor | None = None) -> Routing:
    return router.choose(*pooled(seen, mask))


@pytest.fixture(scope="module")
def router() -> Router:
    return Router.fit({"shared": sums(0), "math": sums(1), "code": sums(2)}, MEMBERS, ["layers.0.down"])


def test_prompts_go_to_their_domain(router: Router) -> None:
    for kind, name in enumerate(("shared", *MEMBERS)):
        routing = routed(router, text(kind, 100, 32, seed=5))
        assert routing.nearest.count(name) >= 95
        assert sum(routing.fallen_back) <= 10
    assert bool((routing.weights.sum(dim=1) <= 1 + 1e-6).all())


def test_other_text_falls_back(router: Router) -> None:
    for kind in (3, 4, 5):
        routing = routed(router, text(kind, 50, 32, seed=5))
        assert sum(routing.fallen_back) >= 45
        assert not bool(routing.weights[list(routing.fallen_back)].any())


def test_a_prompt_of_few_tokens_falls_back(router: Router) -> None:
    routing = routed(router, text(1, 3, LENGTHS[0] - 1))
    assert routing.fallen_back == (True,) * 3 and routing.nearest == ("",) * 3


def test_a_row_is_chosen_by_itself(router: Router) -> None:
    """Padding on either side changes nothing, nor who else is in the batch."""
    one = text(1, 1, 32, seed=3)
    alone = routed(router, one)
    batch = torch.full((2, 50, HIDDEN), float("nan"))
    batch[0, 18:], batch[1] = one[0], text(2, 1, 50)[0]
    mask = torch.ones(2, 50)
    mask[0, :18] = 0
    found = routed(router, batch.nan_to_num(1e3), mask=mask)
    torch.testing.assert_close(found.shares[:1], alone.shares)
    assert found.nearest == ("math", "code")


def test_own_text_is_as_far_as_it_should_be(router: Router) -> None:
    """Tails of text like the calibration's are spread over 0 to 1: `drift` relies on that."""
    tails = torch.tensor(routed(router, text(1, 400, 32, seed=8)).tails)
    for share in (0.1, 0.25, 0.5):
        assert float((tails <= share).float().mean()) == pytest.approx(share, abs=0.12)


def test_a_floor_above_every_share(router: Router) -> None:
    assert all(routed(replace(router, floor=1.0), 0.5 * text(1, 5) + 0.5 * text(2, 5)).fallen_back)


def test_a_new_class_leaves_the_others(router: Router) -> None:
    more = router.with_class("law", sums(6))
    assert more.members == (*MEMBERS, "law")
    assert torch.equal(more.centres[:3], router.centres) and torch.equal(more.roots, router.roots)
    assert torch.equal(more.distances[:, :3], router.distances)
    assert routed(more, text(6, 20, 32, seed=5)).nearest.count("law") >= 18
    again = more.with_class("math", sums(1))
    assert again.members == ("code", "law", "math")


def test_on_disk(router: Router, tmp_path: Path) -> None:
    router.save(tmp_path / "r.safetensors")
    read = Router.load(tmp_path / "r.safetensors", MEMBERS, router.settings)
    means = pooled([text(2, 4)])
    assert torch.equal(read.choose(*means).weights, router.choose(*means).weights)


def test_damaged_files(router: Router, tmp_path: Path) -> None:
    path = tmp_path / "r.safetensors"
    router.save(path)
    with pytest.raises(AdapterError, match=r"the router .* knows .*, the members are"):
        Router.load(path, ("math",), router.settings)
    with pytest.raises(AdapterError, match="temperature 0"):
        Router.load(path, MEMBERS, {**router.settings, "temperature": 0})
    tensors = load_file(path)
    for name, value, message in (
        ("centres", tensors["centres"][:1].clone(), r"holds centres as torch.float32 \[1, 24\]"),
        ("mean", tensors["mean"] * float("nan"), "holds NaN or infinity in mean"),
        ("roots", tensors["roots"].half(), "holds roots as torch.float16"),
    ):
        save_file({**tensors, name: value}, path)
        with pytest.raises(AdapterError, match=message):
            Router.load(path, MEMBERS, router.settings)
    path.write_bytes(b"no tensors")
    with pytest.raises(AdapterError, match="cannot be read"):
        Router.load(path, MEMBERS, router.settings)


def test_too_little_text() -> None:
    with pytest.raises(AdapterError, match="math fills 3 windows; at least 8"):
        Router.fit({"math": sums(1, 3)}, ("math",), ["down"])
    with pytest.raises(AdapterError, match="windows have fewer than 16 tokens"):
        Router.fit({"math": sums(1, 9, 9)}, ("math",), ["down"])
    with pytest.raises(AdapterError, match="holds NaN or infinity"):
        Router.fit({"math": sums(1) * float("nan")}, ("math",), ["down"])


def sample(overlap: float, seed: int) -> Sample:
    """A module whose domains read inputs in common (1) or each its own (0)."""
    generator = torch.Generator().manual_seed(seed)
    own = torch.zeros(2, 32)
    own[0, :8], own[1, 8:16] = 1, 1
    energies = overlap + (1 - overlap) * own + 0.01
    moments = {name: torch.diag(one) for name, one in zip(MEMBERS, energies, strict=True)}
    moments["shared"] = sum(moments.values()) / 2
    return Sample(torch.randn(24, 32, generator=generator), moments)


@pytest.mark.parametrize("overlap", [0.0, 1.0])
def test_the_division(overlap: float) -> None:
    """A correction is a projection of ΔW, which no other domain is worse for: the more is shared, the less is left."""
    total = weights = 4 * 24 * 32
    found = divide([sample(overlap, seed) for seed in range(4)], total, weights, MEMBERS, factor_bits=16)
    assert list(found.forecast.values()) == sorted(found.forecast.values(), reverse=True)
    assert found.shared == int(max(found.forecast) * total)
    assert found.total <= total and min(found.members.values()) >= (total - found.shared) // (2 * STEPS) - 1


def test_the_division_without_a_sample() -> None:
    assert divide([], 1000, 1, MEMBERS, factor_bits=16) == Division(500, {"math": 250, "code": 250}, {})
