"""Replace in-place operators of a captured graph by out-of-place ones, so that a crop of a value may be a view.

NOTE [in-place operators]
1. ``relu_(x)`` becomes ``y = relu(x)``, and everything that reads `x` later reads `y`.
2. Where another view of the same storage is read later (``x[:, 0] += 1``), the write goes through views (`views`).
   An operator stays in place if it changes a tensor of the model (``num_batches_tracked.add_(1)``), if a view
   cannot be undone, or if it has no differentiable out-of-place variant. Every value in that storage is then
   marked `UNSTREAMED`: it is computed outside of streams, in order.
3. ``new_empty(x, size)`` becomes ``empty(size)``: only the type and device of `x` matter, and without `x` a random
   draw of that size does not depend on the image. So ``type_as(k, x)`` becomes ``to(k, type of x)``.

`ExportedProgram.run_decompositions` is functional too, but inlines `no_grad` blocks and autograd functions of the
user, which changes gradients, and writes ``x[:, 0] += 1`` with `aten.copy`, which has no derivative.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import networkx as nx
import torch
from torch import fx

from fxstream.capture.functional.views import UNDONE, Tree, tree_of
from fxstream.graph.effects import (
    UNSTREAMED,
    WAS_IN_PLACE,
    mutated_inputs,
    returns_storage,
    subgraphs,
    tensor_arguments,
)
from fxstream.graph.nodes import bind, parameters_of, schema_of

__all__ = ["CHANGED_TO", "MODEL_TENSOR", "make_factories", "make_functional"]

aten = torch.ops.aten

MODEL_TENSOR = "fxstream_model_tensor"
"""Key in the ``node.meta`` of a placeholder: whether it is a parameter, buffer or constant of the model."""
CHANGED_TO = "fxstream_changed_to"
"""Key in the ``node.meta`` of a placeholder: what a tensor of the call became that is changed in place."""

OUT_OF_PLACE: dict[object, torch._ops.OpOverload | None] = {
    aten.normal_.default: aten.normal_functional.default,
    aten.bernoulli_.float: aten.bernoulli.p,
    aten.copy_.default: None,  # aten.copy has no derivative
    **{
        getattr(getattr(aten, f"__i{name}__"), kind): getattr(getattr(aten, f"__{name}__"), kind)
        for name in ("and", "or", "xor", "lshift", "rshift")
        for kind in ("Tensor", "Scalar")
    },
}
"""Out-of-place variants that are not the operator's name without its underscore; None where there is none."""

FACTORIES = {
    "aten::new_empty": aten.empty.memory_format,
    "aten::new_zeros": aten.zeros.default,
    "aten::new_ones": aten.ones.default,
    "aten::new_full": aten.full.default,
}
"""What makes the same tensor without another one to take type and device from."""
CONVERSIONS = {"aten::type_as", "aten::to"}
"""Operators that take the type and device of another tensor, `other`."""

FILLING = {"aten::fill", "aten::zero"}
"""Operators whose result takes shape and type alone from the tensor that they are called on."""
MAY_RETURN_INPUT = {"aten::dropout", "aten::feature_dropout", "aten::alpha_dropout", "aten::feature_alpha_dropout"}
"""Operators that may return their input itself although their schema has no alias annotation."""


def _viewed_inputs(node: fx.Node) -> list[fx.Node]:
    """The inputs whose storage the result may share, by the schema; for a higher-order operator all tensors."""
    schema = schema_of(node)
    if node.op == "call_function" and schema is None:
        if subgraphs(node):
            return [n for n in node.all_input_nodes if n.op != "get_attr"]
        return [n for n in node.all_input_nodes if isinstance(n.meta.get("val"), (list, tuple))]
    if schema is not None and schema.name in MAY_RETURN_INPUT:
        return node.all_input_nodes[:1]
    return [tensor for tensor, alias in tensor_arguments(node) if alias is not None]


def _storage(node: fx.Node) -> object:
    """What identifies the storage of the node's fake tensor; this shows views that no schema declares."""
    value = node.meta.get("val")
    return value.untyped_storage()._cdata if isinstance(value, torch.Tensor) else node


def make_functional(graph: fx.Graph) -> None:
    """Rewrite `graph` in place by rules 1 and 2 of the NOTE."""
    position = {node: i for i, node in enumerate(graph.nodes)}
    aliases = nx.Graph()  # edges between nodes that may share storage
    first: dict[object, fx.Node] = {}  # the first node of each storage
    in_place = []
    for node in list(graph.nodes):
        mutated = mutated_inputs(node)
        if _copies_itself(node):
            node.replace_all_uses_with(mutated[0])
            graph.erase_node(node)
        elif not mutated:
            _add(aliases, node, [*_viewed_inputs(node), first.setdefault(_storage(node), node)])
        elif (variant := _out_of_place_variant(node)) is None or _is_seen(node, variant, aliases, position):
            tree = _written_tree(node, variant, aliases)
            if tree is None:
                _add(aliases, node, mutated if returns_storage(node) else [])
                in_place.append(node)
            else:
                _write_through(node, variant, tree, position)
                first[_storage(tree.base)] = tree.again[tree.base]
                for one in tree.again.values():
                    _add(aliases, one, [tree.again[tree.base]])
        else:
            result = _replace(node, variant, position)
            _add(aliases, result, [])
            first[_storage(result)] = result
    _return_changed(graph)
    for node in in_place:
        for tensor in mutated_inputs(node):
            for other in nx.node_connected_component(aliases, tensor):
                other.meta[UNSTREAMED] = f"its storage is changed in place by `{node.name}`"


def _copies_itself(node: fx.Node) -> bool:
    """Whether a view is copied onto itself, as ``x[:, 0] += 1`` ends with."""
    if node.target is not aten.copy_.default:
        return False
    one, other = node.args[:2]
    assert isinstance(one, fx.Node)
    assert isinstance(other, fx.Node)
    is_same = one.target in UNDONE and (one.target, one.args) == (other.target, other.args)
    return one is other or is_same


def _written_tree(node: fx.Node, variant: torch._ops.OpOverload | None, aliases: nx.Graph) -> Tree | None:
    """The views that a node writes through; None where what it writes is no value of its own."""
    is_value = variant is not None or node.target is aten.copy_.default
    if not is_value or len(mutated_inputs(node)) != 1 or variant is aten.detach.default:
        return None
    return tree_of(mutated_inputs(node)[0], aliases)


def _write_through(
    node: fx.Node, variant: torch._ops.OpOverload | None, tree: Tree, position: dict[fx.Node, int]
) -> None:
    """Rewrite a node that writes through a view, by the rules of the NOTE in `views`."""
    with node.graph.inserting_before(node):
        if variant is None or variant._schema.name in FILLING:
            value = _filling(node, position)
        else:
            value = _computed(node, variant, position)
    tree.write(node, value, position)
    node.graph.erase_node(node)


def _filling(node: fx.Node, position: dict[fx.Node, int]) -> fx.Node:
    """What ``y.copy_(x)`` or ``y.fill_(1)`` writes: no value of `y`, in its sizes and type."""
    (written,), target = mutated_inputs(node), node.meta["val"]
    source = node.args[1] if len(node.args) > 1 else 0
    options = {"dtype": target.dtype, "device": target.device}

    def new(function: Any, *args: Any, **kwargs: Any) -> fx.Node:
        made = node.graph.create_node("call_function", function, args, kwargs)
        made.meta, position[made] = dict(node.meta), position[node]
        return made

    def sizes() -> list[fx.Node]:
        made = [new(aten.sym_size.int, written, dim) for dim in range(target.ndim)]
        for dim, size in enumerate(made):
            size.meta["val"] = target.shape[dim]
        return made

    if not isinstance(source, fx.Node):
        return new(aten.full.default, sizes(), source, **options)
    value = source.meta["val"]
    if value.shape != target.shape:
        source = new(aten.expand.default, source, sizes())
    return source if value.dtype == target.dtype else new(aten.to.dtype, source, target.dtype)


def _return_changed(graph: fx.Graph) -> None:
    """Let the graph return what the tensors of the call became, after its other outputs."""
    changed = [node for node in graph.find_nodes(op="placeholder") if CHANGED_TO in node.meta]
    output = graph.output_node()
    output.args = ([*output.args[0], *(node.meta[CHANGED_TO] for node in changed)],)  # type: ignore[misc,list-item]


def _add(aliases: nx.Graph, node: fx.Node, viewed: Sequence[fx.Node]) -> None:
    aliases.add_node(node)
    aliases.add_edges_from((node, tensor) for tensor in viewed)


def _is_seen(
    node: fx.Node, variant: torch._ops.OpOverload, aliases: nx.Graph, position: Mapping[fx.Node, int]
) -> bool:
    """Whether a tensor of the model, or another view that is read later, shows what `node` changes in place."""
    if variant is aten.detach.default:  # changes no value
        return False
    (mutated,) = mutated_inputs(node)
    return any(
        other.meta.get(MODEL_TENSOR) is True
        or (other is not mutated and any(position[user] > position[node] for user in other.users))
        for other in nx.node_connected_component(aliases, mutated)
    )


def _out_of_place_variant(node: fx.Node) -> torch._ops.OpOverload | None:
    """``relu.default`` for ``relu_.default``; None if nothing differentiable returns all that the node changes."""
    if node.target in OUT_OF_PLACE:
        return OUT_OF_PLACE[node.target]
    schema = schema_of(node)
    if schema is None or not schema.name.endswith("_") or len(mutated_inputs(node)) > 1:
        return None
    namespace, name = schema.name.split("::")
    packet = getattr(getattr(torch.ops, namespace), name[:-1], None)
    overloads = packet.overloads() if packet is not None else ()
    return next(
        (getattr(packet, o) for o in (schema.overload_name or "default", "default") if o in overloads), None
    )


def _replace(node: fx.Node, variant: torch._ops.OpOverload, position: dict[fx.Node, int]) -> fx.Node:
    """Put the out-of-place variant in the place of an in-place node; returns the node of the new value.

    An in-place operator keeps the type of what it changes while its variant promotes, so a variant of tensors of
    several types is followed by a conversion back.
    """
    graph, (mutated,), now = node.graph, mutated_inputs(node), position[node]
    with graph.inserting_before(node):
        result = _computed(node, variant, position)
    node.replace_all_uses_with(result)
    for tensor in graph.find_nodes(op="placeholder"):
        if mutated in (tensor, tensor.meta.get(CHANGED_TO)):
            tensor.meta[CHANGED_TO] = result
    mutated.replace_all_uses_with(result, delete_user_cb=lambda user: position[user] > now)
    graph.erase_node(node)
    return result


def _computed(node: fx.Node, variant: torch._ops.OpOverload, position: dict[fx.Node, int]) -> fx.Node:
    """The value that an in-place node writes, by its out-of-place variant, in the type of what is written to."""
    result = node.graph.create_node("call_function", variant, *_arguments(node))
    result.meta, position[result] = dict(node.meta) | {WAS_IN_PLACE: True}, position[node]
    if len(_types(node)) > 1:
        result = node.graph.create_node("call_function", aten.type_as.default, (result, mutated_inputs(node)[0]))
        result.meta, position[result] = dict(node.meta), position[node]
    return result


def _types(node: fx.Node) -> set[object]:
    """The types of the tensors that a node reads; a tensor of unknown type counts as one of its own."""
    return {getattr(tensor.meta.get("val"), "dtype", tensor) for tensor in node.all_input_nodes}


def _arguments(node: fx.Node) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Arguments for the out-of-place variant, which may lack the in-place operator's positional defaults."""
    assert isinstance(node.target, torch._ops.OpOverload)
    arguments, parameters = bind(node), parameters_of(node.target)
    positional = tuple(arguments[p.name] for p in parameters if not p.kwarg_only)
    keywords = {p.name: arguments[p.name] for p in parameters if p.kwarg_only and p.name in node.kwargs}
    return positional, keywords


def make_factories(graph: fx.Graph) -> None:
    """Rule 3 of the NOTE: let new tensors depend on no other one, in place."""
    for node in graph.nodes:
        schema, tensor = schema_of(node), node.meta.get("val")
        if schema is not None and schema.name in FACTORIES and isinstance(tensor, torch.Tensor):
            node.target = FACTORIES[schema.name]
            node.args = node.args[1:]
            node.kwargs = {"dtype": tensor.dtype, "device": tensor.device}
        elif schema is not None and schema.name in CONVERSIONS and isinstance(tensor, torch.Tensor):
            _convert_alone(node, tensor)


def _convert_alone(node: fx.Node, tensor: torch.Tensor) -> None:
    """Let a conversion to the type of another tensor, which this is made into, read its own tensor alone."""
    if "other" not in bind(node):
        return
    before = node.all_input_nodes[0]
    if getattr(before.meta.get("val"), "device", None) == tensor.device:
        node.target, node.args = aten.to.dtype, (before, tensor.dtype)
    else:
        node.target, node.args = aten.to.device, (before, tensor.device, tensor.dtype)
    node.kwargs = {}
