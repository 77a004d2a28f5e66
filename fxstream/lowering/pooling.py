"""Adaptive poolings of the whole map: a mean, or sums and maxima over windows.

A window of an adaptive pooling is a product of intervals that follow from the size of the map. Which pixels of an
axis each of them holds is computed from that size, in the graph, so that the rewritten graph holds at any size.
"""

from __future__ import annotations

from functools import reduce

import torch
from torch import fx

from fxstream.lowering.writer import Lowering, Writer
from fxstream.rules.ops import overload

__all__ = ["LOWERINGS"]

aten = torch.ops.aten

MOST_WINDOWS = 16
"""Per axis. Each tile yields a partial result of every window, and takes a pass over its map per window."""


def _mean(writer: Writer) -> fx.Node | None:
    """A pooling to one pixel is a mean; to more of them the sums of windows over the numbers of their pixels."""
    image, counts = writer["self"], writer["output_size"]
    dims = _dims(writer)
    if set(counts) == {1}:
        return writer.call(aten.mean.dim, image, dims, True)
    if not _is_small(writer):
        return None
    windows = _windows(writer)
    axes = range(len(dims))
    sums = writer.call(overload("window_sums"), image, windows)
    pixels = [writer.call(aten.sum.dim_IntList, w, [1 + a for a in axes]) for w in windows]
    spread = [
        writer.call(aten.view.default, found, [-1 if b == a else 1 for b in axes])
        for a, found in enumerate(pixels)
    ]
    product = reduce(lambda a, b: writer.call(aten.mul.Tensor, a, b), spread)
    return writer.like(writer.call(aten.div.Tensor, sums, product), image)


def _maximum(writer: Writer) -> tuple[fx.Node, ...] | None:
    """Maxima of windows, and their positions in the map."""
    image, dims = writer["self"], _dims(writer)
    if not _is_small(writer):
        return None
    extents = [writer.size(image, dim) for dim in dims]
    places = [writer.call(overload("positions"), extents, axis, device=writer.device) for axis in range(len(dims))]
    found = writer.call(overload("window_maxima"), image, _windows(writer), places)
    maxima, positions = (writer.call(aten.select.int, found, 0, i) for i in range(2))
    dtype = writer.meta(image).dtype
    return tuple(
        writer.call(aten.to.dtype, tensor, wanted)
        for tensor, wanted in ((maxima, dtype), (positions, torch.int64))
    )


def _dims(writer: Writer) -> list[int]:
    """The last dims, as many as there are output sizes."""
    rank = len(writer.meta(writer["self"]).shape)
    return list(range(rank - len(writer["output_size"]), rank))


def _is_small(writer: Writer) -> bool:
    """Whether it pools exactly the stream axes of a map of real numbers, to few windows."""
    known = all(isinstance(count, int) and count <= MOST_WINDOWS for count in writer["output_size"])
    exactly = set(writer.dims) == set(_dims(writer))
    return known and exactly and writer.meta(writer["self"]).dtype.is_floating_point


def _windows(writer: Writer) -> list[fx.Node]:
    """Which pixels each window holds, per axis."""
    image, counts = writer["self"], writer["output_size"]
    return [
        writer.call(overload("windows"), count, writer.size(image, dim), axis, len(counts), device=writer.device)
        for axis, (dim, count) in enumerate(zip(_dims(writer), counts, strict=True))
    ]


LOWERINGS: dict[str, Lowering] = {
    **{f"aten::adaptive_avg_pool{axes}d": _mean for axes in (1, 2, 3)},
    **{f"aten::adaptive_max_pool{axes}d": _maximum for axes in (1, 2, 3)},
    "aten::_adaptive_avg_pool2d": _mean,
}
"""Per operator, what it is rewritten to."""
