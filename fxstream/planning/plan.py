"""The plan for one image size: what is streamed, in which segments and tiles, and what that costs.

With a tile, a region is streamed when that frees most of its activations, or when the user names segments or a
cut; where it is cut is decided in `boundaries`, the tiles of each segment in `grid`. Within a memory `search`
finds the fastest plan, and what is then left of the memory keeps graphs of tiles, which saves their recomputation.

Reference: Pinckaers, van Ginneken, Litjens, "Streaming convolutional neural networks for end-to-end learning
with multi-megapixel images", sections III-A and III-C.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from fxstream.errors import PlanError
from fxstream.graph.typed_graph import Locality
from fxstream.machine.device import budget_of
from fxstream.machine.units import bytes_text
from fxstream.planning.cost import Machine
from fxstream.planning.estimate import Basis, Prediction, keep_graphs, predict
from fxstream.planning.partition import FEW_PASSES, RegionPlanner
from fxstream.planning.search import Search
from fxstream.rules import Kind
from fxstream.tiling.autograd_saves import Saved, saved_by
from fxstream.tiling.bounds import is_output
from fxstream.tiling.parts import passes, streamable_parts, whole_segment
from fxstream.tiling.request import Request, place_of_module
from fxstream.tiling.segment_plan import SegmentPlan, arithmetic, offloadable, plan_segment, plan_whole

__all__ = ["Plan", "SegmentPlan", "make_plan", "streamable_share", "total_bytes", "worthwhile"]

CPU = torch.device("cpu")
WORTHWHILE = 0.5
"""A region is streamed when that frees more than this share of its activations."""
LEAST_SHARE = 0.01
"""A region with less than this share of the network's activations is not worth a tile loop."""
MANY_PASSES = 16
"""Passes over a stretch where boundaries enough to do with few do not fit."""
MOST_ATTEMPTS = 6
"""How often the search is repeated with less where its estimate was too low."""
FASTER = 0.8
"""Where the plain network fits too, a plan is chosen that is predicted to take less than this part of its time."""
LESS = 0.02
"""The least part of the budget that it is given less, twice as much each time."""


@dataclass(frozen=True, slots=True, repr=False)
class Plan:
    """The segments to stream, in the order of the graph, and what that is predicted to cost.

    A plan `is_trivial` where the plain network does the same. `offloaded` are the boundaries in host memory.
    """

    segments: tuple[SegmentPlan, ...]
    streamed_bytes: int
    activation_bytes: int
    arithmetic: int
    is_trivial: bool
    prediction: Prediction
    offloaded: frozenset[str] = frozenset()

    @property
    def streamed_share(self) -> float:
        """Share of the network's activations that lie in streamed segments."""
        return self.streamed_bytes / max(1, self.activation_bytes)

    @property
    def overhead(self) -> float:
        """Arithmetic of all tiles of all passes over that of the same operators run plainly, in one forward."""
        return sum(plan.streamed_arithmetic for plan in self.segments) / max(1, self.arithmetic)

    @property
    def reductions_overhead(self) -> float:
        """The part of the overhead that goes into passes which only reductions on the way need."""
        stretches = itertools.groupby(self.segments, lambda plan: plan.segment.name.split("_")[:2])
        earlier = (plan for _, passes_of in stretches for plan in list(passes_of)[:-1])
        return sum(plan.streamed_arithmetic for plan in earlier) / max(1, self.arithmetic)

    def __str__(self) -> str:
        head = (
            f"{len(self.segments)} segments, {self.streamed_share:.0%} of the activations streamed,"
            f" {self.overhead:.2f}x MACs"
        )
        if self.reductions_overhead:
            head += f", {self.reductions_overhead:.2f}x of them in passes for reductions"
        return "\n".join([head, *(f"  {segment}" for segment in self.segments), *self.prediction.lines()])

    __repr__ = __str__


def make_plan(
    locality: Locality,
    request: Request,
    *,
    training: bool = True,
    device: torch.device = CPU,
    saved: Mapping[str, Saved] | None = None,
    wanted: frozenset[str] = frozenset(),
    outside: frozenset[str] = frozenset(),
    written: frozenset[str | None] = frozenset(),
    ranks: int = 1,
) -> Plan:
    """The segments and tiles for one image size, for a call with its backward if `training`.

    `saved` is what autograd keeps of each operator (`saved_by`), `wanted` are the images whose gradient is asked
    for, `outside` those that are not in the device's memory, `written` the results that are written elsewhere;
    `ranks` share the tiles.

    Raises `PlanError` where no tile fits, naming the smallest that does and the node that needs it, where no plan
    fits into the memory, naming the least that one needs, and where a module path in the request matches nothing.
    """
    known = saved_by(locality) if saved is None else saved
    offload = request.offload and device.type != "cpu"
    basis = Basis(locality, known, Machine.of(device), training, wanted, outside, written, ranks, offload)
    if request.tile is None:
        segments, prediction = _fastest(basis, request, budget_of(request.memory, device))
        is_trivial = not segments
        offload = prediction.offloaded > 0
    else:
        segments = _with_tiles(basis, request)
        is_trivial = all(segment.tile_count == 1 for segment in segments)
        prediction = predict(basis, () if is_trivial else segments)
    nodes = list({name: None for segment in segments for name in segment.segment.nodes})
    plain = sum(arithmetic(locality, name) for name in nodes)
    away = offloadable(locality, segments) if offload and not is_trivial else frozenset[str]()
    streamed, total = locality.activation_bytes(nodes), total_bytes(locality)
    return Plan(segments, streamed, total, plain, is_trivial, prediction, away)


def _with_tiles(basis: Basis, request: Request) -> tuple[SegmentPlan, ...]:
    """The segments of every worthwhile region, in the coarsest grids that the tile allows."""
    parts = _parts(basis, request)
    chosen = [run for part in parts for run in RegionPlanner(basis, part, request).segments()]
    return _segments(basis.locality, request, [(run, None) for run in chosen])


def _fastest(basis: Basis, request: Request, memory: int) -> tuple[tuple[SegmentPlan, ...], Prediction]:
    """The fastest plan within the memory; boundaries are offloaded where that is faster, or where it must be."""
    if not basis.offload:
        return _within_memory(basis, request, memory)
    try:
        near = _within_memory(replace(basis, offload=False), request, memory)
    except PlanError:
        return _within_memory(basis, request, memory)
    try:
        return min(near, _within_memory(basis, request, memory), key=lambda found: found[1].seconds)
    except PlanError:
        return near


def _within_memory(basis: Basis, request: Request, memory: int) -> tuple[tuple[SegmentPlan, ...], Prediction]:
    """The fastest segments within the memory, by the search and then by the exact tiles, and their prediction.

    The search estimates a little; where its plan needs too much it is asked for less, a few times.
    """
    plain, locality = predict(basis, ()), basis.locality
    if plain.bytes <= memory and request.segments is None and not _may_be_faster(basis, plain):
        return (), plain
    parts = _parts(basis, request)
    stages = max(locality.stages.values(), default=0) + 1
    for most_passes in (FEW_PASSES, MANY_PASSES) if stages > FEW_PASSES else (FEW_PASSES,):
        search = Search(basis, parts, request, most_passes)
        fitting = _fitting(basis, search, request, memory)
        if fitting is not None:
            is_slower = fitting[1].seconds >= FASTER * plain.seconds and plain.bytes <= memory
            return ((), plain) if is_slower and request.segments is None else fitting
        found, binding = search.smallest()
        segments = _segments(locality, request, found)
        prediction = predict(basis, segments)
        if prediction.bytes <= memory:
            return segments, prediction
    verdict = locality.verdicts[binding]
    source = f" ({verdict.source})" if verdict.source else ""
    least = bytes_text(prediction.bytes, up=True)
    raise PlanError(
        f"no plan fits into {bytes_text(memory)}: the least that works is {least}, which"
        f" `{verdict.module or verdict.node}`{source} needs; give that much, or a smaller image or batch",
        least_bytes=prediction.bytes,
    )


def _may_be_faster(basis: Basis, plain: Prediction) -> bool:
    """Whether a plan may be faster than the plain network: it computes no less, but may allocate less afresh."""
    reused = replace(basis, machine=replace(basis.machine, fresh=math.inf))
    return basis.ranks > 1 or predict(reused, ()).seconds < FASTER * plain.seconds


def _fitting(
    basis: Basis, search: Search, request: Request, memory: int
) -> tuple[tuple[SegmentPlan, ...], Prediction] | None:
    """The fastest plan of the search that really fits, with the graphs of tiles that may be kept."""
    budget = float(memory)
    for attempt in range(MOST_ATTEMPTS):
        found = search.fastest(budget)
        if found is None:
            return None
        segments = _segments(basis.locality, request, found)
        prediction = predict(basis, segments)
        if prediction.bytes <= memory:
            return keep_graphs(basis, segments, memory) if basis.training else (segments, prediction)
        budget *= min(1 - LESS * 2**attempt, memory / prediction.bytes)
    return None


def _segments(
    locality: Locality, request: Request, runs: Sequence[tuple[tuple[str, ...], tuple[int, ...] | None]]
) -> tuple[SegmentPlan, ...]:
    """The plans of these stretches, with the numbers of tiles that each is to have if known; () is whole."""
    found: list[SegmentPlan] = []
    for i, (nodes, counts) in enumerate(runs):
        whole = whole_segment(locality, f"segment_{i}", nodes) if counts == () else None
        if whole is not None:
            found.append(plan_whole(locality, whole))
        else:
            tiled = passes(locality, f"segment_{i}", nodes)
            found += [plan_segment(locality, segment, request, counts) for segment in tiled]
    return tuple(found)


def _parts(basis: Basis, request: Request) -> list[tuple[str, ...]]:
    """The nodes that may be streamed: worthwhile regions, or all before the user's cut."""
    asked = request.segments is not None or request.cut is not None or request.global_ops == "stream"
    locality = basis.locality
    return _parts_before(locality, request.cut) if asked else worthwhile(locality, basis.written)


def total_bytes(locality: Locality) -> int:
    """Bytes of all results that depend on an image."""
    return locality.activation_bytes([v.node for v in locality.verdicts.values() if v.kind is not Kind.SMALL])


def worthwhile(locality: Locality, written: Collection[str | None] = ()) -> list[tuple[str, ...]]:
    """The parts that are streamed without being asked for; results `written` elsewhere count as freed."""
    total = total_bytes(locality)
    return [part for part in streamable_parts(locality) if _is_worthwhile(locality, part, total, written)]


def streamable_share(locality: Locality) -> float:
    """The share of the activations that is streamed without being asked for."""
    return sum(map(locality.activation_bytes, worthwhile(locality))) / max(1, total_bytes(locality))


def _parts_before(locality: Locality, cut: str | None) -> list[tuple[str, ...]]:
    """The parts, up to the last node of the module where the user ends the stream."""
    names = [node.name for node in locality.graph.nodes]
    allowed = set(names if cut is None else names[: place_of_module(locality, cut) + 1])
    parts = (tuple(name for name in part if name in allowed) for part in streamable_parts(locality))
    return [part for part in parts if part]


def _is_worthwhile(
    locality: Locality, nodes: tuple[str, ...], total: int, written: Collection[str | None]
) -> bool:
    """Whether streaming these nodes frees a good part of their activations."""
    held = locality.activation_bytes(nodes)
    inside = set(nodes)
    outputs = [name for name in nodes if is_output(locality, name, inside) and name not in written]
    kept = locality.activation_bytes(outputs)
    return held - kept > WORTHWHILE * held and held > LEAST_SHARE * total
