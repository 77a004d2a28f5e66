"""Weights that FSDP2 has sharded block by block: gathered for a whole call, as its hooks gather them for a block.

A stream calls operators, not modules, so the hooks that `fully_shard` registers on modules would not run. They run
around the call instead: those before a forward on all modules, outermost first, then the call, then those after a
forward with the model's result, whose gradient gathers the weights again. FSDP2 then reduces and scatters the
gradients at the end of backward, as it does for blocks whose inputs need none. Meanwhile the hooks are not on the
modules; in their places is what they do to a block's values: the casts of its mixed precision policy.

All weights are whole during the call, and between forward and backward only those that FSDP2 leaves whole.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import nn
from torch.utils import _pytree as pytree

from fxstream.capture.refusals import hook_of_shards, is_sharded

__all__ = ["gathered"]

Result = TypeVar("Result")


@dataclass(frozen=True, slots=True)
class _Hook:
    """A hook of FSDP2: where it is registered, and the casts that are in its place during a call."""

    hooks: dict[int, Callable[..., Any]]
    key: int
    hook: Callable[..., Any]
    cast: Callable[..., Any]


def gathered(modules: Iterable[nn.Module], run: Callable[[], Result]) -> Result:
    """What `run` returns while the weights of these modules, outermost first, are whole."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return run()
    sharded = [module for module in modules if is_sharded(module)]
    before = [(module, hook) for module in sharded for hook in _hooks(module, module._forward_pre_hooks)]
    after = [(module, hook) for module in sharded for hook in _hooks(module, module._forward_hooks)]
    with _replaced([hook for _, hook in (*before, *after)]):
        for module, hook in before:
            hook.hook(module, (), {})
        result = run()
        for module, hook in reversed(after):
            hook.hook(module, (), result)
    return result


def _hooks(module: nn.Module, hooks: dict[int, Callable[..., Any]]) -> Iterator[_Hook]:
    for key, hook in hooks.items():
        if (state := hook_of_shards(hook)) is None:
            continue
        policy = state._mp_policy
        if hooks is module._forward_hooks:
            cast = _cast_results(policy.output_dtype)
        else:
            cast = _cast_inputs(policy.param_dtype if policy.cast_forward_inputs else None)
        yield _Hook(hooks, key, hook, cast)


@contextlib.contextmanager
def _replaced(hooks: Iterable[_Hook]) -> Iterator[None]:
    try:
        for hook in hooks:
            hook.hooks[hook.key] = hook.cast
        yield
    finally:
        for hook in hooks:
            hook.hooks[hook.key] = hook.hook


@functools.cache
def _cast_inputs(dtype: torch.dtype | None) -> Callable[..., Any]:
    """A hook that casts a module's arguments; one object a type, since a trace is guarded by it."""
    return lambda module, args, kwargs: _cast((args, kwargs), dtype)


@functools.cache
def _cast_results(dtype: torch.dtype | None) -> Callable[..., Any]:
    return lambda module, args, result: _cast(result, dtype)


def _cast(values: Any, dtype: torch.dtype | None) -> Any:
    if dtype is None:
        return values
    return pytree.tree_map_only(torch.Tensor, lambda t: t.to(dtype) if t.is_floating_point() else t, values)
