"""Adaptive poolings of the whole map: a mean, or sums and maxima over windows.

A window of an adaptive pooling is a product of intervals that follow from the size of the map. Which pixels of an
axis each of them holds is computed from that size, in the graph, so that the rewritten graph holds at any size.
"""

from __future__ import annotations

import operator
from functools import reduce

import torch

from fxstream.lowering.proxy import Lowering, Operator, Proxy

__all__ = ["LOWERINGS"]

MOST_WINDOWS = 16
"""Per axis. Each tile yields a partial result of every window, and takes a pass over its map per window."""


def _mean(op: Operator) -> Proxy | None:
    """A pooling to one pixel is a mean; to more of them the sums of windows over the numbers of their pixels."""
    if set(op.output_size) == {1}:
        return op.self.mean(_dims(op), True)
    if not _is_small(op):
        return None
    windows, axes = _windows(op), range(len(op.output_size))
    sums = op.call("fxstream::window_sums", op.self, windows)
    pixels = [window.sum([1 + axis for axis in axes]) for window in windows]
    pixels = [count.view([-1 if b == a else 1 for b in axes]) for a, count in enumerate(pixels)]
    return op.narrow(sums / reduce(operator.mul, pixels))


def _maximum(op: Operator) -> tuple[Proxy, ...] | None:
    """Maxima of windows, and their positions in the map."""
    if not _is_small(op):
        return None
    extents = [op.self.size(dim) for dim in _dims(op)]
    places = [op.call("fxstream::positions", extents, k, device=op.device) for k in range(len(extents))]
    stacked = op.call("fxstream::window_maxima", op.self, _windows(op), places)
    maxima, positions = stacked.select(0, 0), stacked.select(0, 1)
    return maxima.to(op.self.dtype), positions.to(torch.int64)


def _dims(op: Operator) -> list[int]:
    """The last dims, as many as there are output sizes."""
    return list(range(op.self.ndim - len(op.output_size), op.self.ndim))


def _is_small(op: Operator) -> bool:
    """Whether it pools exactly the stream axes of a map of real numbers, to few windows."""
    is_few = all(isinstance(count, int) and count <= MOST_WINDOWS for count in op.output_size)
    return is_few and set(op.self.dims) == set(_dims(op)) and op.self.dtype.is_floating_point


def _windows(op: Operator) -> list[Proxy]:
    """Which pixels each window holds, per axis."""
    dims = _dims(op)
    return [
        op.call("fxstream::windows", count, op.self.size(dim), axis, len(dims), device=op.device)
        for axis, (dim, count) in enumerate(zip(dims, op.output_size, strict=True))
    ]


LOWERINGS: dict[str, Lowering] = {
    **{f"aten::adaptive_avg_pool{axes}d": _mean for axes in (1, 2, 3)},
    **{f"aten::adaptive_max_pool{axes}d": _maximum for axes in (1, 2, 3)},
    "aten::_adaptive_avg_pool2d": _mean,
}
"""Per operator, what it is rewritten to."""
