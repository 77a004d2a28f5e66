"""The costs of a part of the graph as it is streamed: with its frozen BatchNorms fused and memory reused.

Spans of a part are counted in the nodes of the model's graph, of which the streamed part has fewer.
"""

from __future__ import annotations

import itertools

import torch

from fxstream.planning.cost import Costs, Part
from fxstream.planning.estimate import CostContext
from fxstream.tiling.passes import optimised
from fxstream.tiling.segment import make_segment

__all__ = ["PartCosts"]


class PartCosts:
    """The streamed costs of a part; indices and shares are those of its nodes in the model's graph."""

    def __init__(self, context: CostContext, nodes: tuple[str, ...]) -> None:
        segment = optimised(make_segment(context.graph, "", nodes))
        self.costs = Costs(segment.graph, context.machine, segment.nodes)
        left = set(segment.nodes)
        self._kept = torch.tensor([i for i, name in enumerate(nodes) if name in left])
        self._before = [0, *itertools.accumulate(int(name in left) for name in nodes)]
        fused = {fusion.node: float(fusion.bytes) for fusion in segment.fusions}
        self.folded = torch.tensor([fused.get(name, 0.0) for name in nodes], dtype=torch.float64)
        """Bytes of the weight of the fusion into each node."""
        gradients = dict(zip(segment.nodes, self.costs.weight_gradients.tolist(), strict=True))
        self.weight_gradients = torch.tensor([gradients.get(name, 0.0) for name in nodes], dtype=torch.float64)
        """Bytes of the gradients of the weights that each node is the first to read."""

    def part(self, start: int, stop: int) -> Part:
        """The nodes from `start` up to, not including, `stop`."""
        return self.costs.part(self._before[start], self._before[stop])

    def shares(self, shares: torch.Tensor) -> torch.Tensor:
        """The shares of the streamed nodes, from those of all nodes; further dims in front stay."""
        return shares[..., self._kept]
