"""Slides as arrays [H, W, bands] of bytes: levels of OpenSlide's pyramids, images of pyvips.

NOTE [one lattice per level]
1. OpenSlide takes the origin of a region in whole pixels of level 0, and resamples a level where that origin lies
   between its pixels. It does where the downsample of a level is no integer, as in most files (4.0001, not 4).
2. A level like this is therefore read in blocks of `BLOCK` pixels whose origins are fixed, whatever box is read: a
   pixel has one value. An origin is at most half a pixel of level 0 away from where it should be.
3. A region is read from the origin of its block to the end of the box, since OpenSlide's result does not depend on
   the size of a region.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from fxstream.errors import InputError

__all__ = ["openslide_array", "pyvips_array"]

BLOCK = 256
"""Pixels of a level that are read from one origin, along each axis."""


class _Regions:
    """A [H, W, bands] uint8 array of what gives the region at left, top, of so many columns and rows."""

    dtype = torch.uint8

    def __init__(
        self,
        read: Callable[[int, int, int, int], torch.Tensor],
        shape: tuple[int, int, int],
        name: str,
        chunks: tuple[int, int, int] | None = None,
    ) -> None:
        self._read, self.shape, self.name, self.chunks = read, shape, name, chunks

    def __getitem__(self, index: tuple[slice, slice, slice]) -> torch.Tensor:
        rows, columns = (range(*part.indices(size)) for part, size in zip(index[:2], self.shape, strict=False))
        return self._read(columns.start, rows.start, len(columns), len(rows))[:, :, index[2]]


def openslide_array(slide: Any, level: int = 0, background: str | Sequence[int] | None = None) -> _Regions:
    """A level of an `openslide.OpenSlide` as an array [H, W, 3] of bytes.

    `background` is the colour where the slide has no pixels, as three bytes or ``"RRGGBB"``. Without it the
    slide's own background is taken (``openslide.background-color``), or white.

    A level whose downsample is not an integer is read in blocks from fixed origins, so that the value of a pixel
    does not depend on the region it is read with. Raises `InputError` for a level that the slide has not.
    """
    if not 0 <= level < len(slide.level_dimensions):
        raise InputError(f"level={level!r}: the slide has levels 0 to {len(slide.level_dimensions) - 1}")
    width, height = slide.level_dimensions[level]
    scale, properties = float(slide.level_downsamples[level]), getattr(slide, "properties", {})
    color = _color(properties.get("openslide.background-color", "FFFFFF") if background is None else background, 3)
    tile = [int(properties.get(f"openslide.level[{level}].tile-{side}", BLOCK)) for side in ("height", "width")]

    def read_block(left: int, top: int, columns: int, rows: int) -> torch.Tensor:
        origin = round(left * scale), round(top * scale)
        region = slide.read_region(origin, level, (columns, rows)).convert("RGBA")
        return _over(_pixels(region.tobytes(), rows, columns, 4), color)

    def read(left: int, top: int, columns: int, rows: int) -> torch.Tensor:
        if scale.is_integer():
            return read_block(left, top, columns, rows)
        region = torch.empty(rows, columns, 3, dtype=torch.uint8)
        for y, vertical in _blocks(top, top + rows):
            for x, horizontal in _blocks(left, left + columns):
                block = read_block(x, y, horizontal.stop - x, vertical.stop - y)
                part = region[vertical.start - top : vertical.stop - top]
                part[:, horizontal.start - left : horizontal.stop - left] = block[
                    vertical.start - y :, horizontal.start - x :
                ]
        return region

    return _Regions(read, (height, width, 3), str(getattr(slide, "_filename", "")), (tile[0], tile[1], 3))


def pyvips_array(image: Any, background: str | Sequence[int] | None = None) -> _Regions:
    """A `pyvips.Image` of 8-bit bands as an array [H, W, bands].

    With a `background` (one byte per band, or ``"RRGGBB"``) the last band is the opacity of the others, and
    the array holds these over that colour.
    """
    bands = image.bands
    color = None if background is None else _color(background, bands - 1)

    def read(left: int, top: int, columns: int, rows: int) -> torch.Tensor:
        region = _pixels(image.crop(left, top, columns, rows).write_to_memory(), rows, columns, bands)
        return region if color is None else _over(region, color)

    shape = (image.height, image.width, bands if color is None else bands - 1)
    return _Regions(read, shape, str(getattr(image, "filename", "")))


def _blocks(start: int, stop: int) -> Iterator[tuple[int, range]]:
    """The origins of the blocks along one axis that hold these pixels, and the pixels in each.

    >>> list(_blocks(250, 530))
    [(0, range(250, 256)), (256, range(256, 512)), (512, range(512, 530))]
    """
    for origin in range(start // BLOCK * BLOCK, stop, BLOCK):
        yield origin, range(max(start, origin), min(stop, origin + BLOCK))


def _pixels(values: bytes, rows: int, columns: int, bands: int) -> torch.Tensor:
    return torch.frombuffer(bytearray(values), dtype=torch.uint8).view(rows, columns, bands)


def _color(background: str | Sequence[int], bands: int) -> torch.Tensor:
    """A colour, one byte per band. Raises `InputError` for what is none."""
    try:
        values = bytes.fromhex(background.lstrip("#")) if isinstance(background, str) else bytes(background)
    except (TypeError, ValueError):
        values = b""
    if not values or len(values) != bands:
        raise InputError(f"background={background!r} is no colour: give {bands} bytes, as (255, 255, 255)")
    return torch.tensor(list(values), dtype=torch.int32)


def _over(pixels: torch.Tensor, color: torch.Tensor) -> torch.Tensor:
    """Pixels whose last band is their opacity, over a colour; rounded to bytes.

    >>> pixels = torch.tensor([[9, 9, 9, 255], [0, 0, 0, 0], [100, 0, 0, 51]], dtype=torch.uint8)
    >>> _over(pixels, torch.tensor([200] * 3)).tolist()
    [[9, 9, 9], [200, 200, 200], [180, 160, 160]]
    """
    opacity = pixels[..., -1:].int()
    if bool((opacity == 255).all()):
        return pixels[..., :-1]
    return ((pixels[..., :-1] * opacity + color * (255 - opacity) + 127) // 255).to(torch.uint8)
