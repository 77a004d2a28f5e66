"""The first drawing of `how_it_works.md`: from a tile's share of the output back to the pixels that it reads."""

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from style import GREEN, GREY, ORANGE, save
from torch import nn
from torch.nn import functional as F

import fxstream
from fxstream.geometry.box import Interval
from fxstream.graph.typed_graph import TypedGraph
from fxstream.tiling.segment_plan import SegmentPlan

LABELS = ("image", "stem: 3x3", "narrow: 1x1", "wide: 3x3,\ndilation 4", "sum", "pool: 2x2")
HALF = 0.14
"""Half the height of a bar."""


class Branches(nn.Module):
    """A convolution, two branches of different reach, their sum, a pooling."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, padding=1)
        self.narrow = nn.Conv2d(4, 4, 1)
        self.wide = nn.Conv2d(4, 4, 3, padding=4, dilation=4)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        stem = self.stem(image)
        return F.max_pool2d(self.narrow(stem) + self.wide(stem), 2)


def demand(size: int = 48, tile: int = 26) -> None:
    """The walk of the tile in the middle, and the grids of the image and the output."""
    model = Branches()
    graph = fxstream.analyze(model, size).graph
    part = fxstream.plan(model, size, tile=tile, segments=1).segments[0]
    output, leaf = part.segment.outputs[0], part.segment.spatial[0][0]
    figure = Figure(figsize=(8, 3.7), layout="constrained")
    walk, image, owned = figure.subplots(1, 3, width_ratios=(2.3, 1, 1))
    draw_walk(walk, graph, part, size)
    draw_grid(image, [[tile.boxes[leaf] for tile in tiles] for tiles in part.axes], size)
    shares = [[tile.outputs[0] for tile in tiles] for tiles in part.axes]
    draw_grid(owned, shares, graph[output].extents[0])
    image.set_title("the image: boxes\noverlap", fontsize=10)
    owned.set_title("the output: rectangles\npartition it", fontsize=10)
    save(figure, "demand.png")


def draw_walk(axes: Axes, graph: TypedGraph, part: SegmentPlan, size: int) -> None:
    """What every operator holds for the tile in the middle, and what each of its consumers asked for."""
    boxes, leaf = part.axes[1][len(part.axes[1]) // 2].boxes, part.segment.spatial[0][0]
    rows = (leaf, *part.segment.nodes)
    for y, name in enumerate(rows):
        box, scale = boxes[name], 1 if name == leaf else size / graph[name].extents[1]
        axes.broken_barh([(0, size)], (y - HALF, 2 * HALF), color=GREY, alpha=0.25)
        axes.broken_barh([(box.start * scale, len(box) * scale)], (y - HALF, 2 * HALF), color=ORANGE)
        axes.text(size + 1, y, f"{box.start} .. {box.stop - 1}", va="center", fontsize=9)
        for read in [] if name == leaf else graph.pattern(name).reads:
            asked, below = read.needed(1, box).clip(read.extents[1]), rows.index(read.value.name)
            step = size / read.extents[1]
            ends = (box.start * scale, box.stop * scale, asked.stop * step, asked.start * step)
            heights = (y - HALF, y - HALF, below + HALF, below + HALF)
            axes.fill(ends, heights, color=GREEN if name == rows[2] else ORANGE, alpha=0.2, zorder=0)
    axes.set(xticks=[], xlim=(-1, size + 13), ylim=(-0.6, len(rows) - 0.3))
    axes.set_yticks(range(len(rows)), LABELS, fontsize=9)
    axes.set_title("one tile along one axis: what each\noperator holds, pixels of its own map", fontsize=10)
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0)


def draw_grid(axes: Axes, intervals: list[list[Interval]], extent: int) -> None:
    """All rectangles of a grid over a square map, the one in the middle marked."""
    middle = len(intervals[0]) // 2
    for i, rows in enumerate(intervals[0]):
        for k, columns in enumerate(intervals[1]):
            chosen = i == k == middle
            colour, alpha = (ORANGE, 0.8) if chosen else (GREY, 0.25)
            box = (columns.start, rows.start), len(columns), len(rows)
            axes.add_patch(Rectangle(*box, facecolor=colour, edgecolor="none", alpha=alpha, zorder=1 + chosen))
            axes.add_patch(Rectangle(*box, fill=False, edgecolor="white", linewidth=1.2, zorder=3))
    axes.set(xlim=(-1, extent + 1), ylim=(extent + 1, -1), aspect="equal", xticks=[], yticks=[])
    axes.set_xlabel(f"{extent} x {extent}", fontsize=9)
