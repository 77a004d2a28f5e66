"""Every distinct operator in tiles against itself on the whole: rules 4 and 7 of the NOTE in `probe`."""

from __future__ import annotations

import itertools
import math
import operator
from collections.abc import Sequence

import torch
from torch import fx
from torch.utils import _pytree as pytree

from fxstream.geometry.box import EMPTY, Box, Interval
from fxstream.graph.shapes import Shape, fold_integers
from fxstream.graph.typed_graph import Locality
from fxstream.probe.findings import Findings
from fxstream.probe.strip import extents_at, verdicts_at
from fxstream.probe.subgraph import Excerpt, excerpt
from fxstream.rules import Kind, Reduction, Value
from fxstream.runtime.tile_program import tile_program
from fxstream.tiling.bounds import AxisTile, AxisWalk, Segment, lookups, make_segment
from fxstream.tiling.request import leaf_extents, output_extents

__all__ = ["compare_reductions", "compare_values"]

SIZES = (9, 12, 16, 33, 64, 128)
"""Extents at which torch's own operators are compared, whose rules have their own tests: the first that works."""
LARGE_SIZES = (160, 128, 64, 33, 16, 12, 9)
"""The same for operators of others, whose rules may be wrong about pixels far away."""
OWN = "aten::"
TOLERANCE = 1e-9
"""Relative difference between a tile's values and the plain operator's, in float64."""


def compare_values(locality: Locality, segment: Segment, found: Findings) -> None:
    """Rule 4: every distinct operator in three tiles, at both borders and between, against itself on the whole."""
    known: set[object] = set()
    for name in segment.nodes:
        node = locality.nodes[name]
        signature = _signature(node, locality)
        if node.target is not operator.getitem and signature not in known:
            known.add(signature)
            items = tuple(user.name for user in node.users if user.name in segment.nodes)
            several = isinstance(locality.metas[name], tuple)
            _compare_tiles(locality, (name, *items) if several else (name,), found)


def _signature(node: fx.Node, locality: Locality) -> object:
    """What the evaluation on a box can depend on: the operator, its numbers, and the shapes of its kernels."""
    args, kwargs = fold_integers(node, locality.metas)
    numbers = [
        repr(leaf)
        for leaf in pytree.tree_leaves((args, kwargs), is_leaf=lambda x: x is None)
        if not isinstance(leaf, fx.Node)
    ]
    ranks = [
        (len(locality.value(n.name).shape), locality.value(n.name).dims, locality.value(n.name).shape[2:])
        if not locality.value(n.name).dims
        else (len(locality.value(n.name).shape), locality.value(n.name).dims, ())
        for n in node.all_input_nodes
        if isinstance(locality.metas.get(n.name), (Shape, tuple))
    ]
    return node.target, tuple(numbers), tuple(ranks)


def _compare_tiles(locality: Locality, names: tuple[str, ...], found: Findings) -> None:
    """One operator (with the items of its result) on the whole and in tiles, in float64."""
    name = names[0]
    part = excerpt(locality, make_segment(locality, name, names), torch.float64)
    at_size = _at_small_size(part)
    if at_size is None or any(at_size.verdicts[n].kind is not Kind.LOCAL for n in names):
        return
    generator = torch.Generator().manual_seed(0)

    def drawn(name: str) -> torch.Tensor:
        return _integers(at_size.value(name).shape, part.type_of(name), generator)

    inputs = [drawn(leaf) for leaf, _ in part.segment.leaves]
    smalls = [drawn(small).abs() + 1 for small in part.segment.smalls]
    with torch.no_grad():
        plain = part.module(*inputs, *smalls)
    axes = range(len(at_size.value(part.segment.outputs[0]).dims))
    walks = [AxisWalk(at_size, part.segment, axis) for axis in axes]
    for place in range(3):
        owned = [[_third(at_size, output, axis, place) for output in part.segment.outputs] for axis in axes]
        tiles = [walk.tile(tuple(own)) for walk, own in zip(walks, owned, strict=True)]
        program = tile_program(at_size, part.segment, tiles).forward
        cpu = torch.device("cpu")
        tables = [t for lookup in lookups(part.segment, tiles).values() for t in lookup.tensors(cpu)]
        try:
            with torch.no_grad():
                results = program(*_cuts(part, tiles, inputs), *smalls, *tables)
        except RuntimeError as error:
            found.add(name, 0, "values", "a tile of it", "can be evaluated", str(error).splitlines()[0])
            return
        for k, output in enumerate(part.segment.outputs):
            dims = at_size.value(output).dims
            box = Box(tuple(owned[axis][k] for axis in axes))
            if results[k] is None:
                continue
            wanted = plain[k][box.index(dims, plain[k].ndim)]
            if not _same_values(results[k], wanted):
                found.add(name, 0, "values", f"the tile {box}", _preview(results[k]), _preview(wanted))
                return


def compare_reductions(locality: Locality, names: Sequence[str], found: Findings) -> None:
    """Every distinct reduction, combined from three tiles along each axis, against itself on the whole.

    Both its values and the gradients that it sends to the map.
    """
    known: set[object] = set()
    for name in names:
        signature = _signature(locality.nodes[name], locality)
        if signature not in known:
            known.add(signature)
            _compare_combined(locality, name, found)


def _compare_combined(locality: Locality, name: str, found: Findings) -> None:
    part = excerpt(locality, make_segment(locality, name, (name,), (name,)), torch.float64)
    if any(_is_position(locality.value(leaf)) for leaf, _ in part.segment.leaves):
        return  # numbers that are drawn are none
    at_size = _at_small_size(part)
    reduction = at_size.verdicts[name].reduction if at_size is not None else None
    if at_size is None or reduction is None or reduction.reduction is None:
        return
    generator = torch.Generator().manual_seed(0)
    inputs = [
        _integers(at_size.value(leaf).shape, part.type_of(leaf), generator) for leaf, _ in part.segment.leaves
    ]
    smalls = [
        _integers(at_size.value(small).shape, part.type_of(small), generator) for small in part.segment.smalls
    ]
    mapped = [image.requires_grad_() for image in inputs if image.is_floating_point()]
    with torch.enable_grad():
        (plain,) = part.module(*inputs, *smalls)
        combined = _combined_from_tiles(at_size, part, reduction.reduction, inputs, smalls).to(plain.dtype)
    if not _same_values(combined, plain):
        found.add(name, 0, "values", "the result combined from tiles", _preview(combined), _preview(plain))
    elif plain.requires_grad:
        _compare_gradients(name, combined, plain, mapped, found)


def _combined_from_tiles(
    at_size: Locality,
    part: Excerpt,
    reduction: Reduction,
    inputs: Sequence[torch.Tensor],
    smalls: Sequence[torch.Tensor],
) -> torch.Tensor:
    """The result of a reduction from three tiles along each axis: the first pixel, all between, the last pixel."""
    extents = output_extents(at_size, part.segment.outputs[0])
    walks = [AxisWalk(at_size, part.segment, axis) for axis in range(len(extents))]
    thirds = [[Interval(0, 1), Interval(1, extent - 1), Interval(extent - 1, extent)] for extent in extents]
    partials: list[torch.Tensor] = []
    counts: list[int] = []
    for owned in itertools.product(*thirds):
        tiles = [walk.tile((interval,)) for walk, interval in zip(walks, owned, strict=True)]
        program = tile_program(at_size, part.segment, tiles).forward
        partials += program(*_cuts(part, tiles, inputs), *smalls)
        counts.append(math.prod(map(len, owned)))
    return reduction.combine(torch.stack(partials), torch.tensor(counts, dtype=torch.float64))


def _compare_gradients(
    name: str, combined: torch.Tensor, plain: torch.Tensor, maps: Sequence[torch.Tensor], found: Findings
) -> None:
    """The gradients of both results for the same gradient, which is another integer for each of their numbers."""
    given = torch.arange(1, plain.numel() + 1).view(plain.shape).to(plain.dtype)
    wanted = torch.autograd.grad(plain, maps, given, allow_unused=True, materialize_grads=True)
    if combined.requires_grad:
        tiled = torch.autograd.grad(combined, maps, given, allow_unused=True, materialize_grads=True)
    else:
        tiled = tuple(map(torch.zeros_like, maps))
    for mine, whole in zip(tiled, wanted, strict=True):
        if not _same_values(mine, whole):
            what = "the gradient of the result combined from tiles"
            found.add(name, 0, "values", what, _preview(mine), _preview(whole))


def _cuts(part: Excerpt, tiles: Sequence[AxisTile], inputs: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """What a tile reads of each leaf."""
    boxes = [Box(tuple(tile.boxes.get(leaf, EMPTY) for tile in tiles)) for leaf, _ in part.segment.leaves]
    return [
        image[box.index(dims, image.ndim)]
        for (_, dims), box, image in zip(part.segment.leaves, boxes, inputs, strict=True)
    ]


def _is_position(value: Value) -> bool:
    """Whether a leaf is no image, but says where in it a pixel lies."""
    return not value.image and value.dtype == torch.int64


def _at_small_size(part: Excerpt) -> Locality | None:
    """The verdicts at a small size at which the operator yields a few pixels; None if it refuses all."""
    foreign = not part.locality.verdicts[part.segment.nodes[0]].operator.startswith(OWN)
    real = {leaf: leaf_extents(part.locality, leaf, dims) for leaf, dims in part.segment.leaves}
    axes = len(next(iter(real.values())))
    for extent in LARGE_SIZES if foreign else SIZES:
        at_size = verdicts_at(part, extents_at(real, [extent] * axes))
        if at_size is None:
            continue
        if all(min(output_extents(at_size, output), default=0) > 2 for output in part.segment.outputs):
            return at_size
    return None


def _integers(shape: tuple[int, ...], dtype: torch.dtype, generator: torch.Generator) -> torch.Tensor:
    """Small random integers; in the first half of dim 0 all negative, so that a fill value shows.

    Of classes the first two.
    """
    drawn = torch.randint(-4, 5, shape, generator=generator)
    half = max(1, shape[0] // 2) if shape else 0
    if shape:
        drawn[:half] = -drawn[:half].abs() - 1
    if dtype == torch.int64:
        drawn %= 2
    return drawn.to(dtype)


def _third(locality: Locality, output: str, axis: int, place: int) -> Interval:
    """The first pixel, all between, or the last pixel of an output along an axis."""
    extent = locality.value(output).extents[axis]
    return (Interval(0, 1), Interval(1, extent - 1), Interval(extent - 1, extent))[place]


def _same_values(found: torch.Tensor, wanted: torch.Tensor) -> bool:
    if found.shape != wanted.shape or found.dtype != wanted.dtype:
        return False
    if not found.is_floating_point():
        return torch.equal(found, wanted)
    return torch.allclose(found, wanted, rtol=TOLERANCE, atol=TOLERANCE, equal_nan=True)


def _preview(tensor: torch.Tensor) -> str:
    numbers = [f"{x:g}" for x in tensor.flatten()[:4].tolist()]
    return f"{list(tensor.shape)} [{', '.join(numbers)}{', ...' if tensor.numel() > 4 else ''}]"
