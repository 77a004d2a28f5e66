"""A segment made ready to run: the programs of its tile classes and the schedule of its tiles."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

from fxstream.box import Box
from fxstream.demand import AxisTile, Segment, lookups
from fxstream.interpolation import Lookup
from fxstream.locality import Locality
from fxstream.rules import Footprint
from fxstream.saved import Saved
from fxstream.segment_plan import SegmentPlan
from fxstream.sizes import Shape
from fxstream.tile_program import TileProgram, tile_program, whole_program

__all__ = ["Stream", "Subscript", "TileCall", "build_stream"]

Subscript = tuple[slice, ...]
Combine = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


@dataclass(frozen=True, slots=True)
class TileCall:
    """One turn of the loop: which program, what it reads of each leaf, what it owns of each output.

    `positions` are the pixels that it owns of each output, or of what a reduction reduces. `lookups` are the parts
    of tables that the program takes behind its other inputs.
    """

    program: int
    leaves: tuple[Subscript, ...]
    outputs: tuple[Subscript | None, ...]
    positions: tuple[int, ...]
    is_kept: bool = False
    lookups: tuple[Lookup, ...] = ()


@dataclass(frozen=True, slots=True)
class Stream:
    """A segment made ready to run: the programs of its tile classes and the schedule of its tiles.

    `combined` says how the partial results of the outputs that are reductions are combined, by their places.
    `labels` name the leaves and the small tensors, in that order, in the user's words; `sources` are the places
    of the inputs that each output can send a gradient to.
    """

    plan: SegmentPlan
    programs: tuple[TileProgram, ...]
    calls: tuple[TileCall, ...]
    outputs: tuple[Shape, ...]
    combined: Mapping[int, Combine]
    labels: tuple[str, ...]
    sources: tuple[frozenset[int], ...]

    @property
    def leaf_count(self) -> int:
        """How many of the inputs are cut into boxes; the rest is passed whole."""
        return len(self.plan.segment.leaves)

    def tile_inputs(self, call: TileCall, leaves: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """What one tile reads of each leaf; views."""
        return [leaf[box] for leaf, box in zip(leaves, call.leaves, strict=True)]

    def tables(self, call: TileCall, device: torch.device) -> list[torch.Tensor]:
        """What one tile takes from tables."""
        return [tensor for lookup in call.lookups for tensor in lookup.tensors(device)]


def build_stream(
    locality: Locality,
    plan: SegmentPlan,
    labels: tuple[str, ...],
    saved: Mapping[str, Saved] | None = None,
    compile_tiles: bool = False,
) -> Stream:
    """The programs and the schedule of a planned segment; `saved` as in `tile_program`."""
    segment = plan.segment
    if not plan.axes:
        return _whole_stream(locality, plan, labels, saved, compile_tiles)
    classes: dict[tuple[int, ...], int] = {}
    programs: list[TileProgram] = []
    calls: list[TileCall] = []
    per_axis = [_class_numbers(tiles) for tiles in plan.axes]
    ranks = [_shape(locality, leaf) for leaf, _ in segment.leaves]
    shapes = tuple(_shape(locality, output) for output in segment.outputs)
    footprints = [locality.footprint(output) for output in segment.outputs]
    recomputed = plan.tile_count - plan.kept
    for i, tile in enumerate(plan.tiles()):
        key = tuple(numbers[id(along)] for numbers, along in zip(per_axis, tile, strict=True))
        if key not in classes:
            classes[key] = len(programs)
            program = tile_program(locality, segment, tile, saved)
            programs.append(program.compiled() if compile_tiles else program)
        leaves = tuple(
            plan.leaf_box(leaf, tile).index(dims, len(shape.shape))
            for (leaf, dims), shape in zip(segment.leaves, ranks, strict=True)
        )
        boxes = [Box(tuple(along.outputs[k] for along in tile)) for k in range(len(shapes))]
        owned = tuple(
            _owned(box, footprint, len(shape.shape))
            for box, footprint, shape in zip(boxes, footprints, shapes, strict=True)
        )
        positions = tuple(math.prod(box.shape) for box in boxes)
        tables = tuple(lookups(segment, tile).values())
        calls.append(TileCall(classes[key], leaves, owned, positions, i >= recomputed, tables))
    combined = {k: f.reduction.combine for k, f in enumerate(footprints) if f.reduction is not None}
    return Stream(plan, tuple(programs), tuple(calls), shapes, combined, labels, _sources(locality, segment))


def _whole_stream(
    locality: Locality,
    plan: SegmentPlan,
    labels: tuple[str, ...],
    saved: Mapping[str, Saved] | None,
    compile_tiles: bool,
) -> Stream:
    """A segment that runs whole: one tile, which is everything."""
    segment = plan.segment
    program = whole_program(locality, segment, saved)
    shapes = tuple(_shape(locality, output) for output in segment.outputs)
    leaves, outputs = ((slice(None),),) * len(segment.leaves), ((),) * len(shapes)
    call = TileCall(0, leaves, outputs, (1,) * len(shapes), plan.kept > 0)
    programs = (program.compiled() if compile_tiles else program,)
    return Stream(plan, programs, (call,), shapes, {}, labels, _sources(locality, segment))


CONSTANT = {"aten::detach", "aten::zeros_like", "aten::ones_like", "aten::full_like"}
"""Operators whose result has no gradient."""


def _sources(locality: Locality, segment: Segment) -> tuple[frozenset[int], ...]:
    """For each output, the places of the inputs that a gradient can flow to: nothing behind a detach."""
    known = {name: frozenset([place]) for place, name in reversed(list(enumerate(segment.inputs)))}
    for place, name in enumerate(segment.inputs):
        known[name] |= {place}
    for name in segment.nodes:
        given = (known.get(given.name, ()) for given in locality.nodes[name].all_input_nodes)
        known[name] = frozenset().union(*given)
        meta = locality.metas[name]
        if locality.verdicts[name].operator in CONSTANT or (isinstance(meta, Shape) and not meta.has_gradient):
            known[name] = frozenset()
    return tuple(known[output] for output in segment.outputs)


def _class_numbers(tiles: Sequence[AxisTile]) -> dict[int, int]:
    """The class of each tile along one axis: equal programs, equal number."""
    numbers: dict[object, int] = {}
    return {id(tile): numbers.setdefault(tile.program_key, len(numbers)) for tile in tiles}


def _shape(locality: Locality, name: str) -> Shape:
    meta = locality.metas[name]
    assert isinstance(meta, Shape)
    return meta


def _owned(box: Box, footprint: Footprint, rank: int) -> Subscript | None:
    """The part of an output that a tile owns (all of a reduction), or None where the box is empty."""
    if not all(box.shape):
        return None
    return () if footprint.reduction is not None else box.index(footprint.dims, rank)
