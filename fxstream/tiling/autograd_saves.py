"""What autograd keeps of each operator for its backward, found by asking the operator itself.

Every distinct call runs once on meta tensors, which have shapes but no memory, under hooks that see what is saved.
An operator that does not run there is taken to keep all of its tensors.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch.fx.node import map_arg
from torch.utils import _pytree as pytree

from fxstream.graph.shapes import Meta, Shape, fold_integers
from fxstream.graph.typed_graph import Locality

__all__ = ["Saved", "in_place_twin", "saved_by", "takes_over"]


@dataclass(frozen=True, slots=True)
class Saved:
    """What one call keeps: which of its inputs (by place), its result, and extra bytes per element of the result.

    `between` are those of the extra bytes that are values between its input and its result, which have gradients.
    `views` is the place of the input whose memory the result shares, None for new memory. `passes_on` says that
    the gradients of its inputs are views of that of its result. `folded` is the convolution that it is a part of
    (`folding`), if any.
    """

    inputs: frozenset[int]
    result: bool
    extra: float
    views: int | None = None
    passes_on: bool = False
    between: float = 0.0
    folded: str = ""


def saved_by(locality: Locality) -> dict[str, Saved]:
    """For every operator that depends on an image, what it keeps, at any size.

    Inputs are places in `fx.Node.all_input_nodes`.
    """
    known: dict[Any, Saved] = {}
    found = {}
    for name in locality.verdicts:
        node = locality.nodes[name]
        if isinstance(locality.metas.get(name), (Shape, tuple)) and locality.depends_on_image(name):
            key = _key(node, locality.metas)
            if key not in known:
                known[key] = _ask(node, locality.metas)
            found[name] = known[key]
    return found


def _key(node: fx.Node, metas: Mapping[str, Meta]) -> Any:
    """What the answer depends on: the operator, its numbers, the shapes of its tensors, which are the same."""
    given = node.all_input_nodes

    def described(tensor: fx.Node) -> Any:
        return str((given.index(tensor), metas.get(tensor.name)))

    return node.target, str(map_arg(fold_integers(node, metas), described))


def _ask(node: fx.Node, metas: Mapping[str, Meta]) -> Saved:
    given = node.all_input_nodes
    every = Saved(frozenset(range(len(given))), True, 0)
    if node.op != "call_function" or any(isinstance(metas.get(n.name), tuple) for n in given):
        return Saved(frozenset(), False, 0, 0, True) if given else every
    tensors = [_meta_tensor(metas.get(n.name)) for n in given]
    args, kwargs = map_arg(fold_integers(node, metas), dict(zip(given, tensors, strict=True)).__getitem__)
    for statistic in _statistics(node, args):
        statistic.requires_grad_(False)
    kept: list[torch.Tensor] = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(tensor.detach())
        return tensor

    assert callable(node.target)
    try:
        with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            results = [r for r in pytree.tree_leaves(node.target(*args, **kwargs)) if isinstance(r, torch.Tensor)]
    except Exception:  # whatever an operator without a meta kernel raises
        return every
    of_inputs = {storage: i for i, t in reversed([*enumerate(tensors)]) for storage in _storages([t])}
    of_results = set(_storages(results)) - set(of_inputs)
    own = {storage: t for t in kept for storage in _storages([t]) if storage not in {*of_inputs, *of_results}}
    elements = max(1, sum(r.numel() for r in results))
    return Saved(
        frozenset(of_inputs[s] for s in _storages(kept) if s in of_inputs),
        any(s in of_results for s in _storages(kept)),
        sum(t.untyped_storage().nbytes() for t in own.values()) / elements,
        next((of_inputs[s] for s in _storages(results) if s in of_inputs), None),
        _passes_on(results, tensors),
        sum(t.untyped_storage().nbytes() for t in own.values() if t.is_floating_point()) / elements,
    )


def _meta_tensor(meta: Meta) -> torch.Tensor | None:
    if not isinstance(meta, Shape):
        return None
    return torch.empty(meta.shape, dtype=meta.dtype, device="meta", requires_grad=meta.has_gradient)


def _statistics(node: fx.Node, args: tuple[Any, ...]) -> list[torch.Tensor]:
    """The running statistics among the arguments, which have no gradient."""
    if not isinstance(node.target, torch._ops.OpOverload):
        return []
    names = (argument.name for argument in node.target._schema.arguments)
    named = zip(names, args, strict=False)
    return [t for name, t in named if name.startswith("running_") and isinstance(t, torch.Tensor)]


def _storages(tensors: Any) -> Iterator[int]:
    return (t.untyped_storage()._cdata for t in tensors if isinstance(t, torch.Tensor))


def _passes_on(results: list[torch.Tensor], tensors: list[torch.Tensor | None]) -> bool:
    """Whether no gradient of an input is new memory."""
    outputs = [r for r in results if r.requires_grad]
    inputs = [t for t in tensors if t is not None and t.requires_grad]
    if not outputs or not inputs:
        return False
    given = [torch.empty_like(r) for r in outputs]
    try:
        gradients = torch.autograd.grad(outputs, inputs, given, allow_unused=True)
    except Exception:  # no meta kernel for the backward
        return False
    return set(_storages(gradients)) <= set(_storages(given))


def in_place_twin(target: Any) -> torch._ops.OpOverload | None:
    """``relu_.default`` for ``relu.default``, or None."""
    if not isinstance(target, torch._ops.OpOverload) or target.namespace != "aten":
        return None
    packet = getattr(torch.ops.aten, f"{target._schema.name.removeprefix('aten::')}_", None)
    name = target._schema.overload_name or "default"
    return getattr(packet, name) if packet is not None and name in packet.overloads() else None


def takes_over(locality: Locality, saved: Mapping[str, Saved], name: str) -> bool:
    """Whether an operator may take over its input's memory: nothing else reads that and no backward needs it."""
    node = locality.nodes[name]
    if in_place_twin(node.target) is None or len(node.all_input_nodes) != 1 or saved[name].inputs:
        return False
    (given,) = node.all_input_nodes
    metas = locality.metas[name], locality.metas.get(given.name)
    types = {meta.dtype for meta in metas if isinstance(meta, Shape)}
    made = saved.get(given.name)
    fresh = made is not None and (made.views is None or bool(made.folded)) and not made.result
    return fresh and given is node.args[0] and len(given.users) == 1 and len(types) == 1
