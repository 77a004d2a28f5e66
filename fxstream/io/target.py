"""Parts of arrays as the places for results, where a slice of the array would be a copy (zarr, h5py, netCDF4)."""

from __future__ import annotations

from typing import Any

import torch

from fxstream.errors import InputError
from fxstream.io.source import as_tensor, attribute, is_array

__all__ = ["Target", "target"]


class Target:
    """A part of an array that takes a result; made by `target`."""

    def __init__(self, array: Any, parts: tuple[int | range, ...], dims: tuple[int | None, ...]) -> None:
        """`parts` are what is taken of each axis, `dims` the axis of each dim of the part, None for a new one."""
        self.array, self.dtype = array, array.dtype
        self._parts, self._dims = parts, dims
        extents = [len(part) if isinstance(part, range) else 1 for part in parts]
        self.shape = tuple(1 if axis is None else extents[axis] for axis in dims)

    def __getitem__(self, box: tuple[slice, ...]) -> torch.Tensor:
        values = as_tensor(self.array[self.index(box)])
        return values.reshape([len(range(*b.indices(size))) for b, size in zip(box, self.shape, strict=True)])

    def __setitem__(self, box: tuple[slice, ...], values: Any) -> None:
        index = self.index(box)
        self.array[index] = values.reshape([part.stop - part.start for part in index])

    def flush(self) -> None:
        """Bring what is written to the array's file."""
        for flush in flushes(self.array):
            flush()

    def __repr__(self) -> str:
        return f"Target({type(self.array).__name__}, {list(self.shape)}, {self.dtype})"

    def index(self, box: tuple[slice, ...]) -> tuple[slice, ...]:
        """What a box of the part is in the array, one slice per axis."""
        bounds = {axis: part for axis, part in zip(self._dims, box, strict=True) if axis is not None}
        index = []
        for axis, part in enumerate(self._parts):
            if isinstance(part, range):
                inside = part[bounds[axis]]
                index.append(slice(inside.start, inside.stop))
            else:
                index.append(slice(part, part + 1))
        return tuple(index)


def target(array: Any, index: Any) -> Target:
    """A part of an array as the place for a result of `infer`.

    ``zarr_array[3:4]`` is a copy, and what is written into it is lost; ``fxstream.target(zarr_array,
    numpy.s_[3:4])`` is written to the array. `index` is what would stand in the brackets: integers (that axis
    is left out), slices without a step, None (a new axis of size 1), and an ellipsis. So a result [1, 1, H, W]
    goes into plane 3 of an array [Z, H, W] by ``fxstream.target(array, (None, slice(3, 4)))``.

    Raises `InputError` for an index of another kind or outside of the array.

    >>> import numpy
    >>> target(numpy.zeros((5, 40, 60)), numpy.s_[None, 3:4, :, 10:]).shape
    (1, 1, 40, 50)
    """
    if not is_array(array):
        raise InputError(f"a target needs an array with shape, dtype and slices; found {type(array).__name__}")
    entries = list(index) if isinstance(index, tuple) else [index]
    missing = len(array.shape) - sum(entry is not None and entry is not ... for entry in entries)
    if missing < 0 or entries.count(...) > 1:
        raise InputError(f"the index {index!r} does not fit an array of shape {list(array.shape)}")
    place = entries.index(...) if ... in entries else len(entries)
    entries[place : place + 1] = [slice(None)] * missing
    parts: list[int | range] = []
    dims: list[int | None] = []
    for entry in entries:
        if entry is None:
            dims.append(None)
            continue
        part = _part(entry, len(parts), array)
        dims += [len(parts)] if isinstance(part, range) else []
        parts.append(part)
    return Target(array, tuple(parts), tuple(dims))


def _part(entry: Any, axis: int, array: Any) -> int | range:
    """What an entry of an index takes of an axis. Raises `InputError` for another entry than `target` says."""
    pixels = range(array.shape[axis])
    try:
        part: int | range = pixels[entry]
    except (IndexError, TypeError):
        part = range(0)
    if isinstance(part, range) and (part.step != 1 or not part):
        raise InputError(
            f"the index {entry!r} of axis {axis} takes no part of an array of shape {list(array.shape)}: give"
            " integers inside of it, slices without a step, None or ..."
        )
    return part


def flushes(array: Any) -> list[Any]:
    """What brings an array's values to its file: its own flush, or its file's."""
    methods = (attribute(array, "flush"), attribute(attribute(array, "file"), "flush"))
    return [flush for flush in methods if callable(flush)]
