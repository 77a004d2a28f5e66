"""Feature-map-wide operators, rewritten as reductions over space and local operators.

A normalisation over space is a reduction (`fxstream::moments`), a little arithmetic on small tensors, and a map
that takes the result as small arguments. A loss is the loss of every pixel, and sums of it. A draw for the whole
map is a draw of a small tensor and a map of it. Flattened positions are taken apart before (`positions`), so that
what follows them is made of the same; circular padding moves up afterwards (`wraps`). The rewritten graph computes
what the original one does, at any size; what of it is streamed is for the planner to decide. A lowering is a
function in torch code (`proxy`).
"""

from __future__ import annotations

from torch import fx

from fxstream.graph.captured import CUMULATIVE, Captured
from fxstream.graph.effects import UNSTREAMED
from fxstream.graph.nodes import bind
from fxstream.graph.typed_graph import TypedGraph
from fxstream.lowering import losses, normalisations, pooling, randomness, statistics, writes
from fxstream.lowering.positions import with_positions
from fxstream.lowering.proxy import Draft, Lowering, Operator, Proxy
from fxstream.lowering.wraps import with_wraps, wraps_around
from fxstream.rules import Tileability

__all__ = ["lower", "with_positions", "with_wraps", "wraps_around"]

REDUCTIONS: dict[str, Lowering] = (
    losses.LOWERINGS | normalisations.LOWERINGS | pooling.LOWERINGS | statistics.LOWERINGS
)
"""Per operator, what it is rewritten to where it works over space."""
MAPS: dict[str, Lowering] = randomness.LOWERINGS | writes.LOWERINGS
"""The same for those that make a map."""


def lower(captured: Captured, typed: TypedGraph, reductions: bool = True) -> Captured:
    """The same model with every feature-map-wide operator taken apart; without `reductions` only draws.

    The model itself where it has none.
    """
    lowerings = {node.name: _lowering(typed, node, reductions, captured.bound) for node in captured.graph.nodes}
    if not any(lowerings.values()):
        return captured
    draft = Draft.of(captured, typed)
    for node in list(draft.graph.nodes):
        lowering = lowerings[node.name]
        if lowering is not None:
            with draft.graph.inserting_before(node):
                result = lowering(Operator(node, draft))
            _put_in_place(draft, node, result)
    return draft.finished(captured)


def _put_in_place(draft: Draft, node: fx.Node, result: Proxy | tuple[Proxy, ...] | None) -> None:
    """Replace all uses of a node, or of each of its results."""
    if isinstance(result, Proxy):
        draft.replace(node, result)
    elif result is not None:
        for item in list(node.users):
            draft.replace(item, result[item.args[1]])  # type: ignore[index]
        draft.graph.erase_node(node)


def _lowering(typed: TypedGraph, node: fx.Node, reductions: bool, bound: bool) -> Lowering | None:
    verdict = typed[node.name].verdict if node.name in typed.nodes else None
    if verdict is None or verdict.reduction is not None or UNSTREAMED in node.meta:
        return None
    if verdict.operator == "aten::batch_norm" and CUMULATIVE in node.args and bind(node)["training"]:
        return REDUCTIONS[verdict.operator]
    if reductions and verdict.operator in pooling.WINDOWS and pooling.has_one_window(typed, node, bound):
        return pooling.WINDOWS[verdict.operator]
    if verdict.kind is Tileability.GLOBAL:
        return MAPS.get(verdict.operator)
    return REDUCTIONS.get(verdict.operator) if verdict.kind is Tileability.REDUCTION and reductions else None
