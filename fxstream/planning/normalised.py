"""Normalisations across the end of a span: where what follows runs whole, so does all of the normalisation.

The search ends spans behind the moments of a normalisation, which saves a sweep where the next span is tiled.
Where that runs whole, or is dense, the moments belong to it: then the operator of the model runs there, in one
kernel backward, and what ends in the convolution before need not compute that again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from fxstream.graph.typed_graph import TypedGraph
from fxstream.lowering.whole import result_of
from fxstream.planning.search import Span

__all__ = ["with_normalisations_whole"]


def with_normalisations_whole(graph: TypedGraph, spans: Sequence[Span]) -> list[Span]:
    """The spans, of which those that end in moments leave these to what follows, if that runs whole."""
    moved = list(spans)
    place = {name: i for i, span in enumerate(spans) for name in span.nodes}
    for i, span in enumerate(spans):
        for moments in reversed(span.nodes):
            result = result_of(graph[moments].node)
            follows = place.get(result, -1) if result is not None else i
            if follows == i or len(moved[i].nodes) == 1 or (follows >= 0 and spans[follows].counts != ()):
                break
            moved[i] = replace(moved[i], nodes=moved[i].nodes[:-1])
            if follows >= 0:
                moved[follows] = replace(moved[follows], nodes=(moments, *moved[follows].nodes))
    return moved
