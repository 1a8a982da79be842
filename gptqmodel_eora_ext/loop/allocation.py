"""Ranks under a budget, chosen module by module while a model is quantised.

The loop meets modules one by one, and what a module's rank buys is known exactly only once it is quantised. So there is
a forecast for every module from the start, and a price: the loss that a byte must save to be spent. Each module takes
the rank that pays at the price, by its own spectrum. Before each subset of modules the price is set anew, such that the
modules still to come, if they were as forecast, would spend what is left of the budget. Forecasts are corrected by how
those of earlier modules have turned out. No rank is cut afterwards, so the modules that follow are quantised on exactly
what the final model computes.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import Any

import torch

from ..plan.ranks import RankOptions, TokenCorrection, joint_curve, kind_of
from ..solve import Curve, Moment, component_gains, error_loss, price, rank_curve


class RankAllocation:
    """Chooses each module's rank. Safe to ask from several threads; the answers do not depend on their order.

    Args:
        options: full module name → ranks on offer, in the order in which the loop meets the modules.
        forecasts: full module name → predicted losses of those options.
        output_moments: full module name → G in any form, which makes losses comparable. They are asked for one at a
            time, as modules choose, so that a mapping may read them from files.
        corrections: full module name → correction of its losses.
        budget: bytes for all modules.
        together: full module name → what it is stored in, for modules that share a rank there: experts that lie in one
            tensor. They choose together as the first of them is to be quantised, by their forecasts.

    Attributes:
        ranks: full module name → rank, of the modules that have chosen.
        losses: full module name → predicted loss with that rank.
    """

    def __init__(
        self,
        options: Mapping[str, RankOptions],
        forecasts: Mapping[str, Curve],
        output_moments: Mapping[str, Moment],
        corrections: Mapping[str, TokenCorrection],
        budget: int,
        together: Mapping[str, str] = MappingProxyType({}),
    ) -> None:
        self.options = dict(options)
        self.budget = budget
        self.output_moments = output_moments
        self._corrected = dict(corrections)
        self.ranks: dict[str, int] = {}
        self.losses: dict[str, float] = {}
        self._forecasts = dict(forecasts)
        self._spent = 0
        self._price = 0.0
        self._caps: dict[str, float] = {}
        self._together = together
        self._members: dict[str, list[str]] = {}
        for name in options:
            if name in together:
                self._members.setdefault(together[name], []).append(name)
        # What members of `_together` share → their rank, once it is chosen.
        self._shared: dict[str, int] = {}
        # Loss without an adapter, by module, as it was found.
        self._found: dict[str, float] = {}
        self._bytes: dict[str, int] = {}
        self._lock = threading.Lock()

    @property
    def spent(self) -> int:
        """Bytes given out so far."""
        return self._spent

    def begin(self, names: Iterable[str]) -> None:
        """Set the price for a subset of modules, before any of them chooses.

        Args:
            names: full names of the modules that are quantised together next.
        """
        # What is left of the subset before has never chosen, because no token reached it.
        for name in self._caps:
            self.ranks.setdefault(name, 0)
        now = [name for name in names if name in self.options and name not in self.ranks]
        self._caps = {}
        if not now:
            return
        left = self.budget - self._spent
        open_curves = self._open_curves()
        self._price = price([curve for _, curve in open_curves.values()], left)
        # Modules that share a rank choose as one.
        choosing = list(dict.fromkeys(self._together.get(name, name) for name in now))
        choosing = [one for one in choosing if one not in self._shared]
        likely = {one: curve.nbytes[curve.best_at(self._price)] for one, (_, curve) in open_curves.items()
                  if one in choosing}  # fmt: skip
        total = sum(likely.values())
        # Spectra may turn out other than forecast. Even then the subset may spend no more than is left of the budget
        # after the least that all other modules need.
        most = left - sum(curve.nbytes[0] for one, (_, curve) in open_curves.items() if one not in choosing)
        caps = {one: most * (likely[one] / total if total else 1 / len(choosing)) for one in choosing}
        for one in choosing:
            if one in self._members:
                options, curve = open_curves[one]
                index = curve.best_at(self._price, caps[one])
                self._shared[one] = options.ranks[index]
                self._spent += curve.nbytes[index]
        self._caps = {name: caps.get(name, 0.0) for name in now}

    def _open_curves(self) -> dict[str, tuple[RankOptions, Curve]]:
        """Of every module, or of what modules share, that has not chosen: what it may choose from, with forecasts
        corrected by what was found."""
        corrections = self._corrections()
        overall = corrections.get("", 1.0)
        scaled = {
            name: self._forecasts[name].scaled(corrections.get(kind_of(name), overall))
            for name in self.options
            if name not in self.ranks
        }
        found = {name: (self.options[name], curve) for name, curve in scaled.items() if name not in self._together}
        for one, members in self._members.items():
            if one not in self._shared:
                found[one] = joint_curve([self.options[name] for name in members], [scaled[name] for name in members])
        return found

    def choose(
        self,
        name: str,
        lora_A: torch.Tensor,
        lora_B: torch.Tensor,
        second_moment: torch.Tensor,
        delta: torch.Tensor,
    ) -> torch.Tensor:
        """Indices of the components that a module keeps.

        Args:
            name: full module name.
            lora_A: rank × in, as `eora` returns it, of the largest rank on offer.
            lora_B: out × rank, orthonormal.
            second_moment: C, in × in.
            delta: ΔW, out × in.

        Returns:
            Indices into the rows of A and the columns of B, ascending.
        """
        output_moment = self.output_moments[name].to(delta.device)
        total = error_loss(delta, second_moment, output_moment)
        gains, total = self._corrected[name](component_gains(lora_A, lora_B, second_moment, output_moment), total)
        order = gains.argsort(descending=True)
        options = self.options[name]
        # Few tokens or a narrow module may give fewer components than a rank on offer; then that buys nothing more.
        ranks = [min(rank, len(gains)) for rank in options.ranks]
        curve = rank_curve(gains[order], total, ranks, options.nbytes)
        with self._lock:
            if name in self._together:
                shared = self._shared[self._together[name]]
                index = max(place for place, rank in enumerate(options.ranks) if rank <= max(shared, options.ranks[0]))
            else:
                index = curve.best_at(self._price, self._caps.get(name, float("inf")))
                self._spent += curve.nbytes[index]
            self.ranks[name] = ranks[index]
            self.losses[name] = curve.losses[index]
            self._bytes[name] = 0 if name in self._together else curve.nbytes[index]
            self._found[name] = total
        return order[: ranks[index]].sort().values

    def strongest(
        self,
        name: str,
        lora_A: torch.Tensor,
        lora_B: torch.Tensor,
        second_moment: torch.Tensor,
        delta: torch.Tensor,
    ) -> torch.Tensor:
        """As `choose`, for a module that has chosen in an earlier round: its rank stays, and nothing more is spent."""
        gains = component_gains(lora_A, lora_B, second_moment, self.output_moments[name].to(delta.device))
        gains, _ = self._corrected[name](gains, 0.0)
        return gains.argsort(descending=True)[: self.ranks[name]].sort().values

    def chosen(self, name: str) -> tuple[int, float, int, float] | None:
        """What a module chose: its rank, predicted loss, bytes, and loss without an adapter; None if it has not."""
        with self._lock:
            if name not in self._found:
                return None
            return self.ranks[name], self.losses[name], self._bytes[name], self._found[name]

    def take(self, name: str, chosen: tuple[int, float, int, float]) -> None:
        """Note what a module chose in another process, as `chosen` tells it there."""
        with self._lock:
            self.ranks[name], self.losses[name], self._bytes[name], self._found[name] = chosen
            self._spent += chosen[2]

    def report(self) -> dict[str, Any]:
        """Budget and spending, ready for JSON."""
        # In the modules' own order, so that the sum is the same whichever thread was first.
        predicted = sum(self.losses.get(name, 0.0) for name in self.options)
        return {"budget": self.budget, "spent": self._spent, "predicted_loss": predicted}

    def state(self) -> dict[str, Any]:
        """What was given out so far, for `load_state` of an allocation that was made from the same forecasts."""
        with self._lock:
            return {
                "ranks": dict(self.ranks), "losses": dict(self.losses), "spent": self._spent, "price": self._price,
                "caps": dict(self._caps), "found": dict(self._found), "shared": dict(self._shared),
                "bytes": dict(self._bytes),
            }  # fmt: skip

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Go on where another process stopped."""
        with self._lock:
            self.ranks, self.losses = dict(state["ranks"]), dict(state["losses"])
            self._spent, self._price = state["spent"], state["price"]
            self._caps, self._found = dict(state["caps"]), dict(state["found"])
            self._shared, self._bytes = dict(state["shared"]), dict(state["bytes"])

    def _corrections(self) -> dict[str, float]:
        """The ratio of found to forecast loss, by kind of module (`q_proj`), and under "" that of all modules."""
        sums: dict[str, list[float]] = {}
        for name in self.options:
            if name in self._found:
                for kind in ("", kind_of(name)):
                    pair = sums.setdefault(kind, [0.0, 0.0])
                    pair[0] += self._found[name]
                    pair[1] += self._forecasts[name].losses[0]
        return {kind: found / forecast for kind, (found, forecast) in sums.items() if forecast > 0}
