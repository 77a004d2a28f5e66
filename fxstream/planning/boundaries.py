"""The order of a plan's units, and the values that go from one to others.

Who makes a value, who reads and who holds it is found once; the bytes are those of a size.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

from fxstream.graph.typed_graph import TypedGraph
from fxstream.machine.speeds import Machine
from fxstream.planning.cost import Costs
from fxstream.tiling.order import execution_order
from fxstream.tiling.segment_plan import SegmentPlan
from fxstream.tiling.templates import MemoOfStructure

__all__ = ["Boundaries", "Context", "Layout", "costs_of", "laid_out"]

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
    def is_part(self) -> bool:
        """Whether the graph is a segment's: nobody keeps its results, whose gradients are counted elsewhere."""

    @property
    def memo(self) -> MemoOfStructure:
        """What was made at other sizes."""

    def costs(self, graph: TypedGraph, nodes: Sequence[str]) -> Costs:
        """The costs of a run of operators."""


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
class Layout:
    """The units of a plan at every size: the nodes and the segment of each, and the values that cross them."""

    units: tuple[tuple[tuple[str, ...], str | None], ...]
    crossing: tuple[_Crossing, ...]


class Boundaries:
    """Bytes of the values that cross units, per unit: those that it makes, that exist meanwhile, gradients."""

    def __init__(self, graph: TypedGraph, layout: Layout) -> None:
        count = len(layout.units)
        self.made, self.read = [0.0] * count, [0.0] * count
        forward, backward, gradients = ([0.0] * (count + 2) for _ in range(3))
        self.last_of: dict[int, dict[str, float]] = {}
        """By the last unit that reads it, the bytes of each value's gradient."""
        self.gradients_of: dict[int, dict[str, float]] = {}
        """The same by the unit that makes it."""
        for value in layout.crossing:
            size = graph[value.name].bytes
            bytes_whole, gradient = size * value.exists, size * value.has_gradient
            first, first_holder = value.maker + 1, min(value.holders, default=count)
            if value.maker >= 0:
                self.made[value.maker] += bytes_whole
            for k in value.holders:
                self.read[k] += gradient if k > value.maker else 0.0
            _add(forward, first, value.last + 1 if first_holder > value.last else count, bytes_whole)
            _add(backward, 0 if value.is_result else max(first, first_holder), count, bytes_whole)
            _add(gradients, max(value.maker, 0), value.last + 1, gradient)
            self.last_of.setdefault(value.last, {})[value.name] = float(gradient)
            self.gradients_of.setdefault(value.maker, {})[value.name] = float(gradient)
        self.there_forward, self.there_backward, self.gradients = (
            list(itertools.accumulate(changes)) for changes in (forward, backward, gradients)
        )


def _add(changes: list[float], start: int, stop: int, amount: float) -> None:
    """Note that so much is there from one unit up to, not including, another."""
    if start < stop:
        changes[start] += amount
        changes[min(stop, len(changes) - 1)] -= amount


def costs_of(
    context: Context, nodes: Sequence[tuple[str, ...]], plans: Sequence[SegmentPlan | None]
) -> list[Costs]:
    """The costs of the operators of each unit, given its nodes and its plan."""
    return [
        context.costs(context.graph if plan is None else plan.segment.graph, of_unit)
        for of_unit, plan in zip(nodes, plans, strict=True)
    ]


def laid_out(context: Context, plans: Sequence[SegmentPlan], offloaded: frozenset[str]) -> Layout:
    """The units of these segments, and of the dense operators between them, and what crosses them."""
    spans = list(_spans(context.graph, plans))
    costs = costs_of(context, [nodes for nodes, _ in spans], [plan for _, plan in spans])
    units = tuple((nodes, None if plan is None else plan.segment.name) for nodes, plan in spans)
    return Layout(units, tuple(_crossing(context, spans, costs, offloaded)))


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
        is_result = graph.is_result(name) and not context.is_part
        if not others and not is_result:
            continue
        is_new = made < 0 or (not _is_view(graph, name) and name not in offloaded)
        if made >= 0:
            exists = name not in context.written or spans[made][1] is None
        else:
            exists = name in context.outside and any(spans[k][1] is None for k in readers.get(name, ()))
        yield _Crossing(
            name,
            made,
            len(spans) if is_result else max(others),
            tuple(holders.get(name, ())),
            is_new and exists,
            is_new and _has_gradient(context, name, made),
            is_result,
        )


def _has_gradient(context: Context, name: str, made: int) -> bool:
    """Whether a gradient of a value is counted here."""
    if made < 0:
        return name in context.differentiated
    return context.graph[name].has_gradient and not (context.is_part and context.graph.is_result(name))


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
        for name in reads if plan is not None else _saved_inputs(graph, nodes) | costs[k].lifetimes.kept:
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
