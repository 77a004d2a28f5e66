"""The casts of autocast, written into a graph.

Autocast casts the inputs of an operator when it is called; no graph shows that. Where a block of the model is
under autocast, or switches it off, each operator is asked on fake tensors which casts it makes, and these are
written as nodes. The graph then runs with autocast off.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import fx
from torch.fx.node import map_arg
from torch.utils._python_dispatch import TorchDispatchMode

from fxstream.graph.captured import Captured

__all__ = ["AUTOCAST", "ambient_autocast", "without_autocast", "write_casts"]

AUTOCAST = "fxstream_autocast"
"""Key in ``node.meta["custom"]``: the autocast blocks around the operator, outermost first."""
Block = tuple[str, "torch.dtype | None", bool]
"""A block of autocast: type of the device, type that it casts to, and whether it is on."""
DEVICES = ("cpu", "cuda", "xpu", "mps")


def ambient_autocast(values: Sequence[Any]) -> tuple[Block, ...]:
    """The blocks of autocast that are on where this is called, for the devices of the tensors among the values."""
    devices = sorted({value.device.type for value in values if isinstance(value, torch.Tensor)})
    return tuple(
        (device, torch.get_autocast_dtype(device), True)
        for device in devices
        if device in DEVICES and torch.is_autocast_enabled(device)
    )


@contextlib.contextmanager
def without_autocast(captured: Captured) -> Iterator[None]:
    """Autocast is off within, where a captured model holds the casts itself."""
    with contextlib.ExitStack() as stack:
        for device in DEVICES if captured.is_cast else ():
            if torch.is_autocast_enabled(device):
                stack.enter_context(torch.autocast(device, enabled=False))
        yield


class _Casts(TorchDispatchMode):
    """Notes the types that an operator casts its inputs to before it begins."""

    def __init__(self, inputs: Sequence[torch.Tensor]) -> None:
        super().__init__()
        self.dtypes: dict[int, torch.dtype] = {}
        self._inputs = {id(tensor): i for i, tensor in enumerate(inputs)}
        self._begins = True

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        is_cast = func is torch.ops.aten._to_copy.default and kwargs.get("dtype") is not None
        if is_cast and self._begins and id(args[0]) in self._inputs:
            self.dtypes[self._inputs[id(args[0])]] = kwargs["dtype"]
        elif not is_cast and func is not torch.ops.prim.device.default:
            self._begins = False
        return func(*args, **kwargs)


def write_casts(graph: fx.Graph, around: Sequence[Block]) -> bool:
    """Write the casts of every operator, in place, if any block sets autocast; whether any does.

    `around` are the blocks around the whole graph.
    """
    nodes = [node for node in graph.nodes if node.op == "call_function"]
    blocks = {node: node.meta.get("custom", {}).get(AUTOCAST, ()) for node in nodes}
    if not any(blocks.values()):
        return False
    for node in nodes:
        all_blocks = (*around, *blocks[node])
        if isinstance(node.target, torch._ops.OpOverload) and all_blocks:
            _write_casts_of(node, all_blocks)
    return True


def _write_casts_of(node: fx.Node, blocks: Sequence[Block]) -> None:
    inputs = [one for one in node.all_input_nodes if isinstance(one.meta.get("val"), torch.Tensor)]
    dtypes = _casts_of(node, inputs, blocks)
    with node.graph.inserting_before(node):
        for i, dtype in dtypes.items():
            cast = node.graph.call_function(torch.ops.aten.to.dtype, (inputs[i], dtype))
            cast.meta = {key: node.meta[key] for key in ("nn_module_stack", "stack_trace") if key in node.meta}
            cast.meta["val"] = inputs[i].meta["val"].to(dtype)
            node.replace_input_with(inputs[i], cast)


def _casts_of(node: fx.Node, inputs: Sequence[fx.Node], blocks: Sequence[Block]) -> dict[int, torch.dtype]:
    """The type that each input is cast to, by its index, where it is cast."""
    values = [one.meta["val"].detach() for one in inputs]
    by_node = dict(zip(inputs, values, strict=True))

    def value(one: fx.Node) -> Any:
        return by_node.get(one, one.meta.get("val"))

    args, kwargs = map_arg(node.args, value), map_arg(dict(node.kwargs), value)
    mode = values[0].fake_mode if values else contextlib.nullcontext()
    with contextlib.ExitStack() as stack:
        stack.enter_context(mode)
        stack.enter_context(torch.no_grad())
        for device, dtype, enabled in blocks:
            stack.enter_context(torch.autocast(device, dtype=dtype, enabled=enabled, cache_enabled=False))
        casts = stack.enter_context(_Casts(values))
        assert callable(node.target)
        node.target(*args, **kwargs)
    return {i: dtype for i, dtype in casts.dtypes.items() if dtype != values[i].dtype}
