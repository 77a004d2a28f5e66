"""Zarr: arrays and OME-Zarr images (0.4 and 0.5) as pictures, and results as OME-Zarr 0.5.

Along an axis with a unit of length, scales are kept in micrometres.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fxstream.errors import InputError
from fxstream.prediction.libraries import library
from fxstream.prediction.picture import MICROMETRES, Level, Picture, layout_of, squeezed

__all__ = ["open_zarr", "write_metadata"]

AXES = {"N": "time", "C": "channel"}
"""The types of axes that are none of space."""


def open_zarr(path: Path, layout: str | None) -> Picture:
    """A zarr array, or the first image of an OME-Zarr group. Raises `InputError` for a group that has none."""
    zarr = library("zarr", "a zarr store")
    try:
        node = zarr.open(str(path), mode="r")
    except Exception as error:
        raise InputError(f"the folder {path} is no zarr store ({type(error).__name__})") from error
    if hasattr(node, "shape"):
        names = getattr(getattr(node, "metadata", None), "dimension_names", None)
        if layout is None and names and all(name and len(name) == 1 for name in names):
            array, axes = squeezed(node, "".join(names), None, path.name)
            return Picture(path.name, [Level(array, axes)])
        return Picture(path.name, [Level(node, layout_of(node, layout, path.name))])
    attributes = dict(node.attrs)
    scales = attributes.get("ome", attributes).get("multiscales")
    if not scales:
        arrays = ", ".join(f"{path}/{name}" for name, _ in node.arrays()) or "none"
        raise InputError(f"{path} is a zarr group and no OME-Zarr image: name an array of it (it has {arrays})")
    levels = [_level(node, scales[0], part, layout, path.name) for part in scales[0]["datasets"]]
    return Picture(path.name, levels)


def _level(group: Any, scales: dict[str, Any], part: dict[str, Any], layout: str | None, name: str) -> Level:
    axes = scales.get("axes") or "tczyx"
    letters = "".join(axis if isinstance(axis, str) else axis["name"] for axis in axes)
    array, kept = squeezed(group[part["path"]], letters, layout, name)
    steps = [*part.get("coordinateTransformations", []), *scales.get("coordinateTransformations", [])]
    spacing: dict[str, float] = {}
    origin: dict[str, float] = {}
    for place, axis in enumerate(axes):
        unit = None if isinstance(axis, str) else MICROMETRES.get(axis.get("unit", ""))
        letter = letters[place].upper()
        if unit is None or letter not in kept:
            continue
        spacing[letter], origin[letter] = unit, 0.0
        for step in steps:
            if step["type"] == "scale":
                spacing[letter] *= step["scale"][place]
                origin[letter] *= step["scale"][place]
            elif step["type"] == "translation":
                origin[letter] += step["translation"][place] * unit
    return Level(array, kept, spacing, origin)


def write_metadata(group: Any, name: str, levels: Sequence[Level], scales: Sequence[dict[str, float]]) -> None:
    """Make a group that holds arrays "0", "1", ... an OME-Zarr image.

    `scales` are pixels of the finest level per pixel of each level, for axes without a unit.
    """
    layout = levels[0].layout
    axes = [{"name": "t" if axis == "N" else axis.lower(), "type": AXES.get(axis, "space")} for axis in layout]
    for axis, letter in zip(axes, layout, strict=True):
        if letter in levels[0].spacing:
            axis["unit"] = "micrometer"
    datasets = []
    for number, (level, scale) in enumerate(zip(levels, scales, strict=True)):
        sizes = [level.spacing.get(axis, scale.get(axis, 1.0)) for axis in layout]
        places = [level.origin.get(axis, 0.0) for axis in layout]
        steps = [{"type": "scale", "scale": sizes}, {"type": "translation", "translation": places}]
        datasets.append({"path": str(number), "coordinateTransformations": steps})
    multiscales = [{"name": name, "axes": axes, "datasets": datasets}]
    group.attrs["ome"] = {"version": "0.5", "multiscales": multiscales}
