"""Verdicts on nodes, and the regions of the graph that can be streamed.

Every value is *spatial* (some of its dims are stream axes) or *small*. Every operator gets a `Verdict`: LOCAL
with the boxes it reads, SMALL (no spatial input: computed once, outside the tile loop), REDUCE, GLOBAL or
NO_RULE, with the reason in words.

NOTE [stages]
1. A local node, or a reduction over space, is in the stage of its latest local input; a barrier on the way to it
   adds one.
2. Any other barrier (anything not local that depends on an image) is in the stage of its latest input.
3. What depends on no image is before all stages (-1).
4. Nodes that must keep their order (effects, random draws) count as inputs of one another.
So the local nodes of one stage never depend on each other through a barrier: each stage, split into its
connected parts, can be streamed in one piece. These parts are the `Region`s.
"""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import networkx as nx
import torch
from torch import fx
from torch.fx.node import map_arg

from fxstream.geometry.receptive_field import IDENTITY
from fxstream.graph.effects import UNSTREAMED, ordered_nodes
from fxstream.graph.shapes import Meta, Shape, fold_integers
from fxstream.graph.user_code import module_path, source_line
from fxstream.rules import Call, Evaluation, Footprint, Kind, Read, Refusal, Value, rule_of

__all__ = ["Locality", "Region", "Values", "Verdict", "analyse_locality"]

Values = dict[str, Value | tuple[Value, ...]]
"""What is known of each node's result; several for an operator that returns several."""

NO_AXIS = Refusal(Kind.SMALL, "has no stream axis")
STARTS_AXES = ("windowed", "resampled")
"""Families whose operators define what is space, so that a map without stream axes gets them there."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """Whether a node can be computed box by box, and why (not).

    `footprint` is that of a local node, `reduction` that of a reduction over space that is combined from boxes.
    """

    node: str
    operator: str
    kind: Kind
    reason: str
    module: str
    source: str
    footprint: Footprint | None = None
    reduction: Footprint | None = None

    def __str__(self) -> str:
        where = f" at {self.source}" if self.source else ""
        return f"{self.kind.value}: `{self.module or self.node}` ({self.operator}) {self.reason}{where}"


@dataclass(frozen=True, slots=True)
class Region:
    """Local nodes, in the order of the graph, that can be streamed in one piece."""

    stage: int
    nodes: tuple[str, ...]


@dataclass(frozen=True, slots=True, repr=False)
class Locality:
    """The verdicts of all operator nodes at one image size, the values and the regions.

    `unread` are the nodes of which nothing but sizes is read, which need not be computed.
    """

    graph: fx.Graph
    nodes: Mapping[str, fx.Node]
    metas: Mapping[str, Meta]
    values: Values
    verdicts: Mapping[str, Verdict]
    stages: Mapping[str, int]
    regions: tuple[Region, ...]
    images: tuple[Value, ...]
    unread: frozenset[str]

    def counts(self) -> Counter[str]:
        """How many nodes have each verdict."""
        return Counter(verdict.kind.value for verdict in self.verdicts.values())

    def barriers(self) -> tuple[Verdict, ...]:
        """The verdicts that end streamed parts, in the order of the graph; no reductions combined from tiles."""
        local = (Kind.LOCAL, Kind.SMALL)
        return tuple(v for v in self.verdicts.values() if v.kind not in local and v.reduction is None)

    def reductions(self) -> tuple[Verdict, ...]:
        """The reductions over space that can be combined from tiles, in the order of the graph."""
        return tuple(v for v in self.verdicts.values() if v.reduction is not None)

    def footprint(self, node: str) -> Footprint:
        """The footprint of a local node, or of a reduction that can be combined from tiles."""
        footprint = self.verdicts[node].footprint or self.verdicts[node].reduction
        assert footprint is not None, node
        return footprint

    def value(self, node: str) -> Value:
        """The value of a node; the first of an operator that returns several."""
        return _values_of(node, self.values)[0]

    def depends_on_image(self, node: str) -> bool:
        """Whether any of a node's values depends on an image, stream axes or not."""
        return any(value.image for value in _values_of(node, self.values))

    def activation_bytes(self, nodes: Sequence[str]) -> int:
        """Bytes of the results of `nodes` at full size."""
        metas = (self.metas[node] for node in nodes)
        return sum(meta.bytes for meta in metas if isinstance(meta, Shape))

    def __str__(self) -> str:
        counts = ", ".join(f"{count} {kind}" for kind, count in sorted(self.counts().items()))
        regions = "\n".join(
            f"  region {i}: {len(r.nodes)} nodes, {r.nodes[0]} .. {r.nodes[-1]}"
            for i, r in enumerate(self.regions)
        )
        return f"{len(self.verdicts)} nodes: {counts}\n{regions}"

    __repr__ = __str__


def analyse_locality(
    graph: fx.Graph,
    metas: Mapping[str, Meta],
    inputs: Mapping[str, tuple[int, ...]],
    combines: bool = True,
) -> Locality:
    """The verdict of every node of the graph at the size that `metas` describes.

    `inputs` are the placeholders that hold images, with their stream dims; the others are weights. With `combines`
    reductions over space may be combined from tiles.
    """
    values: Values = {}
    verdicts: dict[str, Verdict] = {}
    alignments: dict[str, tuple[int, ...]] = {}
    for node in graph.nodes:
        meta = metas.get(node.name)
        if node.op == "placeholder":
            values[node.name] = _input_value(node.name, meta, inputs)
        elif node.op == "call_function":
            answer = _answer(node, meta, values, metas)
            if node.target is operator.getitem and isinstance(answer, Footprint):
                answer = _of_local(answer, verdicts)
            if isinstance(answer, Footprint):
                answer = _aligned_once(answer, alignments)
            if isinstance(answer, Footprint) and answer.reduction is not None and not combines:
                answer = Refusal(Kind.REDUCE, "reduces over space: its result needs the whole map")
            verdicts[node.name] = _verdict(node, answer)
            reduces = isinstance(answer, Footprint) and answer.reduction is not None
            values[node.name] = _result(node, () if reduces else answer.dims, meta, values)
        elif node.op == "get_attr":
            values[node.name] = ()
    stages = _stages(graph, verdicts, metas)
    unread = _unread(graph, metas)
    regions = _regions(graph, {n: v for n, v in verdicts.items() if n not in unread}, stages)
    nodes = {node.name: node for node in graph.nodes}
    images = tuple(value for name in inputs if isinstance(value := values[name], Value) and value.dims)
    return Locality(graph, nodes, metas, values, verdicts, stages, regions, images, unread)


def _input_value(name: str, meta: Meta, inputs: Mapping[str, tuple[int, ...]]) -> Value | tuple[Value, ...]:
    if not isinstance(meta, Shape):
        return ()
    return Value(name, meta.shape, meta.dtype, inputs.get(name, ()), name in inputs)


def _values_of(name: str, values: Values) -> tuple[Value, ...]:
    value = values[name]
    return value if isinstance(value, tuple) else (value,)


def _answer(node: fx.Node, meta: Meta, values: Values, metas: Mapping[str, Meta]) -> Footprint | Refusal:
    """The rule's answer, after the questions that need no rule."""
    if isinstance(meta, int):
        return Refusal(Kind.SMALL, "shape arithmetic")
    inputs = [value for given in node.all_input_nodes for value in _values_of(given.name, values)]
    if not any(value.image for value in inputs):
        return Refusal(Kind.SMALL, "does not depend on an image")
    if node.target is operator.getitem:
        return _item(node, values)
    rule = rule_of(node.target)
    has_axes = any(value.dims for value in inputs)
    if rule is None or not isinstance(node.target, torch._ops.OpOverload):
        reason = f"`{node.target}` has no rule; add one with fxstream.register_rule"
        return Refusal(Kind.NO_RULE, reason) if has_axes else NO_AXIS
    if not has_axes and rule.family not in STARTS_AXES:
        return NO_AXIS
    answer = rule.rule(_call(node, node.target, meta, values, metas))
    if not (answer.dims if isinstance(answer, Footprint) else has_axes):
        return NO_AXIS
    shapes = [m.shape for m in (meta if isinstance(meta, tuple) else (meta,)) if isinstance(m, Shape)]
    if any(0 in shape for shape in (*shapes, *(value.extents for value in inputs))):
        return Refusal(Kind.GLOBAL, "reads or writes a map without pixels", answer.dims)
    marked = next((n.meta[UNSTREAMED] for n in (node, *node.all_input_nodes) if UNSTREAMED in n.meta), None)
    if marked is None or isinstance(answer, Refusal):
        return answer
    return Refusal(Kind.GLOBAL, marked, () if answer.reduction is not None else answer.dims)


def _call(
    node: fx.Node,
    target: torch._ops.OpOverload,
    meta: Meta,
    values: Values,
    metas: Mapping[str, Meta],
) -> Call:
    """The node as a rule sees it: schema names, defaults, values for tensors, integers for sizes."""
    args, kwargs = fold_integers(node, metas)
    arguments: dict[str, Any] = {}
    for i, argument in enumerate(target._schema.arguments):
        given = args[i] if i < len(args) else kwargs.get(argument.name, argument.default_value)
        arguments[argument.name] = map_arg(given, lambda n: values[n.name])  # type: ignore[arg-type,return-value]
    results = meta if isinstance(meta, tuple) else (meta,)
    return Call(node.name, target, arguments, tuple(m.shape for m in results if isinstance(m, Shape)))


def _item(node: fx.Node, values: Values) -> Footprint | Refusal:
    """One result of an operator that returns several: the same box of it."""
    several, index = node.args
    assert isinstance(several, fx.Node)
    assert isinstance(index, int)
    value = _values_of(several.name, values)[index]
    if not value.dims:
        return NO_AXIS
    read = Read("0", value, value.dims, (IDENTITY,) * len(value.dims))
    return Footprint(Evaluation.SHUFFLED, value.dims, (read,), operator.getitem)


def _of_local(item: Footprint, verdicts: Mapping[str, Verdict]) -> Footprint | Refusal:
    """The footprint of one of several results, if the operator that returns them is local itself."""
    several = item.reads[0].value.name
    if verdicts[several].kind is Kind.LOCAL:
        return item
    return Refusal(Kind.GLOBAL, f"is one of several results of `{several}`", item.dims)


def _aligned_once(answer: Footprint, alignments: dict[str, tuple[int, ...]]) -> Footprint | Refusal:
    """The footprint, unless it cuts a value along other dims than an earlier operator did."""
    for read in answer.reads:
        if alignments.setdefault(read.value.name, read.dims) != read.dims:
            return Refusal(Kind.GLOBAL, f"reads `{read.value.name}` along other dims than before", answer.dims)
    return answer


def _verdict(node: fx.Node, answer: Footprint | Refusal) -> Verdict:
    place = (module_path(node), source_line(node))
    name = node.target._schema.name if isinstance(node.target, torch._ops.OpOverload) else str(node.target)
    if isinstance(answer, Footprint):
        if answer.reduction is not None:
            reason = "reduces over space, tile by tile"
            return Verdict(node.name, name, Kind.REDUCE, reason, *place, reduction=answer)
        return Verdict(node.name, name, Kind.LOCAL, answer.evaluation.value, *place, answer)
    return Verdict(node.name, name, answer.kind, answer.reason, *place)


def _result(node: fx.Node, dims: tuple[int, ...], meta: Meta, values: Values) -> Value | tuple[Value, ...]:
    """The value of a node with the stream axes that its footprint or refusal leaves it."""
    image = any(v.image for given in node.all_input_nodes for v in _values_of(given.name, values))
    if isinstance(meta, Shape):
        return Value(node.name, meta.shape, meta.dtype, dims, image)
    if isinstance(meta, tuple):
        shapes = [m for m in meta if isinstance(m, Shape)]
        return tuple(Value(node.name, m.shape, m.dtype, dims, image) for m in shapes)
    return ()


def _stages(graph: fx.Graph, verdicts: Mapping[str, Verdict], metas: Mapping[str, Meta]) -> dict[str, int]:
    """The stage of every node, by the rules of the NOTE; integers are known before anything runs."""
    ordered = ordered_nodes(graph)
    predecessor = dict(zip(ordered[1:], ordered, strict=False))
    local = {name for name, verdict in verdicts.items() if verdict.kind is Kind.LOCAL}
    stages: dict[str, int] = {}
    for node in graph.nodes:
        inputs = [given for given in node.all_input_nodes if not isinstance(metas.get(given.name), int)]
        inputs += [predecessor[node]] if node in predecessor else []
        if node.name in local or (node.name in verdicts and verdicts[node.name].reduction is not None):
            stages[node.name] = max((stages[n.name] + (n.name not in local) for n in inputs), default=0)
        else:
            stages[node.name] = max((stages[n.name] for n in inputs), default=-1)
    return stages


def _unread(graph: fx.Graph, metas: Mapping[str, Meta]) -> frozenset[str]:
    """The operators without an effect that only integers, and others like them, read."""
    ordered = set(ordered_nodes(graph))
    unread: set[fx.Node] = set()
    for node in reversed(graph.nodes):
        is_value = node.op == "call_function" and not isinstance(metas.get(node.name), int)
        if is_value and node not in ordered:
            others = [u for u in node.users if not isinstance(metas.get(u.name), int) and u not in unread]
            if not others:
                unread.add(node)
    return frozenset(node.name for node in unread)


def _regions(graph: fx.Graph, verdicts: Mapping[str, Verdict], stages: Mapping[str, int]) -> tuple[Region, ...]:
    """The connected parts of each stage's local nodes, in the order of the graph."""
    order = {node.name: i for i, node in enumerate(graph.nodes)}
    parts = nx.Graph()
    for node in graph.nodes:
        verdict = verdicts.get(node.name)
        if verdict is None or verdict.footprint is None:
            continue
        parts.add_node(node.name)
        for read in verdict.footprint.reads:
            if stages[read.value.name] == stages[node.name] and read.value.name in parts:
                parts.add_edge(read.value.name, node.name)
    found = [tuple(sorted(part, key=order.__getitem__)) for part in nx.connected_components(parts)]
    found.sort(key=lambda nodes: order[nodes[0]])
    return tuple(Region(stages[nodes[0]], nodes) for nodes in found)
