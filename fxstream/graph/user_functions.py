"""Whether an autograd function of the user is local: its forward and its backward, traced together and typed.

NOTE [a local function]
1. Forward: each output pixel is computed from the same pixel of the maps, and from tensors without tiled dims.
2. Backward: so is the gradient of each map, from the same pixel of the gradients of the outputs. That of a tensor
   without tiled dims is a sum over positions, so that those of tiles add up to it.
3. Backward is linear in the gradients of the outputs: tiles that overlap each pull back a part of them.
4. Neither has a size of the image in it: both run at another size.
What cannot be shown by the rules of the operators inside is not local.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from fxstream.geometry.receptive_field import BROADCAST, IDENTITY
from fxstream.graph.shapes import fake_tensor_log_silenced, shapes_at
from fxstream.graph.typed_graph import TypedGraph, TypedNode
from fxstream.rules import NotTileable, Pointwise, Read, Reason, Value
from fxstream.rules.rule import Answer

__all__ = ["UserFunction", "answer_of"]

LARGER = 3
"""So many pixels more has the other size (rule 4)."""
LINEAR = frozenset(
    [
        "add",
        "alias",
        "clone",
        "detach",
        "expand",
        "mean",
        "neg",
        "permute",
        "reshape",
        "select",
        "slice",
        "squeeze",
        "sub",
        "sum",
        "transpose",
        "unsqueeze",
        "view",
        "_to_copy",
        "_unsafe_view",
    ]
)
"""Operators that are linear in their tensors together."""
OF_ONE = {"mul": (0, 1), "div": (0,), "where": (1, 2)}
"""Operators that are linear in the arguments at these places, in each alone."""


class UserFunction(Protocol):
    """An autograd function of the user, whose backward is known."""

    outputs: int
    """How many tensors it returns."""

    def joint(self, *tensors: Any) -> list[Any]:
        """What it returns for its arguments, then their gradients for the gradients of what it returns."""


TypeGraph = Callable[[fx.Graph, Any, dict[str, tuple[int, ...]]], TypedGraph]


@dataclass(frozen=True, slots=True)
class _Joint:
    """The typed graph of forward and backward: its results in order, None for no gradient, and its inputs."""

    graph: TypedGraph
    results: tuple[TypedNode | None, ...]
    gradients_in: tuple[str, ...]


def answer_of(
    function: UserFunction, arguments: Sequence[Value], results: Sequence[Value], type_graph: TypeGraph
) -> Answer:
    """The access pattern of a call of the function with these arguments, or why it has none."""
    images = [value for value in arguments if value.dims]
    dims, extents = images[0].dims, images[0].extents
    if any(value.dims != dims or value.extents != extents for value in images):
        return _refused("its maps differ")
    if any(len(value.shape) <= max(dims) or tuple(value.shape[d] for d in dims) != extents for value in results):
        return _refused("its results have other pixels than its arguments")
    gradients = [Value(f"gradient_{k}", one.shape, one.dtype, dims) for k, one in enumerate(results)]
    try:
        joint = _typed(function, [*arguments, *gradients], len(gradients), type_graph)
        _run_at_another_size(function, [*arguments, *gradients], dims)
    except Exception as error:  # whatever the user's operators raise at such sizes
        return _refused(f"it does not run at another size: {str(error).strip().splitlines()[0]}")
    objection = _objection(joint, arguments, dims, function.outputs)
    if objection:
        return _refused(objection)
    maps = (IDENTITY,) * len(dims)
    reads = (Read(str(i), value, dims, maps) for i, value in enumerate(arguments) if value.dims)
    return Pointwise(dims, tuple(reads), is_tight=False)


def _refused(why: str) -> NotTileable:
    return NotTileable(Reason.FUNCTION_NOT_LOCAL, (), (why,))


def _typed(function: UserFunction, values: Sequence[Value], gradients: int, type_graph: TypeGraph) -> _Joint:
    """Forward and backward as one graph of ATen operators."""
    with FakeTensorMode(), fake_tensor_log_silenced(), torch.no_grad():
        tensors = [torch.empty(value.shape, dtype=value.dtype) for value in values]
        module = make_fx(function.joint)(*tensors)
        placeholders = module.graph.find_nodes(op="placeholder")
        images = {node.name: value.dims for node, value in zip(placeholders, values, strict=True) if value.dims}
        graph = type_graph(module.graph, shapes_at(module, tensors), images)
    results = module.graph.output_node().args[0]
    assert isinstance(results, (list, tuple))
    typed = tuple(graph[node.name] if isinstance(node, fx.Node) else None for node in results)
    return _Joint(graph, typed, tuple(node.name for node in placeholders[-gradients:]))


def _run_at_another_size(function: UserFunction, values: Sequence[Value], dims: tuple[int, ...]) -> None:
    """Rule 4: raises where it has a size of the image in it."""
    with FakeTensorMode(), fake_tensor_log_silenced(), torch.no_grad():
        tensors = [torch.empty(_larger(value, dims), dtype=value.dtype) for value in values]
        results = function.joint(*tensors)
    expected = [*tensors[len(tensors) - function.outputs :], *tensors[: len(tensors) - function.outputs]]
    for result, tensor in zip(results, expected, strict=True):
        if result is not None and result.shape != tensor.shape:
            raise ValueError(f"a result is {list(result.shape)}, where {list(tensor.shape)} is needed")


def _larger(value: Value, dims: tuple[int, ...]) -> list[int]:
    return [n + LARGER * (value.dims != () and d in dims) for d, n in enumerate(value.shape)]


def _objection(joint: _Joint, arguments: Sequence[Value], dims: tuple[int, ...], outputs: int) -> str:
    """Why the function is not local, by rules 1 to 3; empty where it is."""
    for node in joint.graph.nodes.values():
        why = _is_not_local(joint.graph, node)
        if why:
            return f"`{node.verdict.operator if node.verdict else node.name}` {why}"
    needed = [dims] * outputs + [value.dims for value in arguments]
    for result, of_result in zip(joint.results, needed, strict=True):
        if result is not None and result.values[0].dims != of_result:
            return "a gradient follows other dims than what it is the gradient of"
    return _nonlinear(joint)


def _is_not_local(graph: TypedGraph, node: TypedNode) -> str:
    """What keeps one operator of forward and backward from being local, or a sum of tiles."""
    if node.verdict is None or not node.depends_on_image or node.integer is not None:
        return ""
    if node.is_local:
        maps = {one for read in node.pattern.reads for one in read.maps}
        summed = (one for one in node.inputs if graph[one].depends_on_image and not graph[one].values[0].dims)
        return "" if maps <= {IDENTITY, BROADCAST} and not any(summed) else "reads other pixels than its own"
    if node.reduces:
        return "" if _name(node) == "sum" else "is no sum over positions"
    is_small = not any(graph[one].values and graph[one].values[0].dims for one in node.inputs)
    return "" if is_small and _name(node) in LINEAR else node.verdict.reason


def _nonlinear(joint: _Joint) -> str:
    """Rule 3: the operator that is not linear in the gradients of the outputs; empty where there is none."""
    flowing = set(joint.gradients_in)
    for name, node in joint.graph.nodes.items():
        if node.verdict is None or flowing.isdisjoint(node.inputs):
            continue
        if not _is_linear(node, flowing):
            return f"`{node.verdict.operator}` in its backward may not be linear in the gradient"
        flowing.add(name)
    return ""


def _is_linear(node: TypedNode, flowing: Collection[str]) -> bool:
    """Whether an operator is linear in the inputs `flowing`."""
    name, arguments = _name(node), node.node.args
    places = [i for i, one in enumerate(arguments) if isinstance(one, fx.Node) and one.name in flowing]
    if name in LINEAR:
        operands = min(2, len(arguments)) if name in ("add", "sub") else len(node.inputs)
        return len(places) == operands and all(one in flowing for one in node.inputs)
    return places == [0] if name.endswith("_backward") else len(places) == 1 and places[0] in OF_ONE.get(name, ())


def _name(node: TypedNode) -> str:
    return node.verdict.operator.removeprefix("aten::") if node.verdict is not None else ""
