"""From a captured graph and its shapes at one size to a `TypedGraph`: verdicts, stages, regions."""

from __future__ import annotations

import operator
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

import networkx as nx
import torch
from torch import fx
from torch.fx.node import map_arg

from fxstream.geometry.receptive_field import IDENTITY
from fxstream.graph.effects import UNSTREAMED, ordered_chains, ordered_nodes
from fxstream.graph.nodes import bind_to
from fxstream.graph.shapes import Meta, Shape, Shapes
from fxstream.graph.typed_graph import Region, TypedGraph, TypedNode, Verdict
from fxstream.graph.user_code import module_path, source_line
from fxstream.graph.user_functions import answer_of
from fxstream.rules import AccessPattern, Call, Item, NotTileable, Read, Reason, Value, rule_of
from fxstream.rules.rule import Answer

__all__ = ["type_graph"]

STARTS_DIMS = ("windowed", "resampled")
"""Families whose operators define what is space, so that a map without tiled dims gets them there."""
NO_TILED_DIM = NotTileable(Reason.NO_TILED_DIM)


def type_graph(
    graph: fx.Graph,
    shapes: Shapes,
    inputs: Mapping[str, tuple[int, ...]],
    combines: bool = True,
    like: TypedGraph | None = None,
) -> TypedGraph:
    """The type of every node of the graph at the size that `shapes` describes.

    `inputs` are the placeholders that hold images, with their tiled dims; the others are weights. With `combines`
    reductions over space may be combined from tiles. `like` are the types of the same graph, made with the same
    options, at another size: of nodes that do not depend on the size they are taken from there.
    """
    typing = _Typing(shapes, inputs, combines, ordered_chains(graph), {} if like is None else like.nodes)
    for node in graph.nodes:
        typing.add(node)
    nodes = typing.nodes
    unread = _unread(graph, nodes, set(ordered_nodes(graph)))
    images = tuple(value for name in inputs for value in nodes[name].values if value.dims)
    return TypedGraph(graph, nodes, tuple(_regions(nodes, unread)), images, unread)


class _Typing:
    """The walk over the graph, node by node; `nodes` are those typed so far."""

    def __init__(
        self,
        shapes: Shapes,
        inputs: Mapping[str, tuple[int, ...]],
        combines: bool,
        chains: Sequence[Sequence[fx.Node]],
        like: Mapping[str, TypedNode],
    ) -> None:
        self.nodes: dict[str, TypedNode] = {}
        self._shapes, self._inputs, self._combines, self._like = shapes, inputs, combines, like
        self._alignments: dict[str, tuple[int, ...]] = {}
        self._predecessors = [dict(zip(chain[1:], chain, strict=False)) for chain in chains]

    def add(self, node: fx.Node) -> None:
        """Type one more node."""
        before = self._like.get(node.name)
        if before is not None and self._is_same(node, before):
            self.nodes[node.name] = before
        else:
            self._type(node)

    def _is_same(self, node: fx.Node, before: TypedNode) -> bool:
        """Whether a node without tiled dims has the type that it has at another size, as its inputs have."""
        meta = self._shapes.metas.get(node.name)
        metas = meta if isinstance(meta, tuple) else (meta,) if isinstance(meta, Shape) else ()
        is_local = before.verdict is not None and not isinstance(before.verdict.answer, NotTileable)
        integer = meta if isinstance(meta, int) else None
        if is_local or node.name in self._inputs or before.integer != integer or len(metas) != len(before.values):
            return False
        if any(value.dims or Shape(value.shape, value.dtype) != m for value, m in zip(before.values, metas)):
            return False
        inputs = (*node.all_input_nodes, *self._before(node))
        return all(self.nodes[one.name] is self._like.get(one.name) for one in inputs)

    def _before(self, node: fx.Node) -> Iterator[fx.Node]:
        """The nodes that come right before one in the chains whose order is part of the model's meaning."""
        return (chain[node] for chain in self._predecessors if node in chain)

    def _type(self, node: fx.Node) -> None:
        name, meta = node.name, self._shapes.metas.get(node.name)
        if node.op == "placeholder":
            dims, image = self._inputs.get(name, ()), name in self._inputs
            values = _values(name, meta, dims, image)
            stage = self._stage(node, None)
            self.nodes[name] = TypedNode(node, len(self.nodes), values, stage=stage, is_parameter=not image)
            return
        if node.op != "call_function":
            self.nodes[name] = TypedNode(node, len(self.nodes), stage=self._stage(node, None))
            return
        answer = self._answer(node, meta)
        verdict = Verdict(name, _operator(node), answer, module_path(node), source_line(node))
        image = any(value.image for value in self._input_values(node))
        dims = () if verdict.reduction is not None else answer.dims
        self.nodes[name] = TypedNode(
            node,
            len(self.nodes),
            _values(name, meta, dims, image),
            isinstance(meta, tuple),
            meta if isinstance(meta, int) else None,
            verdict,
            self._stage(node, verdict),
            self._shapes.macs.get(name, 0),
            is_constant=all(one.is_constant or one.integer is not None for one in self._inputs_of(node)),
        )

    def _inputs_of(self, node: fx.Node) -> list[TypedNode]:
        return [self.nodes[producer.name] for producer in node.all_input_nodes]

    def _input_values(self, node: fx.Node) -> list[Value]:
        return [value for producer in self._inputs_of(node) for value in producer.values]

    def _answer(self, node: fx.Node, meta: Meta) -> Answer:
        """What the first check says that has an answer."""
        answer = self._without_rule(node, meta) or self._by_rule(node, meta)
        if isinstance(answer, NotTileable):
            return answer
        return next(self._objections(node, answer), answer)

    def _without_rule(self, node: fx.Node, meta: Meta) -> NotTileable | None:
        """The answers that need no rule."""
        if isinstance(meta, int):
            return NotTileable(Reason.SHAPE_ARITHMETIC)
        values = self._input_values(node)
        if not any(value.image for value in values):
            return NotTileable(Reason.NO_IMAGE)
        if node.target is operator.getitem:
            return None
        rule, has_dims = rule_of(node.target), any(value.dims for value in values)
        if rule is None and has_dims:
            is_function = hasattr(node.target, "joint") and len(node.args) == len(values)
            is_operator = isinstance(node.target, torch._ops.OpOverload)
            reason = Reason.UNKNOWN_OPERATOR if is_operator else Reason.CODE_OF_ITS_OWN
            return None if is_function else NotTileable(reason, (), (str(node.target),))
        return NO_TILED_DIM if rule is None or (not has_dims and rule.family not in STARTS_DIMS) else None

    def _by_rule(self, node: fx.Node, meta: Meta) -> Answer:
        """The answer of the operator's rule; of an item, the same box of the value that it is taken of."""
        if node.target is operator.getitem:
            several, index = node.args
            value = self.nodes[several.name].values[index]  # type: ignore[union-attr,index,misc,arg-type]
            if not value.dims:
                return NO_TILED_DIM
            return Item(value.dims, (Read("0", value, value.dims, (IDENTITY,) * len(value.dims)),), index)  # type: ignore[arg-type]
        rule, values = rule_of(node.target), self._input_values(node)
        if rule is None:
            metas = meta if isinstance(meta, tuple) else (meta,)
            results = [Value(node.name, m.shape, m.dtype) for m in metas if isinstance(m, Shape)]
            arguments = [self.nodes[one.name].values[0] for one in node.args if isinstance(one, fx.Node)]
            function: Any = node.target
            return answer_of(function, arguments, results, type_graph)
        assert isinstance(node.target, torch._ops.OpOverload)
        answer = rule.rule(self._call(node, node.target, meta))
        has_dims = any(value.dims for value in values) if isinstance(answer, NotTileable) else bool(answer.dims)
        if not has_dims:
            return NO_TILED_DIM
        shapes = (m.shape for m in (meta if isinstance(meta, tuple) else (meta,)) if isinstance(m, Shape))
        if any(0 in shape for shape in (*shapes, *(value.extents for value in values))):
            return NotTileable(Reason.NO_PIXELS, answer.dims)
        return answer

    def _objections(self, node: fx.Node, pattern: AccessPattern) -> Iterator[NotTileable]:
        """What keeps an operator from being tiled though its rule allows it."""
        dims = () if pattern.reduces else pattern.dims
        for marked in (node, *node.all_input_nodes) if node.target is not operator.getitem else ():
            if UNSTREAMED in marked.meta:
                yield NotTileable(Reason.IN_PLACE, dims, (marked.meta[UNSTREAMED],))
        if isinstance(pattern, Item):
            several = pattern.reads[0].value.name
            if not self.nodes[several].is_local:
                yield NotTileable(Reason.ITEM_OF_UNTILED, dims, (several,))
        for read in pattern.reads:
            if self._alignments.setdefault(read.value.name, read.dims) != read.dims:
                yield NotTileable(Reason.READ_ALONG_OTHER_DIMS, pattern.dims, (read.value.name,))
        if pattern.reduces and not self._combines:
            yield NotTileable(Reason.REDUCES_SPACE)

    def _call(self, node: fx.Node, target: torch._ops.OpOverload, meta: Meta) -> Call:
        """The node as a rule sees it: schema names, defaults, values for tensors, integers for sizes."""

        def value(producer: fx.Node) -> Any:
            typed = self.nodes[producer.name]
            if typed.integer is not None:
                return typed.integer
            return typed.values[0] if typed.values and not typed.is_tuple else typed.values

        arguments = bind_to(target, map_arg(node.args, value), map_arg(dict(node.kwargs), value))
        results = meta if isinstance(meta, tuple) else (meta,)
        return Call(node.name, target, arguments, tuple(m.shape for m in results if isinstance(m, Shape)))

    def _stage(self, node: fx.Node, verdict: Verdict | None) -> int:
        """The stage of a node, by the rules of the NOTE in `typed_graph`; integers are known before all."""
        inputs = [producer for producer in self._inputs_of(node) if producer.integer is None]
        inputs += [self.nodes[one.name] for one in self._before(node)]
        if verdict is not None and not isinstance(verdict.answer, NotTileable):
            return max((producer.stage + (not producer.is_local) for producer in inputs), default=0)
        return max((producer.stage for producer in inputs), default=-1)


def _operator(node: fx.Node) -> str:
    return node.target._schema.name if isinstance(node.target, torch._ops.OpOverload) else str(node.target)


def _values(name: str, meta: Meta, dims: tuple[int, ...], image: bool) -> tuple[Value, ...]:
    """The results of a node with the tiled dims that its answer leaves it."""
    metas = meta if isinstance(meta, tuple) else (meta,)
    return tuple(Value(name, m.shape, m.dtype, dims, image) for m in metas if isinstance(m, Shape))


def _unread(graph: fx.Graph, nodes: Mapping[str, TypedNode], ordered: Collection[fx.Node]) -> frozenset[str]:
    """The operators without an effect that only integers, and others like them, read."""
    unread: set[str] = set()
    for node in reversed(graph.nodes):
        is_value = node.op == "call_function" and nodes[node.name].integer is None
        if is_value and node not in ordered:
            users = (user.name for user in node.users)
            if all(user in unread or nodes[user].integer is not None for user in users):
                unread.add(node.name)
    return frozenset(unread)


def _regions(nodes: Mapping[str, TypedNode], unread: frozenset[str]) -> Iterator[Region]:
    """The connected parts of each stage's local nodes, in the order of the graph."""
    parts = nx.Graph()
    for name, node in nodes.items():
        if not node.is_local or name in unread:
            continue
        parts.add_node(name)
        for read in node.pattern.reads:
            if nodes[read.value.name].stage == node.stage and read.value.name in parts:
                parts.add_edge(read.value.name, name)
    groups = [sorted(part, key=lambda name: nodes[name].index) for part in nx.connected_components(parts)]
    for group in sorted(groups, key=lambda group: nodes[group[0]].index):
        yield Region(nodes[group[0]].stage, tuple(group))
