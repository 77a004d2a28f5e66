"""Receptive fields, demands and extents through a captured graph: `receptive_field` applied node by node.

Three walks over local nodes, each per axis and exact in integers:

- `receptive_fields`: what each node depends on of one source (the image, or a leaf of a region), forwards;
- `demands`: what a pixel of a region's output needs of each node, backwards;
- `extent_chains`: how many pixels each node has, as a formula in the source's extent, forwards.

A node that depends on the whole image through a global operator has no field. Branches whose strides differ,
which only happens where sizes agree by accident, have none either.

Coordinates: fields and demands are in pixels of the source or node that they speak of, borders ignored.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from fxstream.errors import RuleError
from fxstream.geometry.receptive_field import BROADCAST, IDENTITY, AxisExtent, ReceptiveField, hull_of
from fxstream.graph.typed_graph import TypedGraph
from fxstream.rules import AccessPattern, Read

__all__ = ["ExtentChain", "Fields", "demands", "extent_chains", "main_image", "receptive_fields"]

Fields = Mapping[str, tuple[ReceptiveField, ...]]
"""Per node, its receptive field in the source along each axis."""
ExtentChain = tuple[AxisExtent, ...]
"""Extent formulas to apply one after the other, first to the source's extent."""


def main_image(graph: TypedGraph) -> str | None:
    """The input with the most pixels along its tiled dims; None where no input has any."""
    return max(graph.images, key=lambda image: math.prod(image.extents)).name if graph.images else None


def receptive_fields(graph: TypedGraph, nodes: Sequence[str], source: str) -> Fields:
    """The field of each of `nodes` (in the order of the graph) in pixels of `source`, where it has one.

    What `nodes` leave out, other inputs of a region and whole tensors, has no influence; a global operator among
    them takes the field away from all that depends on it.
    """
    axes = _axes(graph, nodes, source)
    fields: dict[str, tuple[ReceptiveField, ...]] = {source: (ReceptiveField.of_map(IDENTITY),) * axes}
    lost: set[str] = set()
    for name in nodes:
        pattern = _pattern(graph, name)
        if any(one in lost for one in graph[name].inputs) or (pattern is None and graph[name].depends_on_image):
            lost.add(name)
        reads = [read for read in pattern.reads if read.value.name in fields] if pattern else []
        if name in lost or not reads:
            continue
        try:
            fields[name] = _hull_over(fields, reads)
        except RuleError:
            lost.add(name)
    return fields


def _pattern(graph: TypedGraph, name: str) -> AccessPattern | None:
    """The access pattern of a node that is local."""
    return graph.pattern(name) if graph[name].is_local else None


def _axes(graph: TypedGraph, nodes: Sequence[str], source: str) -> int:
    """How many axes the first local one of these nodes that reads the source has."""
    patterns = filter(None, (_pattern(graph, name) for name in nodes))
    reads = (read for pattern in patterns for read in pattern.reads if read.value.name == source)
    return next((len(read.maps) for read in reads), 0)


def _hull_over(
    fields: Mapping[str, tuple[ReceptiveField, ...]], reads: Sequence[Read]
) -> tuple[ReceptiveField, ...]:
    axes = range(len(reads[0].maps))
    return tuple(
        hull_of([ReceptiveField.of_map(read.maps[axis]).then(fields[read.value.name][axis]) for read in reads])
        for axis in axes
    )


def demands(graph: TypedGraph, nodes: Sequence[str], output: str) -> Fields:
    """What one pixel of `output`, one of `nodes`, needs of every node before it and of the leaves."""
    axes = len(graph.pattern(output).dims)
    fields: dict[str, tuple[ReceptiveField, ...]] = {output: (ReceptiveField.of_map(IDENTITY),) * axes}
    lost: set[str] = set()
    for name in reversed(nodes):
        if name not in fields or name in lost:
            continue
        for read in graph.pattern(name).reads:
            producer = read.value.name
            try:
                needed = tuple(fields[name][k].then(ReceptiveField.of_map(read.maps[k])) for k in range(axes))
                fields[producer] = _hulls(fields.get(producer), needed)
            except RuleError:
                lost.add(producer)
                fields.pop(producer, None)
    return fields


def _hulls(
    one: tuple[ReceptiveField, ...] | None, other: tuple[ReceptiveField, ...]
) -> tuple[ReceptiveField, ...]:
    if one is None:
        return other
    return tuple(a.hull(b) for a, b in zip(one, other, strict=True))


def extent_chains(graph: TypedGraph, nodes: Sequence[str], source: str) -> dict[str, tuple[ExtentChain, ...]]:
    """Along each axis, the formulas that lead from the source's extent to each node's."""
    axes = _axes(graph, nodes, source)
    fields: dict[str, tuple[ExtentChain, ...]] = {source: ((),) * axes}
    for name in nodes:
        pattern = _pattern(graph, name)
        if pattern is None:
            continue
        reads = [read for read in pattern.reads if read.value.name in fields]
        wide = [read for read in reads if BROADCAST not in read.maps] or reads
        if wide:
            before = fields[wide[0].value.name]
            steps = pattern.extents or (None,) * axes
            fields[name] = tuple(_applied(chain, step) for chain, step in zip(before, steps, strict=True))
    return fields


def _applied(chain: ExtentChain, step: AxisExtent | None) -> ExtentChain:
    """The chain with one more step, as one formula where that is possible."""
    if step is None:
        return chain
    if not chain:
        return (step,)
    joined = step.after(chain[-1])
    return (*chain[:-1], joined) if joined is not None else (*chain, step)
