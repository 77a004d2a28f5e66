"""What no capture takes, and errors in the user's words: which module or line, what was met, what to do."""

from __future__ import annotations

import contextlib
import inspect
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch._dynamo.exc import TorchDynamoException, TorchRuntimeError
from torch.utils import _pytree as pytree

from fxstream.errors import CaptureError, GraphBreakError
from fxstream.graph.user_code import is_library_file, last_user_frame

__all__ = ["explained", "hook_of_shards", "is_sharded", "refuse"]

RAISED = re.compile(r"""got \w+\((?P<quote>['"])(?P<reason>.*)(?P=quote)\)$""", re.MULTILINE)
"""What an operator raised, in dynamo's words for it."""


def refuse(model: nn.Module) -> None:
    """Raise `CaptureError` for a model of which a part would silently not do what it does."""
    for check in (_refuse_shared_statistics, _refuse_backward_hooks, _refuse_quantised, _refuse_sharded_parts):
        check(model)


@contextlib.contextmanager
def explained(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Iterator[None]:
    """Raise what tracing the model raises as `GraphBreakError` or `CaptureError`, with the user's line."""
    try:
        yield
    except (RuntimeError, TypeError, ValueError) as error:
        if isinstance(error, TorchDynamoException) and not isinstance(error, TorchRuntimeError):
            raise GraphBreakError(_graph_break(model, error)) from error
        leaves = pytree.tree_leaves((args, dict(kwargs)))
        raise CaptureError(_explanation(model, error) + _advice(model, str(error), leaves)) from error


def _graph_break(model: nn.Module, error: TorchDynamoException) -> str:
    reason = next(iter(str(error).strip().splitlines()), "")
    return f"{type(model).__name__} is not one graph: it breaks{_line(error)}: {reason}"


def _line(error: Exception) -> str:
    """The user's line at which an error arose, dynamo's or any other; empty if there is none."""
    traced = [f for f in getattr(error, "real_stack", None) or () if not is_library_file(f.filename)]
    frame = traced[-1] if traced else last_user_frame(error)
    return f" at {frame.filename}:{frame.lineno} (`{frame.line}`)" if frame is not None else ""


def _refuse_backward_hooks(model: nn.Module) -> None:
    """Raises `CaptureError` where a module waits for its gradient: a stream calls operators, not modules."""
    for name, module in model.named_modules():
        if module._backward_hooks or module._backward_pre_hooks:
            raise CaptureError(
                f"`{name}` ({type(module).__name__}) has a backward hook, which a stream would not call: remove"
                " it, or register it on the compiled module or on the parameters"
            )


def _refuse_quantised(model: nn.Module) -> None:
    """Raises `CaptureError` where weights are packed for integer kernels, which are no tensors of a graph."""
    for name, module in model.named_modules():
        kind = type(module)
        packed = not isinstance(module, torch.jit.ScriptModule) and any(
            isinstance(value, torch.ScriptObject) for value in vars(module).values()
        )
        if packed or kind.__module__.startswith(("torch.ao.nn.quantized", "torch.ao.nn.intrinsic.quantized")):
            raise CaptureError(
                f"`{name}` ({kind.__name__}) is quantised to integers, whose packed weights torch does not export:"
                " compile the model as it was before torch.ao.quantization.convert"
            )


def is_sharded(module: nn.Module) -> bool:
    """Whether FSDP2's `fully_shard` was applied to a module."""
    return any(kind.__name__ == "FSDPModule" for kind in type(module).__mro__)


def hook_of_shards(hook: Any) -> Any:
    """What FSDP2 keeps of a module, if this is one of its hooks; else None."""
    state = getattr(inspect.unwrap(hook, stop=lambda f: hasattr(f, "__self__")), "__self__", None)
    return state if type(state).__name__ == "FSDPState" else None


def _refuse_sharded_parts(model: nn.Module) -> None:
    """Raises `CaptureError` where hooks of FSDP2 gather weights when a module is called."""
    for name, module in model.named_modules():
        if is_sharded(module) and any(map(hook_of_shards, module._forward_pre_hooks.values())):
            place = f"`{name}`" if name else "the model"
            raise CaptureError(
                f"{place} is sharded (fully_shard), and only a call of the compiled module, and infer, gather its"
                " weights: analyze, plan and check the model before it is sharded"
            )


def _refuse_shared_statistics(model: nn.Module) -> None:
    """Raises `CaptureError` where statistics are taken over several processes."""
    several = torch.distributed.is_available() and torch.distributed.is_initialized()
    for name, module in model.named_modules():
        if isinstance(module, nn.SyncBatchNorm) and module.training and several:
            if torch.distributed.get_world_size(module.process_group) == 1:
                continue
            raise CaptureError(
                f"`{name}` (SyncBatchNorm) takes its statistics over all processes, a stream takes them over the"
                " tiles of its own images: use BatchNorm, or fxstream.freeze_batch_norm(model)"
            )


def _explanation(model: nn.Module, error: Exception) -> str:
    """The message of a `CaptureError`: the user's line and the reason."""
    raised = RAISED.search(str(error))
    lines = str(error).strip().splitlines() or [type(error).__name__]
    reason = raised.group("reason") if raised else lines[0]
    return f"{type(model).__name__} cannot run on inputs of these shapes and types{_line(error)}: {reason}"


def _advice(model: nn.Module, reason: str, leaves: Sequence[Any]) -> str:
    """What to do about inputs that are missing or of a wrong type; empty where they are not the reason."""
    if "missing a required argument" in reason:
        return "; give all inputs of the model, on the command line one --input for each"
    tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
    integers = [tensor.dtype for tensor in tensors if not tensor.is_floating_point()]
    floats = [weight.dtype for weight in model.parameters() if weight.is_floating_point()]
    if not integers or not floats or "type" not in reason:
        return ""
    types = [str(kind).removeprefix("torch.") for kind in (integers[0], floats[0])]
    return (
        f"; an input is {types[0]} and weights are {types[1]}: convert it in the model (image.float() / 255), or"
        f" give an array as fxstream.source(..., dtype=torch.{types[1]})"
    )
