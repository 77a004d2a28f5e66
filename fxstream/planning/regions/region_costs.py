"""The costs of the spans of a region as they are streamed: with frozen BatchNorms fused and memory reused.

Positions and shares are counted in the nodes of the model's graph, of which the streamed region has fewer. Between
regions are dense operators, which run as the model has them.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from fxstream.planning.cost import Costs, Part
from fxstream.planning.estimate import CostContext
from fxstream.planning.partition import Positions
from fxstream.planning.search import Option
from fxstream.tiling.passes import optimised
from fxstream.tiling.segment import make_segment

__all__ = ["DenseRun", "RegionCosts", "SpanCosts", "dense_option"]


class RegionCosts:
    """A region, its positions, and the costs of the spans between them."""

    def __init__(self, context: CostContext, nodes: tuple[str, ...]) -> None:
        graph = context.graph
        self.context, self.graph, self.nodes = context, graph, nodes
        self.index = {name: i for i, name in enumerate(nodes)}
        self.positions = Positions(graph, nodes)
        self.dense = context.dense(nodes)
        """The costs of the region as the model has it."""
        self.extents = torch.tensor([graph[name].extents for name in nodes], dtype=torch.float64)
        """The extents of each node along each axis."""
        self._stages = torch.tensor([graph[name].stage for name in nodes])
        segment = optimised(make_segment(graph, "", nodes))
        self._streamed = Costs(segment.graph, context.machine, segment.nodes)
        remaining = set(segment.nodes)
        self._remaining = torch.tensor([i for i, name in enumerate(nodes) if name in remaining])
        self._remaining_before = [0, *itertools.accumulate(int(name in remaining) for name in nodes)]
        fused = {fusion.node: float(fusion.bytes) for fusion in segment.fusions}
        gradients = dict(zip(segment.nodes, self._streamed.weight_gradients.tolist(), strict=True))
        self._folded = self._up_to(fused)
        self._weights = self._up_to(gradients)

    def _up_to(self, sizes: dict[str, float]) -> torch.Tensor:
        """The bytes of the first 0, 1, ... nodes together."""
        along = torch.tensor([0.0, *(sizes.get(name, 0.0) for name in self.nodes)], dtype=torch.float64)
        return along.cumsum(0)

    def span(self, start: int, end: int) -> tuple[str, ...]:
        """The nodes of a span."""
        return self.nodes[start + 1 : end + 1]

    def largest(self, start: int, end: int) -> str:
        """The node of a span with the largest result."""
        return max(self.span(start, end), key=lambda name: self.graph[name].bytes)

    def streamed(self, start: int, end: int, is_whole: bool = False) -> SpanCosts:
        """The costs of a span as it is streamed, or runs as one checkpoint."""
        first, stop = self._remaining_before[start + 1], self._remaining_before[end + 1]
        part = self._streamed.part(first, stop, is_whole, releases=True)
        return SpanCosts(part, self._remaining, self._stages, tuple(self.positions.sweeps(start, end)))

    def seconds_to(
        self, end: int, stage: int, starts: Sequence[int], shares: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Seconds of a forward and a backward of a sweep up to a position, from each of several; [tiles, starts].

        Of the operators up to a stage alone. The spans that end at one position are parts of the longest of them.
        """
        first, stop = self._remaining_before[min(starts) + 1], self._remaining_before[end + 1]
        of_stage = (shares * (self._stages <= stage))[..., self._remaining]
        places = torch.tensor([self._remaining_before[start + 1] - first for start in starts])

        def from_each(seconds: torch.Tensor) -> torch.Tensor:
            sums = torch.nn.functional.pad(seconds.cumsum(-1), (1, 0))
            return sums[..., -1:] - sums[..., places]

        forward, backward = self._streamed.seconds_each(of_stage, first, stop)
        return from_each(forward), from_each(backward)

    def folded(self, start: int, end: int) -> float:
        """Bytes of the weights of the fusions in a span."""
        return float(self._folded[end + 1] - self._folded[start + 1])

    def weights(self, start: int, end: int) -> float:
        """Bytes of the gradients of the weights that the nodes of a span are the first to read."""
        return float(self._weights[end + 1] - self._weights[start + 1])

    @property
    def dense_seconds(self) -> float:
        """Seconds of a forward and a backward of the region as the model has it."""
        return sum(
            map(float, self.dense.part(is_whole=True).seconds(torch.ones(len(self.nodes), dtype=torch.float64)))
        )


@dataclass(frozen=True, slots=True)
class SpanCosts:
    """The costs of a streamed span; shares are those of all nodes of the region, any number of tiles in front."""

    part: Part
    remaining: torch.Tensor
    stages: torch.Tensor
    sweeps: tuple[int, ...]

    def peak(self, shares: torch.Tensor) -> torch.Tensor:
        """Peak bytes of one forward and backward of a tile."""
        return self.part.profile(self._of_remaining(shares)).amax(-1)

    def peak_unrecorded(self, shares: torch.Tensor) -> torch.Tensor:
        """Peak bytes of one forward that nothing is kept of."""
        return self.part.profile_unrecorded(self._of_remaining(shares)).amax(-1)

    def saved(self, shares: torch.Tensor) -> torch.Tensor:
        """Bytes between a forward and its backward."""
        return self.part.saved(self._of_remaining(shares))

    def seconds(self, shares: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Seconds of one forward and one backward of a tile, in one sweep."""
        return self.part.seconds(self._of_remaining(shares))

    def seconds_of_sweeps(self, shares: torch.Tensor) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Seconds of one forward and one backward of a tile, in each sweep."""
        return (self.seconds(shares * (self.stages <= stage)) for stage in self.sweeps)

    def _of_remaining(self, shares: torch.Tensor) -> torch.Tensor:
        """The shares of the nodes that remain in the streamed region."""
        return shares[..., self.remaining]


class DenseRun:
    """Operators outside of all streamed parts: a region of one span, which has one option."""

    def __init__(self, context: CostContext, nodes: Sequence[str]) -> None:
        self.ends = (0,)
        self._costs = costs = context.dense(nodes)
        self._option = dense_option(costs, 0, len(nodes), context.training)
        self._weights = float(costs.weight_gradients.sum()) if context.training else 0.0

    def starts(self, end: int) -> tuple[int, ...]:
        """Its own start."""
        return (-1,)

    def options(self, start: int, end: int) -> list[list[Option]]:
        """The dense graph."""
        return [[self._option]]

    def weights(self, start: int, end: int) -> float:
        """Bytes of the gradients of its weights, all of which are before its end."""
        return self._weights if start < end else 0.0

    def largest(self, start: int, end: int) -> str:
        """The operator with the largest result."""
        return max(self._costs.nodes, key=lambda name: self._costs.sizes[self._costs.place[name]])


def dense_option(
    costs: Costs, begin: int, stop: int, training: bool, gradients: torch.Tensor | float = 0.0
) -> Option:
    """The operators from `begin` up to, not including, `stop` in the dense graph; no bytes of what they read.

    `gradients` are bytes of gradients of what they read and of what others read of them, at each of their steps.
    """
    # Others have let go of what it makes for them before its backward.
    part = costs.part(begin, stop, is_whole=True, releases=True)
    ones = torch.ones(len(costs.nodes), dtype=torch.float64)
    forward, backward = map(float, part.seconds(ones))
    if not training:
        return Option(None, float(part.profile_unrecorded(ones).max()), 0.0, forward)
    needs = float((part.profile(ones) + gradients).max())
    return Option(None, needs, float(part.remaining(ones)), forward + backward)
