"""The order in which segments and the ordinary operators around them run.

It is a topological order of the graph in which each segment is one node, as close to the model's own order as
possible, with effects and random draws in their original order. An operator may be inside several segments.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import networkx as nx

from fxstream.graph.effects import ordered_nodes
from fxstream.graph.typed_graph import Locality
from fxstream.tiling.bounds import Segment

__all__ = ["execution_order"]


def execution_order(locality: Locality, segments: Sequence[Segment]) -> list[str]:
    """The names of segments and ordinary nodes in an order in which they can run; integers need no place."""
    inside = {name for segment in segments for name in segment.nodes}
    place = {node.name: i for i, node in enumerate(locality.graph.nodes)}
    reads = {
        name: [given.name for given in node.all_input_nodes]
        for name, node in locality.nodes.items()
        if name not in inside and name not in locality.unread and not isinstance(locality.metas.get(name), int)
    }
    maker = {name: name for name in reads}
    for segment in segments:
        reads[segment.name] = list(segment.inputs)
        place[segment.name] = max(place[output] for output in segment.outputs)
        maker |= dict.fromkeys(segment.outputs, segment.name)
    edges = nx.DiGraph()
    edges.add_nodes_from(reads)
    edges.add_edges_from((maker[g], name) for name, given in reads.items() for g in given if g in maker)
    edges.add_edges_from(itertools.pairwise(n.name for n in ordered_nodes(locality.graph) if n.name in reads))
    return list(nx.lexicographical_topological_sort(edges, key=place.__getitem__))
