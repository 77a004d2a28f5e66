"""The dense operators between the regions of a network: they run as the model has them."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from fxstream.planning.cost import Costs
from fxstream.planning.estimate import CostContext
from fxstream.planning.search import Option

__all__ = ["DenseRun", "dense_option"]


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
    part, ones = costs.part(begin, stop, is_whole=True), torch.ones(len(costs.nodes), dtype=torch.float64)
    forward, backward = map(float, part.seconds(ones))
    if not training:
        return Option(None, float(part.profile_unrecorded(ones).max()), 0.0, forward)
    needs = float((part.profile(ones) + gradients).max())
    return Option(None, needs, float(part.saved(ones)), forward + backward)
