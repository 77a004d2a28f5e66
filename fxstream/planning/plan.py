"""The plan for one image size: what is streamed, in which segments and tiles, and what that costs.

A region is streamed when that frees most of its activations, or when the user names segments or a cut. Where it is
cut is decided by `search`, with a tile (`tile_region`) or within a memory (`within_memory`); what is then left of
the memory keeps graphs of tiles, which saves their recomputation.

Reference: Pinckaers, van Ginneken, Litjens, "Streaming convolutional neural networks for end-to-end learning
with multi-megapixel images", sections III-A and III-C.
"""

from __future__ import annotations

import contextlib
import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch

from fxstream.errors import PlanError
from fxstream.graph.autograd_saves import saves_of
from fxstream.graph.typed_graph import TypedGraph
from fxstream.machine.device import budget_of, is_accelerator
from fxstream.machine.replay import can_replay
from fxstream.machine.speeds import Machine
from fxstream.planning.decision import DecidedSpan, Decision, Decisions
from fxstream.planning.estimate import CostContext, Prediction, predict
from fxstream.planning.regions.tile_region import spans_within_tile
from fxstream.planning.search import Span
from fxstream.planning.spans import Ran, check_is_of, decided_spans, made_to_fit, segments_of
from fxstream.planning.within_memory import fastest_within, parts_of
from fxstream.tiling.request import Request
from fxstream.tiling.reuse import reuse_memory
from fxstream.tiling.segment_plan import SegmentPlan, offloadable
from fxstream.tiling.templates import Memo

__all__ = ["Plan", "SegmentPlan", "make_plan"]

CPU = torch.device("cpu")


@dataclass(frozen=True, slots=True, repr=False)
class Plan:
    """The segments to stream, in the order of the graph, and what that is predicted to cost.

    A plan `is_trivial` where the plain network does the same. `offloaded` are the boundaries in host memory,
    `untiled` the stretches that need more than the tile, and run whole. `prepared` are the stages of the call that
    made the plan, with their seconds; `repeated` are the tiles that the last call did not compute, in words.
    `decision` is what holds of it at other sizes.
    """

    segments: tuple[SegmentPlan, ...]
    streamed_bytes: int
    activation_bytes: int
    arithmetic: int
    is_trivial: bool
    prediction: Prediction
    offloaded: frozenset[str] = frozenset()
    prepared: tuple[tuple[str, float], ...] = ()
    untiled: tuple[str, ...] = ()
    repeated: tuple[str, ...] = ()
    decision: Decision | None = None

    @property
    def streamed_share(self) -> float:
        """Share of the network's activations that lie in streamed segments."""
        return self.streamed_bytes / max(1, self.activation_bytes)

    @property
    def overhead(self) -> float:
        """Arithmetic of all tiles of all sweeps over that of the same operators run plainly, in one forward."""
        return sum(plan.streamed_arithmetic for plan in self.segments) / max(1, self.arithmetic)

    @property
    def reductions_overhead(self) -> float:
        """The part of the overhead that goes into sweeps which only reductions on the way need."""
        spans = itertools.groupby(self.segments, lambda plan: plan.segment.name.split("_")[:2])
        earlier = (plan for _, sweeps_of in spans for plan in list(sweeps_of)[:-1])
        return sum(plan.streamed_arithmetic for plan in earlier) / max(1, self.arithmetic)

    def __str__(self) -> str:
        head = (
            f"{len(self.segments)} segments, {self.streamed_share:.0%} of the activations streamed,"
            f" {self.overhead:.2f}x MACs"
        )
        if self.reductions_overhead:
            head += f", {self.reductions_overhead:.2f}x of them in passes for reductions"
        lines = [head, *(f"  {segment}" for segment in self.segments), *self.prediction.lines()]
        if self.prepared:
            stages = ", ".join(f"{name} {seconds:.1f} s" for name, seconds in self.prepared)
            lines.append(f"prepared in {sum(seconds for _, seconds in self.prepared):.1f} s: {stages}")
        lines += self.repeated
        return "\n".join(lines)

    __repr__ = __str__


def make_plan(
    graph: TypedGraph,
    request: Request,
    *,
    training: bool = True,
    device: torch.device = CPU,
    differentiated: frozenset[str] = frozenset(),
    outside: frozenset[str] = frozenset(),
    written: frozenset[str | None] = frozenset(),
    ranks: int = 1,
    memo: Memo | None = None,
    saved: Decision | None = None,
) -> Plan:
    """The segments and tiles for one image size, for a call with its backward if `training`.

    `differentiated` are the images whose gradient is asked for, `outside` those that are not in the device's
    memory, `written` the results that are written elsewhere; `ranks` share the tiles. `memo` has what was made and
    decided at other sizes, and `saved` is a decision that is taken wherever it fits.

    Raises `PlanError` where no tile fits, naming the smallest that does and the node that needs it, where no plan
    fits into the memory, naming the least that one needs, and where a module path in the request matches nothing.
    """
    if not graph.costed:
        graph = reuse_memory(graph.with_saves(saves_of(graph)))
    if saved is not None:
        check_is_of(saved, graph)
    offload, machine = request.offload and is_accelerator(device), Machine.of(device, is_shared=ranks > 1)
    if request.cuda_graphs and can_replay(device):
        machine = machine.with_replays()
    of_structure = (memo or Memo()).at(graph)
    modes = (training, differentiated, outside, written, ranks, offload)
    context = CostContext(graph, machine, *modes, of_structure)
    decisions = of_structure.get(("decisions", request, machine, *modes), lambda: Decisions(saved=saved))
    if request.tile is None:
        return _fastest(context, request, machine.for_tensors(budget_of(request.memory, device)), decisions)
    return _within_tile(context, request, decisions)


def _within_tile(context: CostContext, request: Request, decisions: Decisions) -> Plan:
    """The plan whose tiles read no more than the user's: a decision that holds here, or the search's."""
    extents = _extents(context.graph)
    for decision in decisions:
        with contextlib.suppress(PlanError):
            spans = decided_spans(parts_of(context, request), decision)
            plan = _of_spans(context, request, spans) if spans else None
            # Pixels cost the same in tiles of one size, however many there are.
            if plan is not None and decisions.holds(decision, extents, plan.prediction.seconds, near=math.inf):
                return plan
    spans = [span for part in parts_of(context, request) for span in spans_within_tile(context, part, request)]
    plan = _of_spans(context, request, spans)
    if plan.decision is not None:
        decisions.add(plan.decision, extents, plan.prediction.seconds)
    return plan


def _of_spans(context: CostContext, request: Request, spans: Sequence[Span]) -> Plan:
    """The plan of these spans, in the coarsest grids that the user's tile allows."""
    graph = context.graph
    segments = segments_of(context, request, spans)
    is_trivial = all(segment.tile_count == 1 for segment in segments)
    prediction = predict(context, () if is_trivial else segments)
    plan = _plan(context, segments, prediction, is_trivial, context.offload)
    if is_trivial:
        return plan
    untiled = tuple(_ends(graph, span) for span in spans if span.counts == ())
    decided = tuple(DecidedSpan(s.nodes[0], s.nodes[-1], None if s.counts is None else ()) for s in spans)
    return replace(plan, untiled=untiled, decision=Decision(decided, context.offload))


def _extents(graph: TypedGraph) -> tuple[int, ...]:
    """The pixels of the largest image along each axis."""
    return max((image.extents for image in graph.images), key=math.prod, default=())


def _ends(graph: TypedGraph, span: Span) -> str:
    """The user's modules in which a span begins and ends."""
    first, last = (graph.verdicts[span.nodes[i]].place for i in (0, -1))
    return f"`{first}`" if first == last else f"`{first}` .. `{last}`"


def _plan(
    context: CostContext,
    segments: tuple[SegmentPlan, ...],
    prediction: Prediction,
    is_trivial: bool,
    offload: bool,
) -> Plan:
    """The plan of these segments; with `offload` boundaries lie in host memory."""
    graph = context.graph
    covered = list({name: None for segment in segments for name in segment.segment.covers})
    plain = sum({n: s.segment.graph[n].arithmetic for s in segments for n in s.segment.nodes}.values())
    away = offloadable(graph, segments) if offload and not is_trivial else frozenset[str]()
    streamed, total = graph.activation_bytes(covered), graph.total_bytes()
    return Plan(segments, streamed, total, plain, is_trivial, prediction, away)


def _fastest(context: CostContext, request: Request, memory: int, decisions: Decisions) -> Plan:
    """The fastest plan within the memory: a decision that holds here, or the best of those and of the search."""
    extents, fitting = _extents(context.graph), list[Ran]()
    for ran, decision in _near(context, request, memory, decisions):
        if decisions.holds(decision, extents, ran.prediction.seconds):
            decisions.prefer(decision)
            return _plan_of(context, ran, decision)
        fitting.append(ran)
    try:
        fitting.append(_searched(context, request, memory))
    except PlanError:
        if not fitting:
            raise
    best = min(fitting, key=lambda ran: ran.prediction.seconds)
    decision = best.decision()
    decisions.add(decision, extents, best.prediction.seconds)
    return _plan_of(context, best, decision)


def _plan_of(context: CostContext, ran: Ran, decision: Decision) -> Plan:
    is_trivial, is_away = not ran.segments, ran.prediction.offloaded > 0
    return replace(_plan(context, ran.segments, ran.prediction, is_trivial, is_away), decision=decision)


def _near(
    context: CostContext, request: Request, memory: int, decisions: Decisions
) -> Iterator[tuple[Ran, Decision]]:
    """What decisions come to where they fit, and then what a search among the cuts of the first of them finds."""
    made = list(decisions)
    parts = parts_of(context, request) if any(decision.spans for decision in made) else []
    for decision in made:
        ran = made_to_fit(context, parts, decision, memory, request.compile_tiles)
        if ran is not None:
            yield ran, decision
    spans = decided_spans(parts, made[0]) if made else None
    if spans:
        with contextlib.suppress(PlanError):
            ran = fastest_within(replace(context, offload=made[0].offload), request, memory, spans)
            yield ran, ran.decision()


def _searched(context: CostContext, request: Request, memory: int) -> Ran:
    """The fastest plan within the memory; boundaries are offloaded where that is faster, or where it must be."""
    if not context.offload:
        return fastest_within(context, request, memory)
    try:
        here = fastest_within(replace(context, offload=False), request, memory)
    except PlanError:
        return fastest_within(context, request, memory)
    try:
        return min(here, fastest_within(context, request, memory), key=lambda ran: ran.prediction.seconds)
    except PlanError:
        return here
