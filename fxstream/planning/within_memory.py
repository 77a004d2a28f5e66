"""The fastest plan within a memory: by the searches in turn, and then by the exact tiles."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace

from fxstream.errors import PlanError
from fxstream.machine.units import bytes_text
from fxstream.planning.estimate import CostContext, Prediction, predict
from fxstream.planning.partition import FEW_SWEEPS
from fxstream.planning.regions.memory_region import Kind, MemoryRegion
from fxstream.planning.regions.region_costs import DenseRun
from fxstream.planning.search import Region, Search, Span, State
from fxstream.planning.spans import Ran, kept_within, segments_of
from fxstream.tiling.parts import parts_before, streamable_parts, worthwhile
from fxstream.tiling.request import Request

__all__ = ["fastest_within", "parts_of"]

MANY_SWEEPS = 16
"""Sweeps over a span where boundaries enough to do with few do not fit."""
SLOW = 1.4
"""Over the plain network's time; a slower plan is compared with those that recompute checkpoints in parts."""
FASTER = 0.8
"""Where the plain network fits too, a plan is chosen that is predicted to take less than this part of its time."""
LESS = (0.0, 0.0, 0.02, 0.04, 0.08, 0.16, 0.32)
"""The part of the memory that the search is given less at least, each time that its estimate was too low."""
MORE = (1.0, 1.02, 1.1, 1.25)
"""Over the least that any plan needs by its estimate; of plans within these the one that needs least is taken."""


def parts_of(context: CostContext, request: Request) -> list[tuple[str, ...]]:
    """The nodes that may be streamed: worthwhile regions, or all before the user's cut."""
    is_chosen = request.segments is not None or request.cut is not None or request.global_ops == "stream"
    graph = context.graph
    parts = context.memo.get("parts", lambda: streamable_parts(graph))
    return parts_before(graph, parts, request.cut) if is_chosen else worthwhile(graph, parts, context.written)


def fastest_within(context: CostContext, request: Request, memory: int, near: Sequence[Span] = ()) -> Ran:
    """The fastest segments within the memory, by the search and then by the exact tiles, and their prediction.

    The search, of all cuts or of those of spans that are `near`, estimates a little; where its plan needs too much
    it is asked for less, a few times.
    """
    plain = Ran((), (), predict(context, ()))
    fits = plain.prediction.bytes <= memory and request.segments is None
    if fits and not _may_be_faster(context, plain.prediction):
        return plain
    best, parts, errors = None, parts_of(context, request), list[PlanError]()
    for search in _searches(context, parts, request, _kinds(context, request), near):
        try:
            ran = _searched_by(search, context, request, memory)
        except PlanError as error:
            errors.append(error)
            continue
        best = min(best or ran, ran, key=lambda one: one.prediction.seconds)
        if ran is not best or best.prediction.seconds <= SLOW * plain.prediction.seconds:
            break
    if best is None:
        raise min(errors, key=lambda error: error.least_bytes or math.inf)
    return plain if fits and best.prediction.seconds >= FASTER * plain.prediction.seconds else best


def _searched_by(search: Search, context: CostContext, request: Request, memory: int) -> Ran:
    """The fastest plan of a search within the memory, or its smallest. Raises `PlanError` where none fits."""
    requests = [request, replace(request, compile_tiles=False)] if request.compile_tiles else [request]
    fitting = next(filter(None, (_fitting(context, search, one, memory) for one in requests)), None)
    if fitting is not None:
        return fitting
    smallest = search.smallest()
    assert smallest is not None, "everything may stay dense"
    states = [smallest, *filter(None, (search.fastest(more * smallest.peak) for more in MORE))]
    ran, binding = min(
        ((_predicted(context, requests[-1], state), state.binding) for state in states),
        key=lambda pair: pair[0].prediction.bytes,
    )
    if ran.prediction.bytes <= memory:
        return ran
    plain = predict(context, ())
    least = ran.prediction.bytes
    least = least if request.segments is not None else min(plain.bytes, least)
    raise _too_little(context, memory, least, binding)


def _kinds(context: CostContext, request: Request) -> list[Kind]:
    """What is searched: first with few sweeps over a span, then with checkpoints in parts, then with many sweeps.

    What comes later is for plans that are slow, or where nothing fits.
    """
    stages = max((node.stage for node in context.graph.nodes.values()), default=0) + 1
    kinds = [Kind(FEW_SWEEPS)]
    if context.training and request.segments is None:
        kinds.append(Kind(FEW_SWEEPS, is_nested=True))
    return [*kinds, replace(kinds[-1], most_sweeps=MANY_SWEEPS)] if stages > FEW_SWEEPS else kinds


def _predicted(context: CostContext, request: Request, state: State) -> Ran:
    """The segments that the search chose, with their exact tiles, and their prediction."""
    segments = segments_of(context, request, state.spans)
    return Ran(tuple(state.spans), segments, predict(context, segments))


def _too_little(context: CostContext, memory: int, least: int, binding: str) -> PlanError:
    """The error on a memory for tensors that not even the smallest plan fits into, whose peak is at `binding`.

    That plan needs `least` bytes.
    """
    verdict = context.graph.verdicts[binding]
    memory, least = context.machine.around_tensors(memory), context.machine.around_tensors(least)
    source = f" ({verdict.source})" if verdict.source else ""
    message = (
        f"no plan fits into {bytes_text(memory)}: the least that works is {bytes_text(least, up=True)}, which"
        f" `{verdict.place}`{source} needs; give that much, or a smaller image or batch"
    )
    return PlanError(message, least_bytes=least)


def _may_be_faster(context: CostContext, plain: Prediction) -> bool:
    """Whether a plan may be faster than the plain network.

    It computes no less, but may allocate less afresh, and in smaller tensors.
    """
    reused = replace(context, machine=replace(context.machine, fresh=math.inf, beyond=1.0))
    return context.ranks > 1 or predict(reused, ()).seconds < FASTER * plain.seconds


def _fitting(context: CostContext, search: Search, request: Request, memory: int) -> Ran | None:
    """The fastest plan of the search that really fits, with the graphs of tiles that may be kept."""
    budget = float(memory)
    for less in LESS:
        fastest = search.fastest(budget)
        if fastest is None:
            return None
        ran = kept_within(context, fastest.spans, segments_of(context, request, fastest.spans), memory)
        if ran.prediction.bytes <= memory:
            return ran
        over = max(ran.prediction.bytes - memory, less * memory)
        budget = max(fastest.peak - over, (1 - less) * fastest.peak * memory / ran.prediction.bytes)
    return None


def _searches(
    context: CostContext,
    parts: Sequence[tuple[str, ...]],
    request: Request,
    kinds: Sequence[Kind],
    near: Sequence[Span] = (),
) -> Iterator[Search]:
    """The searches of one network at one image size, for any budget in bytes, one of each kind.

    `parts` are the nodes of the regions, in the order of the graph. The searches share what is computed. With the
    spans of another size, `near`, only cuts where these have some are considered, and spans of one or two of
    theirs.
    """
    graph = context.graph
    inside = {name for part in parts for name in part}
    index = {name: i for i, name in enumerate(graph.costed)}
    starts = [index[part[0]] for part in parts]
    dense: list[list[str]] = [[] for _ in range(len(parts) + 1)]
    for name in index:
        if name not in inside:
            dense[sum(start < index[name] for start in starts)].append(name)
    regions: list[Region] = [DenseRun(context, dense[0])] if dense[0] else []
    for part, after in zip(parts, dense[1:], strict=True):
        regions.append(MemoryRegion(context, part, request, kinds[0], near))
        regions += [DenseRun(context, after)] if after else []
    results = (name for name in graph.costed if graph.is_result(name) and name not in context.written)
    count = request.segments if isinstance(request.segments, int) else None
    saved = float(sum(graph[name].bytes for name in results))
    for kind in kinds:
        yield Search([one.of(kind) if isinstance(one, MemoryRegion) else one for one in regions], saved, count)
