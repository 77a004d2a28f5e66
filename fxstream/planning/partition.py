"""Where a streamed region may be cut into spans: at positions where few bytes are live.

Such are the one tensor between two residual blocks, or the features so far inside a dense block. Position `i` is
after node `i` of the region, in the order of the graph, and -1 is before all of them. The span from `start` to
`end` consists of the nodes `start + 1` up to `end`.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import replace

from fxstream.geometry.receptive_field import IDENTITY
from fxstream.graph.typed_graph import TypedGraph
from fxstream.tiling.parts import stages_of_outputs
from fxstream.tiling.request import Request, belongs, last_node_of
from fxstream.tiling.segment import Segment, make_segment

__all__ = ["FEW_SWEEPS", "Positions"]

MOST_POSITIONS = 16
"""Positions considered per region; their pairs are what planning time goes into."""
FEW_REDUCTIONS = 16
"""Of no more reductions each is a position where a region may be cut."""
FEW_SWEEPS = 6
"""A span of more sweeps is considered only where nothing else fits into the memory."""


class Positions:
    """The positions of a region where it may be cut."""

    def __init__(self, graph: TypedGraph, nodes: tuple[str, ...]) -> None:
        self._graph, self._nodes = graph, nodes
        self._index = {name: i for i, name in enumerate(nodes)}
        self._last_read = list(range(len(nodes)))
        for i, name in enumerate(nodes):
            for read in graph.pattern(name).reads:
                if read.value.name in self._index:
                    self._last_read[self._index[read.value.name]] = i
        self._is_output = [graph.is_output(name, self._index) for name in nodes]

    def after(self, paths: Sequence[str]) -> list[int]:
        """The positions after these modules, in order. Raises `PlanError` for one that does not run."""
        ends = set()
        for path in paths:
            last_node_of(self._graph, path)
            inside = [i for i, n in enumerate(self._nodes) if belongs(self._module(n), path)]
            ends |= {inside[-1]} if inside else set()
        return sorted(ends)

    def _module(self, name: str) -> str:
        verdict = self._graph[name].verdict
        return verdict.module if verdict is not None else ""

    def between(self, ends: Sequence[int]) -> list[tuple[str, ...]]:
        """The spans between these positions, from the first node to the last."""
        cuts = [0, *(end + 1 for end in ends if end + 1 < len(self._nodes)), len(self._nodes)]
        return [self._nodes[a:b] for a, b in itertools.pairwise(cuts) if a < b]

    def last_sweep(self, start: int, end: int) -> Segment:
        """The last sweep over a span: without the reductions that maps follow."""
        every = make_segment(self._graph, "", self._nodes[start + 1 : end + 1])
        maps = tuple(name for name in every.outputs if not self._graph[name].reduces)
        return replace(every, outputs=maps or every.outputs[-1:])

    def last_read(self, name: str) -> int:
        """The node of the region that is the last to read the result of one of its nodes; itself without any."""
        return self._last_read[self._index[name]]

    def live(self) -> list[list[str]]:
        """For the position after each node, the values of the region computed so far that are still needed."""
        live: list[list[int]] = [[]]
        for i in range(len(self._nodes)):
            live.append([k for k in (*live[-1], i) if self._last_read[k] > i])
        return [[self._nodes[k] for k in indices] for indices in live[1:]]

    def considered(self, request: Request) -> list[int]:
        """The positions that the user asks for, otherwise those where few bytes are live."""
        if isinstance(request.segments, tuple):
            return self.after(request.segments)
        return [] if request.segments == 1 else list(self.candidates(MOST_POSITIONS + self.reductions))

    def candidates(self, most: int) -> dict[int, int]:
        """The positions worth a boundary and the bytes that it would keep.

        These are the positions before a window or after a reduction where no fewer bytes are live just before or
        after; of each of `most` equal sections of the region the one with the fewest bytes, and of few reductions
        all: a network that normalises a map once, at its end, has smaller ones beside it.
        """
        live = self.live()[:-1]
        sizes = [self._graph.activation_bytes(names) for names in live]
        lowest = {i: sizes[i] for i, names in enumerate(live) if self._is_candidate(i, names, sizes)}
        best: dict[int, int] = {}
        for i, size in lowest.items():
            section = i * most // len(self._nodes)
            if section not in best or size < lowest[best[section]]:
                best[section] = i
        few = filter(self._is_reduction, lowest) if self.reductions <= FEW_REDUCTIONS else ()
        return {i: lowest[i] for i in sorted({*best.values(), *few})}

    def first_window(self) -> dict[int, int]:
        """The position before the second window, and the bytes of a boundary there; none with fewer windows."""
        windows = [i for i in range(len(self._nodes)) if self._is_window(i)]
        if len(windows) < 2 or not windows[1]:
            return {}
        names = self.live()[windows[1] - 1]
        is_tuple = any(self._graph[name].is_tuple for name in names)
        return {} if is_tuple else {windows[1] - 1: self._graph.activation_bytes(names)}

    def _is_candidate(self, i: int, live: Sequence[str], sizes: Sequence[int]) -> bool:
        """Whether the position `i`, where these values are live, is worth a boundary; `sizes` are those of all."""
        if not live or any(self._graph[name].is_tuple for name in live) or sizes[i] > sizes[max(i - 1, 0)]:
            return False
        later = sizes[i + 1] if i + 1 < len(sizes) else sizes[i]
        return sizes[i] < later or (sizes[i] == later and (self._is_window(i + 1) or self._is_reduction(i)))

    @property
    def reductions(self) -> int:
        """The number of reductions, after each of which a boundary saves a sweep."""
        return sum(map(self._is_reduction, range(len(self._nodes))))

    def _is_reduction(self, i: int) -> bool:
        return self._graph[self._nodes[i]].reduces

    def _is_window(self, i: int) -> bool:
        """Whether the node `i` reads more than its own pixels."""
        reads = self._graph.pattern(self._nodes[i]).reads
        return any(axis_map != IDENTITY for read in reads for axis_map in read.maps)

    def sweeps(self, start: int, end: int) -> list[int]:
        """The stages of the outputs of a span: each takes a sweep."""
        span = range(start + 1, end + 1)
        outputs = [self._nodes[i] for i in span if self._is_output[i] or self._last_read[i] > end]
        return stages_of_outputs(self._graph, outputs)

    def starts(self, end: int, ends: Sequence[int], most_sweeps: int) -> list[int]:
        """The positions where a span up to `end` may start, of -1 and `ends`: those with few enough sweeps."""
        before = [start for start in (-1, *ends) if start < end]
        few = [start for start in before if len(self.sweeps(start, end)) <= most_sweeps]
        return few or before[-1:]
