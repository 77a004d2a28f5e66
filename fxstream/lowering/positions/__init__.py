"""Flattened positions, taken apart again, and what becomes of the operators that work on them."""

from __future__ import annotations

from fxstream.graph.captured import Captured
from fxstream.graph.typed_graph import TypedGraph
from fxstream.lowering.positions import columns, flat, products, reshapes
from fxstream.lowering.positions.unflatten import Handler, unflattened

__all__ = ["with_positions"]

HANDLERS: dict[str, Handler] = flat.HANDLERS | columns.HANDLERS | products.HANDLERS | reshapes.HANDLERS
"""Per operator, what becomes of it on flattened positions."""


def with_positions(captured: Captured, typed: TypedGraph) -> Captured:
    """The same model with its positions apart wherever that is possible; the same object where nothing changes."""
    return unflattened(captured, typed, HANDLERS)
