"""Levels of TIFF files as arrays whose tiles several threads decode at once, with tifffile.

tifffile's own zarr view decodes in one thread unless it is told otherwise, and hands every tile through zarr.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import torch

from fxstream.errors import InputError
from fxstream.io.source import torch_dtype

__all__ = ["tiff_array"]


class _Tiles:
    """A page of a TIFF as an array [H, W] or [H, W, samples], of which tiles or strips are decoded."""

    def __init__(self, page: Any, background: Sequence[int] | int) -> None:
        self._page, self._form, self._file = page, page.keyframe, page.parent.filehandle
        self.shape, self.dtype, self.name = tuple(self._form.shape), self._form.dtype, str(self._file.name)
        self.chunks = (*self._form.chunks[:2], *self.shape[2:])
        self._blank = torch.tensor(background, dtype=torch_dtype(self.dtype))
        tables = {"jpegtables": page.jpegtables, "jpegheader": self._form.jpegheader}
        self._tables = {name: table for name, table in tables.items() if table is not None}

    def __getitem__(self, index: tuple[slice, ...]) -> torch.Tensor:
        parts = [range(*part.indices(size)) for part, size in zip(index[:2], self.shape, strict=False)]
        spans = [range(p.start // n, -(-p.stop // n)) for p, n in zip(parts, self.chunks, strict=False)]
        region = torch.empty(*map(len, parts), *self.shape[2:], dtype=self._blank.dtype)
        pixels = region.numpy()  # whose slices cost less than a tensor's
        for place in itertools.product(*spans):
            inside, outside = zip(*map(_common, parts, place, self.chunks), strict=False)
            tile = self._decoded(*place)
            pixels[outside] = self._blank.numpy() if tile is None else tile[inside]
        return region[(slice(None), slice(None), *index[2:])]

    def _decoded(self, down: int, across: int) -> Any:
        """A tile [rows, columns] or [rows, columns, samples] as numpy's; None for one that the file leaves out."""
        number = down * -(-self.shape[1] // self.chunks[1]) + across
        offset, count = self._page.dataoffsets[number], self._page.databytecounts[number]
        if not offset or not count:
            return None
        with self._file.lock:
            self._file.seek(offset)
            stored = self._file.read(count)
        if len(stored) < count:
            raise EOFError(f"tile {number} ends {count - len(stored)} bytes behind the end of the file")
        decoded, *_ = self._form.decode(stored, number, **self._tables)
        return decoded[0].reshape(*decoded.shape[1:3], *self.shape[2:])


def _common(part: range, number: int, length: int) -> tuple[slice, slice]:
    """What a box and a tile have in common along one axis: in the tile, and in the box."""
    at = number * length
    start, stop = max(part.start, at), min(part.stop, at + length)
    return slice(start - at, stop - at), slice(start - part.start, stop - part.start)


def tiff_array(
    file: Any, level: int = 0, *, series: int = 0, page: int = 0, background: int | Sequence[int] | None = None
) -> _Tiles:
    """A level of an open `tifffile.TiffFile` as an array [H, W] or [H, W, samples], decoded by several threads.

    `series` and `page` choose among the images of the file. `background`, one value or one per sample, is what the
    tiles are that the file leaves out; by default what the file says, or 0.

    Raises `InputError` for a level, series or page that the file has not, and for samples that are stored in
    planes of their own (`tifffile.imread(..., aszarr=True)` reads these).
    """
    levels = _chosen(file.series, series, "series", file).levels
    pages = _chosen(levels, level, "level", file).pages
    image = _chosen(pages, page, "page", file)
    form = image.keyframe
    if form.planarconfig != 1 or len(form.shape) not in (2, 3) or getattr(form, "imagedepth", 1) != 1:
        raise InputError(
            f"the samples of {file.filename} are stored in planes of their own: read it with"
            " tifffile.imread(..., aszarr=True)"
        )
    file.filehandle.set_lock(True)  # levels of one file have its handle in common
    return _Tiles(image, form.nodata if background is None else background)


def _chosen(entries: Sequence[Any], number: int, what: str, file: Any) -> Any:
    """An entry by its number. Raises `InputError` where there is none."""
    if not 0 <= number < len(entries):
        raise InputError(f"{what}={number!r}: {file.filename} has {what} 0 to {len(entries) - 1}")
    return entries[number]
