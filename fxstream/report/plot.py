"""A summary as a picture: receptive field over depth, memory per layer, and the tile grid over the image.

Needs matplotlib, the extra ``fxstream[plot]``.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fxstream.errors import InputError
from fxstream.machine.units import bytes_text
from fxstream.report.summary import Summary
from fxstream.tools.benchmark import Row, Workload

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["save_pareto", "save_plot"]

PLAIN, TILED, READ, OWNED = "#7a8ba3", "#d9622b", "#f0b48f", "#d9622b"
CHECKPOINT = "#3b7a57"
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
    known = [(i, layer.field[0]) for i, layer in enumerate(summary.layers) if layer.field]
    places = [i for i, _ in known]
    axes.step(places, [field.size for _, field in known], where="post", color=TILED, label="receptive field")
    axes.step(places, [float(field.stride) for _, field in known], where="post", color=PLAIN, label="stride")
    if summary.image:
        axes.axhline(summary.image[-1], color="black", linewidth=0.8, linestyle=":", label="image")
    axes.set_yscale("log", base=2)
    axes.set(xlabel="operator, in the order of the graph", ylabel="pixels of the image")
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    if known:
        _mark_cut(axes, summary, len(summary.layers))
    axes.legend(frameon=False, fontsize=9)
    axes.set_title("receptive field over depth", fontsize=10)


def _mark_cut(axes: Axes, summary: Summary, count: int) -> None:
    ends = next((i for i, layer in enumerate(summary.layers) if layer.field is None), None)
    if ends is not None and ends < count:
        axes.axvline(ends, color="black", linewidth=0.8)
        axes.text(
            ends, axes.get_ylim()[0] * 1.2, " the whole image", fontsize=8, ha="right", rotation=90, va="bottom"
        )


def save_pareto(workload: Workload, rows: Sequence[Row], path: Path) -> None:
    """Time over peak memory of every way that ran. Raises `InputError` without matplotlib."""
    figure = _figure(6.4, 4.4)
    axes = figure.subplots()
    ran = [row for row in rows if not row.failure]
    plain = next((row for row in ran if row.method.kind == "plain"), None)
    seconds, unit = (plain.seconds, plain.peak_bytes) if plain else (1.0, 2**30)
    for kind, color, marker in (("plain", PLAIN, "s"), ("checkpoint", CHECKPOINT, "^"), ("fxstream", TILED, "o")):
        own = sorted(
            (r.peak_bytes / unit, r.seconds / seconds, r.method.label) for r in ran if r.method.kind == kind
        )
        if own:
            line = "-" if kind == "fxstream" else ""
            places = [x for x, *_ in own], [y for _, y, _ in own]
            axes.plot(*places, marker + line, color=color, label=kind)
        for x, y, label in own:
            if kind == "fxstream":
                axes.annotate(label, (x, y), textcoords="offset points", xytext=(5, 5), fontsize=8)
    named = " over the plain network's" if plain else ""
    axes.set(xlabel=f"peak memory{named or ', GiB'}", ylabel=f"time of a step{named or ', s'}")
    axes.set_xlim(left=0)
    axes.set_ylim(bottom=0)
    axes.legend(frameon=False, fontsize=9)
    axes.set_title(f"{workload.target}, {'x'.join(map(str, workload.shape))}", fontsize=10)
    figure.savefig(path, dpi=150)


def _draw_memory(axes: Axes, summary: Summary) -> None:
    """Bytes of every layer's result, plain and in the largest tile."""
    places = range(len(summary.layers))
    axes.bar(places, [layer.bytes / 2**20 for layer in summary.layers], width=1.0, color=PLAIN, label="plain")
    if summary.plan is not None:
        held = [layer.tile_bytes / 2**20 for layer in summary.layers]
        axes.bar(places, held, width=1.0, color=TILED, label="largest tile")
    axes.set(xlabel="operator, in the order of the graph", ylabel="MiB")
    title = "activations per layer"
    if summary.plan is not None:
        predicted = summary.plan.prediction
        title += f": peak {bytes_text(predicted.plain_bytes)} plain, {bytes_text(predicted.bytes)} streamed"
    axes.set_title(title, fontsize=10)
    axes.legend(frameon=False, fontsize=9)


def _draw_tiles(axes: Axes, summary: Summary) -> None:
    """What the tiles of the first segment read of the image, to scale; one of them with its own share."""
    assert summary.plan is not None
    part = next((part for part in summary.plan.segments if part.axes), None)
    if part is None:
        return
    leaf = part.segment.spatial[0][0]
    rows, columns = (part.axes[0], part.axes[1]) if len(part.axes) > 1 else ((None,), part.axes[0])
    full = summary.image[2:] if len(part.axes) > 1 else (1, summary.image[-1])
    for i, row in enumerate(rows):
        for k, column in enumerate(columns):
            across, along = _interval(row, leaf), _interval(column, leaf)
            if len(rows) <= MOST_TILES and len(columns) <= MOST_TILES and along and across:
                middle = (i, k) == (len(rows) // 2, len(columns) // 2)
                _box(axes, along, across, facecolor=READ if middle else "none", edgecolor=PLAIN, linewidth=0.6)
    row, column = rows[len(rows) // 2], columns[len(columns) // 2]
    along, across = _interval(column, leaf), _interval(row, leaf)
    if along and across:
        _box(axes, along, across, facecolor=READ, edgecolor=OWNED, linewidth=1.4, label="one tile reads")
        own = [
            _share(tiles, index, leaf) for tiles, index in ((columns, len(columns) // 2), (rows, len(rows) // 2))
        ]
        _box(axes, own[0], own[1], facecolor=OWNED, edgecolor="none", label="only it reads")
    axes.set_xlim(-0.02 * full[1], 1.02 * full[1])
    axes.set_ylim(1.02 * full[0], -0.02 * full[0])
    axes.set_aspect("equal")
    grid = " x ".join(str(len(tiles)) for tiles in part.axes)
    axes.set_title(f"first of {len(summary.plan.segments)} segments: {grid} tiles", fontsize=10)
    axes.set(xlabel="pixels of the image")
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.12), ncols=2, frameon=False, fontsize=9)


def _interval(tile: Any, leaf: str) -> tuple[int, int] | None:
    if tile is None:
        return 0, 1
    box = tile.boxes.get(leaf)
    return (box.start, box.stop) if box is not None else None


def _share(tiles: Any, index: int, leaf: str) -> tuple[int, int]:
    """The part of a tile's box that no neighbour reads."""
    start, stop = _interval(tiles[index], leaf) or (0, 1)
    if index > 0:
        start = max(start, (_interval(tiles[index - 1], leaf) or (0, start))[1])
    if index + 1 < len(tiles):
        stop = min(stop, (_interval(tiles[index + 1], leaf) or (stop, 0))[0])
    return start, max(start, stop)


def _box(axes: Axes, along: tuple[int, int], across: tuple[int, int], **style: Any) -> None:
    from matplotlib.patches import Rectangle

    axes.add_patch(Rectangle((along[0], across[0]), along[1] - along[0], across[1] - across[0], **style))
