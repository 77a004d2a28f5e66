"""What is made once of a capture and holds at every size: segments above all, and what planning remembers.

What makes a segment of a span (a graph of its own, fused and marked by the passes) depends on the structure of the
typed graph alone: on verdicts, dims and types, and on integers that the segment's arguments were given. So a
segment is made once per structure (`Templates`), and its typed nodes are replaced by those of another size.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterable
from dataclasses import replace
from typing import Any, TypeVar

from fxstream.graph.typed_graph import TypedGraph, TypedNode
from fxstream.rules import NotTileable, Value
from fxstream.tiling.segment import Fusion, Segment

__all__ = ["Memo", "MemoOfStructure", "Templates"]

T = TypeVar("T")
MOST_STRUCTURES = 8
"""Structures whose results are kept: images of one pixel along an axis, other batch sizes, have their own."""
MOST_RESULTS = 1024
"""Results of one structure that are kept, each of a few KiB to a few hundred."""
MOST_SEGMENTS = 256
"""Spans of one structure whose segments are kept, each of some 100 KiB."""

Integers = dict[str, int | None]
"""Integers of the model's graph that the arguments of a segment have in them, by name."""


def _structure(graph: TypedGraph) -> Hashable:
    """What two sizes have in common that differ in pixels alone.

    Of values with tiled dims the other dims count.
    """
    return tuple(
        (name, node.stage, _answer(node), node.is_tuple, node.integer is None, *map(_of_value, node.values))
        for name, node in graph.nodes.items()
        if not node.is_parameter
    )


def _answer(node: TypedNode) -> Hashable:
    if node.verdict is None:
        return None
    answer = node.verdict.answer
    if isinstance(answer, NotTileable):
        return answer.reason
    return type(answer), answer.dims, tuple((read.value.name, read.dims) for read in answer.reads)


def _of_value(value: Value) -> Hashable:
    if not value.dims:
        return value.dtype, len(value.shape)
    return value.dtype, value.dims, tuple(-1 if d in value.dims else n for d, n in enumerate(value.shape))


class Templates:
    """The segments of graphs of one structure, by what they are made of."""

    def __init__(self) -> None:
        self._made: OrderedDict[Hashable, tuple[tuple[Segment, ...], Integers]] = OrderedDict()

    def at(self, graph: TypedGraph, key: Hashable, make: Callable[[], Iterable[Segment]]) -> tuple[Segment, ...]:
        """The segments for a key at the size of this graph, made where they are missing."""
        segments, integers = self._made.get(key, ((), {}))
        if segments and all(graph[name].integer == value for name, value in integers.items()):
            self._made.move_to_end(key)
            return tuple(_retyped(segment, graph) for segment in segments)
        segments = tuple(make())
        self._made[key] = segments, {n: v for segment in segments for n, v in _integers(segment, graph).items()}
        while len(self._made) > MOST_SEGMENTS:
            self._made.popitem(last=False)
        return segments


def _integers(segment: Segment, graph: TypedGraph) -> Integers:
    """The integers that were folded into the arguments of a segment."""
    read = {one for name in segment.covers for one in graph[name].inputs if graph.is_integer(one)}
    return {name: graph[name].integer for name in read if name not in segment.graph.nodes}


def _retyped(segment: Segment, graph: TypedGraph) -> Segment:
    """The segment at the size of a graph of the same structure."""
    fusions = {fusion.node: fusion for fusion in segment.fusions}
    nodes = {
        name: _typed(old, graph, fusions.get(name)) if name in graph.nodes else old
        for name, old in segment.graph.nodes.items()
    }
    return segment.with_graph(TypedGraph(segment.graph.graph, nodes, images=graph.images))


def _typed(old: TypedNode, graph: TypedGraph, fusion: Fusion | None) -> TypedNode:
    """A node of a segment with the type that it has in a graph; of a fusion it is the type of its convolution."""
    new = graph.nodes[old.name]
    if new.values == old.values and new.integer == old.integer and old.verdict is None:
        return old
    verdict, macs = new.verdict if old.verdict is not None else None, new.macs
    if fusion is not None:
        convolution = graph[fusion.convolution]
        assert verdict is not None
        assert convolution.verdict is not None
        macs = convolution.macs
        verdict = replace(verdict, operator=convolution.verdict.operator, answer=convolution.verdict.answer)
    return TypedNode(
        old.node,
        old.index,
        new.values,
        old.is_tuple,
        new.integer,
        verdict,
        new.stage,
        macs,
        old.saves,
        old.is_parameter,
        old.is_constant,
        old.reuses,
        old.skips,
    )


class Memo:
    """Results by structure  and key; the structures used least recently leave first.

    >>> memo = Memo()
    >>> graph = TypedGraph(None, {})
    >>> [memo.at(graph).get("key", lambda made=made: made) for made in ("first", "second")]
    ['first', 'first']
    """

    def __init__(self) -> None:
        self._structures: OrderedDict[Hashable, MemoOfStructure] = OrderedDict()

    def at(self, graph: TypedGraph) -> MemoOfStructure:
        """The results of this graph's structure."""
        structure = _structure(graph)
        if structure not in self._structures:
            self._structures[structure] = MemoOfStructure()
        self._structures.move_to_end(structure)
        while len(self._structures) > MOST_STRUCTURES:
            self._structures.popitem(last=False)
        return self._structures[structure]


class MemoOfStructure:
    """Results of one structure by key, and its segments."""

    def __init__(self) -> None:
        self.templates = Templates()
        self._results: OrderedDict[Hashable, Any] = OrderedDict()

    def get(self, key: Hashable, make: Callable[[], T]) -> T:
        """The result for a key, made where it is missing."""
        if key not in self._results:
            self._results[key] = make()
        self._results.move_to_end(key)
        while len(self._results) > MOST_RESULTS:
            self._results.popitem(last=False)
        result: T = self._results[key]
        return result
