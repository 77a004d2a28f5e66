"""A graph with the type of each of its nodes at one image size, and the regions of it that can be streamed.

A `TypedNode` knows its results (shape, type, which dims are tiled), or the integer that it is, and for an operator
the `Verdict`: an access pattern, or the reason why it cannot be tiled.

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

import math
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import fx
from torch.fx.node import map_arg

from fxstream.graph.shapes import Meta, Shape
from fxstream.rules import AccessPattern, NotTileable, Reason, Tileability, Value

__all__ = ["Region", "Saves", "TypedGraph", "TypedNode", "Verdict"]


@dataclass(frozen=True, slots=True)
class Verdict:
    """Whether a node can be computed box by box, and why (not): `answer` is the pattern or the reason."""

    node: str
    operator: str
    answer: AccessPattern | NotTileable
    module: str
    source: str

    @property
    def kind(self) -> Tileability:
        """Local, a reduction over space, or what keeps it from being tiled."""
        if isinstance(self.answer, NotTileable):
            return self.answer.tileability
        return Tileability.REDUCTION if self.answer.reduces else Tileability.LOCAL

    @property
    def reason(self) -> str:
        """The answer in words."""
        if isinstance(self.answer, NotTileable):
            return str(self.answer)
        return "reduces over space, tile by tile" if self.answer.reduces else type(self.answer).__name__.lower()

    @property
    def pattern(self) -> AccessPattern | None:
        """The access pattern of a local node."""
        return None if isinstance(self.answer, NotTileable) or self.answer.reduces else self.answer

    @property
    def reduction(self) -> AccessPattern | None:
        """The access pattern of a reduction over space that is combined from tiles."""
        return None if isinstance(self.answer, NotTileable) or not self.answer.reduces else self.answer

    def not_tileable_for(self, reason: Reason) -> bool:
        """Whether this is why it cannot be tiled."""
        return isinstance(self.answer, NotTileable) and self.answer.reason is reason

    @property
    def place(self) -> str:
        """The user's module, or the node where it belongs to none."""
        return self.module or self.node

    def __str__(self) -> str:
        where = f" at {self.source}" if self.source else ""
        return f"{self.kind.value}: `{self.place}` ({self.operator}) {self.reason}{where}"


@dataclass(frozen=True, slots=True)
class Saves:
    """What autograd saves of one call: which of its inputs (by index), its result, extra bytes per result element.

    `between` are those of the extra bytes that are values between its input and its result, which have gradients.
    `views` is the index of the input whose memory the result shares, None for new memory. `passes_on` says that
    the gradients of its inputs are views of that of its result.
    """

    inputs: frozenset[int]
    result: bool
    extra: float
    views: int | None = None
    passes_on: bool = False
    between: float = 0.0


@dataclass(frozen=True, slots=True)
class TypedNode:
    """One node at one image size.

    `values` are its results, one unless `is_tuple`; none of shape arithmetic, whose `integer` is known. `macs` are
    its multiply-accumulates. `saves` is known of operators that yield tensors. `is_parameter` says that it is a
    tensor of the model, or made of such alone, `is_constant` that it reads no tensor of the model or the call, and
    so has no gradient. In a segment, `reuses` says that it may take over the memory of its input, `skips` that no
    backward needs its result, and `halves` that it is a convolution of volumes, which may be done in halves.
    """

    node: fx.Node
    index: int
    values: tuple[Value, ...] = ()
    is_tuple: bool = False
    integer: int | None = None
    verdict: Verdict | None = None
    stage: int = -1
    macs: int = 0
    saves: Saves | None = None
    is_parameter: bool = False
    is_constant: bool = False
    reuses: bool = False
    skips: bool = False
    halves: bool = False

    @property
    def name(self) -> str:
        """The node's name."""
        return self.node.name

    @property
    def inputs(self) -> list[str]:
        """The names of the nodes that it reads, integers included, in the order of `fx.Node.all_input_nodes`."""
        return [node.name for node in self.node.all_input_nodes]

    @property
    def pattern(self) -> AccessPattern:
        """The access pattern of a local node, or of a reduction that is combined from tiles."""
        assert self.verdict is not None
        answer = self.verdict.answer
        assert not isinstance(answer, NotTileable), self.name
        return answer

    @property
    def is_attribute(self) -> bool:
        """Whether it is no tensor but what the graph takes from its module: a subgraph, a function of the user."""
        return self.node.op == "get_attr" and not self.values

    @property
    def is_local(self) -> bool:
        """Whether it is computed box by box."""
        return self.verdict is not None and self.verdict.pattern is not None

    @property
    def reduces(self) -> bool:
        """Whether it is a reduction over space that is combined from tiles."""
        return self.verdict is not None and self.verdict.reduction is not None

    @property
    def depends_on_image(self) -> bool:
        """Whether any of its values depends on an image, tiled dims or not."""
        return any(value.image for value in self.values)

    @property
    def has_gradient(self) -> bool:
        """Whether its result may have a gradient."""
        return not self.is_constant and (self.is_tuple or (bool(self.values) and self.values[0].has_gradient))

    @property
    def bytes(self) -> int:
        """Bytes of its results."""
        return sum(value.bytes for value in self.values)

    @property
    def extents(self) -> tuple[int, ...]:
        """Pixels of its result along each tiled dim; of a reduction, those of the positions that it reduces."""
        return self.pattern.reads[0].extents if self.reduces else self.values[0].extents

    @property
    def arithmetic(self) -> int:
        """Multiply-accumulates, and one per element written."""
        elements = 0 if self.is_tuple or not self.values else self.values[0].elements
        return self.macs + elements


@dataclass(frozen=True, slots=True)
class Region:
    """Local nodes, in the order of the graph, that can be streamed in one piece."""

    stage: int
    nodes: tuple[str, ...]


@dataclass(frozen=True, slots=True, repr=False)
class TypedGraph:
    """A graph and its typed nodes by name, in order; `images` are the inputs with tiled dims.

    `unread` are the nodes of which nothing but sizes is read, which need not be computed.
    """

    graph: fx.Graph
    nodes: Mapping[str, TypedNode]
    regions: tuple[Region, ...] = ()
    images: tuple[Value, ...] = ()
    unread: frozenset[str] = frozenset()

    def __getitem__(self, name: str) -> TypedNode:
        return self.nodes[name]

    @property
    def verdicts(self) -> dict[str, Verdict]:
        """The verdict on every operator, by name, in the order of the graph."""
        return {name: node.verdict for name, node in self.nodes.items() if node.verdict is not None}

    def counts(self) -> Counter[str]:
        """How many nodes have each verdict."""
        return Counter(verdict.kind.value for verdict in self.verdicts.values())

    def barriers(self) -> tuple[Verdict, ...]:
        """The verdicts that end streamed parts, in the order of the graph; no reductions combined from tiles."""
        local = (Tileability.LOCAL, Tileability.SMALL)
        every = (v for v in self.verdicts.values() if v.node not in self.unread)
        return tuple(v for v in every if v.kind not in local and v.reduction is None)

    def reductions(self) -> tuple[Verdict, ...]:
        """The reductions over space that can be combined from tiles, in the order of the graph."""
        return tuple(v for v in self.verdicts.values() if v.reduction is not None)

    def pattern(self, name: str) -> AccessPattern:
        """The access pattern of a local node, or of a reduction that can be combined from tiles."""
        return self.nodes[name].pattern

    def value(self, name: str) -> Value:
        """The value of a node; the first of an operator that returns several."""
        return self.nodes[name].values[0]

    def is_integer(self, name: str) -> bool:
        """Whether a node is shape arithmetic."""
        return name in self.nodes and self.nodes[name].integer is not None

    def inputs(self, name: str) -> list[str]:
        """What a node reads, without integers."""
        return [producer for producer in self.nodes[name].inputs if not self.is_integer(producer)]

    def users(self, name: str) -> list[str]:
        """What reads a node's result, without integers and nodes that need not be computed."""
        names = (user.name for user in self.nodes[name].node.users)
        return [user for user in names if user not in self.unread and not self.is_integer(user)]

    def is_read_outside(self, name: str, inside: Collection[str]) -> bool:
        """Whether anything but the nodes `inside` reads a node's result."""
        return any(user not in inside for user in self.users(name))

    def is_output(self, name: str, inside: Collection[str]) -> bool:
        """Whether a segment of the nodes `inside` yields a result: what is read outside, and every reduction.

        What reads the result of a reduction reads it from outside, since it needs that of all tiles.
        """
        return self.is_read_outside(name, () if self.nodes[name].reduces else inside)

    def is_result(self, name: str) -> bool:
        """Whether the graph returns a node's result."""
        return any(user.op == "output" for user in self.nodes[name].node.users)

    def activation_bytes(self, names: Sequence[str]) -> int:
        """Bytes of the results of `names` at full size; of several results their items count."""
        return sum(self.nodes[name].bytes for name in names if not self.nodes[name].is_tuple)

    def total_bytes(self) -> int:
        """Bytes of all results that depend on an image, with tiled dims or without."""
        dependent = (name for name in self.verdicts if self.nodes[name].depends_on_image)
        return self.activation_bytes([name for name in dependent if name not in self.unread])

    def arguments(self, node: fx.Node) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """A node's arguments with every integer-valued node replaced by its value at this size."""

        def folded(argument: fx.Node) -> Any:
            typed = self.nodes.get(argument.name)
            return argument if typed is None or typed.integer is None else typed.integer

        return map_arg(node.args, folded), map_arg(dict(node.kwargs), folded)

    def image_extents(self, extents: Sequence[int]) -> tuple[int, ...]:
        """The pixels of the largest image along each axis of a value with these extents.

        It is one with as many axes where there is one. Otherwise the last axes of both are the same: a value lacks
        the first of the image's, as after bands became channels, or has axes of its own before them.
        """
        axes = len(extents)
        images = [image.extents for image in self.images]
        of_largest = max([one for one in images if len(one) == axes] or images, key=math.prod)
        return (*extents[: max(0, axes - len(of_largest))], *of_largest[max(0, len(of_largest) - axes) :])

    @property
    def metas(self) -> dict[str, Meta]:
        """Shape and type of every node, or the integer that it is."""
        shapes = {n: tuple(Shape(v.shape, v.dtype) for v in node.values) for n, node in self.nodes.items()}
        return {
            name: node.integer
            if node.integer is not None
            else shapes[name]
            if node.is_tuple
            else (*shapes[name], None)[0]
            for name, node in self.nodes.items()
        }

    def with_saves(self, saves: Mapping[str, Saves]) -> TypedGraph:
        """The same graph, with what autograd saves of each operator."""
        nodes = {n: replace(t, saves=saves[n]) if n in saves else t for n, t in self.nodes.items()}
        return replace(self, nodes=nodes)

    @property
    def costed(self) -> list[str]:
        """The operators that yield tensors, whose saves are known, in order."""
        return [name for name, node in self.nodes.items() if node.saves is not None]

    def __str__(self) -> str:
        counts = ", ".join(f"{count} {kind}" for kind, count in sorted(self.counts().items()))
        regions = "\n".join(
            f"  region {i}: {len(r.nodes)} nodes, {r.nodes[0]} .. {r.nodes[-1]}"
            for i, r in enumerate(self.regions)
        )
        return f"{len(self.verdicts)} nodes: {counts}\n{regions}"

    __repr__ = __str__
