"""What the user asked for, in the pixels of the model's input.

`tile` bounds the box that a tile reads of the model's input, overlap included (the paper's meaning of tile
size). A value further in is bounded by the same tile scaled to its own resolution, rounded up.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from fxstream.errors import PlanError
from fxstream.graph.typed_graph import TypedGraph
from fxstream.rules import Value

__all__ = [
    "Request",
    "belongs",
    "last_node_of",
    "tile_bounds",
]


@dataclass(frozen=True, slots=True)
class Request:
    """What the user asked for: a tile per axis (or one for all) or a memory, segments, where streaming ends.

    Without a tile, tiles are as large as the plan wants them within `memory`: bytes, a share of the device below
    one, or None for what the device has free. `segments` is how many segments each region gets (at most, within
    a memory), or the module paths that each end one, or None for the planner's choice. `global_ops` says whether
    reductions over space are streamed: "stream", "cut", or "auto" for the planner's choice. With `offload`
    boundaries lie in host memory, with `cuda_graphs` tiles are replayed on a device that can. Where programs are
    compiled, tiles of a segment have boxes of one shape, and one program, if that costs little.
    """

    tile: int | tuple[int, ...] | None = None
    segments: int | tuple[str, ...] | None = None
    cut: str | None = None
    memory: float | None = None
    global_ops: str = "auto"
    offload: bool = False
    cuda_graphs: bool = False
    compile_tiles: bool = False

    def tile_along(self, axes: int, images: Sequence[Value]) -> tuple[int | None, ...]:
        """The bound along each of so many axes, in pixels of the model's input; None for no bound.

        The last axes of a value are those of the images, of which some may be left whole.
        """
        if self.tile is None or isinstance(self.tile, int):
            return (self.tile,) * axes
        counts = {count for image in images for count in (len(image.dims), len(image.shape) - 2)}
        if len(self.tile) not in counts:
            count = max(len(image.dims) for image in images)
            raise PlanError(f"tile={self.tile} has {len(self.tile)} axes, but the image has {count}: give {count}")
        for image in images:
            first = len(image.shape) - len(self.tile)
            if len(image.dims) == axes < len(self.tile) and min(image.dims) >= first:
                return tuple(self.tile[dim - first] for dim in image.dims)
        return (None,) * (axes - len(self.tile)) + self.tile[max(0, len(self.tile) - axes) :]


def tile_bounds(graph: TypedGraph, request: Request, extents: Sequence[int]) -> tuple[int, ...]:
    """The tile scaled to the resolution of a value with these extents, rounded up; the extents without a tile."""
    if request.tile is None:
        return tuple(extents)
    image = graph.image_extents(extents)
    tiles = request.tile_along(len(extents), graph.images)
    return tuple(
        extent if tile is None else -(-tile * extent // full)
        for tile, extent, full in zip(tiles, extents, image, strict=True)
    )


def last_node_of(graph: TypedGraph, path: str) -> int:
    """The index in the graph of the last node that belongs to a module of the user."""
    indices = [graph[name].index for name, verdict in graph.verdicts.items() if belongs(verdict.module, path)]
    if not indices:
        parts = sorted({v.module.split(".")[0] for v in graph.verdicts.values() if v.module})
        raise PlanError(f"no module `{path}` runs in this model; its parts are {', '.join(parts)}")
    return indices[-1]


def belongs(module: str, path: str) -> bool:
    """Whether a module lies at or below a path."""
    return module == path or module.startswith(f"{path}.")
