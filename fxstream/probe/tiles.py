"""Every distinct operator in tiles against itself on the whole: rules 4 and 7 of the NOTE in `probe`."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import torch
from torch import fx
from torch.utils import _pytree as pytree

from fxstream.geometry.box import EMPTY, Box, Interval
from fxstream.graph.typed_graph import TypedGraph
from fxstream.probe.findings import Findings
from fxstream.probe.resized import extents_at, typed_at
from fxstream.probe.subgraph import Subgraph, subgraph
from fxstream.rules import Reduced, Value
from fxstream.runtime.tile_program import tile_program
from fxstream.tiling.axes.bounds import AxisTile, BoundsPass, lookups
from fxstream.tiling.segment import Segment, make_segment

__all__ = ["compare_reductions", "compare_values"]

SIZES = (9, 12, 16, 33, 64, 128)
"""Extents at which torch's operators and the package's are compared, which have tests: the first that works."""
LARGE_SIZES = (160, 128, 64, 33, 16, 12, 9)
"""The same for operators of others, whose rules may be wrong about pixels far away."""
FEWEST = (5, 3)
"""The same for operators of much memory at each position, as products of all pairs of pixels of a window."""
MOST_BYTES = 2**27
"""What an operator may read and make, where fewer positions take less."""
MOST_POSITIONS = 2**15
"""Positions of a map on which an operator is compared: of a volume few along each axis."""
TOLERANCE = 1e-9
"""Relative difference between a tile's values and the plain operator's, in float64."""


def compare_values(segment: Segment, findings: Findings) -> None:
    """Rule 4: every distinct operator in three tiles, at both borders and between, against itself on the whole."""
    compared: set[object] = set()
    for name in segment.nodes:
        node = segment.graph[name]
        signature = _signature(segment.graph, node.node)
        if not node.pattern.is_item and signature not in compared:
            compared.add(signature)
            items = tuple(user.name for user in node.node.users if user.name in segment.nodes)
            _compare_tiles(segment.graph, (name, *items) if node.is_tuple else (name,), findings)


def _signature(graph: TypedGraph, node: fx.Node) -> object:
    """What the evaluation on a box can depend on: the operator, its numbers, and the shapes of its kernels."""
    leaves = pytree.tree_leaves(graph.arguments(node), is_leaf=lambda x: x is None)
    numbers = [repr(leaf) for leaf in leaves if not isinstance(leaf, fx.Node)]
    values = [graph[one.name].values[0] for one in node.all_input_nodes if graph[one.name].values]
    ranks = [(len(v.shape), v.dims, () if v.dims else v.shape[2:]) for v in values]
    return node.target, tuple(numbers), tuple(ranks)


def _compare_tiles(graph: TypedGraph, names: tuple[str, ...], findings: Findings) -> None:
    """One operator (with the items of its result) on the whole and in tiles, in float64."""
    name = names[0]
    part = subgraph(make_segment(graph, name, names), torch.float64)
    segment = _at_small_size(part)
    if segment is None or not all(segment.graph[n].is_local for n in names):
        return
    inputs, whole = _drawn(part, segment)
    whole = [_at_least_one(tensor) for tensor in whole]
    with torch.no_grad():
        plain = part.module(*inputs, *whole)
    for third in range(3):
        owned = [[_third(segment.graph, o, axis, third) for o in segment.outputs] for axis in range(segment.axes)]
        try:
            results = _of_tile(segment, owned, inputs, whole)
        except RuntimeError as error:
            findings.add(name, 0, "values", "a tile of it", "can be evaluated", str(error).splitlines()[0])
            return
        for k, result in enumerate(results):
            box = Box(tuple(along[k] for along in owned))
            expected = plain[k][box.index(segment.graph.value(segment.outputs[k]).dims, plain[k].ndim)]
            if result is not None and not _same_values(result, expected):
                findings.add(name, 0, "values", f"the tile {box}", _preview(result), _preview(expected))
                return


@torch.no_grad()
def _of_tile(
    segment: Segment,
    owned: Sequence[Sequence[Interval]],
    inputs: Sequence[torch.Tensor],
    whole: Sequence[torch.Tensor],
) -> Sequence[torch.Tensor | None]:
    """What the tile that owns these intervals, of each output along each axis, makes of the inputs."""
    tiles = [BoundsPass(segment, axis).tile(tuple(along)) for axis, along in enumerate(owned)]
    return _run(segment, tiles, inputs, whole)


def _run(
    segment: Segment, tiles: Sequence[AxisTile], inputs: Sequence[torch.Tensor], whole: Sequence[torch.Tensor]
) -> Sequence[torch.Tensor]:
    """What one tile makes of the inputs."""
    tables = [t for lookup in lookups(segment, tiles).values() for t in lookup.tensors(torch.device("cpu"))]
    return tile_program(segment, tiles).forward(*_boxes(segment, tiles, inputs), *whole, *tables)


def _drawn(part: Subgraph, segment: Segment) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Random spatial and whole inputs at the size of a segment."""
    generator = torch.Generator().manual_seed(0)
    shapes = {name: segment.graph.value(name).shape for name in segment.inputs}
    drawn = [_integers(shapes[name], part.type_of(name), generator) for name in segment.inputs]
    return drawn[: len(segment.spatial)], drawn[len(segment.spatial) :]


def compare_reductions(graph: TypedGraph, names: Sequence[str], findings: Findings) -> None:
    """Every distinct reduction, combined from three tiles along each axis, against itself on the whole.

    Both its values and the gradients that it sends to the map.
    """
    compared: set[object] = set()
    for name in names:
        signature = _signature(graph, graph[name].node)
        if signature not in compared:
            compared.add(signature)
            _compare_combined(graph, name, findings)


def _compare_combined(graph: TypedGraph, name: str, findings: Findings) -> None:
    part = subgraph(make_segment(graph, name, (name,), (name,)), torch.float64)
    if any(_is_position(graph.value(one)) for one, _ in part.segment.spatial):
        return  # random numbers are not positions
    segment = _at_small_size(part)
    if segment is None or not segment.graph[name].reduces:
        return
    inputs, whole = _drawn(part, segment)
    maps = [image.requires_grad_() for image in inputs if image.is_floating_point()]
    with torch.enable_grad():
        (plain,) = part.module(*inputs, *whole)
        combined = _combined_from_tiles(segment, inputs, whole).to(plain.dtype)
    if not _same_values(combined, plain):
        findings.add(name, 0, "values", "the result combined from tiles", _preview(combined), _preview(plain))
    elif plain.requires_grad:
        _compare_gradients(name, combined, plain, maps, findings)


def _combined_from_tiles(
    segment: Segment, inputs: Sequence[torch.Tensor], whole: Sequence[torch.Tensor]
) -> torch.Tensor:
    """The result of a reduction from three tiles along each axis: the first pixel, all between, the last pixel."""
    (output,) = segment.outputs
    reduction, extents = segment.graph.pattern(output), segment.graph[output].extents
    assert isinstance(reduction, Reduced)
    walks = [BoundsPass(segment, axis) for axis in range(len(extents))]
    thirds = [[Interval(0, 1), Interval(1, extent - 1), Interval(extent - 1, extent)] for extent in extents]
    partials: list[torch.Tensor] = []
    counts: list[int] = []
    for owned in itertools.product(*thirds):
        tiles = [walk.tile((interval,)) for walk, interval in zip(walks, owned, strict=True)]
        partials += _run(segment, tiles, inputs, whole)
        counts.append(math.prod(map(len, owned)))
    return reduction.combine(torch.stack(partials), torch.tensor(counts, dtype=torch.float64))


def _compare_gradients(
    name: str, combined: torch.Tensor, plain: torch.Tensor, maps: Sequence[torch.Tensor], findings: Findings
) -> None:
    """The gradients of both results for the same gradient, which is another integer for each of their numbers."""
    gradient = torch.arange(1, plain.numel() + 1).view(plain.shape).to(plain.dtype)
    expected = torch.autograd.grad(plain, maps, gradient, allow_unused=True, materialize_grads=True)
    if combined.requires_grad:
        tiled = torch.autograd.grad(combined, maps, gradient, allow_unused=True, materialize_grads=True)
    else:
        tiled = tuple(map(torch.zeros_like, maps))
    for of_tiles, of_whole in zip(tiled, expected, strict=True):
        if not _same_values(of_tiles, of_whole):
            what = "the gradient of the result combined from tiles"
            findings.add(name, 0, "values", what, _preview(of_tiles), _preview(of_whole))


def _boxes(segment: Segment, tiles: Sequence[AxisTile], inputs: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """What a tile reads of each spatial input."""
    boxes = [Box(tuple(tile.boxes.get(name, EMPTY) for tile in tiles)) for name, _ in segment.spatial]
    return [
        image[box.index(dims, image.ndim)]
        for (_, dims), box, image in zip(segment.spatial, boxes, inputs, strict=True)
    ]


def _is_position(value: Value) -> bool:
    """Whether an input is not an image, but says where in it a pixel lies."""
    return not value.image and value.dtype == torch.int64


def _at_small_size(part: Subgraph) -> Segment | None:
    """The segment at a small size at which the operator yields a few pixels; None if it refuses all."""
    target = part.graph[part.segment.nodes[0]].node.target
    is_tested = isinstance(target, torch._ops.OpOverload) and target.namespace in ("aten", "fxstream")
    first = _first_of(part, SIZES if is_tested else LARGE_SIZES)
    if first is None or first.graph.activation_bytes([*first.inputs, *first.nodes]) <= MOST_BYTES:
        return first
    return _first_of(part, FEWEST) or first


def _first_of(part: Subgraph, sizes: Sequence[int]) -> Segment | None:
    """The segment at the first of these extents at which it yields more than two pixels along each axis."""
    real = {name: part.segment.input_extents(name) for name, _ in part.segment.spatial}
    axes = len(next(iter(real.values())))
    for extent in sizes:
        if extent**axes > MOST_POSITIONS:
            continue
        segment = typed_at(part, extents_at(real, [extent] * axes))
        if segment is not None and all(min(segment.graph[o].extents, default=0) > 2 for o in segment.outputs):
            return segment
    return None


def _integers(shape: tuple[int, ...], dtype: torch.dtype, generator: torch.Generator) -> torch.Tensor:
    """Small random integers; in the first half of dim 0 all negative, so that a fill value shows.

    Of classes the first two.
    """
    drawn_as = dtype if dtype.is_floating_point else torch.int64
    drawn = torch.randint(-4, 5, shape, generator=generator, dtype=drawn_as)
    half = max(1, shape[0] // 2) if shape else 0
    if shape:
        drawn[:half].abs_().neg_().sub_(1)
    if dtype == torch.int64:
        drawn %= 2
    return drawn.to(dtype)


def _at_least_one(tensor: torch.Tensor) -> torch.Tensor:
    """The absolute values and one more, in place where that can be; masks and indices as they are."""
    if not (tensor.is_floating_point() or tensor.is_complex()):
        return tensor
    return tensor.abs().add(1).to(tensor.dtype) if tensor.is_complex() else tensor.abs_().add_(1)


def _third(graph: TypedGraph, output: str, axis: int, third: int) -> Interval:
    """The first pixel, all between, or the last pixel of an output along an axis."""
    extent = graph.value(output).extents[axis]
    return (Interval(0, 1), Interval(1, extent - 1), Interval(extent - 1, extent))[third]


def _same_values(actual: torch.Tensor, expected: torch.Tensor) -> bool:
    if actual.shape != expected.shape or actual.dtype != expected.dtype:
        return False
    if not actual.is_floating_point():
        return torch.equal(actual, expected)
    return torch.allclose(actual, expected, rtol=TOLERANCE, atol=TOLERANCE, equal_nan=True)


def _preview(tensor: torch.Tensor) -> str:
    numbers = [f"{x:g}" for x in tensor.flatten()[:4].tolist()]
    return f"{list(tensor.shape)} [{', '.join(numbers)}{', ...' if tensor.numel() > 4 else ''}]"
