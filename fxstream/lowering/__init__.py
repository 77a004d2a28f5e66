"""Feature-map-wide operators, rewritten as reductions over space and local operators.

A normalisation over space is a reduction (`fxstream::moments`), a little arithmetic on small tensors, and a map
that takes the result as small arguments. A loss is the loss of every pixel, and sums of it. Flattened positions
are taken apart before (`positions`), so that what follows them is made of the same. The rewritten graph computes
what the original one does, at any size; what of it is streamed is for the planner to decide.
"""

from __future__ import annotations

from dataclasses import replace

from torch import fx

from fxstream.capture import Captured
from fxstream.locality import Locality
from fxstream.lowering import losses, normalisations, pooling, positions
from fxstream.lowering.positions import with_positions
from fxstream.lowering.writer import Lowering, Writer, copied
from fxstream.rules import Kind

__all__ = ["is_lowerable", "lower", "with_positions"]

LOWERINGS: dict[str, Lowering] = {
    **normalisations.LOWERINGS,
    **pooling.LOWERINGS,
    **losses.LOWERINGS,
    **positions.LOWERINGS,
}
"""Per operator, what it is rewritten to where it works over space."""


def is_lowerable(locality: Locality) -> bool:
    """Whether any barrier of the graph is made of reductions over space."""
    return any(_lowering(locality, name) is not None for name in locality.verdicts)


def lower(captured: Captured, locality: Locality) -> Captured:
    """The same model with every feature-map-wide operator that is made of reductions taken apart."""
    graph, copies = copied(captured.graph)
    for original in captured.graph.nodes:
        if original not in copies:
            continue
        node, lowering = copies[original], _lowering(locality, original.name)
        node.name = original.name  # a copy gets another one where that is a word of Python
        lowered = lowering(Writer(graph, node, locality.metas)) if lowering is not None else None
        if lowered is not None:
            node.replace_all_uses_with(lowered)
            graph.erase_node(node)
    graph.lint()
    root = {n.target: getattr(captured.module, n.target) for n in graph.nodes if n.op == "get_attr"}
    return replace(captured, module=fx.GraphModule(root, graph))


def _lowering(locality: Locality, name: str) -> Lowering | None:
    verdict = locality.verdicts.get(name)
    if verdict is None or verdict.kind is not Kind.REDUCE or verdict.reduction is not None:
        return None
    return LOWERINGS.get(verdict.operator)
