"""What `adapter_config.json` and `eora.json` say, every field checked.

Of PEFT's LoraConfig some fields are honoured, some change nothing for an adapter that is only applied, and some would
make it another computation than y = x Ŵᵀ + s (x Aᵀ) Bᵀ: those are refused by name. `HONOURED`, `WITHOUT_EFFECT` and
`REFUSED` together name all of them.
"""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from ..formats.factors import GROUP_SIZE
from ..formats.names import ADAPTER_DETAILS
from ..formats.numbers import is_whole
from ..formats.packed_factors import PACKED_TYPE
from .errors import AdapterError, Fields, is_number, read_json
from .patterns import Pattern, PatternError, SuffixPatterns
from .vocabulary import FACTOR_BITS

log = logging.getLogger(__name__)

DETAILS_VERSION = 1
# Where reports of modules stand: of the adapter's own factors, or of those that its refinement began with.
MODULES, MODULES_BEFORE = "modules", "modules_before_refinement"
LORA_TYPE = "LORA"
# PEFT's own, for a config that leaves `lora_alpha` out.
DEFAULT_ALPHA = 8
ALL_LINEAR = "all-linear"
# Starts of training that leave the base as it is. The others (PiSSA, OLoRA, CorDA, LoftQ, LoRA-GA, …) take their first
# factors off the base's weights, so that what was trained fits only weights that were changed in the same way.
PLAIN_STARTS = (None, True, False, "gaussian", "eva", "orthogonal")

# Read and applied: `AdapterSettings`.
HONOURED = frozenset({
    "peft_type", "task_type", "base_model_name_or_path", "r", "lora_alpha", "rank_pattern", "alpha_pattern",
    "use_rslora", "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "init_lora_weights",
})  # fmt: skip
# About training, about how the base is looked up, or about merging into the base, which is not done here.
WITHOUT_EFFECT = frozenset({
    "auto_mapping", "peft_version", "revision", "inference_mode", "lora_dropout", "fan_in_fan_out", "megatron_core",
    "loftq_config", "eva_config", "corda_config", "lora_ga_config", "qalora_group_size", "runtime_config",
    "ensure_weight_tying",
})  # fmt: skip
# Field → what it does. None of it is part of a plain LoRA; a field that is null, false or empty asks for nothing.
REFUSED = {
    "use_dora": "scales each output by a learnt magnitude (DoRA)",
    "use_qalora": "sums groups of inputs before A (QA-LoRA)",
    "use_bdlora": "makes factors block-diagonal (BD-LoRA)",
    "alora_invocation_tokens": "switches the adapter on only after certain tokens (activated LoRA)",
    "arrow_config": "chooses among several adapters for each token (Arrow)",
    "kasa_config": "adds singular values between the factors and cuts the base's weights (KaSA)",
    "velora_config": "changes what passes through the layer in training (VeLoRA)",
    "monteclora_config": "draws the factors at random (MonteCLoRA)",
    "lora_bias": "adds a bias to B",
    "bias": "trains biases of the base",
    "modules_to_save": "replaces whole modules of the base",
    "trainable_token_indices": "replaces rows of the embedding",
    "layer_replication": "repeats layers of the base",
    "target_parameters": "adapts parameters that are no linear layer",
    "megatron_config": "is for layers that Megatron cuts over devices",
}
# Ours, beside PEFT's.
PACKED_FIELDS = frozenset({"factor_bits", "factor_group_size"})
REMEDY = "Save the adapter again with the tool that made it, or correct the file."


@dataclass(frozen=True)
class AdapterSettings:
    """`adapter_config.json`, checked.

    Attributes:
        rank: of modules that `ranks` does not name.
        ranks: pattern → rank, in the file's order (`rank_pattern`).
        alpha: of modules that `alphas` does not name; the scale is alpha / rank.
        alphas: pattern → alpha (`alpha_pattern`).
        root_scale: whether the scale is alpha / √rank instead (`use_rslora`).
        targets: names' ends of the modules that are adapted, or one regular expression, or None for all.
        excluded: names' ends of modules that are not, or one regular expression.
        layers: indices of the layers that are adapted; none for all (`layers_to_transform`).
        layer_lists: patterns for the name in front of a layer's index; none for any (`layers_pattern`).
        factor_bits: 16 (or 32) for PEFT's files, 8 or 4 for packed factors.
        task_type: PEFT's, as it stands in the file.
        base_model: what the adapter was made for, as it stands in the file.
        where: the file, for messages.
    """

    rank: int
    ranks: Mapping[str, int]
    alpha: float
    alphas: Mapping[str, float]
    root_scale: bool
    targets: tuple[str, ...] | str | None
    excluded: tuple[str, ...] | str
    layers: tuple[int, ...]
    layer_lists: tuple[str, ...]
    factor_bits: int
    task_type: str | None
    base_model: str | None
    where: str

    @classmethod
    def read(cls, path: Path) -> AdapterSettings:
        """Read and check a file.

        Args:
            path: `adapter_config.json`.

        Raises:
            AdapterError: for a file that is no JSON object, a value of the wrong form, or a field that makes the
                adapter another computation than plain LoRA; it names file, field, value and what would do.
        """
        content = read_json(path)
        fields = Fields(content, f"`{path}`", REMEDY)
        packed = _kind(fields) == PACKED_TYPE
        _refuse(fields)
        settings = cls(
            rank=fields.whole("r", least=1),
            ranks=_pattern(fields, "rank_pattern", lambda value: is_whole(value, 1), "positive integers"),
            alpha=fields.number("lora_alpha", DEFAULT_ALPHA),
            alphas=_pattern(fields, "alpha_pattern", is_number, "finite numbers"),
            root_scale=fields.flag("use_rslora"),
            targets=_targets(fields),
            excluded=_names(fields, "exclude_modules") or (),
            layers=_layers(fields),
            layer_lists=_layer_lists(fields),
            factor_bits=fields.whole("factor_bits", least=1) if packed else FACTOR_BITS[0],
            task_type=fields.text("task_type"),
            base_model=fields.text("base_model_name_or_path"),
            where=f"`{path}`",
        )
        settings._check_patterns()
        return settings

    @property
    def is_packed(self) -> bool:
        """Whether factors are stored as integers."""
        return self.factor_bits < FACTOR_BITS[0]

    def rank_of(self, module: str) -> int:
        """Rank of a module."""
        return self._first(self._rank_patterns, tuple(self.ranks.values()), module, self.rank)

    def scale_of(self, module: str) -> float:
        """What a module's B A is multiplied by."""
        alpha = self._first(self._alpha_patterns, tuple(self.alphas.values()), module, self.alpha)
        rank = self.rank_of(module)
        return alpha / math.sqrt(rank) if self.root_scale else alpha / rank

    def applies_to(self, module: str) -> bool:
        """Whether PEFT would adapt a module of that name, by targets, exclusions and layers.

        Case is not looked at in names, since GPTQModel's own writer lower-cases them in one file and not in the other.
        """
        if self._named(self.excluded, module, "exclude_modules"):
            return False
        if not self._named(self.targets, module, "target_modules"):
            return False
        if not self.layers or self.targets is None or isinstance(self.targets, str):
            return True
        return module.lower() in (name.lower() for name in self.targets) or self._layer(module) in self.layers

    def _layer(self, module: str) -> int | None:
        """Index of the layer that a module stands in: the first number of its name that is looked for."""
        for found in re.finditer(r"\.(\d+)(?=\.)", module):
            before = module[: found.start()]
            # PEFT looks for a list by any name only where something stands in front of that name.
            fits = "." in before if not self.layer_lists else self._lists.first(before) is not None
            if fits:
                return int(found[1])
        return None

    @cached_property
    def _rank_patterns(self) -> SuffixPatterns:
        return self._compiled("rank_pattern", self.ranks)

    @cached_property
    def _alpha_patterns(self) -> SuffixPatterns:
        return self._compiled("alpha_pattern", self.alphas)

    @cached_property
    def _lists(self) -> SuffixPatterns:
        return self._compiled("layers_pattern", self.layer_lists)

    def _compiled(self, field: str, texts: Any) -> SuffixPatterns:
        try:
            return SuffixPatterns(tuple(texts))
        except PatternError as error:
            raise self._pattern_error(field, error) from error

    def _check_patterns(self) -> None:
        """Have each expression parsed, so that a broken one is told when the file is opened."""
        self._rank_patterns, self._alpha_patterns, self._lists  # noqa: B018
        for field, names in (("target_modules", self.targets), ("exclude_modules", self.excluded)):
            self._named(names, "", field)

    def _first(self, patterns: SuffixPatterns, values: tuple[Any, ...], module: str, default: Any) -> Any:
        try:
            found = patterns.first(module)
        except PatternError as error:
            raise self._pattern_error("a pattern", error) from error
        return default if found is None else values[found]

    def _named(self, names: tuple[str, ...] | str | None, module: str, field: str) -> bool:
        """PEFT's rule: a list holds names or their ends, a string is an expression for the whole name."""
        if names is None:
            return True
        if not isinstance(names, str):
            return any(f".{module}".lower().endswith(f".{name}".lower()) for name in names)
        try:
            return Pattern(names).matches(module)
        except PatternError as error:
            raise self._pattern_error(field, error) from error

    def _pattern_error(self, field: str, error: PatternError) -> AdapterError:
        return AdapterError(
            f"Adapter: {self.where} says {field} with an expression that cannot be used: {error}. "
            f"Name the modules in plain words, such as q_proj."
        )


def _kind(fields: Fields) -> str:
    kind = str(fields.text("peft_type") or LORA_TYPE).upper()
    if kind not in (LORA_TYPE, PACKED_TYPE):
        raise fields.wrong("peft_type", f"{LORA_TYPE} or {PACKED_TYPE}; only they can be applied")
    layout = (fields.content.get("factor_bits"), fields.content.get("factor_group_size"))
    if kind == PACKED_TYPE and (layout[0] not in FACTOR_BITS[1:] or layout[1] != GROUP_SIZE):
        raise AdapterError(
            f"Adapter: {fields.where} says factor_bits {layout[0]}, factor_group_size {layout[1]}; this version reads "
            f"8 and 4 bits in groups of {GROUP_SIZE}. A newer gptqmodel-eora-ext may have written it."
        )
    return kind


def _refuse(fields: Fields) -> None:
    content = fields.content
    for name, effect in REFUSED.items():
        if content.get(name) not in (None, False, "none", [], {}) or (
            # An empty list of invocation tokens still makes it an activated LoRA.
            name == "alora_invocation_tokens" and content.get(name) is not None
        ):
            raise AdapterError(
                f"Adapter: {fields.where} says {name} = {content[name]!r}, which {effect}; only plain LoRA adapters "
                f"can be applied, where it is null or false. Apply this one by PEFT."
            )
    if content.get("init_lora_weights") not in PLAIN_STARTS:
        raise AdapterError(
            f"Adapter: {fields.where} says init_lora_weights = {content['init_lora_weights']!r}, whose factors "
            f"fit only a base that was changed in the same way. Let PEFT convert it to a plain LoRA: "
            f"save_pretrained(…, path_initial_model_for_weight_conversion=…)."
        )
    unknown = [name for name, value in content.items() if value not in (None, False, [], {})]
    unknown = sorted({*unknown} - HONOURED - WITHOUT_EFFECT - set(REFUSED) - PACKED_FIELDS)
    if unknown:
        log.warning("Adapter: %s has fields that are not known here and have no effect: %s.",
                    fields.where, ", ".join(unknown))  # fmt: skip


def _pattern(fields: Fields, name: str, is_right: Any, expected: str) -> dict[str, Any]:
    found = fields.mapping(name)
    if not all(is_right(value) for value in found.values()):
        raise fields.wrong(name, f"an object whose values are {expected}")
    return found


def _names(fields: Fields, name: str) -> tuple[str, ...] | str | None:
    value = fields.content.get(name)
    if value is None or isinstance(value, str):
        return value
    if isinstance(value, list) and all(isinstance(one, str) for one in value):
        return tuple(value)
    raise fields.wrong(name, "a list of module names, or one regular expression")


def _targets(fields: Fields) -> tuple[str, ...] | str | None:
    found = _names(fields, "target_modules")
    if not found:
        # PEFT would choose by the architecture, which the adapter's file does not tell.
        raise fields.wrong("target_modules", f'a list such as ["q_proj", "v_proj"], or "{ALL_LINEAR}"')
    return None if found == ALL_LINEAR else found


def _layers(fields: Fields) -> tuple[int, ...]:
    value = fields.content.get("layers_to_transform")
    found = [] if value is None else value if isinstance(value, list) else [value]
    if not all(is_whole(one, 0) for one in found):
        raise fields.wrong("layers_to_transform", "a layer's index, or a list of them")
    return tuple(found)


def _layer_lists(fields: Fields) -> tuple[str, ...]:
    found = _names(fields, "layers_pattern") or ()
    return (found,) if isinstance(found, str) else found


def read_details(path: Path) -> dict[str, Any]:
    """What `eora.json` says, its parts of the right form.

    Args:
        path: the file.

    Returns:
        The object; `MODULES` and `MODULES_BEFORE` map a module to a report with rank, requested_rank, tokens, bytes,
        signal, error_before and error_after, where the file has reports.

    Raises:
        AdapterError: naming file, field, value and what was expected.
    """
    fields = Fields(read_json(path), f"`{path}`", f"Make the adapter again, or remove {ADAPTER_DETAILS}: "
                                                  f"the adapter loads without it.")  # fmt: skip
    version = fields.content.get("version", DETAILS_VERSION)
    if not is_whole(version, 1):
        raise fields.wrong("version", f"an integer of at most {DETAILS_VERSION}")
    if version > DETAILS_VERSION:
        raise fields.wrong("version", f"at most {DETAILS_VERSION}; a newer gptqmodel-eora-ext has written it")
    for name in ("objective", "method"):
        fields.text(name)
    for name in ("calibration", "options"):
        fields.mapping(name)
    versions = fields.below("versions", "versions")
    for name in versions.content:
        versions.text(name)
    if fields.mapping("allocation"):
        allocation = fields.below("allocation", "allocation")
        for name in ("spent", "budget"):
            allocation.number(name, least=0)
        allocation.text("sensitivity")
    if fields.mapping("refinement"):
        refinement = fields.below("refinement", "refinement")
        refinement.text("loss")
        for name in ("tokens", "steps"):
            refinement.whole(name, least=0)
        for name in ("before", "after"):
            refinement.number(name)
    for key in (MODULES, MODULES_BEFORE):
        for module, report in fields.mapping(key).items():
            if not isinstance(report, dict):
                raise fields.below(key, key).wrong(module, "an object of figures")
            figures = Fields(report, f"`{path}` {key}[{module!r}]", fields.remedy)
            for name in ("rank", "requested_rank", "tokens", "bytes"):
                figures.whole(name, least=0)
            for name in ("signal", "error_before", "error_after"):
                figures.number(name, least=0)
    return dict(fields.content)
