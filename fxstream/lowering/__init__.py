"""Feature-map-wide operators, rewritten as reductions over space and local operators.

A normalisation over space is a reduction (`fxstream::moments`), a little arithmetic on small tensors, and a map
that takes the result as small arguments. A loss is the loss of every pixel, and sums of it. A draw for the whole
map is a draw of a small tensor and a map of it. Flattened positions are taken apart before (`positions`), so
that what follows them is made of the same. The rewritten graph computes what the original one does, at any size;
what of it is streamed is for the planner to decide.
"""

from __future__ import annotations

from dataclasses import replace

from torch import fx

from fxstream.graph.capture import Captured
from fxstream.graph.effects import UNSTREAMED
from fxstream.graph.export import CUMULATIVE
from fxstream.graph.shapes import Meta
from fxstream.graph.typed_graph import Locality
from fxstream.lowering import losses, normalisations, pooling, positions, randomness, statistics
from fxstream.lowering.positions import with_positions
from fxstream.lowering.writer import Lowering, Writer, copied
from fxstream.rules import Kind, Value

__all__ = ["lower", "with_positions"]

DRAWS: dict[str, Lowering] = randomness.LOWERINGS
"""Per operator, what a draw for the whole map is rewritten to."""
REDUCTIONS: dict[str, Lowering] = {
    **normalisations.LOWERINGS,
    **pooling.LOWERINGS,
    **statistics.LOWERINGS,
    **losses.LOWERINGS,
    **positions.LOWERINGS,
}
"""Per operator, what it is rewritten to where it works over space."""


TRAINING = 5
"""The place of that argument of a batch norm."""


def lower(captured: Captured, locality: Locality, reductions: bool = True) -> Captured:
    """The same model with every feature-map-wide operator taken apart; without `reductions` only draws.

    The model itself where it has none.
    """
    known = {
        name: found for name in locality.verdicts if (found := _lowering(locality, name, reductions)) is not None
    }
    if not known:
        return captured
    graph, copies = copied(captured.graph)
    metas = dict(locality.metas)
    for original in captured.graph.nodes:
        if original not in copies:
            continue
        node, lowering = copies[original], known.get(original.name)
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


def _lowering(locality: Locality, name: str, reductions: bool) -> Lowering | None:
    verdict, node = locality.verdicts[name], locality.nodes[name]
    if verdict.reduction is not None or UNSTREAMED in node.meta:
        return None
    if verdict.operator == "aten::batch_norm" and CUMULATIVE in node.args and node.args[TRAINING]:
        return REDUCTIONS[verdict.operator]
    if verdict.kind is Kind.GLOBAL:
        return DRAWS.get(verdict.operator)
    return REDUCTIONS.get(verdict.operator) if verdict.kind is Kind.REDUCE and reductions else None
