"""The second drawing of `how_it_works.md`: tiles of a ResNet-18 through its depth, in one segment and in five."""

from collections.abc import Iterator

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from style import GREEN, GREY, ORANGE, save

import fxstream
from fxstream.graph.typed_graph import TypedGraph
from fxstream.machine.units import bytes_text
from fxstream.planning.plan import Plan
from fxstream.tiling.segment_plan import SegmentPlan
from fxstream.tools.zoo import build


def segments(size: int = 2048, tile: int = 640) -> None:
    """Both plans, drawn and printed, and that of one segment within the memory of five."""
    model = fxstream.freeze_batch_norm(build("torchvision/resnet18"))
    graph = fxstream.analyze(model, size).graph
    one = fxstream.plan(model, size, tile=tile, segments=1)
    several = fxstream.plan(model, size, tile=tile, segments=("maxpool", "layer1", "layer2", "layer3"))
    print(f"ResNet-18, {size} x {size}, tile {tile}:", one, several, sep="\n")
    within = fxstream.plan(model, size, memory=several.prediction.bytes, segments=1)
    print("one segment within the memory of five:", within, sep="\n")
    figure = Figure(figsize=(8, 4.6), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    depth = {name: y for y, name in enumerate(one.segments[0].segment.nodes, 1)}
    for axes, plan, title in zip(panels, (one, several), ("one segment", "five segments"), strict=True):
        draw_depth(axes, graph, plan, depth, size)
        axes.set_title(f"{title}: {plan.overhead:.2f}x MACs,\n{bytes_text(plan.prediction.bytes)}", fontsize=10)
    modules = [(graph.verdicts[name].module or "").split(".")[0] for name in depth]
    starts = {module: y for y, module in reversed(list(enumerate(modules, 1))) if module.startswith("layer")}
    panels[0].set_yticks([0, *starts.values(), len(modules)], ["image", *starts, "pool"], fontsize=9)
    save(figure, "segments.png")


def draw_depth(axes: Axes, graph: TypedGraph, plan: Plan, depth: dict[str, int], size: int) -> None:
    """Every tile along one axis: what it holds at every depth, in pixels of the image."""
    for part in plan.segments:
        for k in range(len(part.axes[1])):
            held = list(held_at(graph, part, k, depth, size))
            chosen = k == len(part.axes[1]) // 2
            ys, starts, stops = zip(*held, strict=True)
            colour, alpha = (ORANGE, 0.7) if chosen else ((GREY, GREEN)[k % 2], 0.3)
            axes.fill_betweenx(ys, starts, stops, color=colour, alpha=alpha, linewidth=0, zorder=2 + chosen)
        leaf = part.segment.spatial[0][0]
        if leaf in depth:
            axes.axhline(depth[leaf], color="black", linewidth=1.6, zorder=5)
            kept = bytes_text(graph.activation_bytes([leaf]))
            label = {"facecolor": "white", "edgecolor": "none", "alpha": 0.85, "pad": 1.5}
            axes.text(30, depth[leaf] + 0.7, f"kept whole: {kept}", fontsize=8.5, zorder=6, bbox=label)
    axes.set(xlim=(0, size), ylim=(0, len(depth)))
    axes.set_xlabel("pixels of the image, one axis", fontsize=9)


def held_at(
    graph: TypedGraph, part: SegmentPlan, k: int, depth: dict[str, int], size: int
) -> Iterator[tuple[int, float, float]]:
    """Depth, start and stop of what tile `k` holds of the nodes on the main path."""
    tile, leaf = part.axes[1][k], part.segment.spatial[0][0]
    for name in (leaf, *part.segment.nodes):
        if name != leaf and "downsample" in (graph.verdicts[name].module or ""):
            continue
        extent = graph[name].extents[1] if name in depth else size
        box = tile.boxes[name]
        yield depth.get(name, 0), box.start * size / extent, box.stop * size / extent
