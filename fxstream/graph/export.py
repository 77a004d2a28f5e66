"""One static, non-strict `torch.export` of a model on fake tensors, wherever it is called from.

The graph does not depend on the surroundings (inference mode, hooks of a checkpoint), and nothing of the image's
size is allocated. `SizeReads` notes whether the model's code reads the size of a tensor; a model that does not
takes the same path at every size.
"""

from __future__ import annotations

import contextlib
import logging
import math
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch._export.wrappers import allow_in_pre_dispatch_graph
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.export import ExportedProgram
from torch.nn.modules.batchnorm import _BatchNorm
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from torch.utils.checkpoint import CheckpointFunction

from fxstream.errors import CaptureError
from fxstream.graph.shapes import stream_dims
from fxstream.graph.user_code import called_by_user, last_user_frame

__all__ = ["CUMULATIVE", "SizeReads", "export", "fake_tensor_log_silenced", "is_capturing"]

CUMULATIVE = -1.0
"""Stands for the momentum of a BatchNorm that averages over all batches so far."""
READS = {torch.Tensor.shape.__get__, torch.Tensor.size, torch.Tensor.numel, torch.Tensor.__len__}  # type: ignore[attr-defined]
GRADIENT_HOOKS = {torch.Tensor.register_hook, torch.Tensor.retain_grad}
_THREAD = threading.local()
_EXPORT_LOCK = threading.RLock()
"""Held during an export, which changes a method of torch and attributes of the model until it is done."""


class SizeReads(TorchFunctionMode):
    """Notes in `by_user` whether code outside of torch reads the size of a tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.by_user = False

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func in READS and not self.by_user:
            self.by_user = called_by_user()
        return func(*args, **(kwargs or {}))


class _WithoutGraphs:
    """Standard error without what `torch.export` prints: the graph so far of a model that it cannot trace."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> Any:
        """Pass on what anything else writes."""
        is_export = sys._getframe(1).f_globals.get("__name__") == "torch.export._trace"
        return len(text) if is_export else self._stream.write(text)


def is_capturing() -> bool:
    """Whether this thread runs a model to capture it."""
    return getattr(_THREAD, "captures", False)


@contextlib.contextmanager
def _capturing() -> Iterator[None]:
    _THREAD.captures = True
    try:
        yield
    finally:
        _THREAD.captures = False


@contextlib.contextmanager
def _neutral_modes() -> Iterator[None]:
    """No inference mode, gradients on; what capture saves for backward must not reach a checkpoint's hooks.

    Autocast stays as it is, since the types that the model computes in depend on it.
    """
    with contextlib.ExitStack() as stack:
        stack.enter_context(_capturing())
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        stack.enter_context(fake_tensor_log_silenced())
        stack.enter_context(contextlib.redirect_stderr(_WithoutGraphs(sys.stderr)))
        stack.enter_context(torch.autograd.graph.saved_tensors_hooks(_unchanged, _unchanged))
        yield


@contextlib.contextmanager
def fake_tensor_log_silenced() -> Iterator[None]:
    """Drops torch's log of operators that refuse fake tensors: if a size is only tried, that is an answer."""

    def drop(record: logging.LogRecord) -> bool:
        return False

    logger = logging.getLogger("torch._subclasses.fake_tensor")
    logger.addFilter(drop)
    try:
        yield
    finally:
        logger.removeFilter(drop)


@contextlib.contextmanager
def _cumulative_averages(model: nn.Module) -> Iterator[None]:
    """`CUMULATIVE` as the momentum of every BatchNorm that has None.

    With None it would read the number of batches so far, which has no value while a model is captured.
    """
    modules = [m for m in model.modules() if isinstance(m, _BatchNorm) and m.momentum is None]
    try:
        for module in modules:
            module.momentum = CUMULATIVE
        yield
    finally:
        for module in modules:
            module.momentum = None


class _RefuseHooks(TorchFunctionMode):
    """Raises `CaptureError` where the model's code asks for the gradient of a tensor that it computes."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func in GRADIENT_HOOKS and called_by_user():
            raise CaptureError(f"{func.__name__} on a tensor that the model computes would be lost in a stream")
        return func(*args, **(kwargs or {}))


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
        packed = any(isinstance(value, torch.ScriptObject) for value in vars(module).values())
        if packed or kind.__module__.startswith(("torch.ao.nn.quantized", "torch.ao.nn.intrinsic.quantized")):
            raise CaptureError(
                f"`{name}` ({kind.__name__}) is quantised to integers, whose packed weights torch does not export:"
                " compile the model as it was before torch.ao.quantization.convert"
            )


def _refuse_sharded_parts(model: nn.Module) -> None:
    """Raises `CaptureError` where FSDP2 gathers weights when a module is called: a stream calls operators."""
    for name, module in model.named_modules():
        if any(kind.__name__ == "FSDPModule" for kind in type(module).__mro__):
            place = f"`{name}`" if name else "the model"
            raise CaptureError(
                f"{place} is sharded by itself, and a stream would not gather its weights: shard the compiled"
                " module as a whole, and nothing in it: fully_shard(fxstream.compile(model, ...))"
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


@contextlib.contextmanager
def _opaque_functions() -> Iterator[None]:
    """Keeps each autograd function of the user as one node that calls it, and so its custom backward.

    Within the block `torch.autograd.Function.apply` is replaced for the whole process; for other threads the
    replacement calls the original. A reentrant checkpoint is replaced by the operators of what it runs.
    """
    function = torch.autograd.Function
    original = function.__dict__["apply"]
    opaque = allow_in_pre_dispatch_graph(original.__func__)
    exporting_thread = threading.get_ident()

    def apply(cls: type, *args: Any, **kwargs: Any) -> Any:
        if threading.get_ident() != exporting_thread:
            return original.__func__(cls, *args, **kwargs)
        if cls is CheckpointFunction:
            run, _, *inputs = args
            return run(*inputs)
        is_users = torch.is_grad_enabled() and not cls.__module__.startswith("torch.")
        return (opaque if is_users else original.__func__)(cls, *args, **kwargs)

    try:
        function.apply = classmethod(apply)  # type: ignore[method-assign, assignment]
        yield
    finally:
        function.apply = original  # type: ignore[method-assign]


def _unchanged(tensor: torch.Tensor) -> torch.Tensor:
    return tensor


def export(
    model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], shift: Sequence[int] | None
) -> ExportedProgram:
    """The program of `model` for inputs like these; with a shift, one image and that many pixels per axis larger.

    One thread exports at a time: meanwhile `torch.autograd.Function.apply` and the momentum of some modules of
    `model` are replaced. Raises `CaptureError`, with the user's line, if the model cannot be captured.
    """
    _refuse_shared_statistics(model)
    _refuse_backward_hooks(model)
    _refuse_quantised(model)
    _refuse_sharded_parts(model)
    try:
        with _EXPORT_LOCK, _neutral_modes(), _cumulative_averages(model), _opaque_functions(), _RefuseHooks():
            program = torch.export.export(model, *_fake_inputs(args, kwargs, shift), strict=False)
    except Exception as error:
        leaves = pytree.tree_leaves((args, dict(kwargs)))
        raise CaptureError(_explanation(model, error) + _advice(model, str(error), leaves)) from error
    if any(isinstance(constant, FakeTensor) for constant in program.constants.values()):
        raise CaptureError(
            f"{type(model).__name__} takes `.data` of a tensor that it computes, which hides it from capture:"
            " use .detach() instead"
        )
    return program


def _fake_inputs(
    args: tuple[Any, ...], kwargs: Mapping[str, Any], shift: Sequence[int] | None
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments with a fake tensor, shifted or not, for each tensor."""
    leaves, spec = pytree.tree_flatten((tuple(args), dict(kwargs)))
    tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
    shapes = iter([list(tensor.shape) for tensor in tensors] if shift is None else _shifted(tensors, shift))
    with FakeTensorMode(allow_non_fake_inputs=True):
        fakes = [
            torch.empty(next(shapes), dtype=leaf.dtype, device=leaf.device)
            if isinstance(leaf, torch.Tensor)
            else leaf
            for leaf in leaves
        ]
    fake_args, fake_kwargs = pytree.tree_unflatten(fakes, spec)
    return fake_args, fake_kwargs


def _shifted(tensors: Sequence[torch.Tensor], shift: Sequence[int]) -> list[list[int]]:
    """The shapes at another size: one image more, and the shift scaled to each input's resolution.

    The shift holds for the largest input; an input at half of its resolution gets half as many pixels more.
    """
    shapes = [list(tensor.shape) for tensor in tensors]
    inputs = list(zip(shapes, stream_dims(shapes), strict=True))
    largest, dims_of_largest = max(inputs, key=lambda i: (len(i[1]), math.prod(i[0])), default=([0], ()))
    batch, extents = largest[0], [largest[dim] for dim in dims_of_largest]
    for shape, dims in inputs:
        if shape and shape[0] == batch:
            shape[0] += 1
        if len(dims) == len(extents):
            for dim, pixels, extent in zip(dims, shift, extents, strict=False):
                shape[dim] = _scaled(shape[dim], extent, pixels)
    return shapes


def _scaled(size: int, extent: int, pixels: int) -> int:
    """The size of an axis where that of the image has `pixels` more; sizes at a stride stay at that stride.

    >>> _scaled(23, 45, 33), _scaled(22, 45, 33), _scaled(30, 45, 33)
    (39, 39, 52)
    """
    stride = max(1, round(extent / size))
    if -(-extent // stride) == size:
        return -(-(extent + pixels) // stride)
    if extent // stride == size:
        return (extent + pixels) // stride
    return size + pixels * size // extent


def _explanation(model: nn.Module, error: Exception) -> str:
    """The message of a `CaptureError`: the user's line and the reason."""
    frame = last_user_frame(error)
    line = f" at {frame.filename}:{frame.lineno} (`{frame.line}`)" if frame is not None else ""
    kind = type(error).__name__
    reason = next(iter(str(error).strip().splitlines()), kind)
    if "DataDependent" in kind or "GuardOnData" in kind:
        return (
            f"{type(model).__name__} has control flow{line} that depends on the values of a tensor, which no graph"
            " of the whole model can follow: compile a part without it, such as the backbone, or use"
            f" torch.compile(model, backend='fxstream'), which splits the model there ({reason})"
        )
    return f"{type(model).__name__} cannot run on inputs of these shapes and types{line}: {reason}"


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
