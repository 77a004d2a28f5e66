"""What a plan will cost: the seconds and the peak of memory of one call, from the cost model.

NOTE [where the peak is]
The plan runs as a sequence of units: segments, and the ordinary operators before, between and behind them. Each
unit has a moment in forward and, with recording, one in backward. At every moment there are

- boundaries: results of one unit that a later one reads, in backward until the first of these is done, and the
  results of the network;
- gradients of boundaries: from the backward of their last reader to that of the unit that made them;
- kept: what autograd keeps of the ordinary operators, and the graphs of kept tiles, of units up to this one;
- the unit itself: one of its tiles, with what is read ahead, or its ordinary operators;
- gradients of the weights of this and later units, twice for a streamed unit (one tile's, and their sum);
- folded weights of this and earlier segments.

The peak is that of the moment that needs most. Not counted: the image, the weights, what an optimiser holds.
An image from outside of the device's memory counts where ordinary operators read it, for they read it whole.
Of offloaded boundaries and their gradients the boxes of a tile count alone.
"""

from __future__ import annotations

import bisect
import functools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace

import torch

from fxstream.graph.typed_graph import Locality
from fxstream.machine.units import bytes_text
from fxstream.planning.cost import Costs, Machine, bytes_of
from fxstream.tiling.autograd_saves import Saved
from fxstream.tiling.fold import fold_bytes, folds_in, saved_with_folds
from fxstream.tiling.order import execution_order
from fxstream.tiling.own_padding import padded_copies
from fxstream.tiling.request import output_extents
from fxstream.tiling.segment_plan import SegmentPlan, offloadable

__all__ = ["Basis", "Moment", "Prediction", "keep_graphs", "predict", "shares_along"]


@dataclass(frozen=True, slots=True)
class Moment:
    """Bytes by category at one moment; see the NOTE."""

    boundaries: float
    gradients: float
    kept: float
    unit: float
    weights: float
    folded: float = 0.0

    @property
    def bytes(self) -> int:
        """All of them."""
        return int(sum(getattr(self, part.name) for part in fields(self)))


@dataclass(frozen=True, slots=True)
class Prediction:
    """Predicted for one call, with its backward where `training`: bytes at the peak, seconds, the plain network's.

    Seconds are those of a typical machine: compare them with `plain_seconds` only. `binding` is the unit at the
    peak: a segment's name, or empty for the ordinary operators. `offloaded` are the bytes of boundaries in host
    memory, where their gradients come to be too.
    """

    training: bool
    peak: Moment
    binding: str
    seconds: float
    plain_bytes: int
    plain_seconds: float
    offloaded: int = 0

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
            ("folded weights", peak.folded),
        )
        told = ", ".join(f"{what} {bytes_text(count)}" for what, count in parts if count)
        away = [f"  in host memory: boundaries {bytes_text(self.offloaded)}"] if self.offloaded else []
        return [
            f"predicted for {step}: {self.time_ratio:.2f}x the plain time, {bytes_text(self.bytes)} instead of"
            f" {bytes_text(self.plain_bytes)}",
            f"  at the peak: {told}",
            *away,
        ]


@dataclass(frozen=True)
class Basis:
    """What every prediction at one image size starts from.

    `saved` is what autograd keeps of each operator, `wanted` the images whose gradient is asked for, `training`
    whether there is a backward at all. `outside` are images that are not in the device's memory, of which segments
    read boxes, `written` results that a segment writes elsewhere tile by tile. `ranks` share the
    tiles; seconds and kept tiles are those of one. With `offload` boundaries lie in host memory.
    """

    locality: Locality
    saved: Mapping[str, Saved]
    machine: Machine
    training: bool = True
    wanted: frozenset[str] = frozenset()
    outside: frozenset[str] = frozenset()
    written: frozenset[str | None] = frozenset()
    ranks: int = 1
    offload: bool = False

    def untiled(self, nodes: Sequence[str]) -> Costs:
        """The costs of a run of operators that runs as the model has it."""
        return Costs(self.locality, self.machine, self.saved, nodes)

    def tiled(self, nodes: Sequence[str]) -> Costs:
        """The costs of a run of operators that is streamed, its frozen BatchNorms folded."""
        return Costs(self.locality, self.machine, saved_with_folds(self.locality, self.saved, nodes), nodes)

    def folded(self, nodes: Sequence[str]) -> torch.Tensor:
        """Bytes of the weight of the fold into each operator of a streamed run."""
        folds = folds_in(self.locality, nodes)
        sizes = [fold_bytes(self.locality, folds[name]) if name in folds else 0 for name in nodes]
        return torch.tensor(sizes, dtype=torch.float64)

    def turns(self, tiles: int) -> int:
        """How many of so many tiles the rank that has most of them runs."""
        return -(-tiles // self.ranks)

    def collecting(self, made: float, weights: float = 0.0) -> float:
        """Seconds to put so many bytes of tiles together, or of gradients beside weights', on all ranks."""
        exchanged = 2 * (made + weights) if weights else made
        return self.machine.writing(made) + (self.ranks - 1) / self.ranks * exchanged / self.machine.link

    @functools.cached_property
    def plain(self) -> tuple[int, float]:
        """Peak bytes and seconds of the plain network."""
        costs = Costs(self.locality, self.machine, self.saved, tuple(self.saved), plain=True)
        part, ones = costs.part(), torch.ones(len(costs.nodes), dtype=torch.float64)
        forward, backward = map(float, part.seconds(ones))
        images = sum(bytes_of(self.locality, name) for name in self.outside)
        if self.training:
            return images + int(part.profile(ones).max()), forward + backward
        return images + int(part.profile_unrecorded(ones).max()), forward


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


@dataclass(frozen=True, slots=True)
class _Unit:
    """What one unit needs, in bytes and seconds of one of its tiles, whatever is kept elsewhere.

    `tiles` is 0 for ordinary operators. `made` are the bytes of what it makes, `read` of the gradients of what it
    reads. `holds` is what it keeps until its backward (per kept tile), apart from
    what other units read; `forward`, `backward` and `pulled` are the peaks of a forward, of a forward with its
    backward, and of the backward of a kept tile beyond what is held. `weights` are the gradients of all of its
    weights, `more_weights` of those that no later unit reads too: others are added to these. `folded` are the
    weights of its folds, which are there from its forward to its backward.
    """

    name: str
    tiles: int
    made: float
    read: float
    holds: float
    there_forward: float
    forward: float
    forward_seconds: float
    there_backward: float
    gradients: float
    backward: float
    pulled: float
    backward_seconds: float
    weights: float
    more_weights: float
    folded: float


class Forecast:
    """The moments of a plan, for any numbers of kept tiles."""

    def __init__(self, basis: Basis, plans: Sequence[SegmentPlan]) -> None:
        self._basis = basis
        self._offloaded = offloadable(basis.locality, plans) if basis.offload else frozenset[str]()
        units = list(_units(basis, plans))
        costs = [basis.untiled(nodes) if plan is None else basis.tiled(nodes) for nodes, plan in units]
        crossing = list(self._crossing(units, costs))
        self._last = {name: k for k, cost in enumerate(costs) for name in cost.weight_bytes}
        self._units = [
            self._unit(k, plan, cost, crossing)
            for k, ((_, plan), cost) in enumerate(zip(units, costs, strict=True))
        ]

    def moments(self, kept: Mapping[str, int]) -> Iterator[tuple[str, Moment, float]]:
        """The name of the unit, the bytes and the seconds of every moment, forward and then backward.

        `kept` are the numbers of kept tiles by the name of the segment.
        """
        held, folded, before = 0.0, 0.0, []
        for unit in self._units:
            folded = unit.folded + folded * self._basis.training
            before.append((held, folded))
            holds = unit.holds * self._basis.turns(kept[unit.name]) if unit.tiles else unit.holds
            here = held + holds if unit.tiles else held
            made = unit.made if unit.tiles else 0.0
            seconds = self._basis.turns(max(1, unit.tiles)) * unit.forward_seconds
            if unit.tiles > 1 or self._basis.ranks > 1:
                seconds += self._basis.collecting(made)
            yield unit.name, Moment(unit.there_forward + made, 0.0, here, unit.forward, 0.0, folded), seconds
            held += holds
        weights = 0.0
        for unit, (earlier, folded) in reversed(
            [*zip(self._units, before, strict=True)] if self._basis.training else []
        ):
            tiles = self._basis.turns(kept.get(unit.name, 0))
            recomputed = self._basis.turns(max(1, unit.tiles)) - tiles
            both = weights + unit.weights if unit.tiles else weights
            moment = Moment(unit.there_backward, unit.gradients, earlier, unit.backward, both, folded)
            if unit.tiles > 1 or (unit.tiles and self._basis.ranks > 1):
                yield unit.name, replace(moment, unit=0.0), self._basis.collecting(unit.read, unit.weights)
            if recomputed:
                again = unit.forward_seconds if unit.tiles else 0.0
                yield unit.name, moment, recomputed * (again + unit.backward_seconds)
            if tiles:
                own = earlier + unit.holds * tiles
                yield unit.name, replace(moment, kept=own, unit=unit.pulled), tiles * unit.backward_seconds
            weights += unit.more_weights

    def prediction(self, kept: Mapping[str, int]) -> Prediction:
        """The peak of all moments and the sum of their seconds, beside the plain network's."""
        plain_bytes, plain_seconds = self._basis.plain
        moments = list(self.moments(kept))
        name, peak, _ = max(moments, key=lambda moment: moment[1].bytes)
        seconds = sum(spent for *_, spent in moments)
        away = sum(bytes_of(self._basis.locality, boundary) for boundary in self._offloaded)
        return Prediction(self._basis.training, peak, name, seconds, plain_bytes, plain_seconds, away)

    def peak(self, kept: Mapping[str, int]) -> int:
        """The bytes at the peak."""
        return max(moment.bytes for _, moment, _ in self.moments(kept))

    def _crossing(
        self, units: Sequence[tuple[tuple[str, ...], SegmentPlan | None]], costs: Sequence[Costs]
    ) -> Iterator[_Crossing]:
        locality, saved = self._basis.locality, self._basis.saved
        maker: dict[str, int] = dict.fromkeys((*self._basis.wanted, *self._basis.outside), -1)
        whole = {name for nodes, plan in units if plan is None for name in _reads(locality, nodes)}
        readers: dict[str, set[int]] = {}
        holders: dict[str, set[int]] = {}
        for k, (nodes, plan) in enumerate(units):
            maker |= dict.fromkeys(nodes if plan is None else plan.segment.outputs, k)
            for name in _reads(locality, nodes) if plan is None else plan.segment.inputs:
                readers.setdefault(name, set()).add(k)
                if plan is not None:
                    holders.setdefault(name, set()).add(k)
            for name in nodes if plan is None else ():
                given = [n.name for n in locality.nodes[name].all_input_nodes]
                for held in saved[name].inputs:
                    holders.setdefault(given[held], set()).add(k)
            for name in costs[k].kept if plan is None else ():
                holders.setdefault(name, set()).add(k)
        for name, made in maker.items():
            is_result = any(user.op == "output" for user in locality.nodes[name].users)
            others = readers.get(name, set()) - {made}
            if not others and not is_result:
                continue
            last = len(units) if is_result else max(others)
            is_away = name in self._offloaded
            size = bytes_of(locality, name) * (made < 0 or (saved[name].views is None and not is_away))
            is_written = name in self._basis.written and made >= 0 and units[made][1] is not None
            is_there = not is_written if made >= 0 else name in self._basis.outside & whole
            gradient = size if made >= 0 or name in self._basis.wanted else 0
            held_by = tuple(holders.get(name, ()))
            yield _Crossing(name, made, last, held_by, size * is_there, gradient, is_result)

    def _unit(self, k: int, plan: SegmentPlan | None, cost: Costs, crossing: Sequence[_Crossing]) -> _Unit:
        part, shares = cost.part(), _shares(self._basis.locality, plan, cost)
        made = sum(value.bytes for value in crossing if value.maker == k)
        whole = plan is None or plan.tile_count == 1
        # What this unit is the last to read gets its gradient only here: at once, or as a sum over tiles.
        gradients = sum(v.gradient for v in crossing if v.has_gradient(k) and not (whole and v.last == k))
        outer = {value.name: float(value.gradient) for value in crossing if value.last == k}
        if plan is not None:
            read = [leaf for leaf, _ in plan.segment.leaves if not whole or leaf in self._offloaded]
            leaves = [leaf for leaf in read if leaf in self._basis.saved or leaf in self._basis.wanted]
            outer = (outer if whole else {}) | {leaf: self._leaf_bytes(plan, leaf) for leaf in leaves}
        recorded, held = part.profile(shares, outer), float(part.held(shares))
        unrecorded = part.profile_unrecorded(shares)
        for name, size in padded_copies(self._basis.locality, cost.nodes, plan.axes if plan else ()).items():
            i, is_kept = cost.place[name], 0 in self._basis.saved[name].inputs
            recorded[i : 2 * part.turn - i if is_kept else i + 1] += size
            unrecorded[i] += size
            held += size * is_kept
        read_ahead = self._read_ahead(plan)
        recorded, unrecorded = recorded + read_ahead, unrecorded + read_ahead
        coming, going = self._transfers(plan)
        recorded[part.turn :] += going
        is_recorded = plan is None and self._basis.training
        forward, backward = (s + (coming + going) / cost.machine.host for s in map(float, part.seconds(shares)))
        return _Unit(
            name=plan.segment.name if plan is not None else "",
            tiles=plan.tile_count if plan is not None else 0,
            made=made,
            read=sum(value.gradient for value in crossing if value.maker < k and k in value.holders),
            holds=(held if plan is not None else held - made) if self._basis.training else 0.0,
            there_forward=sum(value.bytes for value in crossing if value.in_forward(k)),
            forward=float((recorded[: part.turn] if is_recorded else unrecorded).max()),
            forward_seconds=forward,
            there_backward=sum(value.bytes for value in crossing if value.in_backward(k)),
            gradients=gradients,
            backward=float(recorded.max()),
            pulled=float(recorded[part.turn :].max()) - held,
            backward_seconds=backward,
            weights=float(cost.weight_gradients.sum()),
            more_weights=float(sum(size for name, size in cost.weight_bytes.items() if self._last[name] == k)),
            folded=float(self._basis.folded(cost.nodes).sum()) if plan is not None else 0.0,
        )

    def _read_ahead(self, plan: SegmentPlan | None) -> float:
        """Bytes of this tile's and the next one's boxes of what lies outside."""
        if plan is None:
            return 0.0
        outside = self._basis.outside | self._offloaded
        return sum(2 * self._leaf_bytes(plan, leaf) for leaf, _ in plan.segment.leaves if leaf in outside)

    def _transfers(self, plan: SegmentPlan | None) -> tuple[float, float]:
        """Bytes of a tile's boxes of offloaded boundaries: those that it reads, those that it writes."""
        if plan is None or not self._offloaded:
            return 0.0, 0.0
        read = (self._leaf_bytes(plan, leaf) for leaf, _ in plan.segment.leaves if leaf in self._offloaded)
        made = (
            _box_bytes(self._basis.locality, plan, output, self._basis.locality.value(output).dims)
            for output in plan.segment.outputs
            if output in self._offloaded
        )
        return sum(read), sum(made)

    def _leaf_bytes(self, plan: SegmentPlan, leaf: str) -> float:
        return _box_bytes(self._basis.locality, plan, leaf, dict(plan.segment.leaves)[leaf])


def _units(basis: Basis, plans: Sequence[SegmentPlan]) -> Iterator[tuple[tuple[str, ...], SegmentPlan | None]]:
    """Segments, and the runs of ordinary operators between them, in the order in which they run."""
    planned = {plan.segment.name: plan for plan in plans}
    ordinary: list[str] = []
    for name in execution_order(basis.locality, [plan.segment for plan in plans]):
        if name not in planned:
            ordinary += [name] if name in basis.saved else []
            continue
        if ordinary:
            yield tuple(ordinary), None
            ordinary = []
        yield planned[name].segment.nodes, planned[name]
    if ordinary:
        yield tuple(ordinary), None


def _reads(locality: Locality, nodes: Sequence[str]) -> set[str]:
    return {given.name for name in nodes for given in locality.nodes[name].all_input_nodes}


def predict(basis: Basis, plans: Sequence[SegmentPlan]) -> Prediction:
    """Peak and seconds of these segments with everything else run plainly."""
    if plans:
        return Forecast(basis, plans).prediction({plan.segment.name: plan.kept for plan in plans})
    plain_bytes, seconds = basis.plain
    return Prediction(basis.training, Moment(0, 0, 0, plain_bytes, 0), "", seconds, plain_bytes, seconds)


def _shares(locality: Locality, plan: SegmentPlan | None, cost: Costs) -> torch.Tensor:
    """The shares of the largest tile of a segment; all ones for ordinary operators."""
    shares = torch.ones(len(cost.nodes), dtype=torch.float64)
    if plan is not None:
        largest = {name: plan.largest(name) for name in cost.nodes}
        for axis in range(len(plan.axes)):
            held = {name: lengths[axis] for name, lengths in largest.items()}
            shares = shares * shares_along(locality, cost.nodes, axis, held)
    return shares


def _box_bytes(locality: Locality, plan: SegmentPlan, name: str, dims: tuple[int, ...]) -> float:
    """Bytes of the largest box that a tile holds of a leaf or an output with these stream dims."""
    shape = locality.value(name).shape
    shares = (length / shape[dim] for dim, length in zip(dims, plan.largest(name), strict=True))
    return bytes_of(locality, name) * math.prod(shares)


def keep_graphs(
    basis: Basis, plans: Sequence[SegmentPlan], budget: int
) -> tuple[tuple[SegmentPlan, ...], Prediction]:
    """The segments with the graphs of as many tiles kept as the budget allows, and their prediction.

    The last segments come first: a kept graph burdens its own and later moments only, so that theirs are the
    cheapest to keep.
    """
    forecast = Forecast(basis, plans)
    kept = dict.fromkeys((plan.segment.name for plan in plans), 0)
    for plan in reversed(plans):
        counts = range(plan.tile_count + 1)
        name = plan.segment.name
        kept[name] = bisect.bisect_right(counts, budget, key=lambda n: forecast.peak(kept | {name: n})) - 1
    chosen = tuple(replace(plan, kept=kept[plan.segment.name]) for plan in plans)
    return chosen, forecast.prediction(kept)
