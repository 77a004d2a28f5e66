"""A segment: a span of nodes that is streamed, with its inputs and outputs.

The segment of a span (`make_segment`) still refers to the model's graph. `isolated` gives it a graph of its own,
in which its inputs are placeholders and node names are kept; the passes that make it cheaper (`fuse`, `reuse`) go
from segment to segment on such graphs, before anything is planned, so that costs, programs and the probe see the
same.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx
from torch.utils import _pytree as pytree

from fxstream.graph.nodes import TRACED, attributes_of
from fxstream.graph.typed_graph import TypedGraph, TypedNode
from fxstream.lowering.whole import WHOLE

__all__ = [
    "Fusion",
    "Segment",
    "gradient_sources",
    "isolated",
    "make_segment",
    "runs_operators_alone",
    "segment_of",
    "with_nodes",
]

CONSTANT = {"aten::detach", "aten::zeros_like", "aten::ones_like", "aten::full_like"}
"""Operators whose result has no gradient."""
NAMESPACES = frozenset({"aten", "fxstream", "prims"})
"""Those of torch and of this package."""


@dataclass(frozen=True, slots=True)
class Fusion:
    """A BatchNorm that is part of the convolution before it: the whole inputs `weight` and `bias` of both in one.

    They are made of `tensors`, nodes of the model's graph: weight and bias of the convolution, weight, bias, mean
    and variance of the BatchNorm (None for one that it has not), and of `eps`. `bytes` are those of the weight.
    `convolution` is the node of the model's graph that it took the place of.
    """

    node: str
    convolution: str
    tensors: tuple[str | None, ...]
    eps: float
    dtype: torch.dtype
    bytes: int

    @property
    def weight(self) -> str:
        """The name of the weight."""
        return f"{self.node}_folded_weight"

    @property
    def bias(self) -> str:
        """The name of the bias."""
        return f"{self.node}_folded_bias"


@dataclass(frozen=True, slots=True)
class Segment:
    """Nodes that are evaluated tile by tile, or whole as one checkpoint, with their inputs and outputs by name.

    `spatial` are the inputs that are cut to a box per tile, each with its tiled dims; `whole` those that are
    passed whole; `outputs` the nodes used outside. A tile owns a box of each output; of a reduction, a box of the
    positions that it reduces. `covers` are the nodes of the model's graph that the segment computes, `ends` the
    user's modules in which it begins and ends.
    """

    name: str
    graph: TypedGraph
    nodes: tuple[str, ...]
    spatial: tuple[tuple[str, tuple[int, ...]], ...]
    whole: tuple[str, ...]
    outputs: tuple[str, ...]
    covers: tuple[str, ...]
    ends: tuple[str, str] = ("", "")
    fusions: tuple[Fusion, ...] = ()

    @property
    def inputs(self) -> tuple[str, ...]:
        """Spatial and then whole inputs, in the order in which a segment is given them."""
        return (*(name for name, _ in self.spatial), *self.whole)

    @property
    def axes(self) -> int:
        """How many tiled axes it has."""
        return len(self.graph.pattern(self.outputs[0]).dims)

    def with_graph(self, graph: TypedGraph) -> Segment:
        """The same segment at another size."""
        return replace(self, graph=graph)

    def input_extents(self, name: str) -> tuple[int, ...]:
        """The extents of a spatial input along its tiled dims."""
        shape = self.graph.value(name).shape
        return tuple(shape[d] for d in dict(self.spatial)[name])


def make_segment(
    graph: TypedGraph, name: str, nodes: tuple[str, ...], outputs: Collection[str] | None = None
) -> Segment:
    """The segment of these local nodes and reductions, its inputs and outputs found from the graph.

    With `outputs` it has these, and of the nodes only those that they need.
    """
    if outputs is not None:
        nodes = _needed(graph, nodes, outputs)
    inside = set(nodes)
    spatial: dict[str, tuple[int, ...]] = {}
    whole: dict[str, None] = {}
    ends: list[str] = []
    ordered = sorted(nodes, key=lambda node: graph[node].index)
    for node in ordered:
        reads = {read.value.name: read.dims for read in graph.pattern(node).reads}
        spatial.update({n: dims for n, dims in reads.items() if n not in inside})
        whole.update(dict.fromkeys(n for n in graph.inputs(node) if n not in inside and n not in reads))
        if node in outputs if outputs is not None else graph.is_output(node, inside):
            ends.append(node)
    return segment_of(name, graph, nodes, spatial, whole, ends)


def segment_of(
    name: str,
    graph: TypedGraph,
    nodes: tuple[str, ...],
    spatial: Mapping[str, tuple[int, ...]],
    whole: Iterable[str],
    outputs: Iterable[str],
) -> Segment:
    """The segment of these nodes of a model's graph."""
    verdicts = [graph[nodes[i]].verdict for i in (0, -1)]
    first, last = (verdict.place if verdict is not None else "" for verdict in verdicts)
    return Segment(name, graph, nodes, tuple(spatial.items()), tuple(whole), tuple(outputs), nodes, (first, last))


def _needed(graph: TypedGraph, nodes: tuple[str, ...], outputs: Collection[str]) -> tuple[str, ...]:
    """Those of the nodes that the outputs depend on, in order; an item needs the operator that returns it."""
    needed = set(outputs)
    for name in reversed(nodes):
        if name in needed:
            needed |= {read.value.name for read in graph.pattern(name).reads}
    return tuple(name for name in nodes if name in needed)


def isolated(segment: Segment, adapt: Callable[[Any], Any] = lambda leaf: leaf) -> Segment:
    """The segment with a graph of its own, at the same size; `adapt` may replace arguments that are not nodes.

    Integers that follow from sizes inside the segment stay size arithmetic, all others are folded. What its
    operators take from the model's module (subgraphs, functions of the user) belongs to a module of its own.
    """
    parent, graph = segment.graph, fx.Graph()
    nodes: dict[str, TypedNode] = {}

    def add(typed: TypedNode, copy: fx.Node) -> None:
        copy.name = typed.name  # which fx would change if it is one of Python's (`input`)
        nodes[copy.name] = replace(typed, node=copy, index=len(nodes))

    def argument(leaf: Any) -> Any:
        if not isinstance(leaf, fx.Node):
            return adapt(leaf)
        return nodes[leaf.name].node if leaf.name in nodes else parent[leaf.name].integer

    for name in dict.fromkeys(segment.inputs):
        add(replace(parent[name], verdict=None, saves=None), graph.placeholder(name))
    for original in _with_constants(segment):
        node = original.node
        args, kwargs = pytree.tree_map(argument, (node.args, dict(node.kwargs)), is_leaf=lambda x: x is None)
        copy = graph.create_node(node.op, node.target, args, kwargs)
        copy.meta = {key: node.meta[key] for key in (*TRACED, WHOLE) if key in node.meta}
        add(original, copy)
    graph.output(tuple(nodes[name].node for name in segment.outputs))
    if attributes := attributes_of(graph, parent.graph.owning_module):
        fx.GraphModule(attributes, graph)
    graph.lint()
    return replace(segment, graph=TypedGraph(graph, nodes, images=parent.images))


def _with_constants(segment: Segment) -> Iterable[TypedNode]:
    """The nodes of a segment, the integers that follow from them and its inputs, and attributes, in order."""
    reached, inside = set(segment.inputs), set(segment.nodes)
    for name, node in segment.graph.nodes.items():
        follows = node.integer is not None and bool(node.inputs) and all(one in reached for one in node.inputs)
        is_read = node.is_attribute and any(user.name in inside for user in node.node.users)
        if name in inside or follows or is_read:
            reached.add(name)
            yield node


def with_nodes(segment: Segment, changed: Sequence[TypedNode]) -> Segment:
    """The segment with some of its typed nodes replaced."""
    nodes = {**segment.graph.nodes, **{node.name: node for node in changed}}
    return replace(segment, graph=replace(segment.graph, nodes=nodes))


def runs_operators_alone(segment: Segment) -> bool:
    """Whether nothing in a segment is a function or an operator of the user.

    Then gradients are linear in those of the results, and all work is the device's.
    """
    targets = {segment.graph[name].node.target for name in segment.nodes} - {operator.getitem}
    return all(isinstance(one, torch._ops.OpOverload) and one.namespace in NAMESPACES for one in targets)


def gradient_sources(segment: Segment) -> tuple[frozenset[int], ...]:
    """For each output, the indices of the inputs that a gradient can flow to: nothing before a detach."""
    sources: dict[str, frozenset[int]] = {}
    for index, name in enumerate(segment.inputs):
        sources[name] = sources.get(name, frozenset()) | {index}
    for name in segment.nodes:
        node = segment.graph[name]
        is_constant = node.verdict is not None and node.verdict.operator in CONSTANT
        has_gradient = node.is_tuple or (bool(node.values) and node.values[0].has_gradient)
        inputs = node.inputs if has_gradient and not is_constant else []
        sources[name] = frozenset().union(*(sources.get(one, frozenset()) for one in inputs))
    return tuple(sources[output] for output in segment.outputs)
