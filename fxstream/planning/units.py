"""The units of a plan, what each needs, and the values that go from one to others."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from fxstream.graph.typed_graph import TypedGraph
from fxstream.machine.speeds import Machine
from fxstream.planning.cost import Costs
from fxstream.tiling.order import execution_order
from fxstream.tiling.own_padding import padded_copies
from fxstream.tiling.segment_plan import SegmentPlan
from fxstream.tiling.templates import MemoOfStructure

__all__ = ["Unit", "units_of"]

Span = tuple[tuple[str, ...], SegmentPlan | None]
"""The nodes of a unit, and its plan where it is a segment."""


class Context(Protocol):
    """What of a `CostContext` is needed here."""

    @property
    def graph(self) -> TypedGraph:
        """The typed graph of the model."""

    @property
    def machine(self) -> Machine:
        """The speeds of the device."""

    @property
    def training(self) -> bool:
        """Whether there is a backward."""

    @property
    def differentiated(self) -> frozenset[str]:
        """The images whose gradient is asked for."""

    @property
    def outside(self) -> frozenset[str]:
        """The images that are not in the device's memory."""

    @property
    def written(self) -> frozenset[str | None]:
        """The results that are written elsewhere."""

    @property
    def memo(self) -> MemoOfStructure:
        """What was made at other sizes."""

    def costs(self, graph: TypedGraph, nodes: Sequence[str]) -> Costs:
        """The costs of a run of operators."""


@dataclass(frozen=True, slots=True)
class Unit:
    """What one unit needs, in bytes and seconds of one of its tiles, whatever is kept elsewhere.

    `tiles` is 0 for dense operators. `made` are the bytes of what it makes, `read` of the gradients of what it
    reads. `holds` is what it holds until its backward (per kept tile), apart from what other units read;
    `forward`, `backward` and `pulled` are the peaks of a forward, of a forward with its backward, and of the
    backward of a kept tile beyond what is saved. `there_forward`, `there_backward` and `gradients` are the
    boundaries and gradients of other units that exist meanwhile. `weights` are the gradients of all of its
    weights, `more_weights` of those that no later unit reads too: others are added to these. `folded` are the
    weights of its fusions, which exist from its forward to its backward.
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


@dataclass(frozen=True, slots=True)
class _Crossing:
    """A value that goes from one unit to others: who makes it (-1 for an input), who reads it last, who holds it.

    Whether it `exists` whole in the device's memory, and whether a gradient of it does.
    """

    name: str
    maker: int
    last: int
    holders: tuple[int, ...]
    exists: bool
    has_gradient: bool
    is_result: bool


@dataclass(frozen=True, slots=True)
class _Layout:
    """The units of a plan at every size: the nodes of each, the segment that it is, and the values that cross them."""

    units: tuple[tuple[tuple[str, ...], str | None], ...]
    crossing: tuple[_Crossing, ...]


class _Boundaries:
    """Bytes of the values that cross units, per unit: those that it makes, those that exist meanwhile, gradients."""

    def __init__(self, graph: TypedGraph, layout: _Layout) -> None:
        count = len(layout.units)
        self.made, self.read = [0.0] * count, [0.0] * count
        forward, backward, gradients = ([0.0] * (count + 2) for _ in range(3))
        self.last_of: dict[int, dict[str, float]] = {}
        """By the last unit that reads it, the bytes of each value's gradient."""
        for value in layout.crossing:
            size = graph[value.name].bytes
            own, gradient = size * value.exists, size * value.has_gradient
            first, held = value.maker + 1, min(value.holders, default=count)
            if value.maker >= 0:
                self.made[value.maker] += own
            for k in value.holders:
                self.read[k] += gradient if k > value.maker else 0.0
            _add(forward, first, value.last + 1 if held > value.last else count, own)
            _add(backward, 0 if value.is_result else max(first, held), count, own)
            _add(gradients, max(value.maker, 0), value.last + 1, gradient)
            self.last_of.setdefault(value.last, {})[value.name] = float(gradient)
        self.there_forward, self.there_backward, self.gradients = (
            list(itertools.accumulate(changes)) for changes in (forward, backward, gradients)
        )


def _add(changes: list[float], start: int, stop: int, amount: float) -> None:
    """Note that so much is there from one unit up to, not including, another."""
    if start < stop:
        changes[start] += amount
        changes[min(stop, len(changes) - 1)] -= amount


def units_of(context: Context, plans: Sequence[SegmentPlan], offloaded: frozenset[str]) -> list[Unit]:
    """What every unit of a plan needs, in the order in which they run."""
    segments = tuple((plan.segment.name, plan.segment.graph.graph, bool(plan.axes)) for plan in plans)
    key = ("layout", segments, offloaded, context.differentiated, context.outside, context.written)
    layout = context.memo.get(key, lambda: _laid_out(context, plans, offloaded))
    planned: dict[str | None, SegmentPlan] = {plan.segment.name: plan for plan in plans}
    of_units = [planned.get(name) for _, name in layout.units]
    costs = _costs(context, [nodes for nodes, _ in layout.units], of_units)
    boundaries = _Boundaries(context.graph, layout)
    last = {name: k for k, cost in enumerate(costs) for name in cost.weight_bytes}
    return [
        _Needs(context, k, plan, cost, boundaries, offloaded).unit(last)
        for k, (plan, cost) in enumerate(zip(of_units, costs, strict=True))
    ]


def _costs(context: Context, nodes: Sequence[tuple[str, ...]], plans: Sequence[SegmentPlan | None]) -> list[Costs]:
    return [
        context.costs(context.graph if plan is None else plan.segment.graph, of_unit)
        for of_unit, plan in zip(nodes, plans, strict=True)
    ]


def _laid_out(context: Context, plans: Sequence[SegmentPlan], offloaded: frozenset[str]) -> _Layout:
    spans = list(_spans(context.graph, plans))
    costs = _costs(context, [nodes for nodes, _ in spans], [plan for _, plan in spans])
    units = tuple((nodes, None if plan is None else plan.segment.name) for nodes, plan in spans)
    return _Layout(units, tuple(_crossing(context, spans, costs, offloaded)))


def _spans(graph: TypedGraph, plans: Sequence[SegmentPlan]) -> Iterator[Span]:
    """Segments, and the runs of dense operators between them, in the order in which they run."""
    planned = {plan.segment.name: plan for plan in plans}
    dense: list[str] = []
    for name in execution_order(graph, [plan.segment for plan in plans]):
        if name not in planned:
            dense += [name] if graph[name].saves is not None else []
            continue
        if dense:
            yield tuple(dense), None
            dense = []
        yield planned[name].segment.nodes, planned[name]
    if dense:
        yield tuple(dense), None


def _crossing(
    context: Context, spans: Sequence[Span], costs: Sequence[Costs], offloaded: frozenset[str]
) -> Iterator[_Crossing]:
    """The values that units exchange, in the order in which they are made."""
    graph = context.graph
    maker: dict[str, int] = dict.fromkeys((*context.differentiated, *context.outside), -1)
    for k, (nodes, plan) in enumerate(spans):
        maker |= dict.fromkeys(nodes if plan is None else plan.segment.outputs, k)
    readers, holders = _readers_and_holders(graph, spans, costs)
    for name, made in maker.items():
        others = readers.get(name, set()) - {made}
        if not others and not graph.is_result(name):
            continue
        is_new = made < 0 or (not _is_view(graph, name) and name not in offloaded)
        if made >= 0:
            exists = name not in context.written or spans[made][1] is None
        else:
            exists = name in context.outside and any(spans[k][1] is None for k in readers.get(name, ()))
        yield _Crossing(
            name,
            made,
            len(spans) if graph.is_result(name) else max(others),
            tuple(holders.get(name, ())),
            is_new and exists,
            is_new and (made >= 0 or name in context.differentiated),
            graph.is_result(name),
        )


def _readers_and_holders(
    graph: TypedGraph, spans: Sequence[Span], costs: Sequence[Costs]
) -> tuple[dict[str, set[int]], dict[str, set[int]]]:
    """By name of a value the units that read it, and those that hold it until their backward."""
    readers: dict[str, set[int]] = {}
    holders: dict[str, set[int]] = {}
    for k, (nodes, plan) in enumerate(spans):
        reads = _reads(graph, nodes) if plan is None else set(plan.segment.inputs)
        for name in reads:
            readers.setdefault(name, set()).add(k)
        for name in reads if plan is not None else _saved_inputs(graph, nodes) | costs[k].kept:
            holders.setdefault(name, set()).add(k)
    return readers, holders


def _is_view(graph: TypedGraph, name: str) -> bool:
    saves = graph[name].saves
    return saves is not None and saves.views is not None


def _reads(graph: TypedGraph, nodes: Sequence[str]) -> set[str]:
    return {one for name in nodes for one in graph[name].inputs}


def _saved_inputs(graph: TypedGraph, nodes: Sequence[str]) -> set[str]:
    """What autograd saves of the inputs of these nodes."""
    return {graph[n].inputs[i] for n in nodes if (saves := graph[n].saves) is not None for i in saves.inputs}


class _Needs:
    """What one unit needs, of its operators and of what crosses it."""

    def __init__(
        self,
        context: Context,
        k: int,
        plan: SegmentPlan | None,
        cost: Costs,
        boundaries: _Boundaries,
        offloaded: frozenset[str],
    ) -> None:
        self._context, self._k, self._plan, self._cost = context, k, plan, cost
        self._boundaries, self._offloaded = boundaries, offloaded
        self._is_whole = plan is None or plan.tile_count == 1

    def unit(self, last: dict[str, int]) -> Unit:
        """All of it; `last` is the last unit that reads each weight."""
        cost, plan, k = self._cost, self._plan, self._k
        shares, turn = self._shares(SegmentPlan.largest), len(cost.nodes)
        recorded, unrecorded, saved = self._profiles(shares)
        transfer = sum(self._transfers(plan)) / cost.machine.host if plan is not None else 0.0
        usual = shares if self._is_whole else self._shares(SegmentPlan.usual)
        seconds = [float(spent) + transfer for spent in cost.whole.seconds(usual)]
        around = self._boundaries
        of_last = sum(around.last_of.get(k, {}).values()) if self._is_whole else 0.0
        return Unit(
            name=plan.segment.name if plan is not None else "",
            tiles=plan.tile_count if plan is not None else 0,
            made=around.made[k],
            read=around.read[k],
            holds=(saved - (around.made[k] if plan is None else 0.0)) * self._context.training,
            there_forward=around.there_forward[k],
            forward=float((recorded[:turn] if plan is None and self._context.training else unrecorded).max()),
            forward_seconds=seconds[0],
            there_backward=around.there_backward[k],
            gradients=around.gradients[k] - of_last,  # at once: a sum over tiles exists all the while
            backward=float(recorded.max()),
            pulled=float(recorded[turn:].max()) - saved,
            backward_seconds=seconds[1],
            weights=float(cost.weight_gradients.sum()),
            more_weights=float(sum(size for name, size in cost.weight_bytes.items() if last[name] == k)),
            folded=float(sum(fusion.bytes for fusion in plan.segment.fusions)) if plan is not None else 0.0,
        )

    def _shares(self, pixels: Callable[[SegmentPlan, str], Sequence[float]]) -> torch.Tensor:
        """What a tile with so many pixels of each node has, over what the costs are of; what is not tiled has all."""
        plan, cost = self._plan, self._cost
        if plan is None or not plan.axes:
            return cost.shares(self._context.graph if plan is None else plan.segment.graph)
        held = [pixels(plan, name) for name in cost.nodes]
        return (torch.tensor(held, dtype=torch.float64) / torch.tensor(cost.extents, dtype=torch.float64)).prod(-1)

    def _profiles(self, shares: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, float]:
        """Bytes of a tile at each step, with recording and without, and what it saves, with boxes and copies."""
        part, plan = self._cost.whole, self._plan
        recorded, unrecorded = part.profile(shares, self._outer()), part.profile_unrecorded(shares)
        saved = float(part.saved(shares))
        if plan is not None:
            saved += self._add_copies(plan, recorded, unrecorded)
            recorded, unrecorded = recorded + self._prefetched(plan), unrecorded + self._prefetched(plan)
            recorded[part.turn :] += self._transfers(plan)[1]
        return recorded, unrecorded, saved

    def _outer(self) -> dict[str, float]:
        """Bytes of gradients of values from outside, from the backward of their last reader on."""
        outer: dict[str, float] = {}
        if self._is_whole:
            outer = dict(self._boundaries.last_of.get(self._k, {}))
        plan, graph = self._plan, self._context.graph
        for name, _ in plan.segment.spatial if plan is not None else ():
            is_box = not self._is_whole or name in self._offloaded
            if is_box and (graph[name].saves is not None or name in self._context.differentiated):
                outer[name] = _box_bytes(plan, name)
        return {name: size for name, size in outer.items() if name in self._cost.outer}

    def _add_copies(self, plan: SegmentPlan, recorded: torch.Tensor, unrecorded: torch.Tensor) -> float:
        """Add padded copies of inputs to the profiles; returns the bytes of those that autograd saves."""
        saved, turns = 0.0, len(recorded) - 1
        for name, size in padded_copies(plan.segment, plan.axes).items():
            i, saves = self._cost.place[name], plan.segment.graph[name].saves
            is_saved = saves is not None and 0 in saves.inputs
            recorded[i : turns - i if is_saved else i + 1] += size
            unrecorded[i] += size
            saved += size * is_saved
        return saved

    def _prefetched(self, plan: SegmentPlan) -> float:
        """Bytes of this tile's and the next one's boxes of what lies outside."""
        outside = self._context.outside | self._offloaded
        return sum(2 * _box_bytes(plan, name) for name, _ in plan.segment.spatial if name in outside)

    def _transfers(self, plan: SegmentPlan) -> tuple[float, float]:
        """Bytes of a tile's boxes of offloaded boundaries: those that it reads, those that it writes."""
        read = (_box_bytes(plan, name) for name, _ in plan.segment.spatial if name in self._offloaded)
        made = (_box_bytes(plan, name) for name in plan.segment.outputs if name in self._offloaded)
        return sum(read), sum(made)


def _box_bytes(plan: SegmentPlan | None, name: str) -> float:
    """Bytes of the largest box that a tile holds of a spatial input or an output."""
    assert plan is not None
    node = plan.segment.graph[name]
    dims = dict(plan.segment.spatial).get(name, node.values[0].dims)
    lengths = plan.largest(name) if plan.axes else [node.values[0].shape[dim] for dim in dims]
    return node.bytes * math.prod(n / node.values[0].shape[dim] for dim, n in zip(dims, lengths, strict=True))
