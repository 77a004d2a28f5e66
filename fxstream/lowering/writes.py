"""Maps that are put together along a stream axis, as a choice between maps, pixel by pixel; one position of a map.

What is written to a slice is padded to the extent of the map (after its pixels are repeated, where the slice has a
step), and a mask of the positions says which of both is taken. So are the parts of a concatenation, and a few rows
that are mirrored, as padding by hand does.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch
from torch import fx

from fxstream.graph.nodes import bind
from fxstream.lowering.proxy import Lowering, Operator, Proxy

__all__ = ["LOWERINGS"]

MOST_ROWS = 64
"""So many rows are mirrored one by one."""
MIRRORED = "fxstream_mirrored"
"""Key in the ``node.meta`` of mirrored rows: the slice that they were."""
FARTHEST = 2**31
"""An end from here on is that of the map."""


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
    extent = op.self.size(dim)
    if isinstance(start, int) and start < 0:
        start = extent + start
    spread = values.repeat_interleave(step, dim) if step > 1 else values
    stop = values.size(dim) * step + start
    places = op.call("arange", extent, device=op.device)
    is_written = places.ge(start).logical_and(places.lt(stop))
    if step > 1:
        is_written = is_written.logical_and((places - start).remainder(step).eq(0))
    padded = _padded(spread, dim, start, stop * -1 + extent)
    return _chosen(op, is_written, dim, padded, op.self)


def _padded(tensor: Proxy, dim: int, before: Any, after: Any) -> Proxy:
    """A tensor with zeros before and after along a dim of the result."""
    rank = len(tensor.op.value.shape)
    return tensor.constant_pad_nd([*[0, 0] * (rank - 1 - dim), before, after])


def _chosen(op: Operator, mask: Proxy, dim: int, one: Proxy, other: Proxy) -> Proxy:
    """One map where a mask of positions along a dim says so, and another elsewhere."""
    along = mask.view([-1 if d == dim else 1 for d in range(len(op.value.shape))])
    return op.call(torch.ops.aten.where.self, along, one, other)


def _joined(
    op: Operator, parts: Sequence[Proxy], dim: int, sources: Mapping[int, Proxy] = MappingProxyType({})
) -> Proxy:
    """Maps one after the other; one row without stream axes is the same at every position, and is not padded.

    `sources` are maps whose first rows, or last, are the first part, or the last, where a tile reads them near.
    """
    starts, total = [], parts[0].size(dim) * 0
    for part in parts:
        starts.append(total)
        total = total + part.size(dim)
    places, result = op.call("arange", total, device=op.device), None
    for i, (part, start) in enumerate(zip(parts, starts, strict=True)):
        is_row = part.shape and part.shape[dim] == 1 and not part.dims
        stop, source = part.size(dim) + start, sources.get(i)
        if source is not None:
            rest = source.size(dim) * -1 + total
            wide = _padded(source, dim, 0, rest) if i == 0 else _padded(source, dim, rest, 0)
        else:
            wide = part if is_row else _padded(part, dim, start, stop * -1 + total)
        result = wide if result is None else _chosen(op, places.ge(start), dim, wide, result)
    assert result is not None
    return result


def _concatenation(op: Operator) -> Proxy | None:
    """A map and what pads it: rows from the end where they are put, and tensors without stream axes.

    Other rows, or another map, would have a tile at the seam read from far apart.
    """
    parts, dim = op.tensors, op.dim % len(op.value.shape)
    is_along = any(dim in part.dims for part in parts)
    is_alike = {part.dtype for part in parts} == {op.value.dtype} and len({part.ndim for part in parts}) == 1
    if not is_along or not is_alike:
        return None
    rows = [_slice_of(part.node) if part.dims else None for part in parts]
    maps = [i for i, part in enumerate(parts) if part.dims and not _rows_of_slice(rows[i], dim, part.ndim)]
    if len(maps) != 1:
        return None
    sources = {}
    for i, one in enumerate(rows):
        if one is None or i in maps:
            continue
        source, start = bind(one)["self"], bind(one)["start"] or 0
        is_end = (i == 0 and start == 0) or (i == len(parts) - 1 and start < 0)
        if is_end and parts[i].node is one and _is_made_of(op, parts[maps[0]], source, dim):
            sources[i] = op.proxy(source)
        elif source is not parts[maps[0]].node or (start < 0) != (i > maps[0]):
            return None
    return _joined(op, parts, dim, sources)


def _is_made_of(op: Operator, image: Proxy, source: fx.Node, dim: int) -> bool:
    """Whether a map is made of all rows but the ends of another, as of tokens after some that stay as they are."""
    if op.proxy(source).shape[dim] != op.value.shape[dim]:
        return False
    seen, left = set[fx.Node](), [image.node]
    while left:
        node = left.pop()
        if node is source:
            return True
        seen.add(node)
        left += [one for one in node.all_input_nodes if one not in seen and not one < source]
    return False


def _slice_of(node: fx.Node) -> fx.Node:
    """The slice that a node is, or that it is the mirror image of."""
    return node.meta.get(MIRRORED, node)  # type: ignore[no-any-return]


def _mirrored(op: Operator) -> Proxy | None:
    """A few rows, which a slice has at every size, in the other order."""
    dims, source = [dim % op.self.ndim for dim in op.dims], op.self.node
    rows = _rows_of_slice(source, dims[0], op.self.ndim) if len(dims) == 1 else 0
    if not 0 < rows <= MOST_ROWS:
        return None
    parts = [op.self.slice(dims[0], row, row + 1) for row in reversed(range(rows))]
    result = _joined(op, parts, dims[0]) if rows > 1 else parts[0]
    result.node.meta[MIRRORED] = source
    return result


def _rows_of_slice(node: fx.Node | None, dim: int, rank: int) -> int:
    """How many rows a slice along a dim has at every size; 0 of what is none."""
    if node is None or node.target is not torch.ops.aten.slice.Tensor:
        return 0
    arguments = bind(node)
    start, end = arguments["start"] or 0, arguments["end"]
    if arguments["dim"] % rank != dim or arguments["step"] != 1 or not isinstance(start, int):
        return 0
    if start < 0 and (end is None or (isinstance(end, int) and end >= FARTHEST)):
        return -start
    return end - start if isinstance(end, int) and (start < 0) == (end < 0) else 0


def _position(op: Operator) -> Proxy | None:
    """One position along a stream axis, of a map of that alone: what no other part needs is not computed."""
    dim, index = op.dim % op.self.ndim, op.index
    if not isinstance(index, int) or op.self.shape[dim] == 1:
        return None
    return op.self.slice(dim, index, index + 1 or None).select(dim, 0)


LOWERINGS: dict[str, Lowering] = {
    "aten::select": _position,
    "aten::slice_scatter": _slice,
    "aten::select_scatter": _index,
    **dict.fromkeys(("aten::cat", "aten::concat", "aten::concatenate"), _concatenation),
    "aten::flip": _mirrored,
}
"""Per operator, what it is rewritten to."""
