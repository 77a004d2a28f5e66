"""TIFF: slides and OME-TIFF as pictures, and results as pyramids of tiles in a BigTIFF.

Written are tiles of `TILE` pixels, compressed without loss. The coarser levels are reduced images of their own, as
OpenSlide reads them; it opens results of bytes with one or three channels.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from fxstream.errors import InputError
from fxstream.prediction.libraries import library
from fxstream.prediction.picture import MICROMETRES, Level, Picture, squeezed

__all__ = ["TILE", "is_decodable", "open_tiff", "write_tiff"]

TILE = 512
UNITS = {2: MICROMETRES["inch"], 3: MICROMETRES["cm"]}
"""Micrometres of the resolution's unit, by the number that the file has for it."""


def is_decodable(path: Path) -> bool:
    """Whether tifffile, as it is installed, can decode the first image of a file."""
    tifffile = library("tifffile", "TIFF")
    try:
        with tifffile.TiffFile(path) as file:
            page = file.series[0].levels[0].keyframe
            return page.compression in tifffile.TIFF.DECOMPRESSORS
    except Exception:
        return True  # whoever opens it says what is wrong with it


def open_tiff(path: Path, layout: str | None) -> Picture:
    """The first image of a TIFF with its levels. Raises `InputError` for one that is cut off or cannot be
    decoded."""
    tifffile, zarr = library("tifffile", "TIFF"), library("zarr", "TIFF")
    file = tifffile.TiffFile(path)
    try:
        series = file.series[0]
        spacing = _spacing(file)
        levels = []
        for number, one in enumerate(series.levels):
            _refuse_broken(one.keyframe, tifffile, path)
            is_photograph = one.keyframe.photometric in (2, 6) and one.dtype == "uint8"  # RGB, YCbCr
            store = series.aszarr(level=number, fillvalue=255 if is_photograph else 0)
            array, axes = squeezed(zarr.open(store, mode="r"), one.axes, layout, path.name)
            levels.append(Level(array, axes, _scaled(spacing, series.levels[0], one)))
    except BaseException:
        file.close()
        raise
    return Picture(path.name, levels, file.close)


def _refuse_broken(page: Any, tifffile: Any, path: Path) -> None:
    if page.compression not in tifffile.TIFF.DECOMPRESSORS:
        name = getattr(page.compression, "name", page.compression)
        raise InputError(f"the tiles of {path.name} are {name}: python -m pip install imagecodecs decodes them")
    ends = (start + count for start, count in zip(page.dataoffsets, page.databytecounts, strict=False))
    size, last = path.stat().st_size, max(ends, default=0)
    if last > size:
        raise InputError(
            f"{path.name} is cut off: its tiles end at byte {last}, and the file has {size}. Copy it again"
        )


def _scaled(spacing: dict[str, float], finest: Any, level: Any) -> dict[str, float]:
    """The spacing of a level, which has fewer pixels for the same extent."""
    whole, here = (dict(zip(one.axes, one.shape, strict=True)) for one in (finest, level))
    return {axis: size * whole[axis] / here[axis] for axis, size in spacing.items() if axis in whole}


def _spacing(file: Any) -> dict[str, float]:
    """Micrometres per pixel of the finest level: by OME metadata, Aperio's description, or the resolution."""
    if file.ome_metadata:
        return _ome_spacing(file.ome_metadata)
    page = file.pages[0]
    for part in (page.description or "").split("|"):
        key, _, value = part.partition("=")
        if key.strip() == "MPP" and page.is_svs:
            return dict.fromkeys("XY", float(value))
    unit = UNITS.get(int(page.tags["ResolutionUnit"].value) if "ResolutionUnit" in page.tags else 2)
    tags = {axis: page.tags.get(f"{axis}Resolution") for axis in "XY"}
    values = {axis: tag.value for axis, tag in tags.items() if tag is not None and all(tag.value)}
    return {axis: unit * below / above for axis, (above, below) in values.items()} if unit else {}


def _ome_spacing(text: str) -> dict[str, float]:
    """Micrometres per pixel by the OME metadata of a file, which may leave them out."""
    pixels = ElementTree.fromstring(text).find(".//{*}Pixels")
    attributes, spacing = {} if pixels is None else pixels.attrib, {}
    for axis in "XYZ":
        size, unit = attributes.get(f"PhysicalSize{axis}"), attributes.get(f"PhysicalSize{axis}Unit", "um")
        if size and unit in MICROMETRES:
            spacing[axis] = float(size) * MICROMETRES[unit]
    return spacing


def write_tiff(path: Path, levels: Sequence[Level]) -> None:
    """Write levels, the finest first, tile by tile. Raises `InputError` for what a TIFF of this form has not."""
    tifffile = library("tifffile", "a result as TIFF")
    channels = _channels(levels[0])
    is_color = channels == 3 and levels[0].array.dtype == "uint8"
    planes = 1 if is_color else channels
    options: dict[str, Any] = {
        "tile": (TILE, TILE),
        "compression": "zlib",
        "photometric": "rgb" if is_color else "minisblack",
    }
    options |= {"planarconfig": "separate"} if planes > 1 else {}
    options |= {"dtype": levels[0].array.dtype, "resolutionunit": "CENTIMETER", "metadata": None}
    with tifffile.TiffWriter(path, bigtiff=True) as file:
        for number, level in enumerate(levels):
            shape = (*level.extents.values(), channels) if is_color else tuple(level.extents.values())
            if set("YX") <= level.spacing.keys():
                options["resolution"] = tuple(1e4 / level.spacing[axis] for axis in "XY")
            shape = (planes, *shape) if planes > 1 else shape
            file.write(_tiles(level, planes), shape=shape, subfiletype=int(number > 0), **options)


def _channels(level: Level) -> int:
    if level.axes != "YX" or "N" in level.layout:
        raise InputError(
            f"a TIFF takes a result of two image axes, and this one has the axes {level.layout}: write it as"
            " ome-zarr"
        )
    return int(level.array.shape[level.layout.index("C")]) if "C" in level.layout else 1


def _tiles(level: Level, planes: int) -> Iterator[Any]:
    """The tiles of each plane in their order, whole ones: what lies beyond the border is zero."""
    numpy, array = library("numpy", "a result as TIFF"), level.array
    rows, columns = level.extents.values()
    has_channels = "C" in level.layout
    for plane, top, left in itertools.product(range(planes), range(0, rows, TILE), range(0, columns, TILE)):
        channels = slice(plane, plane + 1) if planes > 1 else slice(None)
        box = (slice(top, min(top + TILE, rows)), slice(left, min(left + TILE, columns)))
        values = numpy.asarray(array[(channels, *box) if has_channels else box])
        values = numpy.moveaxis(values, 0, -1) if has_channels else values[..., None]
        tile = numpy.zeros((TILE, TILE, values.shape[-1]), values.dtype)
        tile[: values.shape[0], : values.shape[1]] = values
        yield tile if tile.shape[-1] > 1 else tile[..., 0]
