"""The quantise loop on real weights: every configuration, and that the reported errors are the real ones."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from gptqmodel import BACKEND, AWQConfig, GPTAQConfig, GPTQModel, QQQConfig, QuantizeConfig, RTNConfig
from gptqmodel.nn_modules.hooked_linear import HookedLinear
from transformers import Qwen2Config, Qwen2ForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

from gptqmodel_eora_ext import EoRA
from gptqmodel_eora_ext.hosts.terminal import quiet

from .helpers import Batches, distances, kernels, load, measured_errors, quantize

pytestmark = pytest.mark.e2e

# The loop computes with weights Ŵ + BA rounded to bfloat16, the kernel with Ŵ, B and A apart: activations, and with
# them the measured errors, agree to a few roundings.
SAME_ERROR = 0.05


def gptq(**options: Any) -> QuantizeConfig:
    return QuantizeConfig(**{"bits": 3, "group_size": 64, **options})


@pytest.mark.parametrize(
    ("config", "options"),
    [
        pytest.param(gptq(bits=2), {}, id="2-bit"),
        pytest.param(gptq(sym=False, desc_act=True, act_group_aware=False), {}, id="asymmetric-desc_act"),
        pytest.param(gptq(true_sequential=False), {}, id="not-sequential"),
        pytest.param(gptq(), {"dtype": torch.float16}, id="float16"),
        pytest.param(gptq(), {"dtype": torch.float32}, id="float32"),
        pytest.param(gptq(gptaq=GPTAQConfig()), {}, id="gptaq"),
        pytest.param(RTNConfig(bits=3, group_size=64), {}, id="rtn"),
        pytest.param(gptq(bits=2), {"adapter": EoRA(rank=16, factor_bits=4)}, id="4-bit-factors"),
        pytest.param(gptq(bits=2), {"adapter": EoRA(rank=16, factor_bits=8)}, id="8-bit-factors"),
        pytest.param(gptq(bits=2), {"adapter": EoRA(rank=16, objective="svd")}, id="svd"),
        pytest.param(gptq(bits=2), {"adapter": EoRA(rank=16, objective="diagonal", factor_bits=4)}, id="diagonal"),
        pytest.param(gptq(bits=2), {"adapter": EoRA(rank=16, objective="output")}, id="output"),
        pytest.param(gptq(bits=2), {"adapter": EoRA(rank=16, factor_bits=4, rounds=2)}, id="two-rounds"),
        pytest.param(
            gptq(sym=False, desc_act=True, act_group_aware=False),
            {"adapter": EoRA(rank=16, rounds=3)},
            id="three-rounds",
        ),
    ],
)
def test_reported_errors_are_what_the_loaded_model_has(
    config: Any, options: dict[str, Any], two_layers: Path, calibration: Batches, tmp_path: Path
) -> None:
    made = quantize(two_layers, tmp_path, config, calibration, **options)
    assert len(made.factors) == 14
    tokens = sum(len(batch["input_ids"]) for batch in calibration)
    found = measured_errors(two_layers, load(tmp_path), calibration)
    for name, factors in made.factors.items():
        assert factors.rank == 16 and factors.tokens == tokens
        assert factors.error_after < factors.error_before
        # Without true sequential order the modules of a layer are captured before any of them is compensated.
        if getattr(config, "true_sequential", True):
            assert found[name] == pytest.approx(factors.error_after, rel=SAME_ERROR), name


@pytest.mark.parametrize("sensitivity", ["fisher", "relative"])
def test_ranks_under_a_budget(
    sensitivity: str, two_layers: Path, calibration: Batches, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    adapter = EoRA("auto", budget="0.5bpw", factor_bits=4, sensitivity=sensitivity)
    config = gptq(bits=2, dynamic={"+:.*layers.0.self_attn.q_proj": {"adapter": {"rank": 3}}})
    made = quantize(two_layers, tmp_path / "model", config, calibration, adapter=adapter)
    weights = sum(factors.in_features * factors.out_features for factors in made.factors.values())
    spent = sum(factors.nbytes for factors in made.factors.values())
    assert 0.9 * 0.5 * weights / 8 < spent <= 0.5 * weights / 8
    ranks = {name: factors.rank for name, factors in made.factors.items()}
    assert ranks.pop("model.layers.0.self_attn.q_proj") == 3
    assert len(set(ranks.values())) > 2 and all(rank % 8 == 0 for rank in ranks.values())
    found = measured_errors(two_layers, load(tmp_path / "model"), calibration)
    for name, factors in made.factors.items():
        assert found[name] == pytest.approx(factors.error_after, rel=SAME_ERROR), name
    report = json.loads((tmp_path / "model" / "eora" / "eora.json").read_text())["allocation"]
    assert report["spent"] == spent and report["sensitivity"] == sensitivity
    # The second run finds the sensitivities of the first.
    kept = list((tmp_path / "cache").rglob("*.safetensors"))
    again = quantize(two_layers, tmp_path / "again", config, calibration, adapter=adapter)
    assert {name: factors.rank for name, factors in again.factors.items()} == {
        name: factors.rank for name, factors in made.factors.items()
    }
    # One file a layer; what compares modules by their outputs has no gradients to keep. And what the sweep found.
    assert list((tmp_path / "cache").rglob("*.safetensors")) == kept
    assert len(kept) == (2 if sensitivity == "fisher" else 0) + 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 8, "budget": "1MB"}, "exclude each other"),
        ({"preset": "better"}, "one of fast, balanced, best, got 'better'"),
        ({"rank": 8, "rounds": 0}, "`rounds` must be at least 1, got 0"),
        ({"rank": "auto", "budget": "1MB", "objective": "svd"}, "objective \"eora\", got objective='svd'"),
        ({"rank": "auto", "budget": "1MB", "sensitivity": "x"}, "one of fisher, empirical, relative"),
        ({"rank": "most"}, "must be an integer"),
    ],
)
def test_budget_options_that_do_not_fit(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        EoRA(**options)


def test_no_extra_forward_pass(
    two_layers: Path, calibration: Batches, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the quantiser's own data, compensation runs not one forward more than quantising alone."""
    original = HookedLinear.forward
    calls = 0

    def counted(self: Any, *args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        return original(self, *args, **kwargs)

    monkeypatch.setattr(HookedLinear, "forward", counted)
    counts = []
    for adapter in (None, EoRA(rank=8)):
        calls = 0
        with quiet():
            host = GPTQModel.load(str(two_layers), gptq())
            host.quantize(calibration, batch_size=4, adapter=adapter)
        counts.append(calls)
    assert counts[0] == counts[1] > 0


def test_adapter_calibration_dataset(two_layers: Path, calibration: Batches, tmp_path: Path) -> None:
    """The adapter's statistics come from its own data alone, the quantiser's weights from its own alone."""
    mine, theirs = calibration[:5], calibration[5:]
    made = quantize(two_layers, tmp_path / "own", gptq(), theirs, adapter_calibration_dataset=mine)
    assert {factors.tokens for factors in made.factors.values()} == {5 * 64}
    found = measured_errors(two_layers, load(tmp_path / "own"), mine)
    for name, factors in made.factors.items():
        assert found[name] == pytest.approx(factors.error_after, rel=SAME_ERROR), name
    plain = quantize(two_layers, tmp_path / "same", gptq(), theirs)
    first = "model.layers.0.self_attn.q_proj"
    ours, same = kernels(load(made.folder))[first], kernels(load(plain.folder))[first]
    assert torch.equal(ours.qweight, same.qweight)
    assert made.host._eora_run.details()["calibration"]["tokens"] == 5 * 64


def test_output_follows_the_full_precision_model(two_layers: Path, calibration: Batches, tmp_path: Path) -> None:
    """It trades error on the inputs as they are for what earlier modules did to them; the cross moment shows."""
    found = {
        objective: quantize(two_layers, tmp_path / objective, gptq(bits=2), calibration,
                            adapter=EoRA(rank=16, objective=objective)).factors
        for objective in ("eora", "output")
    }  # fmt: skip
    first, last = "model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj"
    # Before anything is quantised both models have the same inputs, and so the same factors up to their rounding.
    assert found["output"][first].error_after == pytest.approx(found["eora"][first].error_after, rel=0.01)
    assert found["output"][last].error_after > found["eora"][last].error_after * 1.01


def test_padding_does_not_count(two_layers: Path, token_ids: list[int], tmp_path: Path) -> None:
    """Rows of unlike length are padded in one batch; the padding enters neither tokens nor moments."""
    lengths = [64, 40, 25, 12]
    ragged = [{"input_ids": token_ids[:n], "attention_mask": [1] * n} for n in lengths]
    batched = quantize(two_layers, tmp_path / "batched", gptq(), ragged, batch_size=4)
    single = quantize(two_layers, tmp_path / "single", gptq(), ragged, batch_size=1)
    for name, factors in batched.factors.items():
        assert factors.tokens == sum(lengths) == single.factors[name].tokens
    # The first modules read the same inputs in both runs; later ones follow a quantiser that rounds differently.
    for name in ("q_proj", "k_proj", "v_proj"):
        ours, theirs = (made.factors[f"model.layers.0.self_attn.{name}"].signal for made in (batched, single))
        assert ours == pytest.approx(theirs, rel=1e-3), name


@pytest.mark.parametrize("own", [False, True])
def test_awq(own: bool, two_layers: Path, calibration: Batches, tmp_path: Path) -> None:
    options = {"adapter_calibration_dataset": calibration[:6]} if own else {}
    made = quantize(two_layers, tmp_path, AWQConfig(bits=4, group_size=64), calibration, **options)
    assert len(made.factors) == 14
    for name, factors in made.factors.items():
        # 4 bits leave about a percent; scales left out of the comparison would leave hundreds of percent.
        assert factors.error_after < factors.error_before < 0.05 * factors.signal, name
    # Scales were moved between layers, so errors of single weights have no full-precision weight to stand beside.
    adapted, alone = distances(two_layers, load(tmp_path, backend=BACKEND.AWQ_TORCH), calibration)
    assert adapted < 0.95 * alone


def test_skipped_modules_and_ranks_by_dynamic(two_layers: Path, calibration: Batches, tmp_path: Path) -> None:
    dynamic = {
        r"-:.*layers\.0\..*o_proj": {},
        r"+:.*down_proj": {"adapter": {"rank": 4}},
        r"+:.*k_proj": {"adapter": {"rank": 0}},
    }
    made = quantize(two_layers, tmp_path, gptq(dynamic=dynamic), calibration)
    assert "model.layers.0.self_attn.o_proj" not in made.factors
    ranks = {name.rsplit(".", 1)[-1]: factors.rank for name, factors in made.factors.items()}
    assert ranks["down_proj"] == 4 and ranks["k_proj"] == 0 and ranks["q_proj"] == 16
    found = measured_errors(two_layers, load(tmp_path), calibration)
    assert found["model.layers.1.mlp.down_proj"] == pytest.approx(
        made.factors["model.layers.1.mlp.down_proj"].error_after, rel=SAME_ERROR
    )


def test_rank_above_the_shape_is_cut_with_a_warning(
    two_layers: Path, calibration: Batches, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        made = quantize(two_layers, tmp_path, gptq(), calibration, adapter=EoRA(rank=300))
    assert made.factors["model.layers.0.self_attn.k_proj"].rank == 192
    assert made.factors["model.layers.0.self_attn.q_proj"].rank == 300
    assert "layers.0.self_attn.k_proj: rank 300 is above min(out, in) = 192" in caplog.text
    model = load(tmp_path)
    assert kernels(model)["model.layers.0.self_attn.k_proj"].adapter.lora_A.shape == (576, 192)


@pytest.fixture(scope="module")
def qwen2(tmp_path_factory: pytest.TempPathFactory, tokenizer: Any) -> Path:
    """A small random model with biases and an lm_head of its own."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("qwen2")
    config = Qwen2Config(
        vocab_size=49152, hidden_size=256, intermediate_size=512, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, tie_word_embeddings=False, max_position_embeddings=256,
    )  # fmt: skip
    model = Qwen2ForCausalLM(config).to(torch.bfloat16)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_lm_head_and_biases(qwen2: Path, calibration: Batches, tmp_path: Path) -> None:
    # GPTQModel gives lm_head 8 bits unless told; there the rounding of stored scales outweighs what is left.
    dynamic = {"lm_head": {"bits": 3, "group_size": 64}}
    made = quantize(qwen2, tmp_path, gptq(lm_head=True, dynamic=dynamic), calibration)
    assert made.factors["lm_head"].rank == 16
    model = load(tmp_path)
    assert kernels(model)["model.layers.0.self_attn.q_proj"].bias is not None
    found = measured_errors(qwen2, model, calibration)
    for name, factors in made.factors.items():
        assert found[name] == pytest.approx(factors.error_after, rel=SAME_ERROR), name


def test_qqq(qwen2: Path, calibration: Batches, tmp_path: Path) -> None:
    made = quantize(qwen2, tmp_path, QQQConfig(bits=4, group_size=128), calibration)
    assert len(made.factors) == 7
    assert all(factors.error_after < factors.error_before for factors in made.factors.values())
    adapted, alone = distances(qwen2, load(tmp_path, backend=BACKEND.QQQ_TORCH), calibration)
    assert adapted < 0.95 * alone


def test_experts_that_saw_few_or_no_tokens(tmp_path: Path, tokenizer: Any, caplog: pytest.LogCaptureFixture) -> None:
    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        vocab_size=49152, hidden_size=64, intermediate_size=64, moe_intermediate_size=32, num_hidden_layers=1,
        num_attention_heads=4, num_key_value_heads=2, head_dim=16, num_experts=16, num_experts_per_tok=2,
        decoder_sparse_step=1, max_position_embeddings=256, tie_word_embeddings=False,
    )  # fmt: skip
    Qwen3MoeForCausalLM(config).to(torch.bfloat16).save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    twelve = [{"input_ids": list(range(100, 112)), "attention_mask": [1] * 12}]
    with caplog.at_level(logging.WARNING):
        made = quantize(tmp_path / "base", tmp_path / "out", gptq(bits=4, group_size=32), twelve, adapter=EoRA(rank=8))
    experts = {name: factors for name, factors in made.factors.items() if ".experts." in name}
    assert any(factors.tokens == 0 for factors in experts.values())
    for name, factors in experts.items():
        assert factors.rank == min(8, factors.tokens), name
        assert torch.isfinite(factors.lora_A).all() and torch.isfinite(factors.lora_B).all()
        if factors.tokens < 8:
            assert f"{name}: saw {factors.tokens} calibration tokens, too few for rank 8" in caplog.text
    with torch.inference_mode():
        assert torch.isfinite(load(tmp_path / "out")(torch.arange(100, 130)[None]).logits).all()


@pytest.mark.parametrize(
    ("config", "options", "error", "message"),
    [
        (gptq(), {"adapter": EoRA(objective="svd")}, ValueError, "Name a rank, or leave the objective out"),
        (gptq(), {"calibration": []}, ValueError, "calibration dataset is empty"),
        (RTNConfig(bits=4, group_size=64), {"calibration": None}, ValueError, "needs data with every quantisation"),
        (gptq(), {"adapter_calibration_dataset": []}, ValueError, "`adapter_calibration_dataset` is empty"),
        (
            gptq(),
            {"calibration": [{"input_ids": [60000] * 64, "attention_mask": [1] * 64}]},
            ValueError,
            "token id 60000, but the model embeds 49152 ids. The tokenizer does not fit",
        ),
        (
            gptq(dynamic={"+:.*q_proj": {"adapter": {"rank": -1}}}),
            {},
            ValueError,
            r"`dynamic\['\+:\.\*q_proj'\]\['adapter'\]\['rank'\]` must be at least 0, got -1",
        ),
    ],
)
def test_bad_input_fails_before_any_work(
    config: Any, options: dict[str, Any], error: type[Exception], message: str, two_layers: Path, calibration: Batches
) -> None:
    call = {"calibration": calibration, "adapter": EoRA(rank=8), **options}
    with quiet():
        host = GPTQModel.load(str(two_layers), config)
        with pytest.raises(error, match=message):
            host.quantize(**call)
    assert isinstance(host.model.model.layers[0].self_attn.q_proj, torch.nn.Linear)
    assert host.quantize_config.adapter is None or isinstance(host.quantize_config.adapter, EoRA)


def test_nan_activations_name_the_module(smollm2: Path, two_layers: Path, calibration: Batches, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(two_layers, dtype="auto")
    # Finite itself, and more than bfloat16 holds once it is multiplied; broken weights are told before any layer runs.
    model.model.layers[1].input_layernorm.weight.data[3] = 3e38
    model.save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(two_layers).save_pretrained(tmp_path)
    with quiet():
        host = GPTQModel.load(str(tmp_path), gptq())
        with pytest.raises(ValueError, match=r"model\.layers\.1\.self_attn\..*NaN or infinity"):
            host.quantize(calibration, batch_size=4, adapter=EoRA(rank=8))


def test_logs_are_not_left_in_the_working_directory(
    two_layers: Path, calibration: Batches, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    quantize(two_layers, tmp_path / "out", gptq(), calibration[:4], adapter=EoRA(rank=4))
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["out"]
