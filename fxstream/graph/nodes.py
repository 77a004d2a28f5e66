"""Arguments of graph nodes by the names of their operator's schema, and calls made from them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import fx

__all__ = ["TRACED", "bind", "call_with", "schema_of"]

TRACED = ("nn_module_stack", "stack_trace")
"""Keys of ``node.meta`` that say where in the user's model a node comes from."""


def schema_of(node: fx.Node) -> torch.FunctionSchema | None:
    """The schema of an operator node, or None for anything else."""
    return node.target._schema if isinstance(node.target, torch._ops.OpOverload) else None


def bind(
    node: fx.Node, args: tuple[Any, ...] | None = None, kwargs: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """The arguments of an operator node, or other `args` and `kwargs` for it, by name, defaults filled in."""
    schema = schema_of(node)
    assert schema is not None
    args, kwargs = node.args if args is None else args, node.kwargs if kwargs is None else kwargs
    return {
        argument.name: args[i] if i < len(args) else kwargs.get(argument.name, argument.default_value)
        for i, argument in enumerate(schema.arguments)
    }


def call_with(graph: fx.Graph, target: torch._ops.OpOverload, arguments: Mapping[str, Any]) -> fx.Node:
    """A call of an operator with arguments by name, in the order of its schema; others are defaults."""
    positional, keywords = [], {}
    for argument in target._schema.arguments:
        if not argument.kwarg_only:
            positional.append(arguments.get(argument.name, argument.default_value))
        elif argument.name in arguments:
            keywords[argument.name] = arguments[argument.name]
    return graph.call_function(target, tuple(positional), keywords)
