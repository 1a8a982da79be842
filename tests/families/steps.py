"""What is done with tiny models of families, each step in a process of its own: `python -m tests.families STEP …`.

A process a step, since each host replaces classes of transformers for as long as a process lives. What a step finds
lies in FOLDER/found: logits in one file of safetensors, and in one of JSON what was refused, by the name of the case.
"""

from __future__ import annotations

import json
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

BITS, GROUP_SIZE, RANK, TOTAL = 2, 32, 8, "3.0bpw"
WINDOWS, SEQLEN = 8, 64
# In GPTQModel's loop `EoRA()`, a plan, and a rank in 16 bits. In AutoRound's the default, a rank, and a budget, both
# for a model in its files; then one in memory, which may change how AutoRound opens another afterwards.
OF_GPTQMODEL = ("default", "planned", "plain")
OF_AUTOROUND: dict[str, dict[str, Any]] = {"rank": {}, "budget": {"budget": "1bpw"}, "memory": {"budget": "1bpw"}}

# At most tokens, logits are nearer to each other than this share of what the adapter changes in them. Hosts compute in
# 16 bits, the other way in 32; so a token that is nearly between two experts may go another way.
NEAR = 0.2


def assert_near(one: torch.Tensor, other: torch.Tensor, unadapted: torch.Tensor) -> None:
    """Fail where two ways to logits do not agree. All are 1 × tokens × vocabulary."""
    assert torch.isfinite(one).all()
    apart, changed = (float((one - from_there).norm(dim=-1).median()) for from_there in (other, unadapted))
    assert apart < NEAR * changed


class Found:
    """What a step finds of one family: logits, or why there are none."""

    def __init__(self, folder: Path, step: str, model_type: str) -> None:
        self._path = folder / "found" / f"{model_type}-{step}"
        self.logits: dict[str, torch.Tensor] = {}
        self.refused: dict[str, str] = {}

    def attempt(self, case: str, work: Callable[[], Any]) -> Any:
        """The result of ``work``; a tensor is kept. None where it raises, and the error is kept."""
        try:
            result = work()
        except Exception as error:
            place = traceback.extract_tb(error.__traceback__)[-1]
            self.refused[case] = f"{type(error).__name__}: {error} ({Path(place.filename).name}:{place.lineno})"
            return None
        if isinstance(result, torch.Tensor):
            self.logits[case] = result.contiguous()
        return result

    def write(self) -> None:
        self._path.parent.mkdir(exist_ok=True)
        save_file(self.logits, f"{self._path}.safetensors")
        Path(f"{self._path}.json").write_text(json.dumps(self.refused), encoding="utf-8")

    def read(self) -> Found:
        self.logits = load_file(f"{self._path}.safetensors")
        self.refused = json.loads(Path(f"{self._path}.json").read_text(encoding="utf-8"))
        return self


def windows() -> list[dict[str, list[int]]]:
    """Calibration: random bytes."""
    ids = torch.randint(0, 256, (WINDOWS, SEQLEN), generator=torch.Generator().manual_seed(1))
    return [{"input_ids": row, "attention_mask": [1] * SEQLEN} for row in ids.tolist()]


@torch.inference_mode()
def logits(model: Any) -> torch.Tensor:
    """What a model says of 32 tokens, float32, 1 × tokens × vocabulary."""
    ids = torch.randint(0, 256, (1, 32), generator=torch.Generator().manual_seed(2))
    output = model(ids)
    # A class without a head gives what its last layer does.
    found: torch.Tensor = output.logits if hasattr(output, "logits") else output.last_hidden_state
    return found.float()


def gptqmodel(folder: Path, model_type: str, found: Found) -> None:
    """GPTQModel's loop and `eora plan`; then GPTQModel opens what it made itself and what AutoRound made."""
    from gptqmodel_eora_ext.hosts.gptqmodel.checkpoint import adapters_off

    base, out = folder / "base" / model_type, folder / "gptqmodel" / model_type
    out.mkdir(parents=True)
    for case, make in (("default", _by_default), ("planned", by_plan), ("plain", _of_one_rank)):
        found.attempt(case, partial(make, base, out / case))
    if "plain" in found.refused and "EoRA" not in found.refused["plain"]:
        # Whether the host stops without an adapter, too.
        found.attempt("no adapter", partial(_quantized, base, None))
    made = [(case, out / case) for case in OF_GPTQMODEL] + [
        (case, Path(place.read_text())) for case in OF_AUTOROUND
        if (place := folder / "autoround" / model_type / f"{case}.txt").is_file()
    ]  # fmt: skip
    for case, checkpoint in made:
        if case in found.refused or (model := found.attempt(case, partial(_opened, checkpoint))) is None:
            continue
        # A model may be made and opened, and fail when it is run.
        if found.attempt(f"{case} logits", partial(logits, model)) is None:
            continue
        with adapters_off(model):
            found.attempt(f"{case} without", partial(logits, model))


def _by_default(base: Path, out: Path) -> None:
    from gptqmodel_eora_ext import EoRA

    _quantized(base, EoRA()).save(str(out))


def _of_one_rank(base: Path, out: Path) -> None:
    from gptqmodel_eora_ext import EoRA

    _quantized(base, EoRA(rank=RANK)).save(str(out))


def _quantized(base: Path, adapter: Any) -> Any:
    from gptqmodel import GPTQModel, QuantizeConfig

    host = GPTQModel.load(str(base), QuantizeConfig(bits=BITS, group_size=GROUP_SIZE))
    host.quantize(windows(), batch_size=4, adapter=adapter)
    return host


def by_plan(base: Path, out: Path) -> None:
    """`eora plan` into a file beside the checkpoint, and `eora quantize` by it.

    Modules as small as these are better off with wider weights than with an adapter. So the plan is edited, as a user
    may: what has 2 bits gets a rank, too.
    """
    plan, calibration = Path(f"{out}.json"), base / "calibration.txt"
    letters = torch.randint(97, 123, (2 * WINDOWS * SEQLEN,), generator=torch.Generator().manual_seed(3))
    calibration.write_text(bytes(letters.tolist()).decode())
    some = ("--calibration", calibration, "--samples", WINDOWS, "--seqlen", SEQLEN)
    _command("plan", base, *some, "--group-size", GROUP_SIZE, "--total", TOTAL, "--out", plan)
    chosen = json.loads(plan.read_text(encoding="utf-8"))
    del chosen["dynamic"]
    for module in chosen["modules"].values():
        module["rank"] = RANK if module["bits"] == BITS else module["rank"]
    plan.write_text(json.dumps(chosen), encoding="utf-8")
    _command("quantize", base, out, *some, "--plan", plan)


def _command(*words: Any) -> None:
    """Run `eora`.

    Raises:
        RuntimeError: with what it prints, when it fails.
    """
    from typer.testing import CliRunner

    from gptqmodel_eora_ext.cli import app

    done = CliRunner().invoke(app, [str(word) for word in words])
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        raise done.exception
    if done.exit_code:
        raise RuntimeError(done.stderr)


def _opened(checkpoint: Path, **options: Any) -> Any:
    from gptqmodel import BACKEND, GPTQModel

    return GPTQModel.load(str(checkpoint), backend=BACKEND.GPTQ_TORCH, **options).model


def _opened_logits(checkpoint: Path) -> torch.Tensor:
    return logits(_opened(checkpoint))


def autoround(folder: Path, model_type: str, found: Found) -> None:
    """AutoRound's loop; then transformers with `load_peft` opens what it made."""
    out = folder / "autoround" / model_type
    out.mkdir(parents=True)
    for case, options in OF_AUTOROUND.items():
        work = partial(_rounded, folder / "base" / model_type, out / case, options, in_memory=case == "memory")
        checkpoint = found.attempt(case, work)
        if checkpoint is not None:
            (out / f"{case}.txt").write_text(str(checkpoint))
            found.attempt(f"{case} logits", partial(_by_peft, checkpoint, found, case))


def _rounded(base: Path, out: Path, options: dict[str, Any], *, in_memory: bool) -> Path:
    from auto_round import AutoRound
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from gptqmodel_eora_ext import EoRAConfig

    model = AutoModelForCausalLM.from_pretrained(base, dtype="auto") if in_memory else str(base)
    rounder = AutoRound(
        model, tokenizer=AutoTokenizer.from_pretrained(base), device_map="cpu", scheme=f"W{BITS}A16",
        group_size=GROUP_SIZE, nsamples=WINDOWS, seqlen=SEQLEN, batch_size=4, iters=0, disable_opt_rtn=True,
        dataset=[torch.tensor([window["input_ids"]]) for window in windows()],
        alg_configs=["signround", EoRAConfig(**options)],
    )  # fmt: skip
    return Path(rounder.quantize_and_save(str(out), format="auto_round")[1])


def _by_peft(checkpoint: Path, found: Found, case: str) -> torch.Tensor:
    from transformers import AutoModelForCausalLM

    from gptqmodel_eora_ext import load_peft

    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype="auto", device_map="cpu")
    found.attempt(f"{case} without", partial(logits, model))
    return logits(load_peft(model, checkpoint / "eora"))


def without(folder: Path, model_type: str, found: Found) -> None:
    """Where the plugin is switched off: GPTQModel alone; and transformers, with a plain copy of the adapter."""
    made = [(case, folder / "gptqmodel" / model_type / case) for case in OF_GPTQMODEL]
    # First, since GPTQModel replaces classes of transformers when it opens a model; then transformers opens it right.
    for case, checkpoint in made:
        found.attempt(f"{case} in transformers", partial(_in_transformers, checkpoint))
    for case, checkpoint in made:
        found.attempt(f"{case} logits", partial(_opened_logits, checkpoint))


def _in_transformers(checkpoint: Path) -> torch.Tensor:
    from transformers import AutoModelForCausalLM

    from gptqmodel_eora_ext import load_peft

    _command("export", checkpoint, "--peft", f"{checkpoint}-peft")
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype="auto", device_map="cpu")
    return logits(load_peft(model, f"{checkpoint}-peft"))


def apart(folder: Path, model_type: str, found: Found) -> None:
    """Where no host is imported: transformers' own model, each weight Ŵ + BA, in float32."""
    made = [(case, folder / "gptqmodel" / model_type / case, False) for case in OF_GPTQMODEL]
    made += [
        (case, Path(place.read_text()), model_type == "gpt_oss") for case in OF_AUTOROUND
        if (place := folder / "autoround" / model_type / f"{case}.txt").is_file()
    ]  # fmt: skip
    for case, checkpoint, every_second in made:
        if checkpoint.is_dir():
            work = partial(_computed_apart, folder / "base" / model_type, checkpoint, every_second=every_second)
            found.attempt(f"{case} logits", work)


def _computed_apart(base: Path, checkpoint: Path, *, every_second: bool) -> torch.Tensor:
    """Logits of the full-precision model with the checkpoint's weights and factors, its experts in one tensor.

    Args:
        every_second: whether `gate_proj` is every second row of the tensor of gate and up; else it is the first half.
    """
    import transformers

    architecture = json.loads((base / "config.json").read_text())["architectures"][0]
    model: torch.nn.Module = getattr(transformers, architecture).from_pretrained(base, dtype=torch.float32)
    known = dict(model.named_modules())
    for name, weight in _weights(checkpoint).items():
        if name in known:
            known[name].weight.data = weight
            continue
        # AutoRound names Mixtral's experts as hubs do.
        block, _, rest = name.replace("block_sparse_moe", "mlp").partition(".experts.")
        number, projection = rest.split(".")
        experts: Any = known[f"{block}.experts"]
        joined = experts.down_proj if projection in ("down_proj", "w2") else experts.gate_up_proj
        rows = joined.data[int(number)]
        if getattr(experts, "is_transposed", False) or rows.shape[1] != weight.shape[1]:
            rows = rows.T
        if joined is not experts.down_proj:
            second = projection in ("up_proj", "w3")
            rows = rows[int(second) :: 2] if every_second else rows.chunk(2)[int(second)]
        assert rows.shape == weight.shape
        rows.copy_(weight)
    return logits(model)


def _weights(checkpoint: Path) -> dict[str, torch.Tensor]:
    """Full module name → Ŵ + BA, out × in, float32, of a checkpoint in GPTQ's layout."""
    from gptqmodel_eora_ext.adapter.folder import AdapterFolder
    from gptqmodel_eora_ext.formats.packed_weights import PackedWeight
    from gptqmodel_eora_ext.kernels.reference import dequantize

    tensors: dict[str, torch.Tensor] = {}
    for file in checkpoint.glob("*.safetensors"):
        tensors |= load_file(file)
    folder = AdapterFolder.open(checkpoint / "eora")
    factors = dict(folder.factors(list(folder.keys)))
    weights = {}
    for key in tensors:
        name = key.removesuffix(".qweight")
        if name == key:
            continue
        of_module = {part: tensors.get(f"{name}.{part}") for part in ("qweight", "qzeros", "scales", "g_idx")}
        groups, outputs = of_module["scales"].shape
        bits = 32 * of_module["qweight"].shape[0] // (groups * GROUP_SIZE)
        packed = PackedWeight(
            **of_module, bits=bits, group_size=GROUP_SIZE, in_features=groups * GROUP_SIZE, out_features=outputs,
            stores_zero_minus_one=True,
        )  # fmt: skip
        weights[name] = dequantize(packed)
        if name in factors:
            weights[name] += factors[name].lora_B.float() @ factors[name].lora_A.float()
    return weights


STEPS: dict[str, Callable[[Path, str, Found], None]] = {
    "autoround": autoround, "gptqmodel": gptqmodel, "without": without, "apart": apart,
}  # fmt: skip
