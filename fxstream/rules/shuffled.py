"""Operators that only move dims around: permute, transpose, view, flatten, squeeze, expand, select, index.

They are local as long as every tiled dim stays a dim of its own. Size arguments follow the tile. `unflatten` may
also split a tiled dim in windows of a few pixels each, [.., 28, ..] to [.., 4, 7, ..], of which the first is
tiled, and `flatten` may join them again; `lowering.positions.reshapes` makes these two of other reshapes. Where it
is split in a few parts, and the second dim is tiled, pixels beside each other in the result are far apart in the
input: that is no local operator, but a region may start after it. So it may after a reshape that joins all tiled
dims: the positions of a map in one dim, as tokens, are one tiled dim.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import torch

from fxstream.geometry.receptive_field import IDENTITY, AxisExtent, AxisMap
from fxstream.rules.access import OutputSpan, Read, Value
from fxstream.rules.patterns import Moved, Resampled, Windowed
from fxstream.rules.reasons import NotTileable, Reason
from fxstream.rules.rule import Answer, Call, RuleTable

__all__ = ["add_rules", "align", "indexed", "moved"]


def add_rules(table: RuleTable) -> None:
    """Permutations and reshapes."""
    for name in ("permute", "movedim", "moveaxis"):
        table.add(f"aten::{name}", "shuffled", permute)
    for name in ("transpose", "swapaxes", "swapdims"):
        table.add(f"aten::{name}", "shuffled", transpose)
    for name in ("mT", "numpy_T", "t"):
        table.add(f"aten::{name}", "shuffled", transpose_last)
    for name in ("view", "reshape", "_unsafe_view"):
        table.add(f"aten::{name}", "shuffled", reshape)
    table.add("aten::flatten", "shuffled", flatten)
    table.add("aten::unflatten", "shuffled", unflatten)
    table.add("aten::squeeze", "shuffled", squeeze)
    table.add("aten::unsqueeze", "shuffled", unsqueeze)
    table.add("aten::expand", "shuffled", expand)
    table.add("aten::repeat", "shuffled", repeat)
    table.add("aten::select", "shuffled", select)
    table.add("aten::index", "shuffled", index)


def moved(call: Call, image: Value, dims: tuple[int, ...], size: str | None = None) -> Moved:
    """The pattern of an operator that reads the same pixels and leaves the tiled dims at `dims`."""
    argument = next(name for name, _, value in call.tensors() if value.name == image.name)
    read = Read(argument, image, image.dims, (IDENTITY,) * len(image.dims))
    return Moved(dims, (read,), size)


def permute(call: Call) -> Answer:
    """Any permutation of dims, also given as source and destination."""
    image: Value = call["self"]
    rank = len(image.shape)
    if "dims" in call.arguments:
        order = [d % rank for d in call["dims"]]
    else:
        source, destination = _as_list(call["source"]), _as_list(call["destination"])
        order = _moved_order(rank, [d % rank for d in source], [d % rank for d in destination])
    return moved(call, image, tuple(order.index(d) for d in image.dims))


def _as_list(dims: int | Sequence[int]) -> list[int]:
    return [dims] if isinstance(dims, int) else list(dims)


def _moved_order(rank: int, source: list[int], destination: list[int]) -> list[int]:
    """The permutation that puts dim ``source[i]`` at ``destination[i]`` and keeps the order of the rest."""
    rest = iter(d for d in range(rank) if d not in source)
    placed = dict(zip(destination, source, strict=True))
    return [placed[d] if d in placed else next(rest) for d in range(rank)]


def transpose(call: Call) -> Answer:
    """Exchange of two dims."""
    image: Value = call["self"]
    pair = [call[name] % len(image.shape) for name in ("dim0", "axis0") if name in call.arguments]
    pair += [call[name] % len(image.shape) for name in ("dim1", "axis1") if name in call.arguments]
    swap = {pair[0]: pair[1], pair[1]: pair[0]}
    return moved(call, image, tuple(swap.get(d, d) for d in image.dims))


def transpose_last(call: Call) -> Answer:
    """Exchange of the last two dims, of all where there are only two; `numpy_T` reverses any number of them."""
    image: Value = call["self"]
    rank, reverses = len(image.shape), call.target._schema.name == "aten::numpy_T"
    first = 0 if reverses else max(0, rank - 2)
    return moved(call, image, tuple(d if d < first else first + rank - 1 - d for d in image.dims))


def reshape(call: Call) -> Answer:
    """Any change of shape that keeps each tiled dim a dim of its own."""
    image: Value = call["self"]
    if "dtype" in call.arguments:
        return NotTileable(Reason.READS_BITS)
    dims = _follow_dims(image.shape, call.shape, image.dims)
    if dims is None:
        left = _of_positions(image.shape, call.shape, image.dims)
        return NotTileable(Reason.JOINS_TILED_DIM, left, (list(image.shape), list(call.shape)))
    return moved(call, image, dims, "size" if "size" in call.arguments else "shape")


def flatten(call: Call) -> Answer:
    """Joins dims, one tiled dim with dims after it at most."""
    image: Value = call["self"]
    first, last = (call[name] % len(image.shape) for name in ("start_dim", "end_dim"))
    joined, dims = set(range(first, last + 1)) & set(image.dims), _after_join(image.dims, first, last)
    if joined == {first}:
        pixels = [math.prod(image.shape[first + 1 : last + 1]) if d == first else 1 for d in image.dims]
        read = Read("self", image, image.dims, tuple(AxisMap(1, p, 0, 0) for p in pixels))
        spans, extents = (OutputSpan(p, 0, p) for p in pixels), (AxisExtent(p, 1, 0) for p in pixels)
        return Resampled(dims, (read,), tuple(spans), tuple(extents))
    answer = reshape(call)
    if isinstance(answer, Moved):
        return replace(answer, size=None)
    return replace(answer, dims=dims) if joined == {last} and isinstance(answer, NotTileable) else answer


def _after_join(dims: tuple[int, ...], first: int, last: int) -> tuple[int, ...]:
    """Where dims are once `first` to `last` are one."""
    return tuple(d if d <= first else max(first, d - (last - first)) for d in dims)


def unflatten(call: Call) -> Answer:
    """Splits a dim, a tiled dim where one of its parts is free: ``unflatten(1, [-1, 7])``."""
    image: Value = call["self"]
    dim, (windows, *sizes) = call["dim"] % len(image.shape), call["sizes"]
    dims = tuple(d + len(sizes) * (d > dim) for d in image.dims)
    if dim not in image.dims:
        return moved(call, image, dims)
    if windows != -1:
        dims = tuple(d + len(sizes) * (d == dim) for d in dims)
        return NotTileable(Reason.SPLITS_TILED_DIM, dims if sizes[-1:] == [-1] else ())
    pixels = [math.prod(sizes) if d == dim else 1 for d in image.dims]
    read = Read("self", image, image.dims, tuple(AxisMap(p, 1, 0, p - 1) for p in pixels))
    return Windowed(dims, (read,), tuple(AxisExtent(1, p, 0) for p in pixels))


def unsqueeze(call: Call) -> Answer:
    """A new dim of size 1."""
    image: Value = call["self"]
    new = call["dim"] % len(call.shape)
    return moved(call, image, tuple(d + (d >= new) for d in image.dims))


def squeeze(call: Call) -> Answer:
    """Removes dims of size 1; on a tile exactly the dims it removes from the whole map."""
    image: Value = call["self"]
    rank = len(image.shape)
    squeezed = _as_list(call.arguments.get("dim", list(range(rank))))
    removed = [d % rank for d in squeezed if image.shape[d % rank] == 1]
    if set(removed) & set(image.dims):
        return NotTileable(Reason.SQUEEZES_TILED_DIM)
    pattern = moved(call, image, tuple(d - sum(g < d for g in removed) for d in image.dims))
    return replace(pattern, target=torch.ops.aten.squeeze.dims, replaced={"dim": removed})


def _follow_dims(before: Sequence[int], after: Sequence[int], dims: tuple[int, ...]) -> tuple[int, ...] | None:
    """Where tiled dims end up in a reshape; None where one is joined, split or of ambiguous size 1.

    >>> _follow_dims((2, 12, 5, 7), (2, 3, 4, 5, 7), (2, 3))
    (3, 4)
    >>> _follow_dims((2, 12, 5, 7), (2, 12, 35), (2, 3)) is None
    True
    """
    if tuple(before) == tuple(after):
        return dims
    old, new = ([d for d, size in enumerate(shape) if size != 1] for shape in (before, after))
    groups = align([before[d] for d in old], [after[d] for d in new])
    where = {old[one[0]]: new[other[0]] for one, other in groups if len(one) == len(other) == 1}
    return tuple(where[d] for d in dims) if all(d in where for d in dims) else None


def _of_positions(before: Sequence[int], after: Sequence[int], dims: tuple[int, ...]) -> tuple[int, ...]:
    """The dims of a reshaped tensor that positions lie along; none where they lie along channels too.

    >>> _of_positions((2, 12, 5, 7), (2, 12, 35), (2, 3)), _of_positions((2, 12, 5, 7), (2, 420), (2, 3))
    ((2,), ())
    """
    groups = [group for group in align(before, after) if set(group[0]) & set(dims)]
    joined = [dim for group, _ in groups for dim in group]
    positions = (dim for _, group in groups for dim in group if after[dim] != 1)
    return tuple(positions) if set(joined) == set(dims) else ()


def align(before: Sequence[int], after: Sequence[int]) -> list[tuple[range, range]]:
    """Which dims of a shape become which of another in a reshape, in the smallest groups of equal product.

    Both shapes are read from the left; what is left of one of them at the end, dims of size 1, is part of the last
    group. A group that no further dims complete (one shape has no elements) ends the list and is not in it.

    >>> align((2, 12, 5, 7), (2, 3, 4, 35))
    [(range(0, 1), range(0, 1)), (range(1, 2), range(1, 3)), (range(2, 4), range(3, 4))]
    """
    groups: list[tuple[range, range]] = []
    i = j = 0
    while i < len(before) and j < len(after):
        start_i, start_j = i, j
        i, j = i + 1, j + 1
        while (left := math.prod(before[start_i:i])) != (right := math.prod(after[start_j:j])):
            i, j = i + (left < right), j + (left > right)
            if i > len(before) or j > len(after):
                return groups
        groups.append((range(start_i, i), range(start_j, j)))
    if groups:
        (one, other) = groups[-1]
        groups[-1] = (range(one.start, len(before)), range(other.start, len(after)))
    return groups


def expand(call: Call) -> Answer:
    """Broadcast of dims of size 1 that are not tiled dims."""
    image: Value = call["self"]
    missing = len(call.shape) - len(image.shape)
    dims = tuple(d + missing for d in image.dims)
    if any(call.shape[new] != image.shape[old] for new, old in zip(dims, image.dims, strict=True)):
        return NotTileable(Reason.EXPANDS_TILED_DIM)
    return moved(call, image, dims, "size")


def repeat(call: Call) -> Answer:
    """Repetition along dims that are not tiled dims."""
    image: Value = call["self"]
    missing = len(call.shape) - len(image.shape)
    dims = tuple(d + missing for d in image.dims)
    if repeated := [d for d in dims if call["repeats"][d] != 1]:
        return NotTileable(Reason.REPEATS_TILED_DIM, dims, (repeated,))
    return moved(call, image, dims)


def select(call: Call) -> Answer:
    """One index of a dim that is not a tiled dim."""
    image: Value = call["self"]
    dim = call["dim"] % len(image.shape)
    if dim in image.dims:
        return NotTileable(Reason.SELECTS_POSITION, (), (image.dims.index(dim),))
    return moved(call, image, tuple(d - (d > dim) for d in image.dims))


def index(call: Call) -> Answer:
    """Entries of dims that are not tiled dims, as `x[:, [2, 1, 0]]` takes channels."""
    image, indices = call["self"], call["indices"]
    lists = [one for one in indices if one is not None]
    if not image.dims or any(one.dims or one.dtype == torch.bool for one in lists):
        return NotTileable(Reason.READS_DATA_POSITIONS)
    where = indexed([one is not None for one in indices], len(image.shape), max(len(one.shape) for one in lists))
    if any(where[dim] is None for dim in image.dims):
        return NotTileable(Reason.GATHERS_TILED_DIM)
    return moved(call, image, tuple(where[dim] for dim in image.dims))  # type: ignore[misc]


def indexed(is_indexed: Sequence[bool], rank: int, rank_of_indices: int) -> list[int | None]:
    """Where the dims of a tensor are in the result of `aten.index`; None for those that are indexed.

    The dims of the indices stand where the first indexed dim was, in front where indexed dims are not neighbours.

    >>> indexed([False, True], 4, 2)
    [0, None, 3, 4]
    >>> indexed([True, False, True], 4, 1)
    [None, 1, None, 2]
    """
    chosen = [dim for dim, is_one in enumerate(is_indexed) if is_one]
    first = chosen[0] if chosen[-1] - chosen[0] < len(chosen) else 0
    kept = [dim for dim in range(rank) if dim not in chosen]
    places = {dim: i + rank_of_indices * (i >= first) for i, dim in enumerate(kept)}
    return [places.get(dim) for dim in range(rank)]
