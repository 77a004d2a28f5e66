"""Maps with other values at some positions of a stream axis, as a choice between two maps, pixel by pixel.

What is written to a slice is padded to the extent of the map (after its pixels are repeated, where the slice has a
step), and a mask of the positions says which of both is taken.
"""

from __future__ import annotations

from typing import Any

import torch

from fxstream.lowering.proxy import Lowering, Operator, Proxy

__all__ = ["LOWERINGS"]


def _slice(op: Operator) -> Proxy:
    """A map of which a slice is written."""
    dim, step = op.dim % op.self.ndim, op.step
    return _written(op, op.src, dim, 0 if op.start is None else op.start, step)


def _index(op: Operator) -> Proxy:
    """A map of which one row is written."""
    dim = op.dim % op.self.ndim
    return _written(op, op.src.unsqueeze(dim), dim, op.index, 1)


def _written(op: Operator, values: Proxy, dim: int, start: Any, step: int) -> Proxy:
    """The map with `values` from `start` on, `step` pixels apart."""
    extent, rank = op.self.size(dim), op.self.ndim
    if isinstance(start, int) and start < 0:
        start = extent + start
    spread = values.repeat_interleave(step, dim) if step > 1 else values
    stop = values.size(dim) * step + start
    pads = [start, stop * -1 + extent]
    padded = spread.constant_pad_nd([*[0, 0] * (rank - 1 - dim), *pads])
    places = op.call("arange", extent, device=op.device)
    is_written = places.ge(start).logical_and(places.lt(stop))
    if step > 1:
        is_written = is_written.logical_and((places - start).remainder(step).eq(0))
    mask = is_written.view([-1 if d == dim else 1 for d in range(rank)])
    return op.call(torch.ops.aten.where.self, mask, padded, op.self)


LOWERINGS: dict[str, Lowering] = {"aten::slice_scatter": _slice, "aten::select_scatter": _index}
"""Per operator, what it is rewritten to."""
