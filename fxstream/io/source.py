"""Images that are arrays outside of the device's memory: on disk, compressed, larger than all of it.

`Source` stands in the place of an input tensor [N, C, spatial dims...]. It wraps anything with `shape`, `dtype`
and slices (numpy memmap, zarr, h5py, tifffile's zarr view, dask), or several of one shape as a batch. Values
keep their type until they are on the device: normalisation belongs to the model.
"""

from __future__ import annotations

import operator
import os
import warnings
from collections.abc import Sequence
from typing import Any

import torch

from fxstream.errors import InputError, StreamError, StreamingWarning
from fxstream.geometry.box import Box
from fxstream.machine.copies import staged

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

LARGEST_AXES = 3
"""Stream axes that an image may have."""

FEW, MANY = 4, 16
"""An image axis of at most `FEW` pixels beside at least `MANY` channels is taken for a layout in another order."""


class Source:
    """An array as an image [N, C, spatial dims...] of a torch type, of which boxes are read; made by `source`."""

    def __init__(
        self,
        arrays: Sequence[Any],
        layout: str,
        batch: Sequence[int] | None,
        dtype: torch.dtype | None,
        device: torch.device,
    ) -> None:
        self.arrays, self._layout, self._batch, self._converted = arrays, layout, batch, dtype
        self._stored = torch_dtype(arrays[0].dtype)
        self.dtype = dtype or self._stored
        self.device = device
        self._axes = ("N", "C", *(axis for axis in layout if axis not in "NC"))
        extents = dict(zip(layout, arrays[0].shape, strict=True))
        count = len(batch) if batch is not None else extents.get("N", 1)
        extents |= {"N": len(arrays) * count} | {"C": extents.get("C", 1)}
        self.shape = torch.Size(extents[axis] for axis in self._axes)

    @property
    def ndim(self) -> int:
        """Number of dims, with batch and channels."""
        return len(self.shape)

    @property
    def requires_grad(self) -> bool:
        """Never: an array has no gradient."""
        return False

    def to(self, device: torch.device) -> Source:
        """The same image, whose boxes arrive on that device."""
        return Source(self.arrays, self._layout, self._batch, self._converted, device)

    def __getitem__(self, box: tuple[slice, ...]) -> torch.Tensor:
        """A box of the image as a tensor of its own, on the device; slices of all dims or of the first ones."""
        return self.place(self.read(box))

    def read(self, box: tuple[slice, ...]) -> torch.Tensor:
        """A box as it is stored, in host memory. Raises `StreamError` where the array fails, naming both."""
        samples, *bounds = (range(part.start, part.stop) for part in Box.of(box, self.shape))
        parts = [self._read_one(sample, bounds) for sample in samples]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def place(self, stored: torch.Tensor) -> torch.Tensor:
        """What was read, on the device and in the type that the model is given."""
        return staged(stored, self.device).to(self.device, non_blocking=True).to(self.dtype)

    def _read_one(self, sample: int, bounds: Sequence[range]) -> torch.Tensor:
        """A box [1, C, spatial dims...] of one sample of the batch."""
        per_array = self.shape[0] // len(self.arrays)
        array, row = self.arrays[sample // per_array], sample % per_array
        row = row if self._batch is None else self._batch[row]
        bounds_of = dict(zip(self._axes, (range(row, row + 1), *bounds), strict=True))
        index = tuple(slice(bounds_of[axis].start, bounds_of[axis].stop) for axis in self._layout)
        values = self._sliced(array, index)
        missing = [axis for axis in "NC" if axis not in self._layout]
        order = [*missing, *self._layout]
        turned = values[(None,) * len(missing)].permute([order.index(axis) for axis in self._axes])
        return turned.clone(memory_format=torch.contiguous_format)

    def _sliced(self, array: Any, index: tuple[slice, ...]) -> torch.Tensor:
        """What an array gives for a slice. Raises `StreamError` where that is not what it says of itself."""
        region = f"[{', '.join(f'{part.start}:{part.stop}' for part in index)}] of {describe(array)}"
        try:
            sliced = array[index]
            values = as_tensor(sliced)
        except Exception as error:
            raise StreamError(f"reading {region} failed: {type(error).__name__}: {error}") from error
        _warn_of_mask(array, sliced)
        if self._converted is None and values.dtype != self._stored:
            raise StreamError(
                f"reading {region} gave {values.dtype}, and the array says that it is {array.dtype}: choose the"
                f" type, as source(..., dtype={values.dtype})"
            )
        shape = [part.stop - part.start for part in index]
        if list(values.shape) != shape:
            raise StreamError(
                f"reading {region} gave the shape {list(values.shape)}, needed {shape}: has the array shrunk?"
            )
        return values

    def __repr__(self) -> str:
        return f"Source({describe(self.arrays[0])}, {list(self.shape)}, {self.dtype})"


def source(
    *arrays: Any,
    layout: str | None = None,
    batch: Sequence[int] | None = None,
    dtype: torch.dtype | None = None,
) -> Source:
    """Use an array in the place of an image tensor, or several arrays of one shape as a batch.

    An array has `shape`, `dtype` and slices: a numpy memmap, zarr, h5py, dask. `layout` names its axes in their
    order: N is the batch, C the channels, any other upper-case letter an axis of the image (``"HWC"``, ``"CZYX"``,
    ``"NHWC"``, ``"YX"``). Without a layout the array is what the model takes, mostly [N, C, spatial dims...].
    `batch` picks entries along N. Values keep the array's type, or are converted to `dtype` once they are on the
    device. An array whose slices are of another type than its `dtype` (scaled integers) needs `dtype`. Masks of
    masked arrays are dropped, with a warning.

    Raises `InputError` for an object without shape, type or slices, for a type that torch does not have, and for a
    layout that does not fit.

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
    layout = _checked_layout(layout, tuple(arrays[0].shape))
    rows = _checked_batch(batch)
    if rows is not None and ("N" not in layout or not rows):
        raise InputError(f"batch={batch!r} picks entries along N, and the layout is {layout!r}")
    if rows is not None and not all(0 <= row < arrays[0].shape[layout.index("N")] for row in rows):
        raise InputError(f"batch={batch!r} is outside of {arrays[0].shape[layout.index('N')]} entries along N")
    return Source(arrays, layout, rows, dtype, torch.device("cpu"))


def _checked_batch(batch: Sequence[int] | None) -> list[int] | None:
    """The entries along N. Raises `InputError` for what is no list of them."""
    try:
        return None if batch is None else [operator.index(row) for row in batch]
    except TypeError as error:
        raise InputError(f"batch={batch!r} is no list of entries along N: give one, as batch=[2]") from error


def _checked_layout(layout: str | None, shape: tuple[int, ...]) -> str:
    """The layout of an array of this shape. Raises `InputError` for one that does not fit."""
    if layout is None and 2 < len(shape) <= 2 + LARGEST_AXES:
        return "NC" + "DHW"[-(len(shape) - 2) :]
    axes = {*(layout or "")}
    if not layout or not len(axes) == len(layout) == len(shape) or not 0 < len(axes - {*"NC"}) <= LARGEST_AXES:
        raise InputError(
            f"layout={layout!r} does not fit an array of shape {list(shape)}: give one letter per axis, N for the"
            " batch, C for channels, others for one to three axes of the image"
        )
    if not (layout.isalpha() and layout.isupper()):
        raise InputError(f"layout={layout!r} is not in upper case: give {layout.upper()!r}")
    _refuse_swapped_channels(layout, shape)
    return layout


def _refuse_swapped_channels(layout: str, shape: tuple[int, ...]) -> None:
    """Raise `InputError` where channels are at one end of the layout and clearly at the other end of the array.

    A volume may have few planes, which come first.
    """
    axes = [axis for axis in layout if axis != "N"]
    is_first = axes[0] == "C"
    if len(axes) < 3 or not (is_first or (axes[-1] == "C" and len(axes) == 3)):
        return
    sizes, other = dict(zip(layout, shape, strict=True)), axes[-1] if is_first else axes[0]
    if sizes["C"] < MANY or sizes[other] > FEW:
        return
    rest = layout.replace("C", "")
    turned = f"{rest}C" if is_first else rest.replace(other, f"C{other}")
    raise InputError(
        f"layout={layout!r} makes of an array of shape {list(shape)} an image of {sizes['C']} channels that has"
        f" {sizes[other]} pixels along {other}: is it {turned!r}?"
    )


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
