"""AutoRound's real library: compensation in its loop, its exports in GPTQModel, and the study from end to end."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from auto_round import AutoRound, AutoScheme
from auto_round.algorithms.composer import AlgorithmComposer
from gptqmodel import BACKEND
from transformers import AutoModelForCausalLM, LlamaConfig
from typer.testing import CliRunner

from gptqmodel_eora_ext import EoRA, EoRAConfig, cli, load_peft
from gptqmodel_eora_ext.formats.autoround import quantize_config
from gptqmodel_eora_ext.hosts.autoround import budget
from gptqmodel_eora_ext.hosts.gptqmodel.generate import generate_adapter
from gptqmodel_eora_ext.hosts.terminal import quiet

from .helpers import Batches, distances, kernels, load, measured_errors

pytestmark = pytest.mark.e2e

# GPTQModel multiplies factors in the model's 16 bits, PEFT in float32; AutoRound's kernels dequantise in another order.
LOGITS_TOLERANCE = 0.03
SAMPLES, SEQLEN = 8, 64
GROUP_SIZE = 32
# Bits, symmetric, exports of one run. AWQ's goes alone, which AutoRound 0.16.1 needs; asymmetric 8 bits it refuses.
EXPORTS = [
    (2, True, "auto_round,auto_round:auto_gptq,auto_gptq"),
    (2, False, "auto_round,auto_round:auto_gptq,auto_gptq"),
    (3, True, "auto_round,auto_gptq"),
    (3, False, "auto_round,auto_round:auto_gptq,auto_gptq"),
    (4, True, "auto_round,auto_gptq,auto_round:gptqmodel"),
    (4, True, "auto_round:auto_awq"),
    (4, True, "auto_awq"),
    (4, False, "auto_round:auto_gptq,auto_gptq,auto_round:gptqmodel"),
    (4, False, "auto_round"),
    (4, False, "auto_awq"),
    (8, True, "auto_round,auto_gptq"),
]


def samples(calibration: Batches) -> list[torch.Tensor]:
    return [torch.tensor([window["input_ids"]]) for window in calibration[:SAMPLES]]


def autoround(base: Path, tokenizer: Any, calibration: Batches, algorithms: Any, **options: Any) -> Any:
    """AutoRound's object for a short run on a CPU."""
    chosen: dict[str, Any] = {"scheme": "W2A16", "group_size": GROUP_SIZE, "nsamples": SAMPLES, "seqlen": SEQLEN,
                              "batch_size": 8, "iters": 2, "dataset": samples(calibration), **options}  # fmt: skip
    given = {key: value for key, value in chosen.items() if value is not None}
    return AutoRound(str(base), tokenizer=tokenizer, device_map="cpu", alg_configs=algorithms, **given)


def random_model(folder: Path, tokenizer: Any, layers: int) -> Path:
    """A random model of small layers, for what turns on formats alone."""
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=len(tokenizer), hidden_size=128, intermediate_size=256, num_hidden_layers=layers,
                         num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=True)  # fmt: skip
    AutoModelForCausalLM.from_config(config).to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory, tokenizer: Any) -> Path:
    return random_model(tmp_path_factory.mktemp("tiny"), tokenizer, layers=2)


@pytest.fixture(scope="module")
def one_layer(tmp_path_factory: pytest.TempPathFactory, tokenizer: Any) -> Path:
    return random_model(tmp_path_factory.mktemp("one-layer"), tokenizer, layers=1)


@pytest.fixture(scope="module")
def in_loop(two_layers: Path, tokenizer: Any, calibration: Batches, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two layers of SmolLM2, compensated in the loop."""
    quantizer = autoround(two_layers, tokenizer, calibration, ["signround", EoRAConfig(rank=16)])
    _, folder = quantizer.quantize_and_save(str(tmp_path_factory.mktemp("loop")), format="auto_round")
    return Path(folder)


# In the loop ---------------------------------------------------------------------------------------------------


def test_the_adapter_corrects_what_the_loaded_model_computes(
    in_loop: Path, two_layers: Path, calibration: Batches
) -> None:
    """Each module is compensated for what it reads in the final model, so what is measured is what was reported."""
    reports = json.loads((in_loop / "eora" / "eora.json").read_text())["modules"]
    measured = measured_errors(two_layers, load(in_loop), calibration[:SAMPLES])
    assert set(measured) == set(reports) and len(measured) == 14
    for name, report in reports.items():
        assert report["rank"] == 16
        assert report["error_after"] < report["error_before"]
        assert measured[name] == pytest.approx(report["error_after"], rel=0.15), name


def test_the_exported_weights_are_the_quantisers_own(
    in_loop: Path, two_layers: Path, tokenizer: Any, calibration: Batches, tmp_path: Path
) -> None:
    """Ŵ + BA is only for the loop: what is packed is, bit for bit, what AutoRound packs by itself. That holds for the
    first block; the second is tuned on what the compensated first one gives."""
    _, folder = autoround(two_layers, tokenizer, calibration, ["signround"]).quantize_and_save(
        str(tmp_path), format="auto_round"
    )
    ours, theirs = (kernels(load(path)) for path in (in_loop, Path(folder)))
    for name, kernel in ours.items():
        assert len(kernel.dequantize_weight().T.reshape(-1, GROUP_SIZE)[0].unique()) <= 4
        if name.startswith("model.layers.0."):
            for buffer in ("qweight", "qzeros", "scales"):
                assert torch.equal(getattr(kernel, buffer), getattr(theirs[name], buffer)), (name, buffer)


def test_logits_agree_through_autorounds_kernels_and_peft(in_loop: Path, token_ids: list[int]) -> None:
    ids = torch.tensor([token_ids[2000:2100]])
    with torch.inference_mode():
        ours = load(in_loop)(ids).logits.float()
        plain = AutoModelForCausalLM.from_pretrained(in_loop, dtype="auto", device_map="cpu")
        without = plain(ids).logits.float()
        theirs = load_peft(plain, in_loop / "eora")(ids).logits.float()
    assert type(plain.model.layers[0].self_attn.q_proj.base_layer).__module__.startswith("auto_round_extension.")
    assert relative(ours, theirs) < LOGITS_TOLERANCE < relative(without, theirs)


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


@pytest.mark.parametrize("algorithms", [["rtn", "eora"], ["eora", "awq"]], ids=["rtn", "awq, listed after"])
def test_composes_with_other_quantisers(
    tiny: Path, tokenizer: Any, calibration: Batches, tmp_path: Path, algorithms: list[str]
) -> None:
    quantizer = autoround(tiny, tokenizer, calibration, algorithms, scheme="W4A16", iters=None)
    _, folder = quantizer.quantize_and_save(str(tmp_path), format="auto_round")
    modules = json.loads((Path(folder) / "eora" / "eora.json").read_text())["modules"]
    assert len(modules) == 14 and all(one["error_after"] < one["error_before"] for one in modules.values())
    model = load(Path(folder))
    adapted, alone = distances(tiny, model, calibration)
    assert adapted < 0.95 * alone
    if "awq" not in algorithms:
        # AWQ moves scales, so that a weight has no full-precision weight to stand beside.
        measured = measured_errors(tiny, model, calibration[:SAMPLES])
        for name, one in modules.items():
            assert measured[name] == pytest.approx(one["error_after"], rel=0.15), name


def test_packed_factors_under_a_budget(tiny: Path, tokenizer: Any, calibration: Batches, tmp_path: Path) -> None:
    algorithms = ["signround", EoRAConfig(budget="1bpw", factor_bits=4, sensitivity="relative")]
    quantizer = autoround(tiny, tokenizer, calibration, algorithms, enable_alg_ext=True)
    _, folder = quantizer.quantize_and_save(str(tmp_path), format="auto_gptq")
    details = json.loads((Path(folder) / "eora" / "eora.json").read_text())
    spent, budget = details["allocation"]["spent"], details["allocation"]["budget"]
    assert 0.8 * budget < spent <= budget and spent == sum(one["bytes"] for one in details["modules"].values())
    assert json.loads((Path(folder) / "quantize_config.json").read_text())["adapter"]["name"] == "eora"
    assert any(kernel.adapter.packed for kernel in kernels(load(Path(folder))).values())


def test_a_budget_where_the_model_is_on_disk(
    tiny: Path, tokenizer: Any, calibration: Batches, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """AutoRound streams blocks from the checkpoint; the survey reads the same files, and chooses the same ranks."""
    ranks, absent, layered = [], list[bool](), budget.layered

    def noted(model: Any, names: list[str]) -> Any:
        absent.append(any(one.is_meta for one in model.parameters()))
        return layered(model, names)

    monkeypatch.setattr(budget, "layered", noted)
    for streamed in (False, True):
        monkeypatch.setenv("AR_DISK_STREAM_MODEL", str(int(streamed)))
        # Each is measured: what a survey has found is kept there.
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / f"cache-{streamed}"))
        folder = tmp_path / str(streamed)
        algorithms = ["signround", EoRAConfig(budget="1bpw", factor_bits=4)]
        quantizer = autoround(tiny, tokenizer, calibration, algorithms, low_cpu_mem_usage=streamed)
        absent.clear()
        _, saved = quantizer.quantize_and_save(str(folder), format="auto_round")
        assert absent == [streamed]
        modules = json.loads((Path(saved) / "eora" / "eora.json").read_text())["modules"]
        ranks.append({name: one["rank"] for name, one in modules.items()})
    assert ranks[0] == ranks[1] and len(ranks[0]) == 14


def test_widths_that_autoscheme_chose(tiny: Path, tokenizer: Any, calibration: Batches, tmp_path: Path) -> None:
    """Compensated in the loop, loaded, and compensated anew as a finished checkpoint."""
    # AutoScheme takes the name of its data, not the data.
    texts = tmp_path / "texts.json"
    texts.write_text(json.dumps([{"text": tokenizer.decode(window["input_ids"] * 2)} for window in calibration]))
    scheme = AutoScheme(avg_bits=3.5, options=("W2A16G32", "W4A16"), nsamples=4, seqlen=32)
    options = {"scheme": scheme, "group_size": None, "dataset": str(texts), "enable_torch_compile": False}
    quantizer = autoround(tiny, tokenizer, calibration, ["signround", EoRAConfig(rank=8)], **options)
    folder = Path(quantizer.quantize_and_save(str(tmp_path / "out"), format="auto_round")[1])
    found = kernels(load(folder))
    assert {(kernel.bits, kernel.group_size) for kernel in found.values()} == {(2, 32), (4, 128)}
    assert all(kernel.adapter is not None for kernel in found.values())
    with quiet():
        afterwards = generate_adapter(
            EoRA(rank=8, path=tmp_path / "afterwards"), str(tiny), folder, calibration[:4], batch_size=4
        )
    for adapter in (folder / "eora", afterwards):
        modules = json.loads((adapter / "eora.json").read_text())["modules"]
        assert len(modules) == 14 and all(one["error_after"] < one["error_before"] for one in modules.values())


def test_goes_on_after_the_last_finished_block(
    tiny: Path, tokenizer: Any, calibration: Batches, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(name: str, rank: int = 8) -> Path:
        quantizer = autoround(tiny, tokenizer, calibration, ["signround", EoRAConfig(rank=rank)])
        return Path(quantizer.quantize_and_save(str(tmp_path / name), format="auto_round")[1])

    whole = run("whole")
    monkeypatch.setenv("AR_RESUME_DIR", str(tmp_path / "resume"))
    compress = AlgorithmComposer.compress_block

    def interrupted(self: Any, block: Any, inputs: Any, others: Any, block_ctx: Any, **kwargs: Any) -> Any:
        if block_ctx.block_index == 1:
            raise KeyboardInterrupt
        return compress(self, block, inputs, others, block_ctx, **kwargs)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(AlgorithmComposer, "compress_block", interrupted)
        run("resumed")
    with pytest.raises(ValueError, match=r"adapter\.rank: 8 then, 4 now"):
        run("resumed", rank=4)
    monkeypatch.setattr(torch, "load", lambda *args, **kwargs: pytest.fail("nothing is read that could execute"))
    resumed = run("resumed")
    for file in ("model.safetensors", "eora/adapter_model.safetensors"):
        assert (whole / file).read_bytes() == (resumed / file).read_bytes()
    first, second = (json.loads((folder / "eora" / "eora.json").read_text())["modules"] for folder in (whole, resumed))
    assert first == second
    assert not (tmp_path / "resume" / "eora").exists()
    assert not list((tmp_path / "resume").rglob("*.pt"))


@pytest.mark.parametrize(
    ("algorithms", "options", "message"),
    [
        (["signround", "eora"], {"scheme": "MXFP4", "group_size": None}, r"activations to 4 bits \(mx_fp\).*W2A16"),
        (["signround", "eora"], {"scheme": "NVFP4", "group_size": None}, "activations to 4 bits.*W2A16"),
        (
            ["signround", "eora"],
            {"format": "auto_round:llm_compressor", "scheme": "W4A16"},
            "export format `auto_r",
        ),
        (["signround", "quarot", "eora"], {}, "does not compose with the rotation"),
    ],
    ids=["mxfp4", "nvfp4", "format", "rotation"],
)
def test_what_does_not_compose_is_refused_before_any_work(
    tiny: Path, tokenizer: Any, calibration: Batches, algorithms: list[str], options: dict[str, Any], message: str
) -> None:
    with pytest.raises(NotImplementedError, match=message):
        autoround(tiny, tokenizer, calibration, algorithms, **options).post_init()


# Finished checkpoints ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("bits", "sym", "formats"), EXPORTS)
def test_every_export_is_compensated(
    one_layer: Path, tokenizer: Any, calibration: Batches, tmp_path: Path, bits: int, sym: bool, formats: str
) -> None:
    """Made by AutoRound, compensated, loaded again: the table of docs/autoround.md."""
    quantizer = autoround(one_layer, tokenizer, calibration, "signround", scheme=f"W{bits}A16", sym=sym, iters=1)
    _, folders = quantizer.quantize_and_save(str(tmp_path), format=formats)
    for folder in map(Path, [folders] if isinstance(folders, str) else folders):
        backend = BACKEND.AWQ_TORCH if quantize_config(folder)["method"] == "awq" else BACKEND.GPTQ_TORCH
        with quiet():
            generate_adapter(EoRA(rank=8), str(one_layer), folder, calibration[:4], batch_size=4)
        reports = json.loads((folder / "eora" / "eora.json").read_text())["modules"]
        errors = measured_errors(one_layer, load(folder, backend=backend), calibration[:4])
        assert set(errors) == set(reports) and len(errors) == 7, folder
        for module, report in reports.items():
            assert errors[module] < report["error_before"], (folder, module)
            assert errors[module] == pytest.approx(report["error_after"], rel=0.1), (folder, module)


def test_mixed_widths_and_layers_left_alone(tiny: Path, tokenizer: Any, calibration: Batches, tmp_path: Path) -> None:
    layers = {"down_proj": {"bits": 4}, "model.layers.0.self_attn.q_proj": {"bits": 8, "group_size": 64},
              "model.layers.1.self_attn.o_proj": {"bits": 16}}  # fmt: skip
    quantizer = autoround(tiny, tokenizer, calibration, "signround", layer_config=layers)
    _, folders = quantizer.quantize_and_save(str(tmp_path), format="auto_round,auto_gptq")
    # Without an adapter it loads as well, and is left as it is.
    assert len(kernels(load(Path(folders[0])))) == 13 and not (Path(folders[0]) / "quantize_config.json").exists()
    for folder in map(Path, folders):
        with quiet():
            generate_adapter(EoRA(rank=8), str(tiny), folder, calibration[:SAMPLES], batch_size=8)
        found = kernels(load(folder))
        assert len(found) == 13 and "model.layers.1.self_attn.o_proj" not in found
        widths = {name: (kernel.bits, kernel.group_size) for name, kernel in found.items()}
        assert widths["model.layers.0.self_attn.q_proj"] == (8, 64)
        assert widths["model.layers.1.mlp.down_proj"] == (4, GROUP_SIZE)
        assert widths["model.layers.0.mlp.up_proj"] == (2, GROUP_SIZE)


def test_scales_that_autorounds_awq_has_moved_are_moved_in_the_base(
    tiny: Path, tokenizer: Any, calibration: Batches, tmp_path: Path
) -> None:
    quantizer = autoround(tiny, tokenizer, calibration, ["awq", "rtn"], scheme="W4A16", iters=None)
    _, folder = quantizer.quantize_and_save(str(tmp_path), format="auto_round")
    with quiet():
        generate_adapter(EoRA(rank=8), str(tiny), Path(folder), calibration[:SAMPLES], batch_size=8)
    modules = json.loads((Path(folder) / "eora" / "eora.json").read_text())["modules"]
    # Without it ΔW would hold the scales: errors as large as the signal.
    assert all(one["error_after"] < one["error_before"] < 0.1 * one["signal"] for one in modules.values())


def test_another_base_and_formats_that_cannot_be_read_are_refused(
    in_loop: Path, two_layers: Path, tiny: Path, tokenizer: Any, calibration: Batches, tmp_path: Path
) -> None:
    other = AutoModelForCausalLM.from_pretrained(two_layers, dtype="auto")
    with torch.no_grad():
        other.model.embed_tokens.weight.mul_(1.5)
    other.save_pretrained(tmp_path / "sibling")
    tokenizer.save_pretrained(tmp_path / "sibling")
    for base, message in ((tiny, "found a weight of"), (tmp_path / "sibling", "embed_tokens.weight: they differ by")):
        with quiet(), pytest.raises(ValueError, match=f"is not the model that .* was quantised from: .*{message}"):
            generate_adapter(EoRA(rank=4, path=tmp_path / "out"), str(base), in_loop, calibration)
    config = json.loads((in_loop / "config.json").read_text())
    config["quantization_config"] |= {"data_type": "mx_fp", "bits": 4, "act_bits": 4,
                                      "packing_format": "auto_round:mx_fp"}  # fmt: skip
    (tmp_path / "mx").mkdir()
    (tmp_path / "mx" / "config.json").write_text(json.dumps(config))
    with quiet(), pytest.raises(NotImplementedError, match=r"`mx_fp` with activations in 4 bits.*What can be: packed"):
        generate_adapter(EoRA(rank=4, path=tmp_path / "out"), str(two_layers), tmp_path / "mx", calibration)


# The study -----------------------------------------------------------------------------------------------------


def test_a_study_goes_on_and_ends_in_tables(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from gptqmodel_eora_ext.evaluate.demo import demo_text

    general, held_out = demo_text("calibration"), demo_text("heldout")
    (tmp_path / "rows.jsonl").write_text('{"asked": "Two and two is", "answers": ["five", "four"], "right": 1}\n' * 3)
    (tmp_path / "sums.yaml").write_text(
        f"""
task: sums
dataset_path: json
dataset_kwargs: {{data_files: {{test: {tmp_path / "rows.jsonl"}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{asked}}}}"
doc_to_choice: "{{{{answers}}}}"
doc_to_target: "{{{{right}}}}"
metric_list: [{{metric: acc}}, {{metric: acc_norm}}]
"""
    )
    command = ["study", str(tiny), str(tmp_path / "study"), "--calibration", str(general), "--task", str(held_out),
               "--text", str(held_out), "--iters", "2", "--samples", "8", "--seqlen", "64", "--group-size", "32",
               "--max-windows", "2", "--device", "cpu", "--lm-eval-path", str(tmp_path), "--json"]  # fmt: skip
    unknown = CliRunner().invoke(cli.app, [*command, "--lm-eval", "products"])
    assert unknown.exit_code == 2 and "lm-eval knows no task `products`" in " ".join(unknown.output.split())
    with monkeypatch.context() as patch:
        patch.setattr(
            "gptqmodel_eora_ext.evaluate.study.Study._evaluate", lambda *args: (_ for _ in ()).throw(KeyboardInterrupt)
        )
        CliRunner().invoke(cli.app, [*command, "--rank", "4"])
    state = json.loads((tmp_path / "study" / "study.json").read_text())
    assert set(state["steps"]) == {"quantised", "r4"} and not state["losses"]
    made = (tmp_path / "study" / "adapters" / "r4" / "adapter_model.safetensors").stat().st_mtime_ns
    done = CliRunner().invoke(cli.app, [*command, "--rank", "4", "--rank", "16", "--lm-eval", "sums"])
    assert done.exit_code == 0, done.output
    rows = {row["model"]: row for row in json.loads(done.stdout[done.stdout.index("[\n") :])}
    assert list(rows) == ["full precision", "quantised", "r4", "r16"]
    for row in rows.values():
        score = row["scores"]["sums"]
        assert score["metric"] == "acc_norm" and score["value"] in (0, 1)
        assert set(score["metrics"]) == {"acc", "acc_norm"}
    assert rows["r16"]["adapter_bytes"] > rows["r4"]["adapter_bytes"] > rows["quantised"]["adapter_bytes"] == 0
    assert (tmp_path / "study" / "adapters" / "r4" / "adapter_model.safetensors").stat().st_mtime_ns == made
    assert not (tmp_path / "study" / ".autoround").exists() and "AR_RESUME_DIR" not in os.environ
    other = CliRunner().invoke(cli.app, [*command, "--rank", "4", "--bits", "4"])
    assert other.exit_code == 2 and "was begun with bits=2, now 4 is asked" in " ".join(other.output.split())
