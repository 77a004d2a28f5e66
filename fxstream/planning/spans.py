"""From spans to segments with their tiles: spans of the search, and of a decision made at another size."""

from __future__ import annotations

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
        spans = []
        for i, span in enumerate(self.spans):
            tiles = tuple(plan.lengths for plan in self.segments if _is_of(plan.segment, i) and plan.axes)
            if tiles or any(_is_of(plan.segment, i) for plan in self.segments):
                spans.append(DecidedSpan(span.nodes[0], span.nodes[-1], tiles))
        return Decision(tuple(spans), self.prediction.offloaded > 0)


def _is_of(segment: Segment, i: int) -> bool:
    """Whether it is a sweep over span `i`."""
    return segment.name.split("_")[1] == str(i)


def segments_of(context: CostContext, request: Request, spans: Sequence[Span]) -> tuple[SegmentPlan, ...]:
    """The plans of these spans: of each sweep, or of the whole span as one checkpoint.

    A span that cannot be one stays in the dense graph.
    """
    plans: list[SegmentPlan] = []
    for i, span in enumerate(with_normalisations_whole(context.graph, spans)):
        made = _made(context, i, span)
        if span.counts == ():
            plans += map(plan_whole, made)
        else:
            plans += [plan_segment(segment, request, span.counts) for segment in made]
    return tuple(plans)


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
            if follows == i or len(moved[i].nodes) == 1 or (follows >= 0 and spans[follows].counts != ()):
                break
            moved[i] = replace(moved[i], nodes=moved[i].nodes[:-1])
            if follows >= 0:
                moved[follows] = replace(moved[follows], nodes=(moments, *moved[follows].nodes))
    return moved


def _made(context: CostContext, i: int, span: Span) -> tuple[Segment, ...]:
    """The segments that span `i` runs as, at the size of the graph."""
    graph, name, is_whole = context.graph, f"segment_{i}", span.counts == ()

    def make() -> Iterator[Segment]:
        if not is_whole:
            yield from map(optimised, sweeps(graph, name, span.nodes))
        elif (whole := whole_segment(graph, name, span.nodes)) is not None:
            yield optimised(whole)

    return context.memo.templates.at(graph, (name, span.nodes, is_whole), make)


def made_to_fit(
    context: CostContext, parts: Sequence[tuple[str, ...]], decision: Decision, memory: int
) -> Ran | None:
    """What a decision comes to at this size, in smaller tiles if it needs too much in its own."""
    smaller = (decision.with_smaller_tiles(factor) for factor in SMALLER if decision.spans)
    each = (_decided(context, parts, one, memory) for one in (decision, *smaller))
    return next((ran for ran in each if ran is not None), None)


def _decided(
    context: CostContext, parts: Sequence[tuple[str, ...]], decision: Decision, memory: int
) -> Ran | None:
    """What a decision comes to at the size of the graph; None where it does not fit."""
    context = replace(context, offload=context.offload and decision.offload)
    spans = decided_spans(parts, decision)
    if spans is None or any(one.tiles is None for one in decision.spans):
        return None
    segments: list[SegmentPlan] = []
    as_run = with_normalisations_whole(context.graph, spans)
    for i, (span, one) in enumerate(zip(as_run, decision.spans, strict=True)):
        made = _made(context, i, span)
        if not one.tiles:
            segments += map(plan_whole, made)
        elif [len(tile) for tile in one.tiles] == [segment.axes for segment in made]:
            segments += [plan_lengths(segment, tile) for segment, tile in zip(made, one.tiles, strict=True)]
        else:
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
        if not part or part is not other or first > last:
            return None
        spans.append(Span(part[first : last + 1], () if one.tiles == () else None))
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
