"""How the axes of an array are those of an image: layouts, and entries of a batch, checked."""

from __future__ import annotations

import operator
from collections.abc import Sequence

from fxstream.errors import InputError

__all__ = ["LARGEST_AXES", "checked_batch", "checked_layout"]

LARGEST_AXES = 3
"""Stream axes that an image may have."""

FEW, MANY = 4, 16
"""An image axis of at most `FEW` pixels beside at least `MANY` channels is taken for a layout in another order."""


def checked_batch(batch: Sequence[int] | None) -> list[int] | None:
    """The entries along N. Raises `InputError` for what is no list of them."""
    try:
        return None if batch is None else [operator.index(row) for row in batch]
    except TypeError as error:
        raise InputError(f"batch={batch!r} is no list of entries along N: give one, as batch=[2]") from error


def checked_layout(layout: str | None, shape: tuple[int, ...]) -> str:
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
