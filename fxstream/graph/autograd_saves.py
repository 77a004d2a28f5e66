"""What autograd saves of each operator for its backward, found by asking the operator itself.

Every distinct call runs once on meta tensors, which have shapes but no memory, under hooks that see what is saved.
An operator that does not run there is taken to save all of its tensors. Attention, whose kernel is chosen by the
device, is asked on fake tensors of that: a fused one saves no weights of all pairs. So is what reads no image,
which may make tensors, or draw random numbers, on a device that is given.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.node import map_arg
from torch.utils import _pytree as pytree

from fxstream.graph.nodes import bind_to
from fxstream.graph.typed_graph import Saves, TypedGraph, TypedNode
from fxstream.rules.ops import overload

__all__ = ["in_place_variant", "may_reuse", "saves_of"]

OF_DEVICE = (torch.ops.aten.scaled_dot_product_attention.default, overload("attention"))
"""Operators of which each device has kernels that save other things."""


def saves_of(graph: TypedGraph) -> dict[str, Saves]:
    """For every operator that yields tensors, what autograd saves, at any size.

    Inputs are indices in `fx.Node.all_input_nodes`. What depends on no image is among them, such as masks of
    windows and grids of positions, which may be as large as the image.
    """
    cache: dict[Any, Saves] = {}
    saves = {}
    for name, node in graph.nodes.items():
        if node.verdict is not None and node.values:
            key = _key(graph, node.node)
            if key not in cache:
                cache[key] = _ask(graph, node.node)
            saves[name] = cache[key]
    return saves


def _key(graph: TypedGraph, node: fx.Node) -> Any:
    """What the answer depends on: the operator, its numbers, the shapes of its tensors, which are the same."""
    inputs = node.all_input_nodes

    def described(tensor: fx.Node) -> Any:
        typed = graph[tensor.name]
        shapes = [(value.shape, value.dtype) for value in typed.values]
        return str((inputs.index(tensor), typed.is_tuple, typed.is_constant, shapes))

    return node.target, str(map_arg(graph.arguments(node), described))


def _ask(graph: TypedGraph, node: fx.Node) -> Saves:
    inputs = node.all_input_nodes
    every = Saves(frozenset(range(len(inputs))), True, 0)
    if any(graph[n.name].is_tuple for n in inputs):
        return Saves(frozenset(), False, 0, 0, True)
    mode, device = _mode_and_device(graph[node.name])
    with mode:
        tensors = [_stand_in(graph[n.name], device) for n in inputs]
    args, kwargs = map_arg(graph.arguments(node), dict(zip(inputs, tensors, strict=True)).__getitem__)
    for statistic in _statistics(node, args):
        statistic.requires_grad_(False)
    packed: list[torch.Tensor] = []

    def pack(tensor: torch.Tensor) -> None:  # a result that holds itself would never be freed
        packed.append(tensor.detach())

    assert callable(node.target)
    try:
        with mode, torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(pack, lambda nothing: nothing):
            results = [r for r in pytree.tree_leaves(node.target(*args, **kwargs)) if isinstance(r, torch.Tensor)]
    except Exception:  # whatever an operator without a meta kernel raises
        return every
    return _saves(tensors, results, packed)


def _saves(tensors: list[torch.Tensor | None], results: list[torch.Tensor], packed: list[torch.Tensor]) -> Saves:
    """What was packed, by whose storage it is: an input's, a result's, or its own."""
    of_inputs = {storage: i for i, t in reversed([*enumerate(tensors)]) for storage in _storages([t])}
    of_results = set(_storages(results)) - set(of_inputs)
    others = {s: t for t in packed for s in _storages([t]) if s not in {*of_inputs, *of_results}}
    elements = max(1, sum(r.numel() for r in results))
    return Saves(
        frozenset(of_inputs[s] for s in _storages(packed) if s in of_inputs),
        any(s in of_results for s in _storages(packed)),
        sum(t.untyped_storage().nbytes() for t in others.values()) / elements,
        next((of_inputs[s] for s in _storages(results) if s in of_inputs), None),
        _passes_on(results, tensors),
        sum(t.untyped_storage().nbytes() for t in others.values() if t.is_floating_point()) / elements,
    )


def _mode_and_device(node: TypedNode) -> tuple[AbstractContextManager[Any], torch.device]:
    """Where an operator is asked, and the device of the tensors that it is asked on."""
    if node.node.target not in OF_DEVICE and node.depends_on_image:
        return nullcontext(), torch.device("meta")
    return FakeTensorMode(), getattr(node.node.meta.get("val"), "device", torch.device("cpu"))


def _stand_in(node: TypedNode, device: torch.device) -> torch.Tensor | None:
    if len(node.values) != 1:
        return None
    (value,) = node.values
    return torch.empty(value.shape, dtype=value.dtype, device=device, requires_grad=node.has_gradient)


def _statistics(node: fx.Node, args: tuple[Any, ...]) -> list[torch.Tensor]:
    """The running statistics among the arguments, which have no gradient."""
    if not isinstance(node.target, torch._ops.OpOverload):
        return []
    named = bind_to(node.target, args, {}).items()
    return [t for name, t in named if name.startswith("running_") and isinstance(t, torch.Tensor)]


def _storages(tensors: Any) -> Iterator[int]:
    return (t.untyped_storage()._cdata for t in tensors if isinstance(t, torch.Tensor))


def _passes_on(results: list[torch.Tensor], tensors: list[torch.Tensor | None]) -> bool:
    """Whether no gradient of an input is new memory."""
    outputs = [r for r in results if r.requires_grad]
    inputs = [t for t in tensors if t is not None and t.requires_grad]
    if not outputs or not inputs:
        return False
    gradients_out = [torch.empty_like(r) for r in outputs]
    try:
        gradients = torch.autograd.grad(outputs, inputs, gradients_out, allow_unused=True)
    except Exception:  # no meta kernel for the backward
        return False
    return set(_storages(gradients)) <= set(_storages(gradients_out))


def in_place_variant(target: Any) -> torch._ops.OpOverload | None:
    """``relu_.default`` for ``relu.default``, or None."""
    if not isinstance(target, torch._ops.OpOverload) or target.namespace != "aten":
        return None
    packet = getattr(torch.ops.aten, f"{target._schema.name.removeprefix('aten::')}_", None)
    name = target._schema.overload_name or "default"
    return getattr(packet, name) if packet is not None and name in packet.overloads() else None


def may_reuse(graph: TypedGraph, name: str) -> bool:
    """Whether an operator may take over its first input's memory: nothing else reads or saves that."""
    node = graph[name]
    inputs = node.node.all_input_nodes
    if node.saves is None or node.saves.inputs or not inputs or in_place_variant(node.node.target) is None:
        return False
    producer = graph[inputs[0].name]
    if [value.shape for value in producer.values] != [value.shape for value in node.values]:
        return False
    types = {value.dtype for one in (node, producer) if not one.is_tuple for value in one.values}
    is_new = producer.saves is not None and producer.saves.views is None and not producer.saves.result
    is_only = inputs[0] is node.node.args[0] and len(inputs[0].users) == 1
    return is_new and is_only and node.depends_on_image and len(types) == 1
