"""Proxies of the tensors of a graph, with which a lowering is ordinary torch code.

A lowering is a function of an `Operator`, whose attributes are its arguments by schema name: a `Proxy` for each
tensor. Operators and methods of proxies write ATen operators into the graph, in front of the one that is lowered:
``(op.input + op.eps).rsqrt()`` writes `aten.add` and `aten.rsqrt`, in the overloads that torch chooses. (To trace
the same code by `make_fx` takes a hundred times as long, and unites sizes that are equal by chance.)

NOTE [sizes]
1. The rewritten graph holds at every image size: `Proxy.size`, and arithmetic on it, are nodes of the graph.
2. `Proxy.shape` is the shape at the size at hand, for what no image changes: the number of dims, channels.
3. Shape, type and stream dims are those of the model's own values, not of what a lowering writes.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx
from torch.fx.node import map_aggregate
from torch.utils._pytree import tree_leaves

from fxstream.graph.captured import Captured
from fxstream.graph.effects import UNSTREAMED
from fxstream.graph.nodes import attributes_of, bind, call_with, copy_graph, name_of, schema_of, trace_of
from fxstream.graph.typed_graph import TypedGraph, TypedNode
from fxstream.rules import Value

__all__ = ["Draft", "Lowering", "Operator", "Proxy", "Size"]


@dataclass(frozen=True, slots=True)
class Draft:
    """A copy of a captured graph that is rewritten, with the model's tensors by their path.

    `values` is what nodes compute: a tuple for several results, an empty one for an integer.
    """

    graph: fx.Graph
    values: dict[fx.Node, Value | tuple[Value, ...]]
    tensors: Mapping[str, fx.Node]

    @classmethod
    def of(cls, captured: Captured, typed: TypedGraph) -> Draft:
        graph, copies = copy_graph(captured.graph)
        values = {copy: _value(typed.nodes.get(node.name)) for node, copy in copies.items()}
        weights = [n for n in graph.nodes if n.op == "placeholder" and n.name not in captured.inputs]
        return cls(graph, values, dict(zip(captured.tensors, weights, strict=True)))

    @property
    def axes(self) -> int:
        """The stream axes of the image with most of them."""
        images = [value for node, value in self.values.items() if node.op == "placeholder"]
        return max((len(value.dims) for value in images if isinstance(value, Value)), default=0)

    def replace(self, node: fx.Node, result: Proxy) -> None:
        """Put a result in the place of a node that computes the same."""
        self.values.setdefault(result.node, self.values[node])
        node.replace_all_uses_with(result.node)
        self.graph.erase_node(node)

    def finished(self, captured: Captured) -> Captured:
        """The captured model with this graph."""
        self.graph.lint()
        root = attributes_of(self.graph, captured.module)
        return replace(captured, module=fx.GraphModule(root, self.graph))


def _value(node: TypedNode | None) -> Value | tuple[Value, ...]:
    """What a node computes, one result by itself."""
    values = () if node is None else node.values
    return values[0] if node is not None and not node.is_tuple and values else values


class Operator:
    """An operator that is lowered; its arguments are attributes. It writes at the draft's insertion point.

    `value` is its result, or the first of several; `written` are the nodes so far.
    """

    self: Proxy  # `self` and `input` are what ATen calls the first argument
    input: Proxy
    value: Value

    def __init__(self, node: fx.Node, draft: Draft) -> None:
        self.node, self.draft, self.name = node, draft, name_of(node)
        value = draft.values[node]
        self.value = value if isinstance(value, Value) else next(iter(value), None)  # type: ignore[assignment]
        self.arguments: dict[str, Any] = {name: map_aggregate(a, self.proxy) for name, a in bind(node).items()}
        self.written: list[fx.Node] = []

    def __getattr__(self, argument: str) -> Any:
        if argument not in self.__dict__.get("arguments", ()):
            raise AttributeError(f"no argument {argument!r}")
        return self.arguments[argument]

    def proxy(self, leaf: Any) -> Any:
        """A proxy for a node; anything else as it is."""
        if not isinstance(leaf, fx.Node):
            return leaf
        is_integer = self.draft.values.get(leaf) == () and leaf.op != "get_attr"
        return (Size if is_integer else Proxy)(leaf, self)

    @property
    def wide(self) -> torch.dtype:
        """The type of its result in at least 32 bits."""
        return torch.promote_types(self.value.dtype, torch.float32)

    def narrow(self, tensor: Proxy) -> Proxy:
        """A wide tensor in the type of the result, where that has less than 32 bits."""
        return tensor if self.value.dtype.itemsize >= 4 else tensor.to(self.value.dtype)

    @property
    def device(self) -> Any:
        """The device that it runs on."""
        return tree_leaves(self.node.meta["val"])[0].device

    def call(self, target: str | Callable[..., Any], /, *args: Any, **kwargs: Any) -> Proxy:
        """Write a call of a function, or of an operator by its name in ATen or as ``namespace::name``."""
        function = _overload(target, args, kwargs) if isinstance(target, str) else target
        return self._written(self.draft.graph.call_function(function, _nodes(args), _nodes(kwargs)))

    def again(self, /, **replaced: Any) -> Proxy:
        """Write the same operator with some of its arguments replaced."""
        assert isinstance(self.node.target, torch._ops.OpOverload)
        return self._written(call_with(self.draft.graph, self.node.target, _nodes(self.arguments | replaced)))

    def _written(self, node: fx.Node) -> Proxy:
        node.meta.update(trace_of(self.node))
        if (schema := schema_of(node)) is not None and schema.is_mutable:
            node.meta[UNSTREAMED] = "changes a tensor in place"
        self.written.append(node)
        return Proxy(node, self)


def _writes(name: str) -> Callable[[Any, Any], Proxy]:
    return lambda one, other: one.op.call(name, one, other)


def _writes_integer(function: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Size]:
    return lambda one, other: Size(one.op.call(function, one, other).node, one.op)


class Proxy:
    """A tensor of the graph, with the methods of a tensor; `dims` are its stream dims.

    Its shape is empty, and it has no type, where they are not known (rule 3).
    """

    example: Any = torch.empty((), device="meta")

    def __init__(self, node: fx.Node, op: Operator) -> None:
        self.node, self.op = node, op
        value: Any = op.draft.values.get(node)
        is_tensor = isinstance(value, Value)
        self.shape: tuple[int, ...] = value.shape if is_tensor else ()
        self.dims: tuple[int, ...] = value.dims if is_tensor else ()
        self.dtype: Any = value.dtype if is_tensor else None
        self.ndim = len(self.shape)

    def size(self, dim: int) -> Size:
        return Size(self.op.call("sym_size", self, dim).node, self.op)

    def to(self, dtype: torch.dtype) -> Proxy:
        return self if self.dtype == dtype else self.op.call("to", self, dtype)

    def moments(self, dims: Iterable[int]) -> tuple[Proxy, ...]:
        """Mean, variance and sample variance over some dims, in at least 32 bits."""
        stacked = self.stacked_moments(dims)
        return tuple(stacked.select(0, i) for i in range(3))

    def stacked_moments(self, dims: Iterable[int]) -> Proxy:
        """The same as one tensor, stacked in front."""
        return self.op.call("fxstream::moments", self, list(dims))

    def __getattr__(self, name: str) -> Callable[..., Proxy]:
        if name.startswith("_") or not hasattr(torch.ops.aten, name):
            raise AttributeError(f"a tensor has no method {name!r}")
        return functools.partial(self.op.call, name, self)

    def __neg__(self) -> Proxy:
        return self.op.call("neg", self)

    __add__ = _writes("add")
    __sub__ = _writes("sub")
    __rsub__ = _writes("rsub")
    __mul__ = _writes("mul")
    __truediv__ = _writes("div")


class Size(Proxy):
    """An extent of a tensor at any image size, or an integer that is made of extents."""

    example = 1
    __add__ = _writes_integer(operator.add)
    __sub__ = _writes_integer(operator.sub)
    __mul__ = _writes_integer(operator.mul)
    __floordiv__ = _writes_integer(operator.floordiv)


Lowering = Callable[[Operator], Proxy | tuple[Proxy, ...] | None]
"""Writes what an operator is made of and returns its result or results; None where it stays as it is."""


def _nodes(argument: Any) -> Any:
    """An argument with nodes for proxies."""
    return map_aggregate(argument, lambda leaf: leaf.node if isinstance(leaf, Proxy) else leaf)


OVERLOADS: dict[tuple[Any, ...], Callable[..., Any]] = {}
"""What torch chose for an operator and the types of its arguments."""


def _overload(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Callable[..., Any]:
    kind = (name, *map(type, args), *kwargs)
    if kind not in OVERLOADS:
        qualified = name if "::" in name else f"aten::{name}"
        args, kwargs = map_aggregate((args, kwargs), lambda leaf: getattr(leaf, "example", leaf))
        chosen = torch._C._jit_resolve_packet(qualified, *args, **kwargs)
        OVERLOADS[kind] = operator.attrgetter(f"{qualified.replace('::', '.')}.{chosen}")(torch.ops)
    return OVERLOADS[kind]
