"""Whether two arrays are the same memory, file or store, whether two writes into one meet, and whether an array is
a copy that nothing else sees.

numpy is looked at where the process has imported it, as every process with a numpy array has.
"""

from __future__ import annotations

import itertools
import os
import sys
from typing import Any

import torch

from fxstream.io.source import Source, attribute
from fxstream.io.target import Target

__all__ = ["is_in_memory_only", "share", "units_of"]

EFFORT = 100_000
"""Steps that numpy takes to decide whether two views share an element; undecided counts as shared."""


def share(one: Any, other: Any) -> bool:
    """Whether what is written into one array may change what is read of another: images, targets, tensors.

    Memory is compared by element; files and stores, of which parts are read and written in units, as a whole.
    """
    firsts, seconds = _arrays(one), _arrays(other)
    return any(a is b or _same_place(a, b) or _same_memory(a, b) for a in firsts for b in seconds)


def is_in_memory_only(array: Any) -> bool:
    """Whether an array is of numpy's own memory, neither a file's nor another object's: gone with the process.

    A slice of a zarr or HDF5 array is such a copy.
    """
    kind = _numpy_array_type()
    while kind is not None and isinstance(array, kind):
        if array.base is None:
            return True
        array = array.base
    return False


def units_of(array: Any, index: tuple[slice, ...]) -> frozenset[tuple[int, ...]]:
    """The chunks, or shards, that a write into a part of an array reads and writes whole, by their places.

    None of them for memory and its maps, where elements are written. An array that does not tell of chunks is one.
    """
    if isinstance(array, Target):
        return units_of(array.array, array.index(index))
    kind = _numpy_array_type()
    if kind is not None and isinstance(array, kind):
        return frozenset()
    sizes = attribute(array, "shards") or attribute(array, "chunks")
    if not sizes:
        return frozenset({()})
    axes = (range(part.start // size, -(-part.stop // size)) for part, size in zip(index, sizes, strict=True))
    return frozenset(itertools.product(*axes))


def _arrays(array: Any) -> list[Any]:
    """The arrays that an image or a target is made of."""
    if isinstance(array, Source):
        return list(array.arrays)
    return [array.array] if isinstance(array, Target) else [array]


def _numpy_array_type() -> Any:
    return getattr(sys.modules.get("numpy"), "ndarray", None)


def _same_place(one: Any, other: Any) -> bool:
    """Whether two arrays are the same zarr or HDF5 array, or two memory maps of the same part of a file."""
    place = _place(one)
    if place is not None:
        return place == _place(other)
    maps = [_whole_map(one), _whole_map(other)]
    if any(whole is None for whole in maps) or maps[0] is maps[1]:
        return False
    if os.path.realpath(maps[0].filename) != os.path.realpath(maps[1].filename):
        return False
    (start, stop), (begin, end) = ((m.offset, m.offset + m.nbytes) for m in maps)
    return bool(start < end and begin < stop)


def _place(array: Any) -> tuple[str, str] | None:
    """The store or the file of a zarr or HDF5 array, and its name there; None for others."""
    store = attribute(array, "store_path")
    if store is not None:
        return str(store), ""
    file = attribute(attribute(array, "file"), "filename")
    return (os.path.realpath(file), str(attribute(array, "name"))) if isinstance(file, str) else None


def _whole_map(array: Any) -> Any:
    """The memory map of a file that an array is a view of; None for others."""
    kind = getattr(sys.modules.get("numpy"), "memmap", None)
    while kind is not None and isinstance(array, kind):
        if not isinstance(array.base, kind):
            return array if array.filename is not None else None
        array = array.base
    return None


def _same_memory(one: Any, other: Any) -> bool:
    arrays = [_viewed(one), _viewed(other)]
    kind = _numpy_array_type()
    if kind is None or not all(isinstance(array, kind) for array in arrays):
        return False
    numpy = sys.modules["numpy"]
    try:
        return bool(numpy.shares_memory(*arrays, max_work=EFFORT))
    except RuntimeError:
        return True


def _viewed(array: Any) -> Any:
    """The memory of a tensor of the host as an array; others as they are."""
    if not isinstance(array, torch.Tensor) or array.device.type != "cpu" or array.layout != torch.strided:
        return array
    real = torch.view_as_real(array.detach()) if array.is_complex() else array.detach()
    return real.view({1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[real.itemsize]).numpy()
