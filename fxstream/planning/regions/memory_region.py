"""The regions of a network that is to fit into a memory, and the dense operators between them.

NOTE [the options of a span]
1. It is left in the dense graph, where nothing is computed twice and everything is kept, runs as one checkpoint,
   or is streamed in one of many grids. Needs and what is saved are bytes, the cost is seconds by the cost model
   (`cost`): those of forward, recomputation and backward of all tiles.
2. What a span holds until its backward are its outputs; all that autograd keeps, where it is dense. Without
   recording nothing is saved, and a span needs its inputs, its outputs and one tile.
3. Offloaded boundaries are not saved, a tile needs its boxes of them alone; what is not tiled saves its inputs.
"""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch

from fxstream.planning.estimate import CostContext
from fxstream.planning.regions.grids import Grids, grids_of
from fxstream.planning.regions.nested import NestedRuns
from fxstream.planning.regions.region_costs import RegionCosts, SpanCosts, dense_option
from fxstream.planning.search import Option, Span
from fxstream.tiling.parts import whole_segment
from fxstream.tiling.request import Request
from fxstream.tiling.segment import make_segment

__all__ = ["Kind", "MemoryRegion"]

MOST_SPANS_JOINED = 2
"""Spans of another size that may be one."""


@dataclass(frozen=True, slots=True)
class Kind:
    """What a search considers.

    `most_sweeps` is how often a span may run forward for the reductions on its way; where it `is_nested`, the
    recomputation of a span that runs whole may be cut into parts.
    """

    most_sweeps: int
    is_nested: bool = False


@dataclass(frozen=True, slots=True)
class _Around:
    """Bytes around a span: what it reads of its region and of images outside, what it makes that others read.

    `holds` is what it makes but results, which the search counts from its start. `gradients` are those of images
    whose gradient is asked for and of what is there before and after the span, `weights` those of its weights,
    `folded` the weights of its fusions.
    """

    inputs: float
    images: float
    made: float
    holds: float
    gradients: float
    weights: float
    folded: float


class MemoryRegion:
    """A region with all ways to run its spans, in bytes and seconds."""

    def __init__(
        self,
        context: CostContext,
        nodes: tuple[str, ...],
        request: Request,
        kind: Kind,
        near: Sequence[Span] = (),
    ) -> None:
        graph = context.graph
        self._context, self._graph, self._training = context, graph, context.training
        self._sizes: dict[str, int] = {}
        self._costs = costs = RegionCosts(context, nodes)
        self._kind = kind
        self._all_checkpoint = self._training and whole_segment(graph, "", nodes) is not None
        considered = _ends_of(costs, near) if near else costs.positions.considered(request)
        self.ends = sorted({*considered, len(nodes) - 1})
        self._most_starts = MOST_SPANS_JOINED if near else len(self.ends)
        live = costs.positions.live()
        live[-1] = list(make_segment(graph, "", nodes).outputs)
        self._live = {end: live[end] for end in self.ends} | {-1: []}
        read = {one for name in nodes for one in graph[name].inputs}
        self._image_gradients = self._bytes(*context.differentiated & read)
        self._grids: dict[int, Grids] = {}
        self._starts: dict[tuple[int, int], list[int]] = {}
        self._options: dict[tuple[int, int], list[list[Option]]] = {}
        self._wholes: dict[tuple[int, int], list[list[Option]]] = {}
        self._nested: dict[tuple[int, int], list[Option]] = {}
        self._forwards: dict[tuple[int, int], tuple[float, float]] = {}
        """Bytes and seconds of a forward of spans that run whole."""
        self._all_starts = [-1, *self.ends]
        self._seconds: dict[tuple[int, int], tuple[torch.Tensor, torch.Tensor]] = {}

    def starts(self, end: int) -> list[int]:
        """The positions where a span up to `end` may start."""
        few = self._starts_of_few(end)
        return sorted({*few, *self._runs.starts(end)}) if self._kind.is_nested else few

    def _starts_of_few(self, end: int) -> list[int]:
        """Where a span up to `end` with few enough sweeps may start."""
        key = end, self._kind.most_sweeps
        if key not in self._starts:
            self._starts[key] = self._costs.positions.starts(end, self.ends, key[1])[-self._most_starts :]
        return self._starts[key]

    def of(self, kind: Kind) -> MemoryRegion:
        """The same region, with what is computed of it, for a search of another kind."""
        region = copy.copy(self)
        region._kind = kind
        return region

    def weights(self, start: int, end: int) -> float:
        """Bytes of the gradients of the weights that the nodes of a span are the first to read."""
        return self._costs.weights(start, end) if self._training else 0.0

    def largest(self, start: int, end: int) -> str:
        """The node of a span with the largest result."""
        return self._costs.largest(start, end)

    def options(self, start: int, end: int) -> list[list[Option]]:
        """The dense graph, and the ways to stream the span, the fastest first."""
        if self._kind.is_nested and (start, end) not in self._nested:
            self._nested[start, end] = _worth_trying([*self._in_parts(start, end)])
        nested = [self._nested[start, end]] if self._kind.is_nested else []
        return [*self._flat(start, end), *nested]

    def _flat(self, start: int, end: int) -> list[list[Option]]:
        """The dense graph, and the ways to stream the span that are not nested, the fastest first."""
        if start not in self._starts_of_few(end):
            return self._whole(start, end)
        if (start, end) not in self._options:
            around, span = self._around(start, end), self._costs.streamed(start, end)
            dense, checkpoints = self._whole(start, end)
            streamed = [*checkpoints, *self._tiled(start, end, around, span)]
            self._options[start, end] = [dense, _worth_trying(streamed)]
        return self._options[start, end]

    def _whole(self, start: int, end: int) -> list[list[Option]]:
        """The span in the dense graph, and as one checkpoint."""
        if (start, end) not in self._wholes:
            around = self._around(start, end)
            checkpoints = [*self._checkpoint(start, end, around)]
            self._wholes[start, end] = [[self._dense(start, end, around)], checkpoints]
        return self._wholes[start, end]

    @functools.cached_property
    def _runs(self) -> NestedRuns:
        return NestedRuns(self, self._flat, [self._bytes(*self._live[end]) for end in self.ends])

    def _in_parts(self, start: int, end: int) -> Iterator[Option]:
        """The span as a checkpoint that is recomputed in parts; see the NOTE of `nested`."""
        _, checkpoints = self._whole(start, end)
        for checkpoint in checkpoints:
            assert checkpoint.span is not None
            needs, forward = self._forwards[start, end]
            for state in self._runs.states(start, end):
                span = replace(checkpoint.span, parts=state.spans)
                yield Option(span, max(needs, state.peak), checkpoint.holds, forward + state.cost)

    def _around(self, start: int, end: int) -> _Around:
        inputs, outputs = self._live[start], self._live[end]
        made = [n for n in outputs if self._costs.index[n] > start and n not in self._context.written]
        return _Around(
            inputs=self._bytes(*inputs),
            images=self._bytes(*self._images_from_outside(start, end)),
            made=self._bytes(*made),
            holds=self._bytes(*(name for name in made if not self._graph.is_result(name))),
            gradients=self._image_gradients + self._bytes(*{*inputs, *outputs}),
            weights=self.weights(start, end),
            folded=self._costs.folded(start, end),
        )

    def _images_from_outside(self, start: int, end: int) -> set[str]:
        """The images from outside that a span reads."""
        outside = self._context.outside
        span = self._costs.span(start, end) if outside else ()
        return {one for name in span for one in self._graph[name].inputs if one in outside}

    def _bytes(self, *names: str) -> float:
        sizes = self._sizes
        for name in names:
            if name not in sizes:
                sizes[name] = self._graph[name].bytes
        return float(sum(sizes[name] for name in names))

    def _dense(self, start: int, end: int, around: _Around) -> Option:
        """The span in the dense graph, which reads its inputs whole."""
        gradients = self._gradients_over_time(start, end) if self._training else 0.0
        option = dense_option(self._costs.dense, start + 1, end + 1, self._training, gradients)
        if not self._training:
            return replace(option, needs=option.needs + around.inputs + around.images)
        read = around.images + self._fetched(around)
        return replace(option, needs=option.needs + read, holds=option.holds + read)

    def _gradients_over_time(self, start: int, end: int) -> torch.Tensor:
        """Bytes of gradients around a dense span at each step of it.

        That of what others read of the span is there from the start of backward until that of its maker, that of
        what the span reads from the backward of its last reader there.
        """
        inputs, outputs, turn = self._live[start], self._live[end], end - start
        levels = torch.full((2 * turn + 1,), self._image_gradients, dtype=torch.float64)
        for name in {*inputs, *outputs}:
            begins, ends = 0, 2 * turn + 1
            if name in outputs:
                begins = 0 if name in inputs else turn
            if name not in inputs:
                ends = 2 * turn - (self._costs.index[name] - start - 1)
            elif name not in outputs:
                last = self._costs.positions.last_read(name)
                begins = 2 * turn - 1 - self._costs.dense.lifetimes.own_from(last, start + 1)
            levels[begins:ends] += self._bytes(name)
        return levels

    def _fetched(self, around: _Around) -> float:
        """Bytes of the inputs of a span that is not tiled, where they are brought from host memory."""
        return around.inputs if self._context.offload else 0.0

    def _checkpoint(self, start: int, end: int, around: _Around) -> Iterator[Option]:
        """The span as one checkpoint, where it can be one and has a backward."""
        nodes, fetched = self._costs.span(start, end), self._fetched(around)
        if not self._training or not (self._all_checkpoint or whole_segment(self._graph, "", nodes) is not None):
            return
        ones = torch.ones(len(self._costs.nodes), dtype=torch.float64)
        others = around.gradients + around.images + fetched + around.weights + around.folded
        span = self._costs.streamed(start, end, is_whole=True)
        forward, backward = map(float, span.seconds(ones))
        unrecorded = float(span.peak_unrecorded(ones)) + around.images + fetched + around.folded
        self._forwards[start, end] = unrecorded, forward
        holds = around.holds + fetched + around.folded
        yield Option(Span(nodes, ()), float(span.peak(ones)) + others, holds, 2 * forward + backward)

    def _tiled(self, start: int, end: int, around: _Around, span: SpanCosts) -> Iterator[Option]:
        """The span in every grid."""
        grids, nodes = self._grids_at(end), self._costs.span(start, end)
        boxes = self._bytes_of_boxes(start, grids.shares)
        tiles = (grids.tiles / self._context.ranks).ceil()
        forward, backward = self._seconds_of_tile(start, end, span.sweeps)
        images = 2 * self._bytes_of_images(nodes, grids.shares)  # this tile's boxes and the next one's
        needs = self._needs_of_tile(around, span, grids.shares, boxes) + images
        copies = self._seconds_of_copies(around, tiles, boxes)
        if not self._training:
            yield from _options(nodes, grids, needs, torch.zeros_like(needs), tiles * forward + copies)
            return
        holds = torch.full_like(needs, around.folded + (0.0 if self._context.offload else around.holds))
        seconds = tiles * (2 * forward + backward) + copies
        yield from _options(nodes, grids, needs, holds, seconds)
        if self._context.ranks > 1:  # on one alone, what is kept is better left dense
            kept = tiles * span.saved(grids.shares)
            yield from _options(nodes, grids, needs + kept, holds + kept, seconds - tiles * forward)

    def _seconds_of_tile(self, start: int, end: int, sweeps: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
        """Seconds of one forward and one backward of a tile of every grid, in all sweeps together."""
        starts, shares = self._all_starts[: self._all_starts.index(end)], self._grids_at(end).shares
        place, totals = starts.index(start), []
        for stage in sweeps:
            if (end, stage) not in self._seconds:
                self._seconds[end, stage] = self._costs.seconds_to(end, stage, starts, shares)
            totals.append([seconds[:, place] for seconds in self._seconds[end, stage]])
        forward, backward = (torch.stack(of_sweeps).sum(0) for of_sweeps in zip(*totals, strict=True))
        return forward, backward

    def _bytes_of_boxes(self, start: int, shares: torch.Tensor) -> torch.Tensor:
        """Bytes of what a tile of every grid reads of the region."""
        boxes = (shares[:, self._costs.index[name]] * self._bytes(name) for name in self._live[start])
        return sum(boxes, shares.new_zeros(len(shares)))

    def _bytes_of_images(self, nodes: Sequence[str], shares: torch.Tensor) -> torch.Tensor:
        """Bytes of what a tile of every grid reads of images outside: about what their readers make of it."""
        outside = self._context.outside
        reads = [(one, name) for name in nodes if outside for one in self._graph[name].inputs if one in outside]
        boxes = (shares[:, self._costs.index[name]] * self._bytes(one) for one, name in dict(reads).items())
        return sum(boxes, shares.new_zeros(len(shares)))

    def _needs_of_tile(
        self, around: _Around, span: SpanCosts, shares: torch.Tensor, boxes: torch.Tensor
    ) -> torch.Tensor:
        """Bytes of one tile of every grid with all that is there meanwhile; `boxes` are those of its inputs."""
        offload = self._context.offload
        others = (2 * boxes if offload else 0.0) + around.folded  # this tile's boxes and the next one's
        if not self._training:
            needs = span.peak_unrecorded(shares)
            return (needs if offload else needs + around.inputs + around.holds) + others
        whole = self._image_gradients if offload else around.gradients
        return span.peak(shares) + boxes + others + whole + around.weights

    def _seconds_of_copies(
        self, around: _Around, tiles: torch.Tensor, boxes: torch.Tensor
    ) -> torch.Tensor | float:
        """Seconds to collect results and gradients of all tiles, and to move those that are offloaded."""
        context, offload = self._context, self._context.offload
        seconds = context.collecting(0.0 if offload else around.made)
        if self._training:
            seconds += context.collecting(0.0 if offload else around.inputs, around.weights)
        if not offload:
            return seconds
        # In backward inputs are read again, gradients of results are read and those of inputs written.
        times_made, times_read = (2, 3) if self._training else (1, 1)
        return seconds + (times_made * around.made + times_read * tiles * boxes) / context.machine.host

    def _grids_at(self, end: int) -> Grids:
        """The grids of the spans that end at a position."""
        if end not in self._grids:
            sweep = self._costs.positions.last_sweep(-1, end)
            self._grids[end] = grids_of(sweep, self._costs.nodes, self._costs.extents)
        return self._grids[end]


def _worth_trying(options: Sequence[Option]) -> list[Option]:
    """The options from the cheapest on, without those that need no less than a cheaper one."""
    least, best = math.inf, []
    for option in sorted(options, key=lambda one: one.cost):
        if option.needs < least:
            least = option.needs
            best.append(option)
    return best


def _ends_of(costs: RegionCosts, spans: Sequence[Span]) -> set[int]:
    """The positions in a region at which these spans and their parts, or what lies between them, end."""
    every = [*spans, *(part for span in spans for part in span.parts)]
    inside = [span.nodes for span in every if span.nodes[0] in costs.index]
    ends = {costs.index[nodes[-1]] for nodes in inside} | {costs.index[nodes[0]] - 1 for nodes in inside}
    return ends - {-1}


def _options(
    nodes: tuple[str, ...], grids: Grids, needs: torch.Tensor, holds: torch.Tensor, seconds: torch.Tensor
) -> Iterator[Option]:
    """A span in the grids worth trying; needs, what is saved and seconds are vectors over all [grids]."""
    order = seconds.argsort(stable=True)
    sorted_needs = needs[order]
    before = torch.nn.functional.pad(sorted_needs.cummin(0).values[:-1], (1, 0), value=math.inf)
    worth = order[sorted_needs < before].tolist()
    columns = (column[worth].tolist() for column in (needs, holds, seconds))
    each = zip([grids.counts[i] for i in worth], *columns, strict=True)
    return (Option(Span(nodes, counts), *numbers) for counts, *numbers in each)
