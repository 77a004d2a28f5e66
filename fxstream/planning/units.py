"""The units of a plan, what each needs, and the values that go from one to others."""

from __future__ import annotations

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
        """Whether it exists when a later unit runs forward."""
        return self.maker < unit and (unit <= self.last or any(holder < unit for holder in self.holders))

    def in_backward(self, unit: int) -> bool:
        """Whether it exists when a later unit runs backward; a result of the network always does."""
        return self.is_result or (self.maker < unit and any(holder <= unit for holder in self.holders))

    def has_gradient(self, unit: int) -> bool:
        """Whether its gradient exists when a unit runs backward."""
        return self.maker <= unit <= self.last


def units_of(context: Context, plans: Sequence[SegmentPlan], offloaded: frozenset[str]) -> list[Unit]:
    """What every unit of a plan needs, in the order in which they run."""
    spans = list(_spans(context.graph, plans))
    costs = [context.costs(context.graph if plan is None else plan.segment.graph, nodes) for nodes, plan in spans]
    crossing = list(_crossing(context, spans, costs, offloaded))
    last = {name: k for k, cost in enumerate(costs) for name in cost.weight_bytes}
    return [
        _Needs(context, k, plan, cost, crossing, offloaded).unit(last)
        for k, ((_, plan), cost) in enumerate(zip(spans, costs, strict=True))
    ]


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
        size = graph[name].bytes * is_new
        yield _Crossing(
            name,
            made,
            len(spans) if graph.is_result(name) else max(others),
            tuple(holders.get(name, ())),
            size * exists,
            size if made >= 0 or name in context.differentiated else 0,
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
        crossing: Sequence[_Crossing],
        offloaded: frozenset[str],
    ) -> None:
        self._context, self._k, self._plan, self._cost = context, k, plan, cost
        self._crossing, self._offloaded = crossing, offloaded
        self._is_whole = plan is None or plan.tile_count == 1

    def unit(self, last: dict[str, int]) -> Unit:
        """All of it; `last` is the last unit that reads each weight."""
        cost, plan, k = self._cost, self._plan, self._k
        shares, turn = self._shares(SegmentPlan.largest), len(cost.nodes)
        recorded, unrecorded, saved = self._profiles(shares)
        transfer = sum(self._transfers(plan)) / cost.machine.host if plan is not None else 0.0
        usual = shares if self._is_whole else self._shares(SegmentPlan.usual)
        seconds = [float(spent) + transfer for spent in cost.whole.seconds(usual)]
        made = sum(value.bytes for value in self._crossing if value.maker == k)
        return Unit(
            name=plan.segment.name if plan is not None else "",
            tiles=plan.tile_count if plan is not None else 0,
            made=made,
            read=sum(v.gradient for v in self._crossing if v.maker < k and k in v.holders),
            holds=(saved - (made if plan is None else 0.0)) * self._context.training,
            there_forward=sum(value.bytes for value in self._crossing if value.in_forward(k)),
            forward=float((recorded[:turn] if plan is None and self._context.training else unrecorded).max()),
            forward_seconds=seconds[0],
            there_backward=sum(value.bytes for value in self._crossing if value.in_backward(k)),
            gradients=sum(v.gradient for v in self._crossing if v.has_gradient(k) and not self._is_last_of(v)),
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

    def _is_last_of(self, value: _Crossing) -> bool:
        """Whether a value gets its gradient only here, at once: a sum over tiles exists all the while."""
        return self._is_whole and value.last == self._k

    def _outer(self) -> dict[str, float]:
        """Bytes of gradients of values from outside, from the backward of their last reader on."""
        outer: dict[str, float] = {}
        if self._is_whole:
            outer = {v.name: float(v.gradient) for v in self._crossing if v.last == self._k}
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
