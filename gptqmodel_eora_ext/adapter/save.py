"""Writing an adapter's folder, and its plain PEFT copy."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from ..formats.names import ADAPTER_CONFIG, ADAPTER_DETAILS, ADAPTER_WEIGHTS
from ..formats.packed_factors import FEATURES, features_metadata, packed_config, packed_tensors
from ..system.files import replaced_folder, write_json
from ..system.tensor_file import write_tensors
from .errors import AdapterError, read_json
from .factors import ModuleFactors
from .folder import KEY_PREFIX, AdapterFolder
from .settings import DETAILS_VERSION, MODULES
from .vocabulary import FACTOR_BITS


def most_common_rank(factors: Mapping[str, ModuleFactors]) -> int:
    """The rank most modules have: `r` of the config, so that `rank_pattern` stays short."""
    return Counter(max(one.rank, 1) for one in factors.values()).most_common(1)[0][0]


def save_adapter(
    folder: Path,
    factors: Mapping[str, ModuleFactors],
    *,
    base_model: str,
    module_names: Collection[str],
    details: Mapping[str, Any],
) -> None:
    """Write an adapter folder in one step; an older one in its place stays whole until then.

    Args:
        folder: the adapter's folder.
        factors: full module name → factors, all packed or none. Rank 0 is written as rank 1 of zeros, since GPTQModel
            without this plugin cannot load an adapter that leaves out a quantised module; a packed adapter, which
            needs the plugin, leaves it out.
        base_model: what `base_model_name_or_path` says.
        module_names: every module of the model, to tell whether a suffix (`q_proj`) names only modules with factors.
        details: what goes into `eora.json` beside the report of each module whose error is known.

    Raises:
        AdapterError: when there are no factors.
    """
    import peft

    if not factors:
        raise AdapterError(f"Adapter: nothing to save in `{folder}`: no module has factors.")
    config = _lora_config(
        {name: max(one.rank, 1) for name, one in factors.items()},
        target_modules=_target_modules(factors, module_names),
        task_type=peft.TaskType.CAUSAL_LM,
        base_model=base_model,
    )
    packed = {name: one.packed for name, one in factors.items() if one.packed}
    tensors: dict[str, torch.Tensor] = {}
    metadata = {"format": "pt"}
    if packed:
        metadata[FEATURES] = features_metadata(packed)
    for name, one in factors.items():
        if one.packed:
            tensors |= packed_tensors(f"{KEY_PREFIX}{name}", one.packed)
        elif not packed:
            lora_A, lora_B = one.lora_A, one.lora_B
            if one.rank == 0:
                lora_A, lora_B = lora_A.new_zeros(1, one.in_features), lora_B.new_zeros(one.out_features, 1)
            tensors[f"{KEY_PREFIX}{name}.lora_A.weight"] = lora_A.cpu().contiguous()
            tensors[f"{KEY_PREFIX}{name}.lora_B.weight"] = lora_B.cpu().contiguous()
    with replaced_folder(folder) as fresh:
        write_tensors(fresh / ADAPTER_WEIGHTS, tensors, metadata)
        config.save_pretrained(str(fresh))
        if packed:
            content = read_json(fresh / ADAPTER_CONFIG)
            write_json(fresh / ADAPTER_CONFIG, packed_config(content, next(iter(packed.values()))[0].bits))
        report = {MODULES: {name: one.report() for name, one in factors.items() if one.error_after is not None}}
        write_json(fresh / ADAPTER_DETAILS, {**details, **report, "version": DETAILS_VERSION})


def export_peft(source: AdapterFolder, folder: Path) -> None:
    """Write a plain PEFT copy of an adapter: A rank × in, B out × rank, scale 1, of the modules that its config adapts.

    Args:
        source: any adapter folder.
        folder: where to; an older one in its place stays whole until the copy is complete. Factors are float16 where
            they were packed, else in the dtype that they are read in.

    Raises:
        AdapterError: when ``source`` is broken, or ``folder`` is ``source`` itself.

    Example:
        >>> export_peft(AdapterFolder.open("out/eora"), Path("plain"))
    """
    require_another(source, folder)
    tensors = {}
    for name, factors in source.factors(list(source.keys)):
        dtype = torch.float16 if factors.packed else factors.lora_A.dtype
        tensors[f"{KEY_PREFIX}{name}.lora_A.weight"] = factors.lora_A.to(dtype)
        tensors[f"{KEY_PREFIX}{name}.lora_B.weight"] = factors.lora_B.to(dtype)
    ranks = {name: source.rank(name) for name in source.keys}
    config = _lora_config(
        ranks,
        target_modules=_targets_of_copy(source),
        task_type=source.settings.task_type,
        base_model=source.settings.base_model,
    )
    details = None if source.details is None else {**source.details, "factor_bits": FACTOR_BITS[0]}
    _write_plain(folder, tensors, config, details)


def write_plain(
    folder: Path,
    factors: Mapping[str, tuple[torch.Tensor, torch.Tensor]],
    *,
    target_modules: Collection[str],
    task_type: str | None,
    base_model: str | None,
) -> None:
    """Write factors as a plain PEFT adapter of scale 1.

    Args:
        folder: where to; an older one in its place stays whole until the new one is complete.
        factors: full module name → A, rank × in, and B, out × rank, of at least rank 1.
        target_modules: names of modules, or their ends.
        task_type: PEFT's.
        base_model: what `base_model_name_or_path` says.
    """
    tensors = {}
    for name, (lora_A, lora_B) in factors.items():
        tensors[f"{KEY_PREFIX}{name}.lora_A.weight"], tensors[f"{KEY_PREFIX}{name}.lora_B.weight"] = lora_A, lora_B
    ranks = {name: len(lora_A) for name, (lora_A, _) in factors.items()}
    config = _lora_config(ranks, target_modules=list(target_modules), task_type=task_type, base_model=base_model)
    _write_plain(folder, tensors, config, None)


def _write_plain(
    folder: Path, tensors: Mapping[str, torch.Tensor], config: Any, details: Mapping[str, Any] | None
) -> None:
    with replaced_folder(folder) as fresh:
        save_file(dict(tensors), fresh / ADAPTER_WEIGHTS, metadata={"format": "pt"})
        config.save_pretrained(str(fresh))
        if details is not None:
            write_json(fresh / ADAPTER_DETAILS, details)


def require_another(source: AdapterFolder, folder: Path) -> None:
    """Refuse to write a copy over the adapter that it is of.

    Raises:
        AdapterError: for the same folder.
    """
    if folder.resolve() == source.path.resolve():
        raise AdapterError(f"Adapter: `{folder}` is the adapter itself. Export it to another folder.")


def _targets_of_copy(source: AdapterFolder) -> list[str]:
    """The source's list where it says all; else the modules by name, since the copy's config has neither exclusions
    nor layers."""
    settings = source.settings
    plain = isinstance(settings.targets, tuple) and not settings.excluded and not settings.layers
    return list(settings.targets) if plain and settings.targets else sorted(source.keys)


def _lora_config(ranks: Mapping[str, int], *, target_modules: Any, task_type: Any, base_model: str | None) -> Any:
    """PEFT's config of scale 1 for every module: its alpha equals its rank."""
    import peft

    rank = Counter(ranks.values()).most_common(1)[0][0]
    pattern = {name: found for name, found in ranks.items() if found != rank}
    return peft.LoraConfig(
        r=rank,
        lora_alpha=rank,
        target_modules=target_modules,
        rank_pattern=pattern,
        alpha_pattern=dict(pattern),
        task_type=task_type,
        base_model_name_or_path=base_model,
        inference_mode=True,
    )


def _target_modules(factors: Mapping[str, ModuleFactors], module_names: Collection[str]) -> list[str]:
    """Short names (`q_proj`) where every module so named has factors, else full names."""
    suffixes = {name.rsplit(".", 1)[-1] for name in factors}
    named_so = {name for name in module_names if name.rsplit(".", 1)[-1] in suffixes}
    return sorted(suffixes if named_so <= set(factors) else factors)
