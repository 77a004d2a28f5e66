"""Operators that only move dims around: permute, transpose, view, flatten, squeeze, expand, select.

They are local as long as every tiled dim stays a dim of its own. Size arguments follow the tile.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from fxstream.geometry.receptive_field import IDENTITY
from fxstream.rules.access import Read, Value
from fxstream.rules.patterns import Moved
from fxstream.rules.reasons import NotTileable, Reason
from fxstream.rules.rule import Answer, Call, RuleTable

__all__ = ["add_rules", "moved"]


def add_rules(table: RuleTable) -> None:
    """Permutations and reshapes."""
    for name in ("permute", "movedim", "moveaxis"):
        table.add(f"aten::{name}", "shuffled", permute)
    for name in ("transpose", "swapaxes", "swapdims"):
        table.add(f"aten::{name}", "shuffled", transpose)
    for name in ("view", "reshape", "_unsafe_view"):
        table.add(f"aten::{name}", "shuffled", reshape)
    for name in ("flatten", "unflatten"):
        table.add(f"aten::{name}", "shuffled", flatten)
    table.add("aten::squeeze", "shuffled", squeeze)
    table.add("aten::unsqueeze", "shuffled", unsqueeze)
    table.add("aten::expand", "shuffled", expand)
    table.add("aten::repeat", "shuffled", repeat)
    table.add("aten::select", "shuffled", select)


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


def _as_list(given: int | Sequence[int]) -> list[int]:
    return [given] if isinstance(given, int) else list(given)


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


def reshape(call: Call) -> Answer:
    """Any change of shape that keeps each tiled dim a dim of its own."""
    image: Value = call["self"]
    if "dtype" in call.arguments:
        return NotTileable(Reason.READS_BITS)
    dims = _follow_dims(image.shape, call.shape, image.dims)
    if dims is None:
        return NotTileable(Reason.JOINS_TILED_DIM, (), (list(image.shape), list(call.shape)))
    return moved(call, image, dims, "size" if "size" in call.arguments else "shape")


def flatten(call: Call) -> Answer:
    """Joins or splits dims other than tiled dims; its arguments name dims, not sizes of the image."""
    image: Value = call["self"]
    if "sizes" in call.arguments and call["dim"] % len(image.shape) in image.dims:
        return NotTileable(Reason.SPLITS_TILED_DIM)
    answer = reshape(call)
    return replace(answer, size=None) if isinstance(answer, Moved) else answer


def unsqueeze(call: Call) -> Answer:
    """A new dim of size 1."""
    image: Value = call["self"]
    new = call["dim"] % len(call.shape)
    return moved(call, image, tuple(d + (d >= new) for d in image.dims))


def squeeze(call: Call) -> Answer:
    """Removes dims of size 1; on a tile exactly the dims it removes from the whole map."""
    image: Value = call["self"]
    rank = len(image.shape)
    given = _as_list(call.arguments.get("dim", list(range(rank))))
    gone = [d % rank for d in given if image.shape[d % rank] == 1]
    if set(gone) & set(image.dims):
        return NotTileable(Reason.SQUEEZES_TILED_DIM)
    pattern = moved(call, image, tuple(d - sum(g < d for g in gone) for d in image.dims))
    return replace(pattern, target=torch.ops.aten.squeeze.dims, replaced={"dim": gone})


def _follow_dims(before: Sequence[int], after: Sequence[int], dims: tuple[int, ...]) -> tuple[int, ...] | None:
    """Where tiled dims end up in a reshape; None where one is joined, split or of ambiguous size 1.

    Both shapes are read from the left in blocks of equal product; a stream dim must be a block of its own.

    >>> _follow_dims((2, 12, 5, 7), (2, 3, 4, 5, 7), (2, 3))
    (3, 4)
    >>> _follow_dims((2, 12, 5, 7), (2, 12, 35), (2, 3)) is None
    True
    """
    if tuple(before) == tuple(after):
        return dims
    if any(before[d] == 1 for d in dims):
        return None
    old = [d for d in range(len(before)) if before[d] != 1]
    new = [d for d in range(len(after)) if after[d] != 1]
    where: dict[int, int] = {}
    i = j = 0
    while i < len(old) and j < len(new):
        first_i, first_j = i, j
        left, right = before[old[i]], after[new[j]]
        while left != right:
            if left < right:
                i += 1
                left *= before[old[i]]
            else:
                j += 1
                right *= after[new[j]]
        if i == first_i and j == first_j:
            where[old[i]] = new[j]
        i, j = i + 1, j + 1
    return tuple(where[d] for d in dims) if all(d in where for d in dims) else None


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
    if any(call["repeats"][d] != 1 for d in dims):
        return NotTileable(Reason.REPEATS_TILED_DIM)
    return moved(call, image, dims)


def select(call: Call) -> Answer:
    """One index of a dim that is not a tiled dim."""
    image: Value = call["self"]
    dim = call["dim"] % len(image.shape)
    if dim in image.dims:
        return NotTileable(Reason.SELECTS_POSITION, (), (image.dims.index(dim),))
    return moved(call, image, tuple(d - (d > dim) for d in image.dims))
