"""The blocks that an image is read in: each is asked for once, and none is a part of a chunk of the store.

A store decodes whole chunks. Where an array says how it is chunked, a block is one chunk, or several small ones.
Where it does not, the blocks are what the boxes of the tiles have in common: along each axis they end where a box
begins or ends. A box is read as the blocks that it meets.
"""

from __future__ import annotations

import bisect
import itertools
import math
import operator
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from fxstream.geometry.box import Box, Interval

__all__ = ["Grid", "chunk_edges", "grid_of", "groups_of"]

LARGE = 2**20
"""Bytes up to which small chunks are read at once: asking has a cost of its own."""
MANY = 8
"""Blocks of an array without chunks that a box is made of, along each axis, at most."""

Edges = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Grid:
    """Blocks by their place along each dim; `edges` are where they begin and end, in pixels."""

    edges: tuple[Edges, ...]

    def meeting(self, box: Box) -> list[tuple[int, ...]]:
        """The places of the blocks that have a pixel of a box.

        >>> Grid(((0, 4, 8), (0, 3))).meeting(Box((Interval(3, 8), Interval(1, 2))))
        [(0, 0), (1, 0)]
        """
        along = (
            range(bisect.bisect_right(edges, part.start) - 1, bisect.bisect_left(edges, part.stop))
            for edges, part in zip(self.edges, box, strict=True)
        )
        return list(itertools.product(*along)) if all(box.shape) else []

    def box(self, place: Sequence[int]) -> Box:
        """The pixels of a block."""
        return Box(tuple(Interval(e[k], e[k + 1]) for e, k in zip(self.edges, place, strict=True)))


def grid_of(
    chunks: Sequence[Edges | None], extents: Sequence[int], boxes: Collection[Box], itemsize: int, most: int
) -> Grid:
    """The blocks for these boxes of an image whose chunks end there along each dim, of `itemsize` bytes a pixel.

    Chunks of more than `most` bytes could not be kept until all that need them have come: they are as none.
    """
    edges = [_of_boxes({box.intervals[k] for box in boxes}) for k in range(len(extents))]
    decoded = [mine or (0, extent) for mine, extent in zip(chunks, extents, strict=True)]
    if any(chunks) and _largest(decoded) * itemsize <= most:
        edges = _merged(decoded, LARGE // itemsize)
    return Grid(tuple(edges))


def _largest(edges: Sequence[Edges]) -> int:
    """Pixels of the largest block."""
    return math.prod(_longest(along) for along in edges)


def _longest(edges: Edges) -> int:
    return max((stop - start for start, stop in itertools.pairwise(edges)), default=0)


def _merged(chunks: Sequence[Edges], most: int) -> list[Edges]:
    """Pairs of chunks as blocks, again and again, along the axis where they are shortest, up to so many pixels.

    >>> _merged([(0, 1, 2, 3), (0, 8, 16, 24, 30)], 50)
    [(0, 3), (0, 16, 30)]
    """
    edges = list(chunks)
    while mergeable := [k for k, along in enumerate(edges) if len(along) > 2]:
        shortest = min(mergeable, key=lambda k: _longest(edges[k]))
        along = edges[shortest]
        paired = (*along[:-1:2], along[-1])
        if _largest([*edges[:shortest], paired, *edges[shortest + 1 :]]) > most:
            break
        edges[shortest] = paired
    return edges


def _of_boxes(parts: Iterable[Interval]) -> Edges:
    """Where boxes begin and end along an axis; evenly spread edges where that would cut boxes too often.

    >>> _of_boxes([Interval(0, 6), Interval(4, 10)])
    (0, 4, 6, 10)
    """
    parts = [part for part in parts if len(part)]
    edges = sorted({edge for part in parts for edge in (part.start, part.stop)})
    inside = (bisect.bisect_left(edges, p.stop) - bisect.bisect_left(edges, p.start) for p in parts)
    if max(inside, default=0) > MANY:
        step = max(1, max(map(len, parts)) // MANY)
        edges = [*range(edges[0], edges[-1], step), edges[-1]]
    return tuple(edges)


def chunk_edges(shape: Sequence[int], chunks: Any) -> tuple[Edges, ...] | None:
    """Where the chunks of an array begin and end along each axis, of its `chunks`; None where these say nothing.

    They are one length per axis (zarr, h5py), or the lengths of all chunks along it (dask).

    >>> chunk_edges((10, 3), (4, 3)), chunk_edges((10, 3), ((7, 3), (3,)))
    (((0, 4, 8, 10), (0, 3)), ((0, 7, 10), (0, 3)))
    """
    if not isinstance(chunks, (tuple, list)) or len(chunks) != len(shape):
        return None
    edges: list[Edges] = []
    for extent, along in zip(shape, chunks, strict=True):
        try:
            if isinstance(along, (tuple, list)):
                ends = itertools.accumulate(map(operator.index, along), initial=0)
                edges.append(tuple(dict.fromkeys(ends)))
            else:
                edges.append((*range(0, extent, operator.index(along)), extent))
        except (TypeError, ValueError):
            return None
    matches = all(len(along) > 1 and along[-1] == extent for along, extent in zip(edges, shape, strict=True))
    return tuple(edges) if matches else None


def groups_of(rows: Sequence[int], edges: Edges | None) -> list[list[int]]:
    """Entries of a batch that are read at once: those of one chunk, or without chunks each alone.

    >>> groups_of([0, 1, 5, 6, 2], (0, 4, 8)), groups_of([0, 1], None)
    ([[0, 1], [5, 6], [2]], [[0], [1]])
    """
    if edges is None:
        return [[row] for row in rows]
    return [list(group) for _, group in itertools.groupby(rows, lambda row: bisect.bisect_right(edges, row))]
