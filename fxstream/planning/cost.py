"""What operators cost on a tile: seconds, and bytes over time, given the share of its pixels that a tile holds.

NOTE [the cost model]
1. Time. An operator takes its multiply-accumulates over the machine's rate, plus the bytes that it reads and
   writes over the machine's bandwidth, plus a constant for the call. A backward costs twice its forward. Weights
   are read per tile, and their gradients written and added per tile: many small tiles of a layer with large
   weights are slow. Memory that the operating system maps anew costs more than traffic: on the CPU that
   are results above the size that the C library reuses, and the copies of its input and result that
   a convolution lays out for itself. Small tiles can be faster than the plain network for that alone. Whether the
   process has an allocator that reuses large memory too is tried out once. On accelerators, operators on tensors
   of 2^31 elements or more take kernels that are many times slower, which tiles avoid.
2. Memory is a sum of lifetimes on a line of steps: operator `n` of `N` runs forward at step `n` and backward
   at step `2N - 1 - n`. A result lives until its last reader has run, and if autograd keeps it, until the
   backward of the first reader that needs it; the gradient of a value from the backward of its last reader to its
   own; gradients of weights from there to the end.
3. Results that are views of an input, and gradients that are views of another (of a sum, a concatenation), are no
   new memory. Neither are results of operators that take over their input's memory.
4. Where a normalisation runs whole, which was taken apart into moments and an affine map, it is one operator: one
   call, and one gradient of its input. Its traffic is that of the two.
5. Of workspaces inside an operator only the gradients of what it keeps of its own are counted. Everything but
   weights scales with the share of the pixels.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Mapping, Sequence

import torch

from fxstream.graph.effects import WAS_IN_PLACE
from fxstream.graph.typed_graph import Saves, TypedGraph, TypedNode
from fxstream.lowering.whole import result_of
from fxstream.machine.speeds import LARGE, Machine

__all__ = ["Costs", "Part"]

CONVOLUTIONS = {f"aten::conv{n}d" for n in (1, 2, 3)}
BACKWARD = 2
"""Cost of a backward over that of its forward."""
WEIGHTS_BACKWARD = 5
"""How often a backward moves the weights: read, their gradient written, read and added to the sum."""


class Costs:
    """The costs of a run of operators, in the order of the graph; `part` gives those of a span of it.

    The operators take over their input's memory as the graph's passes found (`TypedNode.reuses`); with `plain`,
    where the model calls them in place. In the graph of a segment (`is_segment`) nobody holds the results.
    """

    def __init__(
        self,
        graph: TypedGraph,
        machine: Machine,
        nodes: Sequence[str],
        plain: bool = False,
        is_segment: bool = False,
    ) -> None:
        self.machine = machine
        self.nodes = tuple(nodes)
        self._is_segment = is_segment
        self.place = {name: i for i, name in enumerate(self.nodes)}
        self._graph, self._plain = graph, plain
        self.arithmetic = _vector(graph[name].macs / machine.rate(_dtype(graph[name])) for name in self.nodes)
        self.largest = _vector(self._largest(name) for name in self.nodes)
        self.sizes = [graph[name].bytes for name in self.nodes]
        self.calls = _vector(self._saves(name).views is None for name in self.nodes)
        self.weights = _vector(sum(self._weights(name).values()) for name in self.nodes)
        self.moved = _vector(self._moved(name) for name in self.nodes) * self.calls
        self._inputs, self._users, self._roots = self._edges()
        self.allocated = self._allocated()
        self.results, self.kept = self._results()
        self._own_from: list[int] = []
        """The place from which on in backward the gradient of a value that a node reads is memory of its own."""
        self.gradients, self.temporaries = self._gradients(), self._temporaries()
        self.wholes = self._normalisations()
        """The places of the results of normalisations that were taken apart, by those of their moments."""
        self.outer: dict[str, int] = {}
        """The values that the run reads from outside, and the index of the last operator that reads each."""
        for i, name in enumerate(self.nodes):
            outside = (one for one in graph[name].inputs if one not in self.place and graph[one].depends_on_image)
            self.outer |= dict.fromkeys(outside, i)
        self.weight_bytes: dict[str, int] = {}
        """The parameters that the run reads."""
        gradients = []
        for name in self.nodes:
            weights = self._weights(name)
            gradients.append(sum(size for weight, size in weights.items() if weight not in self.weight_bytes))
            self.weight_bytes |= weights
        self.weight_gradients = _vector(gradients)

    def shares(self, graph: TypedGraph) -> torch.Tensor:
        """What whole results have at another size, over those that the costs are of."""
        ratios = [
            graph[name].bytes / size if size else 1.0 for name, size in zip(self.nodes, self.sizes, strict=True)
        ]
        return torch.tensor(ratios, dtype=torch.float64)

    @functools.cached_property
    def extents(self) -> list[tuple[int, ...]]:
        """The extents of each node along each axis."""
        return [self._graph[name].extents for name in self.nodes]

    @functools.cached_property
    def plain(self) -> Part:
        """All operators, whose results are held."""
        return self.part(is_whole=True)

    @functools.cached_property
    def whole(self) -> Part:
        """All operators, which run whole."""
        return self.part(is_whole=True, releases=True)

    @functools.cached_property
    def tiled(self) -> Part:
        """All operators, on tiles."""
        return self.part(releases=True)

    def seconds_each(
        self, shares: torch.Tensor, start: int = 0, stop: int | None = None, fused: Sequence[int] = ()
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Predicted seconds of a forward and a backward of each operator from `start` up to `stop` (note 1).

        Those at the places `fused` are part of the call of another.
        """
        span, machine = slice(start, len(self.nodes) if stop is None else stop), self.machine
        of_span, calls = shares[..., span], self.calls.clone()
        calls[list(fused)] = 0.0
        present = (of_span > 0).double()
        work = self._work(of_span, span) + present * (calls[span] * machine.call)
        if machine.fresh < math.inf:
            by, like, size = _between(self.allocated, start, span.stop).unbind(-1)
            allocated = size * shares[..., like] * (shares[..., by] > 0)
            work.index_add_(-1, by - start, allocated * (allocated > machine.reused) / machine.fresh)
        read = present * (self.weights[span] / machine.bandwidth)
        return work + read, BACKWARD * work + WEIGHTS_BACKWARD * read

    def _work(self, of_span: torch.Tensor, span: slice) -> torch.Tensor:
        """Seconds of arithmetic and traffic of each operator, with these shares of the span's nodes."""
        machine = self.machine
        each = self.arithmetic[span] + self.moved[span] / machine.bandwidth
        slow = torch.where(of_span * self.largest[span] >= LARGE, machine.beyond, 1.0)
        return of_span * slow * each

    def part(
        self, start: int = 0, stop: int | None = None, is_whole: bool = False, releases: bool = False
    ) -> Part:
        """The operators from `start` up to, not including, `stop`, that run whole or on tiles."""
        return Part(self, start, len(self.nodes) if stop is None else stop, is_whole, releases)

    def own_from(self, reader: int, start: int) -> int:
        """The operator after `start` whose backward has the gradient of a value that `reader` is the last to read.

        Where the reader passes the gradient of its result on, it is new memory when that one would be gone.
        """
        return max(-1, self._own_from[reader] - start)

    def _normalisations(self) -> dict[int, int]:
        results = {name: result_of(self._graph[name].node) for name in self.nodes}
        return {self.place[n]: self.place[r] for n, r in results.items() if r is not None and r in self.place}

    def _saves(self, name: str) -> Saves:
        saves = self._graph[name].saves
        assert saves is not None, name
        return saves

    def _weights(self, name: str) -> dict[str, int]:
        """The parameters that a node reads and their bytes; running statistics count too, and are small."""
        inputs = (self._graph[one] for one in self._graph[name].inputs)
        return {one.name: one.bytes for one in inputs if one.is_parameter}

    def _largest(self, name: str) -> int:
        """Elements of the largest tensor that a node reads or makes."""
        nodes = (self._graph[one] for one in (name, *self._graph[name].inputs))
        return max((value.elements for node in nodes for value in node.values), default=0)

    def _moved(self, name: str) -> int:
        return sum(self._graph[one].bytes for one in (name, *self._graph[name].inputs))

    def _results(self) -> tuple[torch.Tensor, frozenset[str]]:
        """Lifetimes of results as rows: owner, last reader, first reader that saves it, bytes; and those saved."""
        count = len(self.nodes)
        last, saver = list(range(count + 1)), [count] * (count + 1)
        for i, name in enumerate(self.nodes):
            saves, inputs = self._saves(name), self._inputs[i]
            if self._leaves(name):
                last[self._roots[i]] = count
            for j in (*(inputs[k] for k in saves.inputs if k < len(inputs)), *[i] * saves.result):
                saver[self._roots[j]] = min(saver[self._roots[j]], i)
            for j in inputs:
                last[self._roots[j]] = max(last[self._roots[j]], i)
        rows = [(i, last[i], saver[i], self.sizes[i]) for i in range(count) if self._roots[i] == i]
        rows += [(i, i, i, size) for i, size in self._extra("extra")]
        saved = (name for i, name in enumerate(self.nodes) if saver[self._roots[i]] < count)
        return _rows(rows, 4), frozenset(saved)

    def _extra(self, kind: str) -> list[tuple[int, int]]:
        """Which operators make extra values of this kind, and their bytes."""
        rates = [getattr(self._saves(name), kind) for name in self.nodes]
        elements = (sum(value.elements for value in self._graph[name].values) for name in self.nodes)
        return [
            (i, round(rate * count)) for i, (rate, count) in enumerate(zip(rates, elements, strict=True)) if rate
        ]

    def _leaves(self, name: str) -> bool:
        """Whether a result is read outside of the run."""
        inside = {**self.place, "output": -1} if self._is_segment else self.place
        return self._graph.is_read_outside(name, inside)

    def _gradients(self) -> torch.Tensor:
        """Lifetimes of gradients as rows: owner, last reader, first value that has a view of it, bytes."""
        count, users = len(self.nodes), self._users
        groups, first = list(range(count)), list(range(count))
        for i in reversed(range(count)):
            if len(users[i]) == 1 and self._saves(self.nodes[users[i][0]]).passes_on:
                groups[i] = groups[users[i][0]]
            first[groups[i]] = min(first[groups[i]], i)
        passes_on = (self._saves(name).passes_on for name in self.nodes)
        self._own_from = [first[groups[i]] - 1 if is_view else i for i, is_view in enumerate(passes_on)]
        rows = []
        for i, name in enumerate(self.nodes):
            leaves = self._leaves(name)
            if groups[i] == i and self._has_gradient(name) and (users[i] or leaves):
                rows.append((i, count if leaves else users[i][-1], first[i], self.sizes[i]))
        return _rows(rows, 4)

    def _temporaries(self) -> torch.Tensor:
        """Gradients that are new memory until they are added to another, as rows: owner, reader, bytes."""
        rows = []
        for i, name in enumerate(self.nodes):
            for j in self._inputs[i] if not self._saves(name).passes_on else ():
                if j >= 0 and self._has_gradient(self.nodes[j]) and self._users[j][-1] != i:
                    rows.append((j, i, self.sizes[j]))
        rows += [(i, i, size) for i, size in self._extra("between")]
        return _rows(rows, 3)

    def _allocated(self) -> torch.Tensor:
        """What each operator allocates, as rows: its index, the index of the value as large as that, its bytes."""
        rows = []
        for i, name in enumerate(self.nodes):
            rows += [(i, i, self.sizes[i])] * (self._roots[i] == i)
            verdict = self._graph[name].verdict
            if verdict is not None and verdict.operator in CONVOLUTIONS:
                rows += [(i, j, self.sizes[j]) for j in (i, *self._inputs[i]) if j >= 0]
        return _rows(rows, 3)

    def _edges(self) -> tuple[list[list[int]], list[list[int]], list[int]]:
        """Per node the indices of its inputs (-1 outside) and its readers, and the index whose memory it is."""
        users: list[list[int]] = [[] for _ in self.nodes]
        inputs, roots = [], list(range(len(self.nodes) + 1))
        for i, name in enumerate(self.nodes):
            node, saves = self._graph[name], self._saves(name)
            inputs.append([self.place.get(one, -1) for one in node.inputs])
            for j in inputs[i]:
                if j >= 0:
                    users[j].append(i)
            # Autograd copies what an operator saves and then changes in place.
            was = WAS_IN_PLACE in node.node.meta and 0 not in saves.inputs
            viewed = 0 if (was if self._plain else node.reuses) else saves.views
            if viewed is not None and viewed < len(inputs[i]):
                roots[i] = roots[inputs[i][viewed]]
        return inputs, users, roots

    def _has_gradient(self, name: str) -> bool:
        return self._graph[name].has_gradient


class Part:
    """A span of a run. Shares are a vector over the nodes of the whole run: what a tile holds of each.

    Where it `is_whole` a normalisation is one operator (note 4). What it makes for others is theirs to hold where
    it `releases` that when its forward has run.
    """

    def __init__(
        self, costs: Costs, start: int, stop: int, is_whole: bool = False, releases: bool = False
    ) -> None:
        self.costs, self.start, self.stop = costs, start, stop
        self._fused = [m for m, r in costs.wholes.items() if start <= m and r < stop] if is_whole else []
        self.turn = stop - start
        """The step between forward and backward."""
        results, gradients, temporaries = (
            _between(rows, start, stop) for rows in (costs.results, costs.gradients, costs.temporaries)
        )
        gradients = gradients[gradients[:, 1] < stop]
        temporaries = temporaries[temporaries[:, 1] < stop]
        temporaries = temporaries[~torch.isin(temporaries[:, 1], torch.tensor(self._fused, dtype=torch.int64))]
        weights = torch.arange(start, stop)
        forward, backward = weights - start, 2 * self.turn - 1 - (weights - start)
        never = torch.tensor(2 * self.turn)

        def step(places: torch.Tensor, of: torch.Tensor, otherwise: torch.Tensor) -> torch.Tensor:
            return torch.where(places < stop, of[(places - start).clamp(0, self.turn - 1)], otherwise)

        read = step(results[:, 1], forward, torch.tensor(self.turn - 1) if releases else never)
        kept_until = torch.maximum(read, step(results[:, 2], backward, torch.tensor(0)))
        self._results, self._read_until, self._left = results, read, results[:, 1] >= stop
        self._owner = torch.cat([results[:, 0], gradients[:, 0], temporaries[:, 0], weights])
        self._bytes = torch.cat([results[:, 3], gradients[:, 3], temporaries[:, 2]]).double()
        self._scaled = len(self._bytes)
        self._bytes = torch.cat([self._bytes, costs.weight_gradients[start:stop]])
        self._begin = torch.cat(
            [
                results[:, 0] - start,
                step(gradients[:, 1], backward, never),
                step(temporaries[:, 1], backward, never),
                backward,
            ]
        )
        self._until = torch.cat(
            [
                kept_until,
                step(gradients[:, 2].clamp(min=start), backward, never),
                step(temporaries[:, 1], backward, never),
                never.expand(len(weights)),
            ]
        )

    def profile(self, shares: torch.Tensor, outer: Mapping[str, float] | None = None) -> torch.Tensor:
        """Bytes at each step of one forward and backward of a tile with these shares, recorded.

        `shares` may have further dims in front, one tile each; so has the result. `outer` are bytes of gradients
        of values from outside, which are there from the backward of their last reader on.
        """
        amounts = self._bytes * shares[..., self._owner]
        amounts[..., self._scaled :] = self._bytes[self._scaled :]
        levels = self._levels(self._begin, self._until, amounts)
        for name, size in (outer or {}).items():
            levels[..., 2 * self.turn - 1 - self.costs.own_from(self.costs.outer[name], self.start) :] += size
        return levels

    def held(self, shares: torch.Tensor) -> torch.Tensor:
        """What is saved, with what others read."""
        left = self._left & ((self._begin >= self.turn) | (self._until < self.turn))[: len(self._left)]
        return self.saved(shares) + (self._results[left, 3] * shares[..., self._results[left, 0]]).sum(-1)

    def saved(self, shares: torch.Tensor) -> torch.Tensor:
        """Bytes that are there between that forward and its backward."""
        amounts = self._bytes * shares[..., self._owner]
        across = (self._begin < self.turn) & (self._until >= self.turn)
        return amounts[..., across].sum(-1)

    def profile_unrecorded(self, shares: torch.Tensor) -> torch.Tensor:
        """The same for one forward that nothing is kept of."""
        amounts = self._results[:, 3] * shares[..., self._results[:, 0]]
        return self._levels(self._results[:, 0] - self.start, self._read_until, amounts)[..., : self.turn]

    def _levels(self, begin: torch.Tensor, until: torch.Tensor, amounts: torch.Tensor) -> torch.Tensor:
        change = amounts.new_zeros(*amounts.shape[:-1], 2 * self.turn + 2)
        change.index_add_(-1, begin, amounts)
        change.index_add_(-1, until + 1, -amounts)
        return change.cumsum(-1)[..., :-1]

    def seconds(self, shares: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Predicted seconds of one forward and of one backward of a tile with these shares (note 1)."""
        forward, backward = self.costs.seconds_each(shares, self.start, self.stop, self._fused)
        return forward.sum(-1), backward.sum(-1)


def _rows(rows: Iterable[tuple[int, ...]], count: int) -> torch.Tensor:
    """Rows of integers, sorted by the first of each."""
    table = torch.tensor(sorted(rows), dtype=torch.int64)
    return table.view(-1, count)


def _between(rows: torch.Tensor, start: int, stop: int) -> torch.Tensor:
    """The rows whose first number is one from `start` up to, not including, `stop`."""
    first, last = torch.searchsorted(rows[:, 0].contiguous(), torch.tensor([start, stop])).tolist()
    return rows[first:last]


def _dtype(node: TypedNode) -> torch.dtype:
    return node.values[0].dtype if node.values else torch.float32


def _vector(values: Iterable[float]) -> torch.Tensor:
    return torch.tensor([float(value) for value in values], dtype=torch.float64)
