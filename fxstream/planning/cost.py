"""What operators cost on a tile: seconds, and bytes over time, given the share of its pixels that a tile holds.

NOTE [the cost model]
1. Time. An operator takes its multiply-accumulates over the machine's rate, plus the bytes that it reads and
   writes over the machine's bandwidth, plus a constant for the call. A backward costs twice its forward, but for
   the traffic of kernels that were measured (`speeds.Effort`). Weights are read per tile, and their gradients
   written and added per tile: many small tiles of a layer with large weights are slow. Memory that the operating
   system maps anew costs more than traffic: on the CPU that are results above the size that the C library reuses,
   and the copies of its input and result that a convolution lays out for itself. Small tiles can be faster than
   the plain network for that alone. Whether the process has an allocator that reuses large memory too is tried out
   once. On accelerators, operators on tensors of 2^31 elements or more take kernels that are many times slower,
   which tiles avoid.
2. Memory is a sum of lifetimes on a line of steps (`lifetimes`).
3. Where a normalisation runs whole, which was taken apart into moments and an affine map, it is one operator: one
   call, and one gradient of its input. Its traffic is that of the two.
4. Of workspaces inside an operator only the gradients of what it keeps of its own are counted. Everything but
   weights scales with the share of the pixels.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Mapping, Sequence

import torch

from fxstream.graph.typed_graph import TypedGraph, TypedNode
from fxstream.lowering.whole import result_of
from fxstream.machine.kernels.volumes import is_halved
from fxstream.machine.speeds import DEPTHWISE, LARGE, SLOW_VOLUME, Machine
from fxstream.planning.lifetimes import CONVOLUTIONS, Lifetimes

__all__ = ["Costs", "Part"]

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
        self.lifetimes = lifetimes = Lifetimes(graph, self.nodes, plain, is_segment)
        self.place, self.sizes = lifetimes.place, lifetimes.sizes
        self._graph = graph
        efforts = [machine.effort(_kind(graph, name)) for name in self.nodes]
        rates = (machine.rate(_dtype(graph[n])) * effort.share for n, effort in zip(self.nodes, efforts))
        self.arithmetic = _vector(graph[n].macs / rate for n, rate in zip(self.nodes, rates, strict=True))
        self.largest = _vector(self._largest(name) for name in self.nodes)
        self.calls = _vector(lifetimes.saves(name).views is None for name in self.nodes)
        self.weights = _vector(sum(self._weights(name).values()) for name in self.nodes)
        moved = _vector(self._moved(name) for name in self.nodes) * self.calls / machine.bandwidth
        self.traffic = tuple(
            moved * _vector(getattr(effort, direction) for effort in efforts)
            for direction in ("forward", "backward")
        )
        """Seconds of traffic, forward and backward."""
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
        self,
        shares: torch.Tensor,
        start: int = 0,
        stop: int | None = None,
        fused: Sequence[int] = (),
        is_whole: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Predicted seconds of a forward and a backward of each operator from `start` up to `stop` (note 1).

        Those at the places `fused` are part of the call of another.
        """
        call = self.machine.call if is_whole else self.machine.call_of_tile
        span, machine = slice(start, len(self.nodes) if stop is None else stop), self.machine
        of_span = shares[..., span]
        present = (of_span > 0).double()
        slow = of_span * torch.where(of_span * self.largest[span] >= LARGE, machine.beyond, 1.0)
        work = slow * self.arithmetic[span] + present * (self._called(fused)[span] * call)
        if machine.fresh < math.inf:
            self._add_fresh(work, shares, span)
        read = present * (self.weights[span] / machine.bandwidth)
        forward, backward = (slow * traffic[span] for traffic in self.traffic)
        return work + forward + read, BACKWARD * work + backward + WEIGHTS_BACKWARD * read

    def _called(self, fused: Sequence[int]) -> torch.Tensor:
        """Which operators are calls, where those at the places `fused` are part of others."""
        calls = self.calls.clone()
        calls[list(fused)] = 0.0
        return calls

    def _add_fresh(self, work: torch.Tensor, shares: torch.Tensor, span: slice) -> None:
        """Add the seconds of memory that is mapped anew for the operators of a span."""
        by, like, size = _between(self.lifetimes.allocated, span.start, span.stop).unbind(-1)
        allocated = size * shares[..., like] * (shares[..., by] > 0)
        seconds = allocated * (allocated > self.machine.reused) / self.machine.fresh
        work.index_add_(-1, by - span.start, seconds)

    def part(
        self, start: int = 0, stop: int | None = None, is_whole: bool = False, releases: bool = False
    ) -> Part:
        """The operators from `start` up to, not including, `stop`, that run whole or on tiles."""
        return Part(self, start, len(self.nodes) if stop is None else stop, is_whole, releases)

    def _normalisations(self) -> dict[int, int]:
        results = {name: result_of(self._graph[name].node) for name in self.nodes}
        return {self.place[n]: self.place[r] for n, r in results.items() if r is not None and r in self.place}

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


class Part:
    """A span of a run. Shares are a vector over the nodes of the whole run: what a tile holds of each.

    Where it `is_whole` a normalisation is one operator (note 3). What it makes for others is theirs to hold where
    it `releases` that when its forward has run.
    """

    def __init__(
        self, costs: Costs, start: int, stop: int, is_whole: bool = False, releases: bool = False
    ) -> None:
        self.costs, self.start, self.stop, self._is_whole = costs, start, stop, is_whole
        self._fused = [m for m, r in costs.wholes.items() if start <= m and r < stop] if is_whole else []
        self.turn = stop - start
        """The step between forward and backward."""
        lifetimes = costs.lifetimes
        results, gradients, temporaries = (
            _between(rows, start, stop) for rows in (lifetimes.results, lifetimes.gradients, lifetimes.temporaries)
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
            levels[
                ..., 2 * self.turn - 1 - self.costs.lifetimes.own_from(self.costs.outer[name], self.start) :
            ] += size
        return levels

    def remaining(self, shares: torch.Tensor) -> torch.Tensor:
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
        forward, backward = self.costs.seconds_each(shares, self.start, self.stop, self._fused, self._is_whole)
        return forward.sum(-1), backward.sum(-1)


def _between(rows: torch.Tensor, start: int, stop: int) -> torch.Tensor:
    """The rows whose first number is one from `start` up to, not including, `stop`."""
    first, last = torch.searchsorted(rows[:, 0].contiguous(), torch.tensor([start, stop])).tolist()
    return rows[first:last]


def _kind(graph: TypedGraph, name: str) -> str:
    """What an operator is to the machine."""
    node = graph[name]
    kind = node.verdict.operator if node.verdict is not None else ""
    if kind in CONVOLUTIONS:
        channels, weight = node.values[0].shape[1], graph.value(node.inputs[1]).shape
        is_plain = len(weight) == 5 and not node.halves and _dtype(node) == torch.float32
        if is_plain and is_halved(graph.value(node.inputs[0]).shape, weight):
            return SLOW_VOLUME
        return DEPTHWISE if weight[1] == 1 and channels == weight[0] > 1 else kind
    return kind


def _dtype(node: TypedNode) -> torch.dtype:
    return node.values[0].dtype if node.values else torch.float32


def _vector(values: Iterable[float]) -> torch.Tensor:
    return torch.tensor([float(value) for value in values], dtype=torch.float64)
