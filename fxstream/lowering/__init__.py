"""Feature-map-wide operators, rewritten as reductions over space and local operators.

A normalisation over space is a reduction (`fxstream::moments`), a little arithmetic on small tensors, and a map
that takes the result as small arguments. A draw for the whole map is a draw of a small tensor and a map of it. The
rewritten graph computes what the original one does, at any size; what of it is streamed is for the planner to
decide.
"""

from __future__ import annotations

from dataclasses import replace

from torch import fx

from fxstream.capture import Captured
from fxstream.functional import UNSTREAMED
from fxstream.locality import Locality
from fxstream.lowering import normalisations, pooling, randomness, statistics
from fxstream.lowering.writer import Lowering, Writer
from fxstream.rules import Kind, Value
from fxstream.sizes import Meta

__all__ = ["is_lowerable", "lower"]

LOWERINGS: dict[Kind, dict[str, Lowering]] = {
    Kind.REDUCE: {**normalisations.LOWERINGS, **pooling.LOWERINGS, **statistics.LOWERINGS},
    Kind.GLOBAL: randomness.LOWERINGS,
}
"""Per verdict and operator, what it is rewritten to: reductions over space, and draws for the whole map."""


def is_lowerable(locality: Locality) -> bool:
    """Whether any barrier of the graph is made of reductions over space."""
    return any(_lowering(locality, name) is not None for name in locality.verdicts)


def lower(captured: Captured, locality: Locality) -> Captured:
    """The same model with every feature-map-wide operator that is made of reductions taken apart."""
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    graph.output(graph.graph_copy(captured.graph, copies))
    metas = dict(locality.metas)
    for original in captured.graph.nodes:
        if original not in copies:
            continue
        node, lowering = copies[original], _lowering(locality, original.name)
        node.name = original.name  # a copy gets another one where that is a word of Python
        if lowering is None:
            continue
        lowered = lowering(Writer(graph, node, metas, _stream_dims(locality, original)))
        if lowered is not None:
            _put_in_place(node, lowered, metas)
            graph.erase_node(node)
    graph.lint()
    root = {n.target: getattr(captured.module, n.target) for n in graph.nodes if n.op == "get_attr"}
    return replace(captured, module=fx.GraphModule(root, graph))


def _put_in_place(node: fx.Node, lowered: fx.Node | tuple[fx.Node, ...], metas: dict[str, Meta]) -> None:
    """Let all users of a node, or of each of its results, use what it is made of; that has the same shape."""
    if isinstance(lowered, fx.Node):
        metas[lowered.name] = metas[node.name]
        node.replace_all_uses_with(lowered)
        return
    for item in list(node.users):
        _, index = item.args
        assert isinstance(index, int)
        metas[lowered[index].name] = metas[item.name]
        item.replace_all_uses_with(lowered[index])
        node.graph.erase_node(item)


def _stream_dims(locality: Locality, node: fx.Node) -> tuple[int, ...]:
    """The stream dims of the first map that a node reads."""
    values = (locality.values[given.name] for given in node.all_input_nodes)
    return next((value.dims for value in values if isinstance(value, Value) and value.dims), ())


def _lowering(locality: Locality, name: str) -> Lowering | None:
    verdict = locality.verdicts.get(name)
    if verdict is None or verdict.reduction is not None or UNSTREAMED in locality.nodes[name].meta:
        return None
    return LOWERINGS.get(verdict.kind, {}).get(verdict.operator)
