"""What a plan will cost: the seconds and the peak of memory of one call, from the cost model.

NOTE [where the peak is]
The plan runs as a sequence of units: segments, and the ordinary operators before, between and behind them. Each
unit has a moment in forward and, with recording, one in backward. At every moment there are

- boundaries: results of one unit that a later one reads, in backward until the first of these is done, and the
  results of the network;
- gradients of boundaries: from the backward of their last reader to that of the unit that made them;
- kept: what autograd keeps of the ordinary operators, and the graphs of kept tiles, of units up to this one;
- the unit itself: one of its tiles, or its ordinary operators;
- gradients of the weights of this and later units, twice for a streamed unit (one tile's, and their sum).

The peak is that of the moment that needs most. Not counted: the image, the weights, what an optimiser holds.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace

import torch

from fxstream.cost import Costs, Machine, bytes_of
from fxstream.locality import Locality
from fxstream.request import output_extents
from fxstream.saved import Saved
from fxstream.segment_plan import SegmentPlan
from fxstream.units import bytes_text

__all__ = ["Basis", "Moment", "Prediction", "keep_graphs", "plain_costs", "predict", "shares_along"]


@dataclass(frozen=True, slots=True)
class Moment:
    """Bytes by category at one moment; see the NOTE."""

    boundaries: float
    gradients: float
    kept: float
    unit: float
    weights: float

    @property
    def bytes(self) -> int:
        """All of them."""
        return int(sum(getattr(self, part.name) for part in fields(self)))


@dataclass(frozen=True, slots=True)
class Prediction:
    """Predicted for one call, with its backward where `training`: bytes at the peak, seconds, the plain network's.

    Seconds are those of a typical machine: compare them with `plain_seconds` only. `binding` is the unit at the
    peak: a segment's name, or empty for the ordinary operators.
    """

    training: bool
    peak: Moment
    binding: str
    seconds: float
    plain_bytes: int
    plain_seconds: float

    @property
    def bytes(self) -> int:
        """The peak."""
        return self.peak.bytes

    @property
    def time_ratio(self) -> float:
        """Predicted seconds over those of the plain network."""
        return self.seconds / max(self.plain_seconds, 1e-12)

    def lines(self) -> list[str]:
        """The prediction in words, for the end of a plan."""
        peak, step = self.peak, "a training step" if self.training else "a call without gradients"
        parts = (
            ("boundaries", peak.boundaries),
            ("their gradients", peak.gradients),
            ("kept graphs", peak.kept),
            (f"a tile of {self.binding}" if self.binding else "ordinary operators", peak.unit),
            ("gradients of weights", peak.weights),
        )
        told = ", ".join(f"{what} {bytes_text(count)}" for what, count in parts if count)
        return [
            f"predicted for {step}: {self.time_ratio:.2f}x the plain time, {bytes_text(self.bytes)} instead of"
            f" {bytes_text(self.plain_bytes)}",
            f"  at the peak: {told}",
        ]


@dataclass(frozen=True, slots=True)
class Basis:
    """What every prediction at one image size starts from.

    `saved` is what autograd keeps of each operator, `wanted` the images whose gradient is asked for, `training`
    whether there is a backward at all.
    """

    locality: Locality
    saved: Mapping[str, Saved]
    machine: Machine
    training: bool = True
    wanted: frozenset[str] = frozenset()


def plain_costs(basis: Basis) -> tuple[int, float]:
    """Peak bytes and seconds of the plain network."""
    costs = Costs(basis.locality, basis.machine, basis.saved, tuple(basis.saved), in_place=True)
    part, ones = costs.part(), torch.ones(len(costs.nodes), dtype=torch.float64)
    forward, backward = map(float, part.seconds(ones))
    if basis.training:
        return int(part.profile(ones).max()), forward + backward
    return int(part.profile_unrecorded(ones).max()), forward


def shares_along(locality: Locality, nodes: Sequence[str], axis: int, held: Mapping[str, int]) -> torch.Tensor:
    """The share of each node's pixels along an axis that a tile holds; `held` are the pixels that it holds."""
    shares = [held[n] / output_extents(locality, n)[axis] if n in held else 0.0 for n in nodes]
    return torch.tensor(shares, dtype=torch.float64)


@dataclass(frozen=True, slots=True)
class _Crossing:
    """A value that goes from one unit to others: who makes it (-1 for an input), who reads it last, who holds it.

    `gradient` are the bytes of its gradient, and 0 where none is asked for.
    """

    name: str
    maker: int
    last: int
    holders: tuple[int, ...]
    bytes: int
    gradient: int
    is_result: bool

    def in_forward(self, unit: int) -> bool:
        """Whether it is there when a later unit runs forward."""
        return self.maker < unit and (unit <= self.last or any(holder < unit for holder in self.holders))

    def in_backward(self, unit: int) -> bool:
        """Whether it is there when a later unit runs backward; a result of the network always is."""
        return self.is_result or (self.maker < unit and any(holder <= unit for holder in self.holders))

    def has_gradient(self, unit: int) -> bool:
        """Whether its gradient is there when a unit runs backward."""
        return self.maker <= unit <= self.last


class _Units:
    """The sequence of units of a plan: segments have odd numbers, the ordinary operators around them even ones."""

    def __init__(self, costs: Basis, plans: Sequence[SegmentPlan]) -> None:
        locality, saved = costs.locality, costs.saved
        place = {name: i for i, name in enumerate(saved)}
        self.plans = sorted(plans, key=lambda plan: place[plan.segment.nodes[0]])
        starts = [place[plan.segment.nodes[0]] for plan in self.plans]
        of_segment = {name: 2 * k + 1 for k, plan in enumerate(self.plans) for name in plan.segment.nodes}
        of: dict[str, int] = {}
        for name, i in place.items():
            before = [of[n.name] for n in locality.nodes[name].all_input_nodes if n.name in of]
            behind = 2 * sum(start < i for start in starts)
            of[name] = of_segment.get(name, max([behind, *(u + u % 2 for u in before)]))
        count = 2 * len(self.plans) + 1
        nodes: list[list[str]] = [[] for _ in range(count)]
        for name, unit in of.items():
            nodes[unit].append(name)
        self.costs = [Costs(locality, costs.machine, saved, names) for names in nodes]
        self.crossing: list[_Crossing] = []
        for name, maker in [*((name, -1) for name in costs.wanted), *of.items()]:
            users = [u for u in locality.nodes[name].users if of.get(u.name, maker) != maker]
            ends = any(user.op == "output" for user in locality.nodes[name].users)
            if not users and not ends:
                continue
            last = count if ends else max(of[user.name] for user in users)
            holders = {of[u.name] for u in users if of[u.name] % 2 or _keeps(costs, u.name, name)}
            if maker >= 0 and name in self.costs[maker].kept:
                holders.add(maker)
            size = bytes_of(locality, name) * (maker < 0 or saved[name].views is None)
            own = size if maker >= 0 else 0
            gradient = size if maker >= 0 or name in costs.wanted else 0
            self.crossing.append(_Crossing(name, maker, last, tuple(holders), own, gradient, ends))

    def plan_of(self, unit: int) -> SegmentPlan | None:
        """The segment that a unit is; None for ordinary operators."""
        return self.plans[unit // 2] if unit % 2 else None


def _keeps(costs: Basis, reader: str, name: str) -> bool:
    given = [n.name for n in costs.locality.nodes[reader].all_input_nodes]
    return given.index(name) in costs.saved[reader].inputs


def predict(basis: Basis, plans: Sequence[SegmentPlan]) -> Prediction:
    """Peak and seconds of these segments with everything else run plainly."""
    plain_bytes, plain_seconds = plain_costs(basis)
    if not plans:
        peak = Moment(0, 0, 0, plain_bytes, 0)
        return Prediction(basis.training, peak, "", plain_seconds, plain_bytes, plain_seconds)
    moments = list(predicted_moments(basis, plans))
    name, peak, _ = max(moments, key=lambda moment: moment[1].bytes)
    seconds = sum(spent for *_, spent in moments)
    return Prediction(basis.training, peak, name, seconds, plain_bytes, plain_seconds)


def predicted_moments(basis: Basis, plans: Sequence[SegmentPlan]) -> Iterator[tuple[str, Moment, float]]:
    """The name of the unit, the bytes and the seconds of every moment, forward and then backward."""
    units = _Units(basis, plans)
    kept, burdens = 0.0, []
    for k, cost in enumerate(units.costs):
        before = kept
        if cost.nodes:
            yield from _forward(basis, units, k, before)
            kept += _keeps_of(basis, units, k)
        burdens.append((before, kept))
    weights = 0.0
    for k in reversed(range(len(units.costs) if basis.training else 0)):
        cost = units.costs[k]
        if cost.nodes:
            yield from _backward(basis, units, k, burdens[k], weights)
            weights += float(cost.weight_gradients.sum())


def _keeps_of(basis: Basis, units: _Units, k: int) -> float:
    """What a unit keeps until its backward, apart from what other units read."""
    if not basis.training:
        return 0.0
    cost, plan = units.costs[k], units.plan_of(k)
    part = cost.part()
    held = float(part.held(_shares(basis.locality, plan, cost)))
    if plan is not None:
        return plan.kept * held
    return held - sum(value.bytes for value in units.crossing if value.maker == k)


def _forward(basis: Basis, units: _Units, k: int, before: float) -> Iterator[tuple[str, Moment, float]]:
    cost, plan = units.costs[k], units.plan_of(k)
    part, shares = cost.part(), _shares(basis.locality, plan, cost)
    there = sum(value.bytes for value in units.crossing if value.in_forward(k))
    seconds = float(part.seconds(shares)[0])
    unrecorded = float(part.profile_unrecorded(shares).max())
    if plan is None:
        recorded = float(part.profile(shares)[: part.turn].max()) if basis.training else unrecorded
        yield "", Moment(there, 0.0, before, recorded, 0.0), seconds
    else:
        made = sum(value.bytes for value in units.crossing if value.maker == k)
        held = before + _keeps_of(basis, units, k)
        yield plan.segment.name, Moment(there + made, 0.0, held, unrecorded, 0.0), plan.tile_count * seconds


def _backward(
    basis: Basis, units: _Units, k: int, burden: tuple[float, float], weights: float
) -> Iterator[tuple[str, Moment, float]]:
    """`burden` is what is kept before and behind the unit, `weights` the bytes of gradients of later weights."""
    cost, plan = units.costs[k], units.plan_of(k)
    part, shares = cost.part(), _shares(basis.locality, plan, cost)
    there = sum(value.bytes for value in units.crossing if value.in_backward(k))
    whole = plan is None or plan.tile_count == 1
    # What this unit is the last to read gets its gradient only here: at once, or as a sum over tiles.
    gradients = sum(v.gradient for v in units.crossing if v.has_gradient(k) and not (whole and v.last == k))
    outer = {value.name: float(value.gradient) for value in units.crossing if value.gradient and value.last == k}
    if plan is not None and not whole:
        leaves = [leaf for leaf, _ in plan.segment.leaves if leaf in basis.saved or leaf in basis.wanted]
        outer = {leaf: _box_bytes(basis.locality, plan, leaf) for leaf in leaves}
    profile, own = part.profile(shares, outer), float(cost.weight_gradients.sum())
    forward, backward = map(float, part.seconds(shares))
    before, behind = burden
    if plan is None:
        yield "", Moment(there, gradients, before, float(profile.max()), weights), backward
        return
    name, recomputed = plan.segment.name, plan.tile_count - plan.kept
    if recomputed:
        moment = Moment(there, gradients, before, float(profile.max()), weights + own)
        yield name, moment, recomputed * (forward + backward)
    if plan.kept:
        one = float(profile[part.turn :].max()) - float(part.held(shares))
        yield name, Moment(there, gradients, behind, one, weights + own), plan.kept * backward


def _shares(locality: Locality, plan: SegmentPlan | None, cost: Costs) -> torch.Tensor:
    """The shares of the largest tile of a segment; all ones for ordinary operators."""
    if plan is None:
        return torch.ones(len(cost.nodes), dtype=torch.float64)
    shares = torch.ones(len(cost.nodes), dtype=torch.float64)
    for axis in range(len(plan.axes)):
        held = {name: plan.largest(name)[axis] for name in cost.nodes}
        shares = shares * shares_along(locality, cost.nodes, axis, held)
    return shares


def _box_bytes(locality: Locality, plan: SegmentPlan, leaf: str) -> float:
    """Bytes of the largest box that a tile reads of a leaf."""
    extents = dict(plan.segment.leaves)[leaf]
    share = 1.0
    for dim, length in zip(extents, plan.largest(leaf), strict=True):
        share *= length / locality.value(leaf).shape[dim]
    return bytes_of(locality, leaf) * share


def keep_graphs(basis: Basis, plans: Sequence[SegmentPlan], budget: int) -> tuple[SegmentPlan, ...]:
    """The segments with the graphs of as many tiles kept as the budget allows, the last segments first.

    A kept graph burdens its own and later moments only, so that the last segments' are the cheapest to keep.
    """
    chosen = list(plans)
    for k in reversed(range(len(chosen))):
        low, high = 0, chosen[k].tile_count
        while low < high:
            middle = (low + high + 1) // 2
            tried = [*chosen[:k], replace(chosen[k], kept=middle), *chosen[k + 1 :]]
            if max(moment.bytes for _, moment, _ in predicted_moments(basis, tried)) <= budget:
                low = middle
            else:
                high = middle - 1
        chosen[k] = replace(chosen[k], kept=low)
    return tuple(chosen)
