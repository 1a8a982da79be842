"""`eora refine model-Q2_K.gguf`: the factors of an adapter in GGUF, trained together over the quantised file."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path

import torch

from ...adapter.settings import MODULES, MODULES_BEFORE
from ...adapter.vocabulary import FACTOR_BITS
from ...formats.factors import PACKED_LAYOUT, QuantizedFactor
from ...formats.gguf import GGUFError, gguf_package
from ...formats.gguf.blocks import GGUF_LAYOUT
from ...formats.gguf.lora import Factor, LoraHeader, LoraPair, read_lora, read_lora_header, write_lora
from ...formats.gguf.model import GGUFModel
from ...loop.weights import file_fingerprint
from ...refine import Outcome, RefineJob, begin, describe, refine_factors
from ...refine.outcome import RESUMABLE
from ...refine.run import Pair
from ...system.distributed import by_first
from ...system.files import unfinished_folder
from .generate import reordered
from .trainable import LocatedModel
from .weights import GGUFWeights, Placed

WEIGHTS = "weights.safetensors"


def refine_gguf(checkpoint: Path, source: Path, output: Path, job: RefineJob, device: str | None) -> Outcome:
    """Train an adapter's factors over a GGUF model by what the whole model loses, and write another file.

    While it runs, the model's weights are kept in 16 bits in a hidden folder beside ``output``, with the state that an
    interrupted run goes on from; `LocatedModel.trainee` tells what of llama.cpp's model is trained against.

    Args:
        checkpoint: the quantised model's file.
        source: file of the adapter to begin with, which stays as it is.
        output: the refined adapter's file.
        job: base, calibration and settings.
        device: where the model is run; None for the CPU.

    Returns:
        The run's outcome; `after` is never above `before`.

    Raises:
        GGUFError: for a file that is broken, or an adapter that does not fit the model.
        ValueError: for a base that the file was not made from.
        ResumeError: where an interrupted run with other settings, data or factors has left its state.
        NotImplementedError: for a mixture of experts in one tensor, or a model that cannot be run layer by layer.
    """
    gguf_package()
    if output.is_dir() or output.resolve() == source.resolve():
        what = "a folder" if output.is_dir() else "the adapter to begin with, which stays as it is"
        raise ValueError(f"EoRA: `{output}` is {what}. Name another file, as `eora-refined.gguf`.")
    lora, model = read_lora_header(source), GGUFModel(checkpoint)
    weights = GGUFWeights(model, job.base)
    located = LocatedModel(weights, job.base, trust_remote_code=job.trust_remote_code)
    start = _start(source, lora, weights.placed)
    work = unfinished_folder(output)
    begin(work, source, job, model=file_fingerprint(checkpoint))
    trainee = located.trainee(work / WEIGHTS, device, job.teaching)
    layout = GGUF_LAYOUT if lora.factor_bits < FACTOR_BITS[0] else PACKED_LAYOUT
    outcome, factors = refine_factors(trainee, start, lora.factor_bits, torch.float16, job, work, layout)
    known = dict(lora.details)
    before = known.pop(MODULES, None) or known.get(MODULES_BEFORE, {})
    details = {**known, MODULES_BEFORE: before, "refinement": describe(outcome, job)}
    pairs = {weights.placed[name].place.tensor: _in_file_order(pair, weights.placed[name])
             for name, pair in factors.items()}  # fmt: skip

    def write() -> None:
        write_lora(output, model.architecture, pairs, name=f"EoRA for {checkpoint.name}, refined", details=details)
        if outcome.ended not in RESUMABLE:
            shutil.rmtree(work, ignore_errors=True)

    by_first(write)
    return outcome


def _start(source: Path, lora: LoraHeader, placed: Mapping[str, Placed]) -> dict[str, Pair]:
    """Module → its factors, as `refine_factors` takes them: rows of B in the model's order.

    Raises:
        GGUFError: for factors of a tensor that the model lacks, or of other shapes.
    """
    modules = {one.place.tensor: name for name, one in placed.items()}
    found: dict[str, Pair] = {}
    for tensor, (lora_A, file_B) in read_lora(lora).items():
        if tensor not in modules:
            raise GGUFError(f"`{source}` has factors for {tensor}, which is no quantised matrix of the model. Name the "
                            f"adapter that was made for this file.")  # fmt: skip
        at = placed[modules[tensor]]
        lora_B = reordered(file_B, at.in_model_order)
        shape = (_shape(lora_B)[0], _shape(lora_A)[1])
        expected = (at.shape.out_features, at.shape.in_features)
        if shape != expected:
            raise GGUFError(f"`{source}`: the factors of {tensor} are for a weight of out × in = {shape[0]} × "
                            f"{shape[1]}, the model's is {expected[0]} × {expected[1]}. Name the adapter that was made "
                            f"for this file.")  # fmt: skip
        if {_bits(lora_A), _bits(lora_B)} != {lora.factor_bits}:
            raise GGUFError(f"`{source}`: the factors of {tensor} have {_bits(lora_A)} and {_bits(lora_B)} bits, "
                            f"others {lora.factor_bits}. Make the adapter again, in one width.")  # fmt: skip
        found[modules[tensor]] = (lora_A, lora_B if isinstance(lora_B, QuantizedFactor) else lora_B.T)
    return found


def _bits(factor: Factor) -> int:
    return factor.bits if isinstance(factor, QuantizedFactor) else FACTOR_BITS[0]


def _shape(factor: Factor) -> tuple[int, int]:
    if isinstance(factor, QuantizedFactor):
        return factor.codes.shape[0], factor.features
    rows, features = factor.shape
    return rows, features


def _in_file_order(pair: Pair, at: Placed) -> LoraPair:
    lora_A, up = pair
    # Floating factors come as A and Bᵀ, those in integers as A and B.
    return LoraPair(lora_A, reordered(up if isinstance(up, QuantizedFactor) else up.T, at.in_file_order))
