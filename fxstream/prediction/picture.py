"""An image file that is open: its levels, each an array with a layout and the size of its pixels."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from fxstream.errors import InputError
from fxstream.io.target import target

__all__ = ["MICROMETRES", "Level", "Picture", "layout_of", "squeezed"]

MICROMETRES = {"angstrom": 1e-4, "nm": 1e-3, "nanometer": 1e-3, "mm": 1e3, "millimeter": 1e3}
MICROMETRES |= dict.fromkeys(("micrometer", "um", "µm", "\u03bcm"), 1.0)  # the micro sign, and the Greek letter
MICROMETRES |= {"cm": 1e4, "centimeter": 1e4, "m": 1e6, "meter": 1e6, "inch": 25400.0}
"""What one of a unit of length is in micrometres, by the names that files have for it."""

NEAR = 0.1
"""A level whose spacing differs from that asked for by at most this share of it is taken."""
COLORS = (1, 2, 3, 4)
"""Extents at an end of an array that are taken for its channels."""


@dataclass(frozen=True, slots=True)
class Level:
    """One resolution of an image. `spacing` and `origin` are in micrometres, by the letters of the axes.

    `origin` is where the centre of the first pixel lies. Both are empty where the file does not tell.
    """

    array: Any
    layout: str
    spacing: Mapping[str, float] = field(default_factory=dict)
    origin: Mapping[str, float] = field(default_factory=dict)

    @property
    def axes(self) -> str:
        """The letters of its image axes, in the order of the network's input."""
        return "".join(axis for axis in self.layout if axis not in "NC")

    @property
    def extents(self) -> dict[str, int]:
        """The number of pixels along each image axis."""
        sizes = dict(zip(self.layout, self.array.shape, strict=True))
        return {axis: sizes[axis] for axis in self.axes}

    @property
    def pixel(self) -> float | None:
        """The spacing in micrometres, the mean of the last two axes; None where the file does not tell."""
        spacings = [self.spacing[axis] for axis in self.axes[-2:] if axis in self.spacing]
        return sum(spacings) / len(spacings) if spacings else None


@dataclass(frozen=True, slots=True)
class Picture:
    """An image file that is open: its levels, the finest first, and what closes it."""

    name: str
    levels: Sequence[Level]
    close: Callable[[], object] = lambda: None

    def level(self, number: int | None, spacing: float | None) -> Level:
        """The level of this number, or of this spacing in micrometres. Raises `InputError` where there is none."""
        if spacing is None:
            place = number or 0
            if not 0 <= place < len(self.levels):
                raise InputError(f"{self.name} has no level {place}: its levels are 0 .. {len(self.levels) - 1}")
            return self.levels[place]
        pixels = [level.pixel for level in self.levels]
        if None in pixels:
            raise InputError(
                f"{self.name} does not tell the size of its pixels: give a level instead of a spacing"
            )
        near = min(self.levels, key=lambda level: abs(math.log((level.pixel or 0) / spacing)))
        if abs((near.pixel or 0) / spacing - 1) > NEAR:
            listed = ", ".join(f"{pixel:.4g}" for pixel in pixels)
            raise InputError(
                f"{self.name} has no level at {spacing:g} micrometres per pixel: its levels are at {listed}."
                " Images are not resampled: give one of these, or a level"
            )
        return near


def layout_of(array: Any, layout: str | None, name: str) -> str:
    """The layout of an array that does not tell it: as it was asked for, or by where its channels seem to be.

    Raises `InputError` where it is not clear.
    """
    shape = tuple(array.shape)
    if layout is not None:
        return layout
    if len(shape) == 2:
        return "YX"
    if len(shape) == 3 and (shape[0] in COLORS) != (shape[2] in COLORS):
        return "CYX" if shape[0] in COLORS else "YXC"
    raise InputError(
        f"{name} is an array of shape {list(shape)} and does not name its axes: give a layout, one letter per axis"
        " (N for the batch, C for channels, as YXC or CZYX)"
    )


def squeezed(array: Any, letters: str, layout: str | None, name: str) -> tuple[Any, str]:
    """An array whose file names its axes, and its layout; axes of one pixel besides C, Y and X are left out.

    A layout that was asked for is one of the array as it is. Raises `InputError` for axes that are not clear.
    """
    if layout is not None:
        return array, layout
    renamed = letters.upper().replace("S", "C").replace("T", "N").replace("I", "N")
    kept = [axis in "CYX" or size > 1 for axis, size in zip(renamed, array.shape, strict=True)]
    left = "".join(axis for axis, is_kept in zip(renamed, kept, strict=True) if is_kept)
    if len(set(left)) < len(left) or not set(left) <= set("NCZYX"):
        raise InputError(
            f"{name} has the axes {letters} of {list(array.shape)} pixels: give a layout that names them, N for"
            " the batch, C for channels"
        )
    if all(kept):
        return array, left
    return target(array, tuple(slice(None) if is_kept else 0 for is_kept in kept)), left
