"""A summary as a picture: receptive field over depth, memory per layer, and the tile grid over the image.

Needs matplotlib, the extra ``fxstream[plot]``.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fxstream.errors import InputError
from fxstream.machine.units import bytes_text
from fxstream.report.summary import Summary
from fxstream.tiling.segment_plan import SegmentPlan
from fxstream.tools.benchmark import CHECKPOINT, COMPILED, FXSTREAM, PLAIN, Row, Workload

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["save_pareto", "save_plot"]

Pixels = tuple[int, int] | None
"""First and last pixel along an axis, the last excluded; None where nothing is read."""

SLATE, ORANGE, SAND, GREEN, PLUM = "#7a8ba3", "#d9622b", "#f0b48f", "#3b7a57", "#7d4f7a"
MARKS = {PLAIN: (SLATE, "s"), CHECKPOINT: (GREEN, "^"), COMPILED: (PLUM, "v"), FXSTREAM: (ORANGE, "o-")}
"""Colours and markers of the methods."""
MOST_TILES = 24
"""Tiles per axis up to which the grid is drawn tile by tile."""


def save_plot(summary: Summary, path: Path) -> None:
    """Draw the summary into an image file; the form follows its suffix. Raises `InputError` without matplotlib."""
    panels = 3 if summary.plan is not None and summary.plan.segments else 2
    figure = _figure(5.2 * panels, 4.6)
    axes = figure.subplots(1, panels)
    image = "x".join(map(str, summary.image))
    figure.suptitle(f"{summary.name}, image {image}", fontsize=11)
    _draw_field(axes[0], summary)
    _draw_memory(axes[1], summary)
    if panels == 3:
        _draw_tiles(axes[2], summary)
    figure.savefig(path, dpi=150)


def _figure(width: float, height: float) -> Figure:
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise InputError("--plot needs matplotlib: pip install 'fxstream[plot]'") from None
    return Figure(figsize=(width, height), layout="constrained")


def _draw_field(axes: Axes, summary: Summary) -> None:
    """Receptive field and stride of every layer that has one, on a logarithmic scale."""
    fields = {i: layer.field[0] for i, layer in enumerate(summary.layers) if layer.field}
    sizes, strides = ([float(f.size) for f in fields.values()], [float(f.stride) for f in fields.values()])
    axes.step(list(fields), sizes, where="post", color=ORANGE, label="receptive field")
    axes.step(list(fields), strides, where="post", color=SLATE, label="stride")
    if summary.image:
        axes.axhline(summary.image[-1], color="black", linewidth=0.8, linestyle=":", label="image")
    axes.set_yscale("log", base=2)
    axes.set(xlabel="operator, in the order of the graph", ylabel="pixels of the image")
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    if fields:
        _mark_cut(axes, summary, len(summary.layers))
    axes.legend(frameon=False, fontsize=9)
    axes.set_title("receptive field over depth", fontsize=10)


def _mark_cut(axes: Axes, summary: Summary, count: int) -> None:
    """A line at the first operator whose receptive field is the whole image."""
    ends = next((i for i, layer in enumerate(summary.layers) if layer.field is None), None)
    if ends is not None and ends < count:
        axes.axvline(ends, color="black", linewidth=0.8)
        axes.text(
            ends, axes.get_ylim()[0] * 1.2, " the whole image", fontsize=8, ha="right", rotation=90, va="bottom"
        )


def save_pareto(workload: Workload, rows: Sequence[Row], path: Path) -> None:
    """Draw time over peak memory of every method that ran. Raises `InputError` without matplotlib."""
    figure = _figure(6.4, 4.4)
    axes = figure.subplots()
    ran = [row for row in rows if not row.failure]
    plain = next((row for row in ran if row.method.kind == PLAIN), None)
    seconds, unit = (plain.seconds, plain.peak_bytes) if plain else (1.0, 2**30)
    for kind, (color, marker) in MARKS.items():
        points = [(r.peak_bytes / unit, r.seconds / seconds, r.method.label) for r in ran if r.method.kind == kind]
        if points:
            _draw_method(axes, kind, sorted(points), marker, color)
    named = " over the plain network's" if plain else ""
    axes.set(xlabel=f"peak memory{named or ', GiB'}", ylabel=f"time of a step{named or ', s'}")
    axes.set_xlim(left=0)
    axes.set_ylim(bottom=0)
    axes.legend(frameon=False, fontsize=9)
    axes.set_title(workload.title, fontsize=10)
    figure.savefig(path, dpi=150)


def _draw_method(
    axes: Axes, kind: str, points: Sequence[tuple[float, float, str]], marker: str, color: str
) -> None:
    """The points of a method, memory and time; those of fxstream with their labels."""
    axes.plot([x for x, *_ in points], [y for _, y, _ in points], marker, color=color, label=kind)
    for x, y, label in points if kind == FXSTREAM else ():
        axes.annotate(label, (x, y), textcoords="offset points", xytext=(5, 5), fontsize=8)


def _draw_memory(axes: Axes, summary: Summary) -> None:
    """Bytes of every layer's result, plain and in the largest tile."""
    indices = range(len(summary.layers))
    axes.bar(indices, [layer.bytes / 2**20 for layer in summary.layers], width=1.0, color=SLATE, label="plain")
    if summary.plan is not None:
        sizes = [layer.tile_bytes / 2**20 for layer in summary.layers]
        axes.bar(indices, sizes, width=1.0, color=ORANGE, label="largest tile")
    axes.set(xlabel="operator, in the order of the graph", ylabel="MiB")
    title = "activations per layer"
    if summary.plan is not None:
        predicted = summary.plan.prediction
        title += f": peak {bytes_text(predicted.plain_bytes)} plain, {bytes_text(predicted.bytes)} streamed"
    axes.set_title(title, fontsize=10)
    axes.legend(frameon=False, fontsize=9)


def _draw_tiles(axes: Axes, summary: Summary) -> None:
    """What the tiles of the first segment read of the image, to scale, and what only the middle one reads."""
    assert summary.plan is not None
    plan = next((plan for plan in summary.plan.segments if plan.axes), None)
    if plan is None:
        return
    rows, columns = _reads(plan)
    height, width = summary.image[2:4] if len(plan.axes) > 1 else (1, summary.image[-1])
    row, column = len(rows) // 2, len(columns) // 2
    if max(len(rows), len(columns)) <= MOST_TILES:
        for i, k in itertools.product(range(len(rows)), range(len(columns))):
            fill = SAND if (i, k) == (row, column) else "none"
            _box(axes, columns[k], rows[i], facecolor=fill, edgecolor=SLATE, linewidth=0.6)
    label = "one tile reads"
    _box(axes, columns[column], rows[row], facecolor=SAND, edgecolor=ORANGE, linewidth=1.4, label=label)
    label = "only it reads"
    _box(axes, _unshared(columns, column), _unshared(rows, row), facecolor=ORANGE, edgecolor="none", label=label)
    axes.set_xlim(-0.02 * width, 1.02 * width)
    axes.set_ylim(1.02 * height, -0.02 * height)
    axes.set_aspect("equal")
    grid = " x ".join(str(len(tiles)) for tiles in plan.axes)
    axes.set_title(f"first of {len(summary.plan.segments)} segments: {grid} tiles", fontsize=10)
    axes.set(xlabel="pixels of the image")
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.12), ncols=2, frameon=False, fontsize=9)


def _reads(plan: SegmentPlan) -> tuple[list[Pixels], list[Pixels]]:
    """What the tiles of each row and of each column read of the segment's first input; one row for one axis."""
    source = plan.segment.spatial[0][0]
    boxes = [[tile.boxes.get(source) for tile in tiles] for tiles in plan.axes[:2]]
    spans: list[list[Pixels]] = [
        [None if box is None else (box.start, box.stop) for box in along] for along in boxes
    ]
    return (spans[0], spans[1]) if len(spans) > 1 else ([(0, 1)], spans[0])


def _unshared(spans: Sequence[Pixels], index: int) -> Pixels:
    """The part of what a tile reads that no neighbour reads."""
    span = spans[index]
    if span is None:
        return None
    start, stop = span
    if index > 0:
        start = max(start, (spans[index - 1] or (0, start))[1])
    if index + 1 < len(spans):
        stop = min(stop, (spans[index + 1] or (stop, 0))[0])
    return start, max(start, stop)


def _box(axes: Axes, along: Pixels, across: Pixels, **style: Any) -> None:
    """A rectangle; none where a tile reads nothing along an axis."""
    from matplotlib.patches import Rectangle

    if along is not None and across is not None:
        corner, extents = (along[0], across[0]), (along[1] - along[0], across[1] - across[0])
        axes.add_patch(Rectangle(corner, *extents, **style))
