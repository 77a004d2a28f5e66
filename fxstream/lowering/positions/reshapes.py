"""Operators that flatten positions, or take them apart again (`unflatten`, rules 1, 3 and 5)."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import replace
from functools import reduce
from typing import Any

import torch
from torch import fx

from fxstream.lowering.positions.unflatten import FlatOperator, Handler, Result, Unflattened
from fxstream.lowering.proxy import Proxy, Size
from fxstream.rules.shuffled import align

__all__ = ["HANDLERS"]


def _source(op: FlatOperator) -> Unflattened | None:
    """The source of the input, a map for itself; None where no stream axis can be followed (rule 5)."""
    source = op.source(op.self) or Unflattened(op.self, 0, op.self.shape[:1], op.self.dims)
    shape = source.shape(op.self.shape)
    return source if source.dims and all(shape[d] != 1 for d in source.dims) else None


def _flatten(op: FlatOperator) -> Result:
    """Rule 1 for dims by number."""
    source = _source(op)
    if source is None:
        return None
    first, last = (dim % op.self.ndim for dim in (op.start_dim, op.end_dim))
    begin, end = source.dim(first), source.dim(last + 1)
    if op.source(op.self) is not None and not first <= source.place <= last:
        joined = source.tensor.flatten(begin, end - 1)
        return source.at(joined, source.place - (last - first) * (last < source.place))
    if not all(begin <= dim < end for dim in source.dims):
        return None
    extents = source.shape(op.self.shape)[begin:end]
    return Unflattened(source.tensor, begin, extents, tuple(dim - begin for dim in source.dims))


def _view(op: FlatOperator) -> Result:
    sizes = op.arguments.get("size", op.arguments.get("shape"))
    return None if sizes is None else _reshape(op, sizes)  # a view as another type has none


def _view_as(op: FlatOperator) -> Result:
    return _reshape(op, [op.other.size(dim) for dim in range(op.other.ndim)]) if op.other.dims else None


def _unflatten(op: FlatOperator) -> Result:
    dim = op.dim % op.self.ndim
    if dim in op.self.dims and -1 in op.sizes:
        return None
    others = [op.self.size(d) if d != dim else 0 for d in range(op.self.ndim)]
    return _reshape(op, [*others[:dim], *op.sizes, *others[dim + 1 :]])


def _reshape(op: FlatOperator, sizes: Sequence[Any]) -> Result:
    """Rules 1 and 3 for a shape."""
    source = _source(op)
    if source is None:
        return None
    shape = source.shape(op.self.shape)
    aligned = [
        (_without_batch_of_one(op, source, before), after) for before, after in align(shape, op.value.shape)
    ]
    groups = [group for group in aligned if set(group[0]) & set(source.dims)]
    if all(len(before) == len(after) == 1 for before, after in groups):
        if _loses_batch_of_one(op, groups[0][1][0]):
            return _with_batch_of_one(op, groups[0][1][0], sizes)
        where = {before[0]: after[0] for before, after in groups}
        return _taken_apart(op, tuple(where[dim] for dim in source.dims), sizes)
    is_flat, is_map = len(groups) == 1 == len(groups[0][1]), op.source(op.self) is None
    if (is_map or not is_flat) and (windows := _windows(op, source, groups, sizes)) is not None:
        return windows
    if not is_flat:
        return None
    joined, place = groups[0][0], groups[0][1][0]
    extents = [source.tensor.size(dim) for dim in joined]
    tensor = source.tensor.reshape([*sizes[:place], *extents, *sizes[place + 1 :]])
    return Unflattened(tensor, place, tuple(shape[d] for d in joined), tuple(d - joined[0] for d in source.dims))


def _without_batch_of_one(op: FlatOperator, source: Unflattened, joined: range) -> range:
    """The dims from a stream axis on that a reshape joins, in a model bound to a batch of one before it (rule 5).

    An example: [3, 1, H*W, C] that becomes [3, H, W, C], or [1, T, C, H, W] that becomes [T, C, H, W].
    """
    axes = [dim for dim in joined if dim in source.dims]
    if not op.bound or len(axes) != 1 or _is_line(op):
        return joined
    is_one = all(source.shape(op.self.shape)[dim] == 1 for dim in joined if dim < axes[0])
    return range(axes[0], joined.stop) if is_one else joined


def _loses_batch_of_one(op: FlatOperator, place: int) -> bool:
    """Whether a reshape joins the only axis and a batch of one, [T, 1, C] to [T, C], as a larger batch."""
    is_lost = len(op.value.shape) < op.self.ndim and op.value.shape[place + 1 : place + 2] != (1,)
    return op.bound and _is_line(op) and is_lost and op.self.shape[op.self.dims[0] + 1 :][:1] == (1,)


def _is_line(op: FlatOperator) -> bool:
    """Whether the tensor has one stream axis, and is not flat."""
    return op.source(op.self) is None and len(op.self.dims) == 1


def _with_batch_of_one(op: FlatOperator, place: int, sizes: Sequence[Any]) -> Unflattened:
    """Rule 1 for both."""
    pair = range(op.self.dims[0], op.self.dims[0] + 2)
    tensor = op.self.reshape([*sizes[:place], *map(op.self.size, pair), *sizes[place + 1 :]])
    return Unflattened(tensor, place, op.self.shape[pair[0] : pair[-1] + 1], (0,))


def _taken_apart(op: FlatOperator, dims: tuple[int, ...], sizes: Sequence[Any]) -> Proxy | None:
    """Rule 3: the stream axes of a flat tensor are `dims` of the result."""
    source = op.source(op.self)
    free = [dim for dim in dims if sizes[dim] == -1]
    is_axis = [dim in free or _is_extent(op, sizes[dim], axis) for axis, dim in enumerate(dims)]
    if source is None or len(free) > 1 or not all(is_axis):
        return None
    extents = {dim: source.tensor.size(before) for dim, before in zip(dims, source.dims, strict=True)}
    if source.place and isinstance(sizes[0], Size) and op.self.shape[0] == op.value.shape[0]:
        extents[0] = source.tensor.size(0)
    image = source.tensor.reshape([extents.get(dim, size) for dim, size in enumerate(sizes)])
    op.draft.values[image.node] = replace(op.value, dims=dims)
    return image


def _windows(
    op: FlatOperator, source: Unflattened, groups: Sequence[tuple[range, range]], sizes: Sequence[Any]
) -> Proxy | None:
    """Rule 6: the source with each stream axis kept, split, or joined with dims after it."""
    result, dims, shape = source.tensor, {}, source.shape(op.self.shape)
    if op.source(op.self) is None and _is_of_a_map(op, groups):
        return None
    for before, after in groups[::-1]:
        axes = [axis for axis, dim in enumerate(source.dims) if dim in before]
        free = next((dim for dim in after if _may_be_extent(op, sizes[dim], axes[0])), None)
        inner = [sizes[dim] for dim in after if dim != free]
        is_constant = all(isinstance(size, int) and size > 0 for size in inner)
        if len(axes) > 1 or free is None or not is_constant or min(len(before), len(after)) > 1:
            return None
        dims[axes[0]] = free
        if len(before) > 1:
            result = result.flatten(before[0], before[-1])
        elif inner:
            result = result.unflatten(before[0], [-1 if dim == free else sizes[dim] for dim in after])
    rest = [group for group in align(shape, op.value.shape) if group not in groups]
    image = result if all(len(one) == len(other) == 1 for one, other in rest) else result.reshape(sizes)
    op.draft.values[image.node] = replace(op.value, dims=tuple(dims[axis] for axis in range(len(dims))))
    return image


def _is_of_a_map(op: FlatOperator, groups: Sequence[tuple[range, range]]) -> bool:
    """Whether the only axis is joined to the batch before it, or is of all positions of a map, and no line."""
    joined, parts = groups[0]
    is_after_batch = len(parts) == 1 and joined[0] not in op.self.dims
    return len(op.self.dims) == 1 and (is_after_batch or op.draft.axes > 1)


def _may_be_extent(op: FlatOperator, number: Any, axis: int) -> bool:
    return number == -1 if isinstance(number, int) and number < 1 else _is_extent(op, number, axis)


def _is_extent(op: FlatOperator, number: Any, axis: int) -> bool:
    """Rule 5: whether a size is by its origin that of a stream axis, times or by a constant."""
    if not isinstance(number, Size):
        return op.bound
    sizes = [node.args for node in _sizes_in(number.node)]
    of_axes = [(op.proxy(tensor).dims, dim) for tensor, dim in sizes]
    axes = {dims.index(dim) if dim in dims else None for dims, dim in of_axes}
    return all(dims for dims, _ in of_axes) and axes <= {axis, None} and axis in axes


def _sizes_in(number: fx.Node) -> list[fx.Node]:
    """The sizes of tensors that an integer is made of."""
    if number.target is torch.ops.aten.sym_size.int:
        return [number]
    return [size for node in number.all_input_nodes for size in _sizes_in(node)]


def _size(op: FlatOperator) -> Result:
    """A size of a flat tensor, from its source."""
    source = op.only("self")
    return source and reduce(operator.mul, map(source.tensor.size, source.apart([op.dim % op.self.ndim])))


HANDLERS: dict[str, Handler] = {
    "flatten": _flatten,
    **dict.fromkeys(("view", "reshape", "_unsafe_view"), _view),
    **dict.fromkeys(("view_as", "reshape_as"), _view_as),
    "unflatten": _unflatten,
    "sym_size": _size,
}
"""Per operator, what it flattens or takes apart."""
