"""The result of one image: where it is while it is computed, and what file it becomes.

A map is computed into level 0 of a zarr group; then coarser levels are made of it, chunk by chunk, and the group
is the OME-Zarr or is written as a TIFF. Coarser levels are means of two pixels per axis; of integers, which are
classes, every second pixel. A vector is a memory map, which is the `.npy`.
"""

from __future__ import annotations

import itertools
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from fxstream.compiler.prepared import Prepared
from fxstream.compiler.streaming import Ready
from fxstream.errors import InputError
from fxstream.graph.fields import main_image, receptive_fields
from fxstream.graph.shapes import Shape
from fxstream.prediction.libraries import library
from fxstream.prediction.ome_zarr import write_metadata
from fxstream.prediction.picture import Level
from fxstream.prediction.tiff import write_tiff

__all__ = ["FORMATS", "Form", "finished", "form_of", "opened"]

FORMATS = {"ome-zarr": ".ome.zarr", "tiff": ".tif"}
CHUNK = {1: 2**18, 2: 1024, 3: 128}
"""Pixels of a chunk per image axis, by the number of these."""
SMALLEST = 1024
"""Levels are made until none of the last two axes has more pixels."""


@dataclass(frozen=True, slots=True)
class Form:
    """What a result is: shape and type of the network's result, the letters of its dims ("" for a vector).

    `strides` are pixels of the image per pixel of the result; `spacing` and `origin` those of a `Level`.
    """

    shape: tuple[int, ...]
    dtype: str
    letters: str
    strides: Mapping[str, float]
    spacing: Mapping[str, float]
    origin: Mapping[str, float]

    @property
    def dropped(self) -> bool:
        """Whether the first dim, the batch, is left out of the array."""
        return bool(self.letters) and self.shape[0] == 1

    @property
    def layout(self) -> str:
        """The letters of the array's axes."""
        return self.letters[1:] if self.dropped else self.letters

    def level(self, array: Any) -> Level:
        """The finest level of the result."""
        return Level(array, self.layout, self.spacing, self.origin)


def form_of(ready: Ready, level: Level, dtype: str | None) -> Form:
    """What the result of a network is that is ready for a level of an image.

    Raises `InputError` for several results.
    """
    prepared, results = ready.prepared, ready.results
    meta = prepared.analysis.graph.metas.get(results[0] or "") if results else None
    if len(results) != 1 or not isinstance(meta, Shape):
        raise InputError(
            f"the network returns {len(results)} results, and a prediction writes one tensor per image: wrap it"
            " in a module that returns one"
        )
    axes, shape = level.axes, tuple(meta.shape)
    letters = {len(axes) + 2: f"NC{axes}", len(axes) + 1: f"N{axes}"}.get(len(shape), "")
    strides, starts = _lattice(
        prepared, results[0], level, dict(zip(letters, shape, strict=True)) if letters else {}
    )
    pixels = {axis: level.spacing[axis] for axis in strides if axis in level.spacing}
    spacing = {axis: size * strides[axis] for axis, size in pixels.items()}
    origin = {axis: level.origin.get(axis, 0.0) + starts[axis] * size for axis, size in pixels.items()}
    return Form(shape, dtype or _stored(meta.dtype), letters, strides, spacing, origin)


def _stored(dtype: torch.dtype) -> str:
    return {torch.bfloat16: "float32", torch.bool: "uint8"}.get(dtype, str(dtype).removeprefix("torch."))


def _lattice(
    prepared: Prepared, result: str | None, level: Level, sizes: Mapping[str, int]
) -> tuple[dict[str, float], dict[str, float]]:
    """Along each image axis: pixels of the image per pixel of the result, and the place of its first pixel.

    Of the receptive field; where the network has none, as if both had the same extent.
    """
    graph = prepared.analysis.graph
    image = main_image(graph)
    fields = receptive_fields(graph, list(graph.verdicts), image) if image else {}
    field = fields.get(result or "", ())
    axes = [axis for axis in level.axes if axis in sizes]
    if len(field) != len(axes):
        strides = {axis: level.extents[axis] / sizes[axis] for axis in axes}
        return strides, {axis: (stride - 1) / 2 for axis, stride in strides.items()}
    strides = {axis: float(one.stride) for axis, one in zip(axes, field, strict=True)}
    starts = {}
    for axis, one in zip(axes, field, strict=True):
        ends = zip(one.lows, one.highs, strict=True)
        middles = [(low + high) / 2 - strides[axis] * phase for phase, (low, high) in enumerate(ends)]
        starts[axis] = sum(middles) / len(middles)
    return strides, starts


def opened(folder: Path, form: Form, is_first: bool) -> Any:
    """The array in a work folder that takes a result. The first process makes it, where it is not there as
    needed."""
    if not form.letters:
        return _vector(folder / "result.npy", form, is_first)
    zarr = library("zarr", "the result of a prediction")
    path, shape = folder / "result", form.shape[form.dropped :]
    array = _array(zarr, path)
    if is_first and (array is None or (array.shape, str(array.dtype)) != (shape, form.dtype)):
        shutil.rmtree(path, ignore_errors=True)
        group = zarr.open_group(str(path), mode="a", zarr_format=3)
        array = group.create_array("0", shape=shape, dtype=form.dtype, chunks=_chunks(form.layout, shape))
    return array


def _array(zarr: Any, path: Path) -> Any:
    """The array of an attempt before this one; None where there is none that can be read."""
    try:
        return zarr.open_array(str(path / "0"), mode="r+")
    except Exception:
        return None


def _vector(path: Path, form: Form, is_first: bool) -> Any:
    memory_map = library("numpy", ".npy").lib.format.open_memmap
    try:
        array = memory_map(path, mode="r+")
    except (OSError, ValueError):
        array = None
    if is_first and (array is None or (array.shape, str(array.dtype)) != (form.shape, form.dtype)):
        array = memory_map(path, mode="w+", dtype=form.dtype, shape=form.shape)
    return array


def _chunks(layout: str, shape: Sequence[int]) -> tuple[int, ...]:
    edge = CHUNK[sum(axis not in "NC" for axis in layout)]
    return tuple(1 if axis in "NC" else min(edge, size) for axis, size in zip(layout, shape, strict=True))


def finished(folder: Path, form: Form, format: str, name: str) -> Path:
    """What a result becomes, made in its work folder of the array that is complete."""
    if not form.letters:
        return folder / "result.npy"
    group = library("zarr", "the result of a prediction").open_group(str(folder / "result"), mode="r+")
    levels = _levels(group, form)
    if format == "tiff":
        write_tiff(folder / "result.tif", levels)
        return folder / "result.tif"
    scales = [
        {axis: stride * 2.0**number for axis, stride in form.strides.items()} for number in range(len(levels))
    ]
    write_metadata(group, name, levels, scales)
    return folder / "result"


def _levels(group: Any, form: Form) -> list[Level]:
    """The finest level, and the coarser ones, which are made anew."""
    levels = [form.level(group["0"])]
    while max(list(levels[-1].extents.values())[-2:]) > SMALLEST:
        fine, number = levels[-1], len(levels)
        shape = [n if a in "NC" else -(-n // 2) for a, n in zip(fine.layout, fine.array.shape, strict=True)]
        chunks = _chunks(fine.layout, shape)
        array = group.create_array(str(number), shape=shape, dtype=form.dtype, chunks=chunks, overwrite=True)
        coarse = replace(
            fine,
            array=array,
            spacing={axis: 2 * size for axis, size in fine.spacing.items()},
            origin={
                axis: place + (0 if _is_integer(array) else fine.spacing[axis] / 2)
                for axis, place in fine.origin.items()
            },
        )
        _halve(fine, coarse)
        levels.append(coarse)
    return levels


def _halve(fine: Level, coarse: Level) -> None:
    """Fill a level from the next finer one, chunk by chunk."""
    array = coarse.array
    factors = [1 if axis in "NC" else 2 for axis in fine.layout]
    spans = [range(0, size, chunk) for size, chunk in zip(array.shape, array.chunks, strict=True)]
    for corner in itertools.product(*spans):
        sizes = zip(corner, array.chunks, array.shape, strict=True)
        box = tuple(slice(at, min(at + chunk, size)) for at, chunk, size in sizes)
        pairs = zip(box, factors, fine.array.shape, strict=True)
        values = fine.array[tuple(slice(s.start * f, min(s.stop * f, n)) for s, f, n in pairs)]
        for axis in [place for place, factor in enumerate(factors) if factor == 2]:
            values = _of_pairs(values, axis, _is_integer(array))
        array[box] = values.astype(array.dtype)


def _of_pairs(values: Any, axis: int, are_classes: bool) -> Any:
    """Half of the values along an axis: the first of each two, or their mean; an odd one at the end is itself."""
    numpy = library("numpy", "a prediction")
    every_second = [slice(None)] * values.ndim
    every_second[axis] = slice(0, None, 2)
    firsts = values[tuple(every_second)]
    if are_classes:
        return firsts
    every_second[axis] = slice(1, None, 2)
    seconds = values[tuple(every_second)]
    if seconds.shape != firsts.shape:
        seconds = numpy.concatenate([seconds, firsts.take([-1], axis)], axis)
    wide = numpy.promote_types(values.dtype, numpy.float32)
    return (firsts.astype(wide) + seconds.astype(wide)) / 2


def _is_integer(array: Any) -> bool:
    return str(array.dtype).startswith(("int", "uint"))
