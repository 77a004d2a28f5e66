"""A pyramidal TIFF slide at a wanted pixel spacing.

A slide is stored several times, each level at a coarser spacing (micrometres per pixel). `read` takes the level
that is nearest at or below the wanted spacing, decodes only the tiles that it needs, and resamples the rest of the
way. The spacing comes from the OME metadata, else from the Aperio description (SVS), else from the resolution
tags. Slides whose tiles are JPEG or JPEG 2000 need `pip install imagecodecs`.
"""

from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import tifffile
import torch
from torch.nn import functional as F

Box = tuple[float, float, float, float]
"""top, left, bottom, right as shares of the slide's height and width"""
WHOLE: Box = (0.0, 0.0, 1.0, 1.0)
MICROMETRES = {"nm": 1e-3, "µm": 1.0, "um": 1.0, "mm": 1e3, "cm": 1e4}
PER_UNIT = {2: 25400.0, 3: 10000.0}  # ResolutionUnit: inch, centimetre
ROUNDING = 0.02
"""A level this share coarser than the wanted spacing still counts as being at it."""


@dataclass(frozen=True)
class Slide:
    """Spacings in micrometres per pixel and shapes (height, width) of the levels, finest first."""

    path: Path
    spacings: tuple[float, ...]
    shapes: tuple[tuple[int, int], ...]

    def level(self, spacing: float) -> int:
        """The level nearest at or below `spacing`. Raises `ValueError` where the slide has none that fine."""
        fine = [i for i, own in enumerate(self.spacings) if own <= spacing * (1 + ROUNDING)]
        if not fine:
            raise ValueError(
                f"{self.path}: the finest level has {self.spacings[0]:.3g} µm per pixel, {spacing:.3g} wanted"
            )
        return max(fine, key=lambda i: self.spacings[i])

    def read(self, spacing: float, box: Box = WHOLE) -> torch.Tensor:
        """The pixels of `box` at `spacing`, uint8 [3, H, W]."""
        level = self.level(spacing)
        pixels = torch.from_numpy(self.read_level(level, box)).permute(2, 0, 1)
        factor = self.spacings[level] / spacing
        size = [max(1, round(extent * factor)) for extent in pixels.shape[1:]]
        if size == list(pixels.shape[1:]):
            return pixels
        return F.interpolate(pixels[None].contiguous(), size, mode="bilinear", antialias=True)[0]

    def read_level(self, level: int, box: Box = WHOLE) -> np.ndarray:
        """The pixels of `box` of one level, uint8 [H, W, 3]; tiles that the file left out are white."""
        height, width = self.shapes[level]
        top, left, bottom, right = (round(s * n) for s, n in zip(box, (height, width) * 2, strict=True))
        pixels = np.full((bottom - top, right - left, 3), 255, np.uint8)
        with tifffile.TiffFile(self.path) as file:
            page = file.series[0].levels[level].pages[0]
            for tile, (y, x) in tiles(page, top, left, bottom, right):
                rows, columns = (
                    slice(max(first, at), min(last, at + extent))
                    for first, last, at, extent in (
                        (top, bottom, y, tile.shape[0]),
                        (left, right, x, tile.shape[1]),
                    )
                )
                pixels[rows.start - top : rows.stop - top, columns.start - left : columns.stop - left] = tile[
                    rows.start - y : rows.stop - y, columns.start - x : columns.stop - x, :3
                ]
        return pixels


def open_slide(path: str | Path) -> Slide:
    """The levels of the slide at `path`. Raises `ValueError` where it is not 8-bit RGB or has no spacing."""
    with tifffile.TiffFile(path) as file:
        levels = file.series[0].levels
        page = levels[0].keyframe
        if page.dtype != np.uint8 or page.planarconfig != 1 or page.samplesperpixel not in (3, 4):
            raise ValueError(f"{path}: 8-bit RGB is needed, found {page.dtype} with shape {page.shape}")
        shapes = tuple((level.keyframe.imagelength, level.keyframe.imagewidth) for level in levels)
        finest = base_spacing(file)
    return Slide(Path(path), tuple(finest * shapes[0][1] / width for _, width in shapes), shapes)


def base_spacing(file: tifffile.TiffFile) -> float:
    """Micrometres per pixel of the finest level. Raises `ValueError` where the file does not tell."""
    page = file.series[0].levels[0].keyframe
    if file.is_ome and file.ome_metadata:
        pixels = ElementTree.fromstring(file.ome_metadata).find(".//{*}Pixels")
        if pixels is not None and "PhysicalSizeX" in pixels.attrib:
            return (
                float(pixels.attrib["PhysicalSizeX"]) * MICROMETRES[pixels.attrib.get("PhysicalSizeXUnit", "µm")]
            )
    if file.is_svs and "MPP" in (aperio := tifffile.tifffile.svs_description_metadata(page.description)):
        return float(aperio["MPP"])
    resolution, unit = page.tags.get("XResolution"), page.tags.get("ResolutionUnit")
    if resolution is None or unit is None or unit.value not in PER_UNIT or not resolution.value[0]:
        raise ValueError(
            f"{file.filename}: neither OME metadata, Aperio description nor tags tell the pixel spacing"
        )
    pixels_per_unit = resolution.value[0] / resolution.value[1]
    return PER_UNIT[int(unit.value)] / pixels_per_unit


def tiles(page: tifffile.TiffPage, top: int, left: int, bottom: int, right: int):
    """Yields the decoded tiles (or strips) of `page` that meet the box, and where each begins (y, x)."""
    keyframe = page.keyframe
    rows, columns = keyframe.chunks[:2] if keyframe.is_tiled else (keyframe.rowsperstrip, keyframe.imagewidth)
    across = -(-keyframe.imagewidth // columns)
    wanted = [
        y * across + x
        for y in range(top // rows, -(-bottom // rows))
        for x in range(left // columns, -(-right // columns))
    ]
    offsets, counts = ([given[i] for i in wanted] for given in (page.dataoffsets, page.databytecounts))
    jpeg = keyframe.compression in (6, 7, 33007, 34892)
    tables = {"jpegtables": page.jpegtables, "jpegheader": keyframe.jpegheader} if jpeg else {}
    segments = page.parent.filehandle.read_segments(offsets, counts, indices=wanted, flat=True)
    for data, index in segments:
        tile, place, shape = keyframe.decode(data, index, **tables)
        if tile is not None:
            yield tile[0, : shape[1], : shape[2]], (place[2], place[3])
