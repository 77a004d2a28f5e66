"""Parts of the graph that are streamed together, and the passes over a stretch of one.

NOTE [reductions on the way]
1. A part is a region of local nodes, with the regions that read its maps behind a barrier, and the reductions over
   space of its maps. So a network with BatchNorm in training, or with squeeze-excitation, is one part.
2. A stretch of a part is a run of its nodes in the order of the graph. Its outputs are what others read: maps, and
   all its reductions. A reduction stands directly behind the last map that it reads.
3. Nothing behind a barrier can run before what the barrier yields is known. So a stretch runs as one segment per
   stage of its outputs: each computes the outputs of that stage from what the stretch reads, and from outputs of
   earlier passes. What lies on the way is computed in each pass anew, unless it is itself an output: a stretch
   that ends in the map that a normalisation takes its statistics of has no further pass.
4. A stretch that is not cut into tiles needs no passes: it runs whole, with the small operators between its maps,
   and is recomputed for its backward. That is a checkpoint.
5. A pass reads only what passes of the same or an earlier stage make, and of the same stage only of earlier
   stretches. So there is always an order in which all of them can run.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import networkx as nx

from fxstream.graph.effects import ordered_nodes
from fxstream.graph.typed_graph import Locality
from fxstream.tiling.bounds import Segment, is_output, is_read_outside, make_segment

__all__ = ["passes", "stages_of_outputs", "streamable_parts", "whole_segment"]


def streamable_parts(locality: Locality) -> list[tuple[str, ...]]:
    """The parts (rule 1) by their nodes, in the order of the graph."""
    order = {node.name: float(i) for i, node in enumerate(locality.graph.nodes)}
    region = {name: k for k, found in enumerate(locality.regions) for name in found.nodes}
    reductions = [v.node for v in locality.reductions() if v.node not in locality.unread]
    joined = nx.Graph()
    joined.add_nodes_from(region.values())
    for name in (*region, *reductions):
        read = [region[r.value.name] for r in locality.footprint(name).reads if r.value.name in region]
        own = [region[name]] if name in region else []
        nx.add_path(joined, (*own, *read))
    of = {k: i for i, group in enumerate(nx.connected_components(joined)) for k in group}
    parts: dict[int, list[str]] = {}
    for name, k in region.items():
        parts.setdefault(of[k], []).append(name)
    for name in reductions:
        read = [region[r.value.name] for r in locality.footprint(name).reads if r.value.name in region]
        if read:
            parts[of[read[0]]].append(name)
            last = max(order[r.value.name] for r in locality.footprint(name).reads if r.value.name in region)
            order[name] = last + order[name] / len(order)
    found = [tuple(sorted(nodes, key=order.__getitem__)) for nodes in parts.values()]
    return sorted(found, key=lambda nodes: order[nodes[0]])


def passes(locality: Locality, name: str, nodes: Sequence[str]) -> Iterator[Segment]:
    """The segments that a stretch runs as (rule 3), in order; `name` begins their names."""
    inside, known = set(nodes), set[str]()
    outputs = [n for n in nodes if is_output(locality, n, inside)]
    for i, stage in enumerate(stages := stages_of_outputs(locality, outputs)):
        own = [n for n in outputs if locality.stages[n] == stage]
        left = tuple(n for n in nodes if n not in known)
        yield make_segment(locality, f"{name}_{i}" if len(stages) > 1 else name, left, own)
        known |= set(own)


def whole_segment(locality: Locality, name: str, nodes: Sequence[str]) -> Segment | None:
    """The segment that runs a stretch whole (rule 4); None where an effect or a random draw lies in between."""
    between = _between(locality, nodes)
    ordered = {node.name for node in ordered_nodes(locality.graph)}
    if not ordered.isdisjoint(between):
        return None
    inside = {*nodes, *between}
    leaves: dict[str, tuple[int, ...]] = {}
    smalls: dict[str, None] = {}
    own = tuple(node.name for node in locality.graph.nodes if node.name in inside)
    for given in (given for n in own for given in locality.nodes[n].all_input_nodes if given.name not in inside):
        if isinstance(locality.metas.get(given.name), int):
            continue
        dims = locality.value(given.name).dims
        leaves |= {given.name: dims} if dims else {}
        smalls |= {} if dims else {given.name: None}
    outputs = tuple(n for n in own if is_read_outside(locality, n, inside))
    return Segment(name, own, tuple(leaves.items()), tuple(smalls), outputs)


def _between(locality: Locality, nodes: Sequence[str]) -> set[str]:
    """The other nodes that depend on one of these and that another of these depends on; no integers."""
    inside, order = set(nodes), list(locality.nodes)
    place = {name: i for i, name in enumerate(order)}
    span = order[min(place[n] for n in nodes) : max(place[n] for n in nodes) + 1]
    behind, before = set(nodes), set(nodes)
    for name in span:
        if any(given.name in behind for given in locality.nodes[name].all_input_nodes):
            behind.add(name)
    for name in reversed(span):
        if any(user.name in before for user in locality.nodes[name].users):
            before.add(name)
    return {n for n in behind & before - inside if not isinstance(locality.metas.get(n), int)}


def stages_of_outputs(locality: Locality, outputs: Sequence[str]) -> list[int]:
    """The stages of these nodes, each of which takes a pass."""
    return sorted({locality.stages[name] for name in outputs})
