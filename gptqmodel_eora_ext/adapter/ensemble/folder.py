"""An ensemble on disk: a shared adapter, members that correct what it leaves, and what chooses among them.

adapter_config.json, …      the shared adapter, which opens alone wherever an adapter opens
members/<name>/             a member each: an adapter folder, too, which corrects what the shared one leaves
ensemble.json               members, fingerprints of what each was made for, settings of the router
router.safetensors          what the router knows of each member's text (`router.Router`)
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from ...formats.factors import Factors, QuantizedFactor
from ...formats.names import ADAPTER_WEIGHTS
from ...formats.numbers import is_whole
from ...system.files import parts_digest, write_json
from ..errors import AdapterError, Fields, read_json
from ..folder import AdapterFolder, ReadFactors
from ..save import require_another, write_plain

ENSEMBLE_FILE, ROUTER_FILE, MEMBERS_FOLDER = "ensemble.json", "router.safetensors", "members"
ENSEMBLE_VERSION = 1
SHARED = "shared"
# Names are folders' names, on any file system.
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}")
# Parts of each file of weights that go into a fingerprint.
FINGERPRINT_PARTS = 16


def fingerprint(files: Sequence[Path]) -> str:
    """A hash of files of weights, by their sizes and parts of their content.

    Args:
        files: in any order; names do not count.
    """
    digests = sorted(parts_digest(path, FINGERPRINT_PARTS) for path in files)
    return hashlib.sha256("".join(digests).encode()).hexdigest()


def checkpoint_fingerprint(checkpoint: Path) -> str:
    """The fingerprint of a checkpoint's weights, its adapters left out.

    Raises:
        AdapterError: for a folder without weights.
    """
    files = [path for path in checkpoint.glob("*.safetensors") if path.name != ADAPTER_WEIGHTS]
    if not files:
        raise AdapterError(
            f"Ensemble: `{checkpoint}` holds no *.safetensors; it is no checkpoint of quantised weights."
        )
    return fingerprint(files)


def check_name(name: str, known: Collection[str] = ()) -> None:
    """Refuse a member's name that cannot be a folder, or that another member has.

    Args:
        name: to check.
        known: names that are taken; upper and lower case are the same to some file systems, and so here.

    Raises:
        AdapterError: naming it.
    """
    if not NAME.fullmatch(name) or name.lower() == SHARED:
        raise AdapterError(
            f"Ensemble: {name!r} cannot name a member; expected letters, digits, `_`, `.` and `-`, beginning with a "
            f"letter or digit, at most 64, and not {SHARED!r}."
        )
    taken = next((one for one in known if one.lower() == name.lower()), None)
    if taken is not None:
        raise AdapterError(f"Ensemble: there is a member {taken!r} already. Choose another name than {name!r}, or "
                           f"replace it: eora ensemble add --replace.")  # fmt: skip


@dataclass(frozen=True)
class Member:
    """A member as `ensemble.json` has it.

    Attributes:
        name: of the domain.
        over: fingerprint of the shared adapter's weights, on whose error it was solved.
        checkpoint: fingerprint of the checkpoint that it was made for.
        tokens: of its text, that it was calibrated on.
    """

    name: str
    over: str
    checkpoint: str
    tokens: int


@dataclass(frozen=True)
class EnsembleFolder:
    """An ensemble, opened for reading; tensors of factors are read one module at a time.

    Attributes:
        path: the folder.
        shared: the shared adapter.
        members: those of the domains, in the order of their weights.
        folders: each member's adapter.
        depth: layers at the beginning of the model that no member adapts: the router looks at what they compute.
        settings: of the router, as they stand in the file.

    Example:
        >>> ensemble = EnsembleFolder.open("out/eora")
        >>> ensemble.names
        ('shared', 'math', 'code')
    """

    path: Path
    shared: AdapterFolder
    members: tuple[Member, ...]
    folders: Mapping[str, AdapterFolder] = field(repr=False)
    depth: int
    settings: Mapping[str, Any]

    @classmethod
    def is_one(cls, path: str | Path) -> bool:
        """Whether a folder says that it is an ensemble."""
        return (Path(path) / ENSEMBLE_FILE).is_file()

    @classmethod
    def open(cls, path: str | Path) -> EnsembleFolder:
        """Open and check a folder: its lists, and the headers of its files of factors.

        Raises:
            AdapterError: when a file is missing or damaged, names overlap, or a member was made over another shared
                adapter or for another checkpoint than the first.
        """
        path = Path(path)
        remedy = "Make the ensemble again with `eora ensemble make`."
        if not cls.is_one(path):
            raise AdapterError(f"Ensemble: `{path}` has no {ENSEMBLE_FILE}; it is no ensemble. {remedy}")
        content = Fields(read_json(path / ENSEMBLE_FILE), f"`{path / ENSEMBLE_FILE}`", remedy)
        if content.whole("version", least=1) > ENSEMBLE_VERSION:
            raise content.wrong("version", f"at most {ENSEMBLE_VERSION}; a newer release of this package reads it")
        shared = AdapterFolder.open(path)
        over = fingerprint([shared.weights])
        members: list[Member] = []
        for name, told in content.mapping("members").items():
            check_name(name, [one.name for one in members])
            entry = told if isinstance(told, dict) else {}
            fields = Fields(entry, f"`{path / ENSEMBLE_FILE}` of member {name}", remedy)
            member = Member(
                name, str(fields.text("over")), str(fields.text("checkpoint")), fields.whole("tokens", least=1)
            )
            if member.over != over:
                raise AdapterError(
                    f"Ensemble: member {name} of `{path}` corrects what another shared adapter leaves "
                    f"({member.over[:12]}…; the one in the folder is {over[:12]}…): their sum would correct twice. "
                    f"Make the member again: eora ensemble add --replace."
                )
            if members and member.checkpoint != members[0].checkpoint:
                raise AdapterError(
                    f"Ensemble: members {members[0].name} and {name} of `{path}` were made for different checkpoints "
                    f"({members[0].checkpoint[:12]}… and {member.checkpoint[:12]}…). Make one of them again."
                )
            members.append(member)
        folders = {one.name: AdapterFolder.open(path / MEMBERS_FOLDER / one.name) for one in members}
        for name, folder in folders.items():
            if folder.factor_bits != shared.factor_bits:
                raise AdapterError(
                    f"Ensemble: member {name} of `{path}` has factors in {folder.factor_bits} bits, the shared adapter "
                    f"in {shared.factor_bits}; kernels read them as one. Make the member again."
                )
        return cls(path, shared, tuple(members), folders, content.whole("depth", least=0), content.mapping("router"))

    @property
    def names(self) -> tuple[str, ...]:
        """The shared adapter and the members, as weights of kernels are ordered."""
        return (SHARED, *(one.name for one in self.members))

    @property
    def nbytes(self) -> int:
        """Bytes of all files of factors."""
        return sum(folder.weights.stat().st_size for folder in (self.shared, *self.folders.values()))

    def is_for(self, checkpoint: Path) -> bool:
        """Whether the members were made for a checkpoint's weights; a folder without any is not."""
        if not any(checkpoint.glob("*.safetensors")):
            return False
        return not self.members or checkpoint_fingerprint(checkpoint) == self.members[0].checkpoint

    def check_checkpoint(self, checkpoint: Path) -> None:
        """Refuse a checkpoint that the members were not made for.

        Raises:
            AdapterError: naming the member.
        """
        if self.members and checkpoint_fingerprint(checkpoint) != self.members[0].checkpoint:
            raise AdapterError(
                f"Ensemble: member {self.members[0].name} of `{self.path}` was made for another checkpoint than "
                f"`{checkpoint}`: its weights differ. Use it with that one, or make an ensemble for this one."
            )

    def factors(self, modules: Collection[str]) -> Iterator[tuple[str, Factors]]:
        """Yield (module of ``modules``, factors of all members stacked), of modules that any member adapts.

        Args:
            modules: full names of the checkpoint's quantised modules.

        Raises:
            AdapterError: as `AdapterFolder.match` and `AdapterFolder.factors`, and for members of other shapes.
        """
        adapters = (self.shared, *self.folders.values())
        matched = [adapter.match(modules) for adapter in adapters]
        for module in modules:
            parts = [
                next(adapter.factors([found[module]]))[1] if module in found else None
                for adapter, found in zip(adapters, matched, strict=True)
            ]
            if any(part is not None for part in parts):
                yield module, stacked(module, parts, self.names)


def write_manifest(path: Path, members: Sequence[Member], depth: int, settings: Mapping[str, Any]) -> None:
    """Write an ensemble's `ensemble.json`.

    Args:
        path: the ensemble's folder.
        members: in the order of their weights.
        depth: see `EnsembleFolder`.
        settings: of the router.
    """
    told = {
        one.name: {"over": one.over, "checkpoint": one.checkpoint, "tokens": one.tokens} for one in members
    }  # fmt: skip
    write_json(
        path / ENSEMBLE_FILE,
        {"version": ENSEMBLE_VERSION, "depth": depth, "members": told, "router": dict(settings)},
    )


def stacked(module: str, parts: Sequence[ReadFactors | None], names: Sequence[str]) -> Factors:
    """The factors of several adapters for one module as one, with `Factors.members`.

    Args:
        module: its name, for messages.
        parts: of each adapter; None where it has none. Floating ones take the dtype of the first.
        names: of the adapters, for messages.

    Raises:
        AdapterError: when they are not for one weight.
    """
    present = [(name, part) for name, part in zip(names, parts, strict=True) if part is not None]
    shapes = {name: (part.lora_B.shape[0], part.lora_A.shape[1]) for name, part in present}
    if len(set(shapes.values())) > 1:
        raise AdapterError(f"Ensemble: {module} is out × in = {shapes} to its members. They are of different models.")
    ranks = tuple(0 if part is None else part.lora_A.shape[0] for part in parts)
    read = [part for _, part in present]
    if read[0].packed is not None:
        packed = [part.packed for part in read if part.packed is not None]
        return Factors(_joined([pair[0] for pair in packed]), _joined([pair[1] for pair in packed]), ranks)
    dtype = read[0].lora_A.dtype
    return Factors(
        torch.cat([part.lora_A.to(dtype) for part in read]),
        torch.cat([part.lora_B.to(dtype).T for part in read]),
        ranks,
    )


def _joined(factors: Sequence[QuantizedFactor]) -> QuantizedFactor:
    codes, scales = (torch.cat([getattr(one, name) for one in factors]) for name in ("codes", "scales"))
    return QuantizedFactor(codes, scales, factors[0].bits, factors[0].features, factors[0].group_size)


def export_pair(ensemble: EnsembleFolder, member: str | None, folder: Path) -> None:
    """Write the shared adapter and one member as one plain PEFT adapter, whose rank is the sum of theirs.

    Args:
        ensemble: to export from.
        member: its name; None for the shared adapter alone.
        folder: where to; an older one in its place stays whole until the copy is complete. Factors are float16 where
            they were packed, else in the dtype that they are read in.

    Raises:
        AdapterError: for an unknown member, or ``folder`` being the ensemble itself.
    """
    if member is not None and member not in ensemble.folders:
        raise AdapterError(unknown_member(member, ensemble.names[1:]))
    require_another(ensemble.shared, folder)
    adapters = [ensemble.shared, *([ensemble.folders[member]] if member is not None else [])]
    names = dict.fromkeys(name for adapter in adapters for name in adapter.keys)
    tensors: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
    for name in names:
        parts = [next(adapter.factors([name]))[1] if name in adapter.keys else None for adapter in adapters]
        factors = stacked(name, parts, ensemble.names[: len(parts)])
        down, up = factors.dense(torch.float16 if factors.packed else _dtype(factors))
        tensors[name] = (down, up.T.contiguous())
    settings = ensemble.shared.settings
    write_plain(
        folder, tensors, target_modules=sorted(names), task_type=settings.task_type, base_model=settings.base_model
    )


def _dtype(factors: Factors) -> torch.dtype:
    assert isinstance(factors.down, torch.Tensor)
    return factors.down.dtype


def unknown_member(name: str, known: Sequence[str]) -> str:
    """What to say of a name that no member has."""
    return f"Ensemble: there is no member {name!r}; there are {', '.join(known) or 'none'}."


def whole_tokens(tokens: Any, what: str, least: int) -> None:
    """Refuse a text too short to make a member or a router of.

    Raises:
        AdapterError: naming the text, its tokens and the least.
    """
    if not is_whole(tokens, least):
        raise AdapterError(f"Ensemble: {what} has {tokens} tokens; at least {least} are needed. Give more text.")
