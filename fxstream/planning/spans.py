"""From spans to segments with their tiles: spans of the search, and of a decision made at another size."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from fxstream.errors import PlanError
from fxstream.graph.typed_graph import TypedGraph
from fxstream.lowering.whole import result_of
from fxstream.planning.decision import DecidedSpan, Decision
from fxstream.planning.estimate import CostContext, Prediction, keep_graphs, predict
from fxstream.planning.search import Span
from fxstream.tiling.parts import sweeps, whole_segment
from fxstream.tiling.passes import optimised
from fxstream.tiling.request import Request
from fxstream.tiling.segment import Segment
from fxstream.tiling.segment_plan import SegmentPlan, plan_lengths, plan_segment, plan_whole

__all__ = [
    "Ran",
    "check_is_of",
    "decided_spans",
    "kept_within",
    "made_to_fit",
    "segments_of",
    "with_normalisations_whole",
]


SMALLER = (0.8, 0.6)
"""The sides of tiles that are tried for a decision that needs too much at another size, over its own."""


@dataclass(frozen=True, slots=True)
class Ran:
    """Spans as they run: their segments, none where the plain network runs, and the prediction."""

    spans: tuple[Span, ...]
    segments: tuple[SegmentPlan, ...]
    prediction: Prediction

    def decision(self) -> Decision:
        """What holds of it at other sizes."""
        every = (_decided(span, f"segment_{i}", self.segments) for i, span in enumerate(self.spans))
        return Decision(tuple(one for one in every if one is not None), self.prediction.offloaded > 0)


def _decided(span: Span, name: str, plans: Sequence[SegmentPlan]) -> DecidedSpan | None:
    """What a decision has of a span, whose sweeps are called `name`; None where it stayed in the dense graph."""
    mine = [plan for plan in plans if plan.segment.name == name or plan.segment.name.startswith(f"{name}_")]
    if not mine:
        return None
    inside = [_decided(part, _part(name, j), mine[0].parts) for j, part in enumerate(span.parts)]
    parts = tuple(one for one in inside if one is not None)
    return DecidedSpan(span.nodes[0], span.nodes[-1], tuple(plan.lengths for plan in mine if plan.axes), parts)


def _part(name: str, j: int) -> str:
    """The name of a part of a segment."""
    return f"{name}_part_{j}"


def segments_of(context: CostContext, request: Request, spans: Sequence[Span]) -> tuple[SegmentPlan, ...]:
    """The plans of these spans: of each sweep, or of the whole span as one checkpoint.

    A span that cannot be one stays in the dense graph. Raises `PlanError` where no tile fits, and for spans whose
    tiles are of other sweeps.
    """
    every = with_normalisations_whole(context.graph, spans)
    each = (_planned(context, request, context.graph, span, f"segment_{i}") for i, span in enumerate(every))
    return tuple(plan for plans in each for plan in plans)


def _planned(
    context: CostContext, request: Request, graph: TypedGraph, span: Span, name: str
) -> Iterator[SegmentPlan]:
    """The plans of a span of a graph: the model's, or that of a segment that it is a part of."""
    made = _made(context, graph, span, name)
    if span.is_whole:
        for segment in made:
            yield plan_whole(segment, _planned_parts(context, request, segment, span))
    elif span.tiles is None:
        yield from (plan_segment(segment, request, span.counts) for segment in made)
    elif [len(tile) for tile in span.tiles] == [segment.axes for segment in made]:
        yield from (
            plan_lengths(segment, tile, request.compile_tiles)
            for segment, tile in zip(made, span.tiles, strict=True)
        )
    else:
        raise PlanError(f"the plan that was given has tiles of other sweeps for `{span.nodes[0]}` ..")


def _planned_parts(
    context: CostContext, request: Request, segment: Segment, span: Span
) -> tuple[SegmentPlan, ...]:
    """The plans of the parts of a segment, of which fused operators are no more."""
    inside = set(segment.nodes)
    parts = [replace(part, nodes=tuple(n for n in part.nodes if n in inside)) for part in span.parts]
    every = enumerate(with_normalisations_whole(segment.graph, parts))
    each = (_planned(context, request, segment.graph, p, _part(segment.name, j)) for j, p in every if p.nodes)
    return tuple(replace(plan, skips=_skips(segment.graph, plan)) for plans in each for plan in plans)


def _skips(graph: TypedGraph, part: SegmentPlan) -> bool:
    """Whether nothing in the graph of a segment reads what its part makes, but as a result."""
    outputs = [graph[name] for name in part.segment.outputs]
    return not any(one.reduces or any(user.op != "output" for user in one.node.users) for one in outputs)


def with_normalisations_whole(graph: TypedGraph, spans: Sequence[Span]) -> list[Span]:
    """The spans, of which those that end in moments leave these to what follows, if that runs whole.

    The search ends spans behind the moments of a normalisation, which saves a sweep where the next span is tiled.
    Where that runs whole, or is dense, the model's operator runs there, in one kernel backward, and what ends
    in the convolution before need not compute that again.
    """
    moved = list(spans)
    place = {name: i for i, span in enumerate(spans) for name in span.nodes}
    for i, span in enumerate(spans):
        for moments in reversed(span.nodes):
            result = result_of(graph[moments].node)
            follows = place.get(result, -1) if result is not None else i
            if follows == i or len(moved[i].nodes) == 1 or (follows >= 0 and not spans[follows].is_whole):
                break
            moved[i] = _without_last(moved[i])
            if follows >= 0:
                moved[follows] = _with_first(moved[follows], moments)
    return moved


def _without_last(span: Span) -> Span:
    """The span without its last node, and so its last part."""
    parts = list(span.parts)
    if parts and parts[-1].nodes[-1:] == span.nodes[-1:]:
        parts[-1] = _without_last(parts[-1])
    return replace(span, nodes=span.nodes[:-1], parts=tuple(parts))


def _with_first(span: Span, node: str) -> Span:
    """The span with one more node in front, which is its first part's if that runs whole."""
    parts = list(span.parts)
    if parts and parts[0].is_whole and parts[0].nodes[:1] == span.nodes[:1]:
        parts[0] = _with_first(parts[0], node)
    return replace(span, nodes=(node, *span.nodes), parts=tuple(parts))


def _made(context: CostContext, graph: TypedGraph, span: Span, name: str) -> tuple[Segment, ...]:
    """The segments that a span runs as, at the size of the graph."""

    def make() -> Iterator[Segment]:
        if not span.is_whole:
            yield from map(optimised, sweeps(graph, name, span.nodes))
        elif (whole := whole_segment(graph, name, span.nodes)) is not None:
            yield optimised(whole)

    return context.memo.templates.at(graph, (name, graph.graph, span.nodes, span.is_whole), make)


def made_to_fit(
    context: CostContext, parts: Sequence[tuple[str, ...]], decision: Decision, memory: int, uniform: bool
) -> Ran | None:
    """What a decision comes to at this size, in smaller tiles if it needs too much in its own."""
    smaller = (decision.with_smaller_tiles(factor) for factor in SMALLER if decision.spans)
    tried = itertools.product((decision, *smaller), (True, False) if uniform else (False,))
    each = (_ran(context, parts, one, memory, Request(None, compile_tiles=alike)) for one, alike in tried)
    return next((ran for ran in each if ran is not None), None)


def _ran(
    context: CostContext, parts: Sequence[tuple[str, ...]], decision: Decision, memory: int, request: Request
) -> Ran | None:
    """What a decision comes to at the size of the graph; None where it does not fit."""
    context = replace(context, offload=context.offload and decision.offload)
    spans = decided_spans(parts, decision)
    if spans is None or any(one.tiles is None for one in decision.spans):
        return None
    try:
        segments = segments_of(context, request, spans)
    except PlanError:
        return None
    ran = kept_within(context, spans, segments, memory)
    return ran if ran.prediction.bytes <= memory else None


def kept_within(context: CostContext, spans: Sequence[Span], segments: Sequence[SegmentPlan], memory: int) -> Ran:
    """These segments with as many graphs of tiles kept as fit into the memory."""
    if not segments:
        return Ran((), (), predict(context, ()))
    return Ran(tuple(spans), *keep_graphs(context, segments, memory))


def decided_spans(parts: Sequence[tuple[str, ...]], decision: Decision) -> list[Span] | None:
    """The spans of a decision among the parts that may be streamed; None where one is not there."""
    place = {name: (part, i) for part in parts for i, name in enumerate(part)}
    spans = []
    for one in decision.spans:
        (part, first), (other, last) = (place.get(name, ((), 0)) for name in (one.first, one.last))
        inside = decided_spans([part[first : last + 1]], Decision(one.parts)) if one.parts else []
        if not part or part is not other or first > last or inside is None:
            return None
        counts, tiles = (() if one.tiles == () else None), one.tiles or None
        spans.append(Span(part[first : last + 1], counts, tuple(inside), tiles))
    return spans


def check_is_of(decision: Decision, graph: TypedGraph) -> None:
    """Raises `PlanError` for a decision about another network."""
    for span in decision.spans:
        for name in (span.first, span.last):
            if name not in graph.nodes:
                raise PlanError(
                    f"the plan that was given is of another network or mode: it has an operator `{name}`, which is"
                    " missing here. Save the plan of a call of this network in this mode"
                )
