"""Poolings of the whole map: a mean, or sums and maxima over windows.

They are adaptive, or have one window whose size is that of the map.

A window of an adaptive pooling is a product of intervals that follow from the size of the map. Which pixels of an
axis each of them holds is computed from that size, in the graph, so that the rewritten graph holds at any size.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from functools import reduce
from typing import Any

import torch
from torch import fx

from fxstream.graph.nodes import bind, name_of
from fxstream.graph.typed_graph import TypedGraph
from fxstream.lowering.proxy import Lowering, Operator, Proxy
from fxstream.rules.windowed import per_axis

__all__ = ["LOWERINGS", "WINDOWS", "has_one_window"]

MOST_WINDOWS = 16
"""Per axis. Each tile yields a partial result of every window, and takes a pass over its map per window."""


def _mean(op: Operator) -> Proxy | None:
    """A pooling to one pixel is a mean; to more of them the sums of windows over the numbers of their pixels.

    Along an axis that keeps its pixels it is none.
    """
    if strips := _strips(op):
        return op.self.mean(strips, True)
    if not _is_small(op):
        return None
    windows, axes = _windows(op, op.output_size), range(len(op.output_size))
    sums = op.call("fxstream::window_sums", op.self, windows)
    pixels = [window.sum([1 + axis for axis in axes]) for window in windows]
    pixels = [count.view([-1 if b == a else 1 for b in axes]) for a, count in enumerate(pixels)]
    return op.narrow(sums / reduce(operator.mul, pixels))


def _strips(op: Operator) -> list[int]:
    """The dims that are pooled to one pixel where the others keep theirs; empty where that is not so."""
    pairs = list(zip(_dims(op), op.output_size, strict=True))
    is_strips = all(size == 1 or _keeps(op, size, dim) for dim, size in pairs)
    return [dim for dim, size in pairs if size == 1] if is_strips else []


def _keeps(op: Operator, size: Any, dim: int) -> bool:
    """Whether a size is that of the map along a dim, by its origin."""
    return isinstance(size, Proxy) and _is_extent(size.node, op.self.node, dim)


def _maximum(op: Operator) -> tuple[Proxy, ...] | None:
    """Maxima of windows, and their positions in the map."""
    return _maxima(op, op.output_size) if _is_small(op) else None


def _maxima(op: Operator, counts: Sequence[int]) -> tuple[Proxy, Proxy]:
    """The maxima of so many windows along each axis, and their positions."""
    extents = [op.self.size(dim) for dim in _last_dims(op, len(counts))]
    places = [op.call("fxstream::positions", extents, k, device=op.device) for k in range(len(extents))]
    stacked = op.call("fxstream::window_maxima", op.self, _windows(op, counts), places)
    maxima, positions = stacked.select(0, 0), stacked.select(0, 1)
    return maxima.to(op.self.dtype), positions.to(torch.int64)


def _mean_of_window(op: Operator) -> Proxy:
    return op.self.mean(_last_dims(op, _axes_of(op.node)), True)


def _maximum_of_window(op: Operator) -> Proxy:
    """Of equal maxima the first gets the gradient, as in torch's pooling."""
    return _maxima(op, [1] * _axes_of(op.node))[0]


def has_one_window(typed: TypedGraph, node: fx.Node, bound: bool) -> bool:
    """Whether a pooling has one window, which is the map, at every size; of a `bound` graph, at its only size.

    Its window is written in the sizes of the map, as in ``avg_pool2d(x, x.shape[2:])``.
    """
    arguments, axes = bind(node), _axes_of(node)
    image, first = typed.value(node.all_input_nodes[0].name), -axes
    rank = len(image.shape)
    kernel, padding, dilation = (
        per_axis(arguments.get(name, default), axes)
        for name, default in (("kernel_size", 0), ("padding", 0), ("dilation", 1))
    )
    is_map = all(
        size == image.shape[dim] if bound else _is_extent(size, node.args[0], rank + dim)
        for dim, size in enumerate(kernel, first)
    )
    is_plain = not any(padding) and set(dilation) == {1} and arguments.get("divisor_override") is None
    fits = bool(image.dims) and set(image.dims) <= set(range(rank - axes, rank))
    return is_map and is_plain and fits and image.dtype.is_floating_point


def _is_extent(size: object, tensor: object, dim: int) -> bool:
    """Whether an argument is the size of a dim of this tensor."""
    return isinstance(size, fx.Node) and size.target is torch.ops.aten.sym_size.int and size.args == (tensor, dim)


def _axes_of(node: fx.Node) -> int:
    """The number of axes of ``avg_pool2d`` and the like."""
    return int(name_of(node).removesuffix("d")[-1])


def _dims(op: Operator) -> list[int]:
    """The last dims, as many as there are output sizes."""
    return _last_dims(op, len(op.output_size))


def _last_dims(op: Operator, count: int) -> list[int]:
    return list(range(op.self.ndim - count, op.self.ndim))


def _is_small(op: Operator) -> bool:
    """Whether it pools exactly the stream axes of a map of real numbers, to few windows."""
    is_few = all(isinstance(count, int) and count <= MOST_WINDOWS for count in op.output_size)
    return is_few and set(op.self.dims) == set(_dims(op)) and op.self.dtype.is_floating_point


def _windows(op: Operator, counts: Sequence[int]) -> list[Proxy]:
    """Which pixels each of so many windows holds, per axis."""
    dims = _last_dims(op, len(counts))
    return [
        op.call("fxstream::windows", count, op.self.size(dim), axis, len(dims), device=op.device)
        for axis, (dim, count) in enumerate(zip(dims, counts, strict=True))
    ]


LOWERINGS: dict[str, Lowering] = {
    **{f"aten::adaptive_avg_pool{axes}d": _mean for axes in (1, 2, 3)},
    **{f"aten::adaptive_max_pool{axes}d": _maximum for axes in (1, 2, 3)},
    "aten::_adaptive_avg_pool2d": _mean,
}
"""Per operator, what it is rewritten to."""
WINDOWS: dict[str, Lowering] = {
    **{f"aten::avg_pool{axes}d": _mean_of_window for axes in (1, 2, 3)},
    **{f"aten::max_pool{axes}d": _maximum_of_window for axes in (1, 2, 3)},
}
"""The same where the map is its only window."""
