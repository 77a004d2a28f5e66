"""Parts of the graph that are streamed together, which of them are worth it, and the sweeps over a span of one.

NOTE [reductions on the way]
1. A part is a region of local nodes, with the regions that read its maps after a barrier, and the reductions over
   space of its maps. So a network with BatchNorm in training, or with squeeze-excitation, is one part.
2. A span of a part is a run of its nodes in the order of the graph. Its outputs are what others read: maps, and
   all its reductions. A reduction stands directly after the last map that it reads.
3. Nothing after a barrier can run before what the barrier yields is computed. So a span runs as one sweep per
   stage of its outputs: each computes the outputs of that stage from what the span reads, and from outputs of
   earlier sweeps. What lies on the way is computed again in each sweep, unless it is itself an output: a span
   that ends in the map that a normalisation takes its statistics of has one sweep only.
4. A span that is not cut into tiles needs no sweeps: it runs whole, with the small operators between its maps,
   and is recomputed for its backward. That is a checkpoint.
5. A sweep reads only what sweeps of the same or an earlier stage make, and of the same stage only of earlier
   spans. So there is always an order in which all of them can run.
"""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterator, Sequence

import networkx as nx

from fxstream.graph.effects import ordered_chains
from fxstream.graph.typed_graph import TypedGraph
from fxstream.tiling.request import last_node_of
from fxstream.tiling.segment import Segment, make_segment, segment_of

__all__ = [
    "parts_before",
    "stages_of_outputs",
    "streamable_parts",
    "streamable_share",
    "sweeps",
    "whole_segment",
    "worthwhile",
]

WORTHWHILE = 0.5
"""A region is streamed when that frees more than this share of its activations."""
LEAST_SHARE = 0.01
"""A region with less than this share of the network's activations is not worth a tile loop."""


def streamable_parts(graph: TypedGraph) -> list[tuple[str, ...]]:
    """The parts (rule 1) by their nodes, in the order of the graph."""
    order = {name: float(node.index) for name, node in graph.nodes.items()}
    region = {name: k for k, one in enumerate(graph.regions) for name in one.nodes}
    reductions = [v.node for v in graph.reductions() if v.node not in graph.unread]

    def regions_read(name: str) -> list[int]:
        return [region[read.value.name] for read in graph.pattern(name).reads if read.value.name in region]

    joined = nx.Graph()
    joined.add_nodes_from(region.values())
    for name in (*region, *reductions):
        nx.add_path(joined, [*([region[name]] if name in region else []), *regions_read(name)])
    part_of = {k: i for i, group in enumerate(nx.connected_components(joined)) for k in group}
    parts: dict[int, list[str]] = {}
    for name, k in region.items():
        parts.setdefault(part_of[k], []).append(name)
    for name in reductions:
        if regions := regions_read(name):
            parts[part_of[regions[0]]].append(name)
            maps = (read.value.name for read in graph.pattern(name).reads if read.value.name in region)
            order[name] = max(order[one] for one in maps) + order[name] / len(order)
    ordered = [tuple(sorted(nodes, key=order.__getitem__)) for nodes in parts.values()]
    return sorted(ordered, key=lambda nodes: order[nodes[0]])


def sweeps(graph: TypedGraph, name: str, nodes: Sequence[str]) -> Iterator[Segment]:
    """The segments that a span runs as (rule 3), in order; `name` begins their names."""
    inside, computed = set(nodes), set[str]()
    outputs = [n for n in nodes if graph.is_output(n, inside)]
    for i, stage in enumerate(stages := stages_of_outputs(graph, outputs)):
        of_stage = [n for n in outputs if graph[n].stage == stage]
        left = tuple(n for n in nodes if n not in computed)
        yield make_segment(graph, f"{name}_{i}" if len(stages) > 1 else name, left, of_stage)
        computed |= set(of_stage)


def whole_segment(graph: TypedGraph, name: str, nodes: Sequence[str]) -> Segment | None:
    """The segment that runs a span whole (rule 4); None where what lies in between is more than small operators.

    That is an effect, a random draw, or nodes of another part, which has segments of its own.
    """
    chains = [[node.name for node in chain] for chain in ordered_chains(graph.graph)]
    between = _between(graph, nodes, chains)
    if not between.isdisjoint(itertools.chain(*chains)) or any(graph[one].is_local for one in between):
        return None
    inside = {*nodes, *between}
    all_nodes = tuple(sorted(inside, key=lambda one: graph[one].index))
    read = (one for node in all_nodes for one in graph.inputs(node) if not graph[one].is_attribute)
    inputs = dict.fromkeys(one for one in read if one not in inside)
    dims = {one: graph.value(one).dims for one in inputs}
    spatial = {one: dims[one] for one in inputs if dims[one]}
    whole = [one for one in inputs if not dims[one]]
    outputs = [one for one in all_nodes if graph.is_read_outside(one, inside)]
    return segment_of(name, graph, all_nodes, spatial, whole, outputs)


def _between(graph: TypedGraph, nodes: Sequence[str], chains: Sequence[Sequence[str]]) -> set[str]:
    """The other nodes that depend on the values of one of these, and whose value another of these depends on.

    What must run after another, as `chains` say, counts as dependent on it. What depends on sizes alone is not
    among them.
    """
    chained = nx.DiGraph(pair for chain in chains for pair in itertools.pairwise(chain))
    inside, order = set(nodes), list(graph.nodes)
    span = order[min(graph[n].index for n in nodes) : max(graph[n].index for n in nodes) + 1]
    span = [name for name in span if not graph.is_integer(name)]
    after, before = set(nodes), set(nodes)
    for name in span:
        if any(one in after for one in (*graph[name].inputs, *chained.pred.get(name, ()))):
            after.add(name)
    for name in reversed(span):
        if any(one in before for one in (*graph.users(name), *chained.succ.get(name, ()))):
            before.add(name)
    return after & before - inside


def stages_of_outputs(graph: TypedGraph, outputs: Sequence[str]) -> list[int]:
    """The stages of these nodes, each of which takes a sweep."""
    return sorted({graph[name].stage for name in outputs})


def worthwhile(
    graph: TypedGraph, parts: Sequence[tuple[str, ...]] | None = None, written: Collection[str | None] = ()
) -> list[tuple[str, ...]]:
    """The parts that are streamed without being asked for; results `written` elsewhere count as freed."""
    total = graph.total_bytes()
    every = streamable_parts(graph) if parts is None else parts
    return [part for part in every if _is_worthwhile(graph, part, total, written)]


def streamable_share(graph: TypedGraph) -> float:
    """The share of the activations that is streamed without being asked for."""
    return sum(map(graph.activation_bytes, worthwhile(graph))) / max(1, graph.total_bytes())


def parts_before(graph: TypedGraph, every: Sequence[tuple[str, ...]], cut: str | None) -> list[tuple[str, ...]]:
    """The parts, up to the last node of the module where the user ends the stream."""
    last = len(graph.nodes) if cut is None else last_node_of(graph, cut)
    parts = (tuple(name for name in part if graph[name].index <= last) for part in every)
    return [part for part in parts if part]


def _is_worthwhile(graph: TypedGraph, nodes: tuple[str, ...], total: int, written: Collection[str | None]) -> bool:
    """Whether streaming these nodes frees a good part of their activations."""
    before = graph.activation_bytes(nodes)
    inside = set(nodes)
    outputs = [name for name in nodes if graph.is_output(name, inside) and name not in written]
    after = graph.activation_bytes(outputs)
    return before - after > WORTHWHILE * before and before > LEAST_SHARE * total
