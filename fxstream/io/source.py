"""Images that are arrays outside of the device's memory: on disk, compressed, larger than all of it.

`Source` stands in the place of an input tensor [N, C, spatial dims...]. It wraps anything with `shape`, `dtype`
and slices (numpy memmap, zarr, h5py, tifffile's zarr view, dask), or several of one shape as a batch. Values
keep their type until they are on the device: normalisation belongs to the model.
"""

from __future__ import annotations

import copy
import os
import sys
import warnings
from collections.abc import Sequence
from typing import Any

import torch

from fxstream.errors import InputError, StreamError, StreamingWarning
from fxstream.geometry.box import Box
from fxstream.io.blocks import chunk_edges, groups_of
from fxstream.io.layout import LARGEST_AXES, checked_batch, checked_layout
from fxstream.io.skip import Skip
from fxstream.machine.copies import staged
from fxstream.machine.device import cores

__all__ = [
    "LARGEST_AXES",
    "Source",
    "as_tensor",
    "attribute",
    "describe",
    "is_array",
    "source",
    "torch_dtype",
]

PARALLEL = frozenset({"dask", "fxstream", "numpy", "tensorstore", "torch", "zarr"})
"""Packages whose arrays several threads may read at once, and are read faster for it."""
MOST_READERS = 8
"""Threads that read such an array, unless the user says how many."""


class Source:
    """An array as an image [N, C, spatial dims...] of a torch type, of which boxes are read; made by `source`.

    It is read in groups of entries along N, each of one array: `groups` are their lengths. `readers` is how many
    threads may read at once, `order` the dims as they lie in the array.
    """

    def __init__(
        self,
        arrays: Sequence[Any],
        layout: str,
        batch: Sequence[int] | None = None,
        dtype: torch.dtype | None = None,
        readers: int | None = None,
    ) -> None:
        self.arrays, self._layout, self._converted = arrays, layout, dtype
        self.stored = torch_dtype(arrays[0].dtype)
        self.dtype = dtype or self.stored
        self.device = torch.device("cpu")
        self.readers = min(map(_readers_of, arrays)) if readers is None else readers
        self._skip: Skip | None = None
        self._axes = ("N", "C", *(axis for axis in layout if axis not in "NC"))
        extents = dict(zip(layout, arrays[0].shape, strict=True))
        rows = list(batch) if batch is not None else list(range(extents.get("N", 1)))
        edges = self._edges(arrays[0]).get("N")
        self._groups = [(array, group) for array in arrays for group in groups_of(rows, edges)]
        self.groups = tuple(len(group) for _, group in self._groups)
        extents |= {"N": sum(self.groups)} | {"C": extents.get("C", 1)}
        self.shape = torch.Size(extents[axis] for axis in self._axes)
        missing = [axis for axis in "NC" if axis not in layout]
        self.order = tuple(self._axes.index(axis) for axis in (*missing, *layout))

    @property
    def ndim(self) -> int:
        """Number of dims, with batch and channels."""
        return len(self.shape)

    @property
    def requires_grad(self) -> bool:
        """Never: an array has no gradient."""
        return False

    @property
    def chunk_edges(self) -> tuple[tuple[int, ...] | None, ...]:
        """Where chunks of the array begin and end, along all dims but N; None along dims that are not chunked."""
        edges = self._edges(self.arrays[0])
        return tuple(edges.get(axis) for axis in self._axes[1:])

    def to(self, device: torch.device) -> Source:
        """The same image, whose boxes arrive on that device."""
        moved = copy.copy(self)
        moved.device = device
        return moved

    def skipping(self, skip: Skip) -> Source:
        """The same image with what `skip` says in the place of some pixels, which are not read."""
        filled = copy.copy(self)
        filled._skip = skip
        return filled

    def __getitem__(self, box: tuple[slice, ...]) -> torch.Tensor:
        """A box of the image as a tensor of its own, on the device; slices of all dims or of the first ones."""
        stored = self.read(box)
        self.require_complete()
        return self.place(staged(stored, self.device))

    def read(self, box: tuple[slice, ...]) -> torch.Tensor:
        """A box as it is stored, in host memory. Raises `StreamError` where the array fails, naming both."""
        samples, *bounds = (range(part.start, part.stop) for part in Box.of(box, self.shape))
        parts, first = [], 0
        for group, length in enumerate(self.groups):
            part = range(max(samples.start - first, 0), min(samples.stop - first, length))
            parts += [self.read_group(group, bounds, part)] if part else []
            first += length
        return torch.cat(parts) if len(parts) > 1 else parts[0].clone(memory_format=torch.contiguous_format)

    def read_group(self, group: int, bounds: Sequence[range], part: range | None = None) -> torch.Tensor:
        """A box [entries, C, spatial dims...] of a group, or of a part of it; it may be a view of the array."""
        array, rows = self._groups[group]
        rows = rows if part is None else rows[part.start : part.stop]
        skip = None if self._skip is None else self._skip.of(bounds[1:])
        if skip is not None and bool(skip.all()):
            return self._skip.filled(self.stored, len(rows), bounds)  # type: ignore[union-attr]
        values = self._read_rows(array, rows, bounds)
        if skip is not None and bool(skip.any()):
            values = torch.where(skip, self._skip.filled(values.dtype, 1, bounds), values)  # type: ignore[union-attr]
        return values

    def place(self, stored: torch.Tensor) -> torch.Tensor:
        """What was read, ready to be copied, on the device and in the type that the model is given."""
        moved = stored.to(self.device, non_blocking=True)
        return moved.to(self.dtype, memory_format=torch.contiguous_format).contiguous()

    def require_complete(self) -> None:
        """Raise `StreamError` where a store is gone that gives its fill value for what is not there (zarr)."""
        for array in self.arrays:
            place, zarr = attribute(array, "store_path"), sys.modules.get("zarr")
            if place is None or zarr is None:
                continue
            try:
                zarr.open_array(place, mode="r", zarr_format=array.metadata.zarr_format)
            except FileNotFoundError as error:
                raise StreamError(
                    f"{describe(array)} is gone since it was opened, and its chunks were read as its fill value:"
                    f" {type(error).__name__}: {error}"
                ) from error

    def _edges(self, array: Any) -> dict[str, tuple[int, ...]]:
        """Where the chunks of an array begin and end, by axis; empty where it has none."""
        edges = chunk_edges(array.shape, attribute(array, "chunks"))
        return {} if edges is None else dict(zip(self._layout, edges, strict=True))

    def _read_rows(self, array: Any, rows: Sequence[int], bounds: Sequence[range]) -> torch.Tensor:
        """A box [rows, C, spatial dims...] of an array, read at once."""
        bounds_of = dict(zip(self._axes, (range(min(rows), max(rows) + 1), *bounds), strict=True))
        index = tuple(slice(bounds_of[axis].start, bounds_of[axis].stop) for axis in self._layout)
        values = self._sliced(array, index)
        turned = values[(None,) * (self.ndim - values.ndim)].permute(
            [self.order.index(d) for d in range(self.ndim)]
        )
        if list(rows) == list(bounds_of["N"]):
            return turned
        return turned[[row - min(rows) for row in rows]]

    def _sliced(self, array: Any, index: tuple[slice, ...]) -> torch.Tensor:
        """What an array gives for a slice. Raises `StreamError` where that is not what it says of itself."""
        try:
            sliced = array[index]
            values = as_tensor(sliced)
        except Exception as error:
            raise StreamError(f"{_reading(array, index)} failed: {type(error).__name__}: {error}") from error
        _warn_of_mask(array, sliced)
        if values.dtype != self.stored and self._converted is not None:
            values = values.to(self._converted)
        if values.dtype not in (self.stored, self._converted):
            raise StreamError(
                f"{_reading(array, index)} gave {values.dtype}, and the array says that it is {array.dtype}:"
                f" choose the type, as source(..., dtype={values.dtype})"
            )
        shape = [part.stop - part.start for part in index]
        if list(values.shape) != shape:
            raise StreamError(
                f"{_reading(array, index)} gave the shape {list(values.shape)}, needed {shape}: has the array"
                " shrunk?"
            )
        return values

    def __repr__(self) -> str:
        return f"Source({describe(self.arrays[0])}, {list(self.shape)}, {self.dtype})"


def source(
    *arrays: Any,
    layout: str | None = None,
    batch: Sequence[int] | None = None,
    dtype: torch.dtype | None = None,
    readers: int | None = None,
    skip: Any = None,
    fill: float | Sequence[float] = 0,
) -> Source:
    """Use an array in the place of an image tensor, or several arrays of one shape as a batch.

    An array has `shape`, `dtype` and slices: a numpy memmap, zarr, h5py, dask. `layout` names its axes in their
    order: N is the batch, C the channels, any other upper-case letter an axis of the image (``"HWC"``, ``"CZYX"``,
    ``"NHWC"``, ``"YX"``). Without a layout the array is what the model takes, mostly [N, C, spatial dims...].
    `batch` picks entries along N. Values keep the array's type, or are converted to `dtype` once they are on the
    device. An array whose slices are of another type than its `dtype` (scaled integers) needs `dtype`. Masks of
    masked arrays are dropped, with a warning.

    `readers` threads read at once: by default as many as there are cores, up to 8, for numpy, zarr, dask,
    tensorstore and the adapters of slides, and one for others, which may not allow more. They ask for whole chunks
    where an array has `chunks`, so that none is decoded twice in a pass.

    `skip` is a mask of the axes of the image, which may be coarser: where it is true the image is `fill` (a
    number, or one per channel), and a chunk of which nothing else is left is not read.

    Raises `InputError` for an object without shape, type or slices, for a type that torch does not have, and for a
    layout or a mask that does not fit.

    >>> source(torch.zeros(40, 60, 3, dtype=torch.uint8), layout="HWC").shape
    torch.Size([1, 3, 40, 60])
    """
    if not arrays:
        raise InputError("source needs an array")
    for array in arrays:
        if not _has_parts(array):
            raise InputError(f"an image source needs shape, dtype and slicing; found {type(array).__name__}")
        if tuple(array.shape) != tuple(arrays[0].shape) or array.dtype != arrays[0].dtype:
            listed = ", ".join(f"{list(array.shape)} {array.dtype}" for array in arrays)
            raise InputError(f"the arrays of a batch need one shape and type; found {listed}")
    layout = checked_layout(layout, tuple(arrays[0].shape))
    rows = checked_batch(batch)
    if rows is not None and ("N" not in layout or not rows):
        raise InputError(f"batch={batch!r} picks entries along N, and the layout is {layout!r}")
    if rows is not None and not all(0 <= row < arrays[0].shape[layout.index("N")] for row in rows):
        raise InputError(f"batch={batch!r} is outside of {arrays[0].shape[layout.index('N')]} entries along N")
    if readers is not None and (not isinstance(readers, int) or readers < 1):
        raise InputError(f"readers={readers!r} is no number of threads: give 1 or more")
    image = Source(arrays, layout, rows, dtype, readers)
    if not image.shape.numel():
        raise InputError(f"the image is empty: its shape is {list(image.shape)}")
    return image if skip is None else image.skipping(Skip.of_mask(skip, fill, image.shape, image.stored))


def _readers_of(array: Any) -> int:
    """How many threads may read an array at once, and are worth it here."""
    return min(cores(), MOST_READERS) if type(array).__module__.split(".")[0] in PARALLEL else 1


def is_array(argument: Any) -> bool:
    """Whether an argument can be read like an array and is no tensor."""
    return _has_parts(argument) and not isinstance(argument, torch.Tensor)


def _has_parts(argument: Any) -> bool:
    shape, dtype = attribute(argument, "shape"), attribute(argument, "dtype")
    return (
        hasattr(type(argument), "__getitem__")
        and dtype is not None
        and isinstance(shape, (tuple, list))
        and bool(shape)
    )


def attribute(array: Any, name: str) -> Any:
    """An attribute of a foreign object, None where there is none, whatever it raises then (netCDF4: KeyError)."""
    try:
        return getattr(array, name, None)
    except Exception:
        return None


def as_tensor(values: Any) -> torch.Tensor:
    """What an array gave for a slice, in the machine's order of bytes; tensors as they are."""
    if isinstance(values, torch.Tensor):
        return values
    numbers = values.__array__()
    odd = any(stride < 0 or stride % numbers.itemsize for stride in numbers.strides)  # torch has no such strides
    return torch.from_numpy(
        numbers.astype(
            numbers.dtype.newbyteorder("="), order="C" if odd else "K", copy=odd or not numbers.flags.writeable
        )
    )


def _warn_of_mask(array: Any, sliced: Any) -> None:
    """A warning where a slice has masked values; Python shows it once per array."""
    mask = attribute(sliced, "mask")
    if mask is not None and bool(mask.any()):
        warnings.warn(
            f"{describe(array)} has masked values, whose mask is dropped: the network reads what lies under it"
            " (fill them first, if that is no part of the image)",
            StreamingWarning,
            stacklevel=2,
        )


def _reading(array: Any, index: tuple[slice, ...]) -> str:
    """What is read, in words."""
    return f"reading [{', '.join(f'{part.start}:{part.stop}' for part in index)}] of {describe(array)}"


def describe(array: Any) -> str:
    """An array in words: what it is, and its file where it has one."""
    labels = (attribute(array, part) for part in ("filename", "path", "name"))
    where = next((f" {label}" for label in labels if isinstance(label, (str, os.PathLike)) and str(label)), "")
    return f"{type(array).__module__.split('.')[0]}.{type(array).__name__}{where} {list(array.shape)}"


def torch_dtype(dtype: Any) -> torch.dtype:
    """The torch type of an array's type. Raises `InputError` for one that torch has not."""
    converted = getattr(torch, str(getattr(dtype, "name", dtype)).removeprefix("torch."), None)
    if not isinstance(converted, torch.dtype):
        raise InputError(f"an image of type {dtype} cannot be streamed: torch has no such type")
    if converted.is_complex:
        raise InputError(f"a complex image ({dtype}) cannot be streamed: pass real and imaginary channels")
    return converted
