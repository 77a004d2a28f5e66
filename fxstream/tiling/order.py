"""The order in which segments and the dense operators around them run.

It is a topological order of the graph in which each segment is one node, as close to the model's own order as
possible, with effects among themselves and random draws among themselves in their original order. An operator may
be inside several segments.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import networkx as nx

from fxstream.graph.effects import ordered_chains
from fxstream.graph.typed_graph import TypedGraph
from fxstream.tiling.segment import Segment

__all__ = ["execution_order"]


def execution_order(graph: TypedGraph, segments: Sequence[Segment]) -> list[str]:
    """The names of segments and dense nodes in an order in which they can run, without integers."""
    inside = {name for segment in segments for name in segment.covers}
    index: dict[str, int] = {name: node.index for name, node in graph.nodes.items()}
    reads: dict[str, Sequence[str]] = {
        name: node.inputs
        for name, node in graph.nodes.items()
        if name not in inside and name not in graph.unread and node.integer is None
    }
    producer = {name: name for name in reads}
    for segment in segments:
        reads[segment.name] = segment.inputs
        index[segment.name] = max(index[output] for output in segment.outputs)
        producer |= dict.fromkeys(segment.outputs, segment.name)
    edges = nx.DiGraph()
    edges.add_nodes_from(reads)
    edges.add_edges_from(
        (producer[one], name) for name, inputs in reads.items() for one in inputs if one in producer
    )
    for chain in ordered_chains(graph.graph):
        edges.add_edges_from(itertools.pairwise(node.name for node in chain if node.name in reads))
    return list(nx.lexicographical_topological_sort(edges, key=index.__getitem__))
