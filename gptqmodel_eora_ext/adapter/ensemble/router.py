"""What chooses an ensemble's weights from a prompt: how near its early activations are to those of each domain's text.

Of each token is read what the last linear layer of each early layer reads: the values inside its MLP, which stand for
words and small groups of them, and tell texts apart better than hidden states do. A prompt of n tokens becomes the mean
m of its tokens' vectors, each layer's divided by its root mean square. For n tokens of one kind of text, m is nearly
Gaussian around the kind's own mean; its covariance Σ_n, which falls with n, is pooled over all kinds and shrunk towards
its diagonal, and is known for some lengths. Then, with d_k² = (m − μ_k)ᵀ Σ_n⁻¹ (m − μ_k),

    p_k = softmax_k(−d_k² / 2T)        the classes' shares (linear discriminant analysis with a temperature)

d is taken in the directions in which the domains' text varies. What of m lies outside of them tells another language
sooner: ‖m − V Vᵀ m‖², V these directions. Where the nearest class k is as far in either way as hardly any of its own
held-out text (`QUANTILE`), the prompt fits no domain; where no class has a share of `floor`, it fits none clearly. In
both cases the shared adapter serves alone. One class may stand for the shared adapter's own text: its share is nobody's
weight.

Nothing is trained by gradients. Mean and covariance come from windows of the domains' calibration text, temperature,
limits and the distances that `drift` compares with from windows that are held out from them.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from ...formats.numbers import is_whole
from ..errors import AdapterError, is_number
from .folder import SHARED
from .pooling import PIECE, SKIPPED

# Lengths of prompts that a covariance is kept for: a prompt is judged by the longest that it has. Shorter prompts than
# the first say too little, and fall back. All are multiples of `PIECE`.
LENGTHS = (16, 32, 64, 128, 256)
# Directions that are kept, those of most variance between pieces of `BASIS_LENGTH` tokens. Of the 3,072 values of two
# layers of SmolLM2, 1,024 directions tell domains apart no better, and 256 take a hundredth fewer prompts home. Fewer
# pieces than some for each direction would tell little of covariances.
MOST_DIRECTIONS, PIECES_PER_DIRECTION = 768, 4
BASIS_LENGTH = 64
# Directions more, with which a random subspace begins that holds those wanted, and its steps towards them.
OVERSAMPLED, STEPS_OF_BASIS = 20, 2
# Share of the diagonal in the covariance: pieces of text are a few hundred, hardly more than directions.
SHRINKAGE = 0.1
# Windows held out from means and covariances: every fourth.
HELD_OUT_EVERY = 4
# A prompt farther from its class than this share of the class's held-out text fits no domain.
QUANTILE = 0.99
# Share of a prompt's square outside of the directions below which it is rounding: they are all that there are.
LEAST_OUTSIDE = 1e-5
# Below this share of the nearest class the shared adapter serves alone. Licences resemble comments of source code: from
# here on four fifths of their pieces of 128 tokens fall back; of prompts of 32 tokens a hundredth fewer go home than
# with 0.5.
FLOOR = 0.7
# Shares below this are no weight: a member is read for the whole batch if one row weighs it.
LEAST_WEIGHT = 0.05
TEMPERATURES = (0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 32.0)
# Windows of a domain at least: a quarter is held out, and a covariance of fewer pieces says nothing.
LEAST_WINDOWS = 8
# Held-out distances that are kept for each class and length.
DISTANCES = 256
# A router's tensors, as its file names them.
TENSORS = ("mean", "basis", "centres", "roots", "distances", "outside")


@dataclass(frozen=True)
class Routing:
    """What was chosen for the prompts of a batch.

    Attributes:
        weights: prompts × members, without the shared adapter's, which is 1.
        nearest: the class that each prompt is nearest to; "" for one too short to tell.
        shares: prompts × classes.
        tails: of each prompt, the share of the nearest class's held-out text that is as far, in the directions or
            outside of them: twice the smaller of both shares, so that it is below p for a share of p of such text at
            most; 1 for one too short.
        fallen_back: whether the shared adapter serves alone since the prompt fits no domain, or none clearly.
        seconds: that the choice took, hidden states not counted.
    """

    weights: torch.Tensor
    nearest: tuple[str, ...]
    shares: torch.Tensor
    tails: tuple[float, ...]
    fallen_back: tuple[bool, ...]
    seconds: float = 0.0


@dataclass(frozen=True)
class Router:
    """Statistics of classes, and the choice by them.

    Attributes:
        classes: names of members, and perhaps the shared adapter's.
        members: names of members, in the order of their weights.
        reads: names of the modules whose inputs are read, one of each early layer.
        mean: of length features; taken off every prompt's mean.
        basis: features × directions.
        centres: classes × directions: μ.
        roots: lengths × directions × directions: R with Σ_n⁻¹ = R Rᵀ.
        distances: lengths × classes × `DISTANCES`, ascending: d² of held-out text to its own class.
        outside: the same of what lies outside of the directions.
        temperature: T.
        floor: least share of the nearest class.

    Memory: 4 bytes times features × directions + lengths × directions².
    """

    classes: tuple[str, ...]
    members: tuple[str, ...]
    reads: tuple[str, ...]
    mean: torch.Tensor
    basis: torch.Tensor
    centres: torch.Tensor
    roots: torch.Tensor
    distances: torch.Tensor
    outside: torch.Tensor
    temperature: float = 1.0
    floor: float = FLOOR

    @classmethod
    def fit(
        cls,
        windows: Mapping[str, torch.Tensor],
        members: Sequence[str],
        reads: Sequence[str],
        *,
        floor: float = FLOOR,
    ) -> Router:
        """Learn the classes from their texts.

        Args:
            windows: class → `pooling.summed` of windows of its text, with as many tokens as the longest of `LENGTHS`
                that is to be known.
            members: names of members; classes that are none of them stand for the shared adapter.
            reads: names of the modules whose inputs ``windows`` are of.
            floor: least share of the nearest class.

        Raises:
            AdapterError: for a class of fewer than `LEAST_WINDOWS` windows, windows shorter than the first of
                `LENGTHS`, or values that are not finite.
        """
        for name, sums in windows.items():
            _check_sums(name, sums)
        shortest = PIECE * min(sums.shape[1] for sums in windows.values())
        lengths = [one for one in LENGTHS if one <= shortest]
        if not lengths:
            raise AdapterError(f"Ensemble: windows have fewer than {LENGTHS[0]} tokens, which a router needs.")
        pieces = {length: {name: _pieces(sums, length) for name, sums in windows.items()} for length in lengths}
        of_basis = pieces[max(one for one in lengths if one <= BASIS_LENGTH)]
        seen = torch.cat([fitted for fitted, _ in of_basis.values()])
        mean = seen.mean(dim=0)
        basis = _directions(seen - mean)
        centres = torch.stack([((fitted - mean) @ basis).mean(dim=0) for fitted, _ in pieces[lengths[0]].values()])
        roots = torch.stack([_root(found, mean, basis) for found in pieces.values()])
        names = tuple(windows), tuple(members), tuple(reads)
        made = cls(*names, mean, basis, centres, roots, torch.zeros(0), torch.zeros(0), 1.0, floor)
        far = [[made._far(held, index) for _, held in found.values()] for index, found in enumerate(pieces.values())]
        return replace(
            made,
            distances=torch.stack(
                [torch.stack([_spread(of[:, own]) for own, (of, _) in enumerate(row)]) for row in far]
            ),
            outside=torch.stack([torch.stack([_spread(outside) for _, outside in row]) for row in far]),
            temperature=_temperature([[of for of, _ in row] for row in far]),
        )

    def with_class(self, name: str, sums: torch.Tensor) -> Router:
        """A router that knows one member more, or one anew; nothing that it knows of the others changes.

        The class is learnt in the directions and with the covariance that are there.

        Args:
            name: the member.
            sums: as `fit` takes them.

        Raises:
            AdapterError: as `fit`.
        """
        _check_sums(name, sums)
        known = LENGTHS[: len(self.roots)]
        if PIECE * sums.shape[1] < known[-1]:
            raise AdapterError(f"Ensemble: windows of {name} have {PIECE * sums.shape[1]} tokens; this router needs "
                               f"{known[-1]}.")  # fmt: skip
        fitted = [_pieces(sums, length) for length in known]
        centre = ((fitted[0][0] - self.mean) @ self.basis).mean(dim=0)
        fresh = replace(self, centres=centre[None])
        far = [fresh._far(held, index) for index, (_, held) in enumerate(fitted)]
        found = torch.stack([_spread(squares[:, 0]) for squares, _ in far])
        outside = torch.stack([_spread(one) for _, one in far])
        kept = [index for index, one in enumerate(self.classes) if one != name]
        return replace(
            self,
            classes=(*(self.classes[index] for index in kept), name),
            members=(*(one for one in self.members if one != name), name),
            centres=torch.cat([self.centres[kept], centre[None]]),
            distances=torch.cat([self.distances[:, kept], found[:, None]], dim=1),
            outside=torch.cat([self.outside[:, kept], outside[:, None]], dim=1),
        )

    def choose(self, means: torch.Tensor, tokens: torch.Tensor) -> Routing:
        """Choose weights.

        Args:
            means: of `pooling.pooled`, prompts × features.
            tokens: of each prompt.
        """
        means = means.to(self.mean.device)
        shares = torch.zeros(len(means), len(self.classes))
        weights = torch.zeros(len(means), len(self.members))
        nearest, tails, back = [""] * len(means), [1.0] * len(means), [True] * len(means)
        known = LENGTHS[: len(self.roots)]
        for index, length in enumerate(known):
            longest = index == len(known) - 1
            rows = [row for row, count in enumerate(tokens.tolist())
                    if count >= length and (longest or count < known[index + 1])]  # fmt: skip
            if not rows:
                continue
            squares, outside = self._far(means[rows], index)
            found = torch.softmax(-squares / (2 * self.temperature), dim=1)
            shares[rows] = found
            for row, square, beyond, share in zip(rows, squares, outside, found, strict=True):
                best = int(share.argmax())
                nearest[row] = self.classes[best]
                tails[row] = _tail(self.distances[index, best], square[best])
                if self.outside[index, best].any():
                    tails[row] = min(1.0, 2 * min(tails[row], _tail(self.outside[index, best], beyond)))
                back[row] = tails[row] < 1 - QUANTILE or float(share[best]) < self.floor
                if not back[row]:
                    weights[row] = self._weights(share)
        return Routing(weights, tuple(nearest), shares, tuple(tails), tuple(back))

    @functools.cached_property
    def _scales(self) -> torch.Tensor:
        """What `basis` multiplies each of its directions by."""
        return self.basis.norm(dim=0)

    def _far(self, means: torch.Tensor, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        """d² of prompts to all classes, prompts × classes, for the index of a length; what lies outside, prompts."""
        centred = means - self.mean
        places = centred @ self.basis
        squares = torch.stack(
            [((places - centre) @ self.roots[index]).square().sum(dim=1) for centre in self.centres], dim=1
        )
        whole = centred.square().sum(dim=1)
        outside = whole - (places / self._scales).square().sum(dim=1)
        return squares, torch.where(outside > LEAST_OUTSIDE * whole, outside, 0.0)

    def _weights(self, share: torch.Tensor) -> torch.Tensor:
        chosen = torch.tensor([float(share[self.classes.index(one)]) for one in self.members])
        return torch.where(chosen < LEAST_WEIGHT, 0.0, chosen)

    # On disk -------------------------------------------------------------------------------------------------------

    @property
    def settings(self) -> dict[str, Any]:
        """What `ensemble.json` says of the router."""
        return {"classes": list(self.classes), "reads": list(self.reads), "temperature": self.temperature,
                "floor": self.floor}  # fmt: skip

    def save(self, path: Path) -> None:
        """Write the statistics to a safetensors file."""
        save_file({name: getattr(self, name).contiguous() for name in TENSORS}, path)

    @classmethod
    def load(cls, path: Path, members: Sequence[str], settings: Mapping[str, Any]) -> Router:
        """Read a router, checked.

        Args:
            path: its safetensors file.
            members: names of the ensemble's members.
            settings: of `settings`.

        Raises:
            AdapterError: for a file that is missing or damaged, or of other members.
        """
        remedy = "Make the router again: eora ensemble add, or eora ensemble make."
        try:
            tensors = load_file(path)
            mean, basis, centres, roots, distances, outside = (tensors[name] for name in TENSORS)
        except (OSError, SafetensorError, KeyError) as error:
            raise AdapterError(f"Ensemble: `{path}` cannot be read ({error}). {remedy}") from error
        reads = settings.get("reads")
        if not isinstance(reads, list) or not reads or not all(isinstance(one, str) for one in reads):
            raise AdapterError(f"Ensemble: the router of `{path}` reads {reads!r}; expected names of modules. {remedy}")
        classes = settings.get("classes")
        if not isinstance(classes, list) or {*classes, SHARED} != {*members, SHARED}:
            raise AdapterError(f"Ensemble: the router of `{path}` knows {classes}, the members are {list(members)}. "
                               f"{remedy}")  # fmt: skip
        width, directions = basis.shape if basis.ndim == 2 else (0, 0)
        lengths = len(roots) if roots.ndim == 3 else 0
        expected = {"mean": (width,), "basis": (width, directions), "centres": (len(classes), directions),
                    "roots": (lengths, directions, directions),
                    "distances": (lengths, len(classes), DISTANCES),
                    "outside": (lengths, len(classes), DISTANCES)}  # fmt: skip
        for name, shape in expected.items():
            if tuple(tensors[name].shape) != shape or tensors[name].dtype != torch.float32 or 0 in shape:
                found = f"{tensors[name].dtype} {list(tensors[name].shape)}"
                raise AdapterError(f"Ensemble: `{path}` holds {name} as {found}; expected float32 {list(shape)}. "
                                   f"{remedy}")  # fmt: skip
            if not bool(torch.isfinite(tensors[name]).all()):
                raise AdapterError(f"Ensemble: `{path}` holds NaN or infinity in {name}. {remedy}")
        if not is_whole(lengths, 1) or lengths > len(LENGTHS):
            raise AdapterError(f"Ensemble: `{path}` knows {lengths} lengths; expected 1 to {len(LENGTHS)}. {remedy}")
        temperature: Any = settings.get("temperature")
        floor: Any = settings.get("floor")
        if not is_number(temperature) or temperature <= 0 or not is_number(floor) or not 0 <= floor <= 1:
            raise AdapterError(f"Ensemble: the router of `{path}` has temperature {temperature!r} and floor {floor!r}; "
                               f"expected a positive number and one from 0 to 1. {remedy}")  # fmt: skip
        return cls(
            tuple(classes), tuple(members), tuple(reads), mean, basis, centres, roots, distances, outside,
            float(temperature), float(floor),
        )  # fmt: skip


def _check_sums(name: str, sums: torch.Tensor) -> None:
    if len(sums) < LEAST_WINDOWS:
        raise AdapterError(f"Ensemble: the text of {name} fills {len(sums)} windows; at least {LEAST_WINDOWS} are "
                           f"needed to know it by. Give more text.")  # fmt: skip
    if not bool(torch.isfinite(sums).all()):
        raise AdapterError(f"Ensemble: what early layers compute of {name} holds NaN or infinity; no router can be "
                           f"made.")  # fmt: skip


def _pieces(sums: torch.Tensor, length: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Means of pieces of so many tokens: of the windows that are fitted, and of those that are held out."""
    each = length // PIECE
    count = sums.shape[1] // each
    tokens = torch.full((count, 1), float(length))
    tokens[0] -= SKIPPED
    means = sums[:, : count * each].unflatten(1, (count, each)).sum(dim=2) / tokens
    held = torch.arange(len(means)) % HELD_OUT_EVERY == HELD_OUT_EVERY - 1
    return means[~held].flatten(0, 1), means[held].flatten(0, 1)


def _spread(values: torch.Tensor) -> torch.Tensor:
    """`DISTANCES` of some values, ascending, from the least to the largest."""
    return torch.quantile(values, torch.linspace(0, 1, DISTANCES))


def _tail(known: torch.Tensor, value: torch.Tensor) -> float:
    """Share of held-out text that is at least as far."""
    return float((known >= value).sum()) / len(known)


def _directions(centred: torch.Tensor) -> torch.Tensor:
    """The directions of most variance, features × directions, scaled so that each has a variance of 1.

    Features are tens of thousands in large models, so that their covariance is not formed.
    """
    most = max(1, min(MOST_DIRECTIONS, len(centred) // PIECES_PER_DIRECTION))
    if min(centred.shape) <= 2 * most:
        _, values, rows = torch.linalg.svd(centred, full_matrices=False)
        vectors = rows.T
    else:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            _, values, vectors = torch.svd_lowrank(centred, most + OVERSAMPLED, STEPS_OF_BASIS)
    values, vectors = values[:most], vectors[:, :most]
    least = values[0] * torch.finfo(torch.float32).eps ** 0.5
    return vectors * (math.sqrt(len(centred)) / values.clamp_min(least))


def _root(
    pieces: Mapping[str, tuple[torch.Tensor, torch.Tensor]], mean: torch.Tensor, basis: torch.Tensor
) -> torch.Tensor:
    """R of the pooled, shrunk covariance within classes: Σ⁻¹ = R Rᵀ."""
    inside, count = torch.zeros(basis.shape[1], basis.shape[1], dtype=torch.float64), 0
    for fitted, _ in pieces.values():
        places = ((fitted - mean) @ basis).double()
        places = places - places.mean(dim=0)
        inside, count = inside + places.T @ places, count + len(places)
    inside /= count
    # Towards the diagonal, of which a part is the same in all directions: one without variance has an inverse then.
    shrunk = (1 - SHRINKAGE) * inside + SHRINKAGE * torch.eye(len(inside)) * inside.diagonal().mean()
    return torch.linalg.cholesky(torch.linalg.inv(shrunk)).float()


def _temperature(squares: Sequence[Sequence[torch.Tensor]]) -> float:
    """The temperature under which held-out text's own classes are likeliest, all lengths and classes alike."""

    def loss(temperature: float) -> float:
        return sum(
            float(torch.nn.functional.cross_entropy(-of / (2 * temperature), torch.full((len(of),), own)))
            for row in squares
            for own, of in enumerate(row)
        )

    return min(TEMPERATURES, key=loss)
