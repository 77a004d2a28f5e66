"""What a plan will cost: the seconds and the peak of memory of one call, from the cost model.

NOTE [where the peak is]
The plan runs as a sequence of units: segments, and the ordinary operators before, between and behind them. Each
unit has a moment in forward and, with recording, one in backward. At every moment there are

- boundaries: results of one unit that a later one reads, in backward until the first of these is done;
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

__all__ = ["Moment", "Prediction", "Units", "keep_graphs", "plain_costs", "predict", "shares_along"]


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


def plain_costs(
    locality: Locality, saved: Mapping[str, Saved], machine: Machine, training: bool
) -> tuple[int, float]:
    """Peak bytes and seconds of the plain network."""
    costs = Costs(locality, machine, saved, tuple(saved), in_place=True)
    part, ones = costs.part(), torch.ones(len(costs.nodes), dtype=torch.float64)
    forward, backward = map(float, part.seconds(ones))
    if training:
        return round(float(part.profile(ones).max())), forward + backward
    return round(float(part.profile_unrecorded(ones).max())), forward


def shares_along(locality: Locality, nodes: Sequence[str], axis: int, held: Mapping[str, int]) -> torch.Tensor:
    """The share of each node's pixels along an axis that a tile holds; `held` are the pixels that it holds."""
    shares = [held[n] / output_extents(locality, n)[axis] if n in held else 0.0 for n in nodes]
    return torch.tensor(shares, dtype=torch.float64)


class Units:
    """The sequence of units of a plan: which nodes each has, and which values go from one to another."""

    def __init__(self, locality: Locality, saved: Mapping[str, Saved], streamed: Sequence[Sequence[str]]) -> None:
        place = {name: i for i, name in enumerate(saved)}
        streamed = sorted(streamed, key=lambda nodes: place[nodes[0]])
        starts = [place[nodes[0]] for nodes in streamed]
        of_segment = {name: 2 * k + 1 for k, nodes in enumerate(streamed) for name in nodes}
        self.of: dict[str, int] = {}
        """The unit of each node: segments have odd numbers, ordinary operators even ones."""
        for name, i in place.items():
            before = [self.of[n.name] for n in locality.nodes[name].all_input_nodes if n.name in self.of]
            behind = 2 * sum(start < i for start in starts)
            self.of[name] = of_segment.get(name, max([behind, *(u + u % 2 for u in before)]))
        self.count = 2 * len(streamed) + 1
        self.nodes: list[list[str]] = [[] for _ in range(self.count)]
        for name, unit in self.of.items():
            self.nodes[unit].append(name)
        self.crossing: list[tuple[str, int, int, int]] = []
        """Values that another unit reads: their node, the unit that makes them, the first reader, the last."""
        for name, unit in self.of.items():
            readers = [self.of[u.name] for u in locality.nodes[name].users if self.of.get(u.name, unit) != unit]
            ends = any(user.op == "output" for user in locality.nodes[name].users)
            if readers or ends:
                last = self.count if ends else max(readers)
                self.crossing.append((name, unit, min([*readers, last]), last))


def predict(
    locality: Locality,
    saved: Mapping[str, Saved],
    machine: Machine,
    plans: Sequence[SegmentPlan],
    training: bool,
) -> Prediction:
    """Peak and seconds of these segments with everything else run plainly."""
    plain_bytes, plain_seconds = plain_costs(locality, saved, machine, training)
    if not plans:
        return Prediction(training, Moment(0, 0, 0, plain_bytes, 0), "", plain_seconds, plain_bytes, plain_seconds)
    moments = list(predicted_moments(locality, saved, machine, plans, training))
    peak = max(moments, key=lambda moment: moment[1].bytes)
    seconds = sum(spent for *_, spent in moments)
    return Prediction(training, peak[1], peak[0], seconds, plain_bytes, plain_seconds)


def predicted_moments(
    locality: Locality,
    saved: Mapping[str, Saved],
    machine: Machine,
    plans: Sequence[SegmentPlan],
    training: bool,
) -> Iterator[tuple[str, Moment, float]]:
    """The name of the unit, the bytes and the seconds of every moment, forward and then backward."""
    units = Units(locality, saved, [plan.segment.nodes for plan in plans])
    plan_of = {units.of[plan.segment.nodes[0]]: plan for plan in plans}
    costs = [Costs(locality, machine, saved, nodes) for nodes in units.nodes]
    sizes = {name: bytes_of(locality, name) * (saved[name].views is None) for name, *_ in units.crossing}
    kept, later = 0.0, []
    for k, cost in enumerate(costs):
        if not cost.nodes:
            later.append((kept, 0.0))
            continue
        plan, part = plan_of.get(k), cost.part()
        shares = _shares(locality, plan, cost)
        made = sum(sizes[name] for name, unit, *_ in units.crossing if unit == k)
        alive = sum(sizes[name] for name, unit, _, last in units.crossing if unit < k <= last)
        before = kept
        if training:
            alive = sum(sizes[name] for name, unit, *_ in units.crossing if unit < k)
            turn = float(part.profile(shares)[part.turn])
            kept += (turn - made) if plan is None else plan.kept * turn
        tiles = plan.tile_count if plan else 1
        forward, _ = map(float, part.seconds(shares))
        unit = float(part.profile_unrecorded(shares).max()) - (made if plan is None else 0)
        name = plan.segment.name if plan else ""
        yield name, Moment(alive + made, 0.0, max(before, kept), unit, 0.0), tiles * forward
        later.append((before, kept))
    weights = 0.0
    for k in reversed(range(len(costs) if training else 0)):
        cost, plan = costs[k], plan_of.get(k)
        if not cost.nodes:
            continue
        part, own = cost.part(), float(cost.weight_gradients.sum())
        shares = _shares(locality, plan, cost)
        profile = part.profile(shares)
        crossing = units.crossing
        boundaries = sum(sizes[name] for name, unit, first, _ in crossing if unit < k and first <= k)
        gradients = sum(sizes[name] for name, unit, _, last in crossing if unit <= k <= last and unit + last > 0)
        forward, backward = map(float, part.seconds(shares))
        before, after = later[k]
        if plan is None:
            made = sum(sizes[name] for name, unit, *_ in crossing if unit == k)
            yield "", Moment(boundaries, gradients, before, float(profile.max()), weights), backward
        else:
            boxes = sum(_box_bytes(locality, plan, leaf) for leaf, _ in plan.segment.leaves if leaf in saved)
            name = plan.segment.name
            recomputed = plan.tile_count - plan.kept
            spent = recomputed * (forward + backward) + plan.kept * backward
            if recomputed:
                yield (
                    name,
                    Moment(boundaries, gradients, before, float(profile.max()) + boxes, weights + own),
                    spent,
                )
            if plan.kept:
                turn = float(profile[part.turn])
                one = float(profile[part.turn :].max()) - turn + boxes
                yield name, Moment(boundaries, gradients, after, one, weights + own), 0.0 if recomputed else spent
        weights += own


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


def keep_graphs(
    locality: Locality,
    saved: Mapping[str, Saved],
    machine: Machine,
    plans: Sequence[SegmentPlan],
    budget: int,
) -> tuple[SegmentPlan, ...]:
    """The segments with the graphs of as many tiles kept as the budget allows, the last segments first.

    A kept graph burdens its own and later moments only, so that the last segments' are the cheapest to keep.
    """
    chosen = list(plans)
    for k in reversed(range(len(chosen))):
        low, high = 0, chosen[k].tile_count
        while low < high:
            middle = (low + high + 1) // 2
            tried = [*chosen[:k], replace(chosen[k], kept=middle), *chosen[k + 1 :]]
            if max(m.bytes for _, m, _ in predicted_moments(locality, saved, machine, tried, True)) <= budget:
                low = middle
            else:
                high = middle - 1
        chosen[k] = replace(chosen[k], kept=low)
    return tuple(chosen)
