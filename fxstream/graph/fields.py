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
from fxstream.graph.typed_graph import Locality
from fxstream.rules import Read, Value

__all__ = ["Demands", "ExtentChain", "Fields", "demands", "extent_chains", "main_image", "receptive_fields"]

Fields = Mapping[str, tuple[ReceptiveField, ...]]
"""Per node, its receptive field in the source along each axis."""
Demands = Fields
"""Per node, what one pixel of the output needs of it along each axis."""
ExtentChain = tuple[AxisExtent, ...]
"""Extent formulas to apply one after the other, first to the source's extent."""


def main_image(locality: Locality) -> str | None:
    """The input with the most pixels along its stream axes; None where no input has any."""
    images: dict[str, int] = {}
    for node in locality.graph.nodes:
        value = locality.values.get(node.name)
        if node.op == "placeholder" and isinstance(value, Value) and value.dims:
            images[node.name] = math.prod(value.extents)
    return max(images, key=images.__getitem__) if images else None


def receptive_fields(locality: Locality, nodes: Sequence[str], source: str) -> Fields:
    """The field of each of `nodes` (in the order of the graph) in pixels of `source`, where it has one.

    What `nodes` leave out, other inputs of a region and small tensors, is taken as given; a global operator among
    them takes the field away from all that depends on it.
    """
    axes = _axes(locality, nodes)
    known: dict[str, tuple[ReceptiveField, ...]] = {source: (ReceptiveField.of_map(IDENTITY),) * axes}
    lost: set[str] = set()
    for name in nodes:
        footprint = locality.verdicts[name].footprint
        inputs = [given.name for given in locality.nodes[name].all_input_nodes]
        if any(given in lost for given in inputs) or (footprint is None and locality.depends_on_image(name)):
            lost.add(name)
        reads = [read for read in footprint.reads if read.value.name in known] if footprint else []
        if name in lost or not reads:
            continue
        try:
            known[name] = _hull_over(known, reads)
        except RuleError:
            lost.add(name)
    return known


def _axes(locality: Locality, nodes: Sequence[str]) -> int:
    """How many stream axes the local ones of these nodes have."""
    footprints = (locality.verdicts[name].footprint for name in nodes if name in locality.verdicts)
    return max((len(footprint.dims) for footprint in footprints if footprint is not None), default=0)


def _hull_over(
    known: Mapping[str, tuple[ReceptiveField, ...]], reads: Sequence[Read]
) -> tuple[ReceptiveField, ...]:
    axes = range(len(reads[0].maps))
    return tuple(
        hull_of([ReceptiveField.of_map(read.maps[axis]).then(known[read.value.name][axis]) for read in reads])
        for axis in axes
    )


def demands(locality: Locality, nodes: Sequence[str], output: str) -> Demands:
    """What one pixel of `output`, one of `nodes`, needs of every node before it and of the leaves."""
    axes = len(locality.footprint(output).dims)
    known: dict[str, tuple[ReceptiveField, ...]] = {output: (ReceptiveField.of_map(IDENTITY),) * axes}
    lost: set[str] = set()
    for name in reversed(nodes):
        if name not in known or name in lost:
            continue
        for read in locality.footprint(name).reads:
            producer = read.value.name
            try:
                needed = tuple(known[name][k].then(ReceptiveField.of_map(read.maps[k])) for k in range(axes))
                known[producer] = _hulls(known.get(producer), needed)
            except RuleError:
                lost.add(producer)
                known.pop(producer, None)
    return known


def _hulls(
    one: tuple[ReceptiveField, ...] | None, other: tuple[ReceptiveField, ...]
) -> tuple[ReceptiveField, ...]:
    if one is None:
        return other
    return tuple(a.hull(b) for a, b in zip(one, other, strict=True))


def extent_chains(locality: Locality, nodes: Sequence[str], source: str) -> dict[str, tuple[ExtentChain, ...]]:
    """Along each axis, the formulas that lead from the source's extent to each node's."""
    axes = _axes(locality, nodes)
    known: dict[str, tuple[ExtentChain, ...]] = {source: ((),) * axes}
    for name in nodes:
        footprint = locality.verdicts[name].footprint
        if footprint is None:
            continue
        reads = [read for read in footprint.reads if read.value.name in known]
        wide = [read for read in reads if BROADCAST not in read.maps] or reads
        if wide:
            before = known[wide[0].value.name]
            steps = footprint.extents or (None,) * axes
            known[name] = tuple(_applied(chain, step) for chain, step in zip(before, steps, strict=True))
    return known


def _applied(chain: ExtentChain, step: AxisExtent | None) -> ExtentChain:
    """The chain with one more step, as one formula where that is possible."""
    if step is None:
        return chain
    if not chain:
        return (step,)
    joined = step.after(chain[-1])
    return (*chain[:-1], joined) if joined is not None else (*chain, step)
