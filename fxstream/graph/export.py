"""One static, non-strict `torch.export` of a model on fake tensors, wherever it is called from.

The graph must not depend on the surroundings (inference mode, hooks of a checkpoint), and nothing of
the image's size is allocated. `SizeReads` notes whether the model's own code looks at the size of a tensor; one
that does not, takes the same path at every size.
"""

from __future__ import annotations

import contextlib
import logging
import math
import sys
import traceback
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
from fxstream.graph.shapes import is_library_file, stream_dims

__all__ = ["CUMULATIVE", "SizeReads", "export"]

CUMULATIVE = -1.0
"""Stands for the momentum of a BatchNorm that averages over all batches so far."""
READS = {torch.Tensor.shape.__get__, torch.Tensor.size, torch.Tensor.numel, torch.Tensor.__len__}  # type: ignore[attr-defined]
GRADIENT_HOOKS = {torch.Tensor.register_hook, torch.Tensor.retain_grad}
MACHINERY = tuple(f"{torch.__path__[0]}/{part}" for part in ("_", "fx/", "overrides", "export/"))


class SizeReads(TorchFunctionMode):
    """Notes in `found` whether code outside of torch reads the size of a tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.found = False

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func in READS and not self.found:
            self.found = _is_called_by_the_user()
        return func(*args, **(kwargs or {}))


def _is_called_by_the_user() -> bool:
    """Whether the caller behind the tracing machinery is not torch's own code."""
    frame = sys._getframe(2)
    while frame.f_back is not None and (
        frame.f_code.co_name == "__torch_function__" or frame.f_code.co_filename.startswith(MACHINERY)
    ):
        frame = frame.f_back
    return not is_library_file(frame.f_code.co_filename)


@contextlib.contextmanager
def _neutral() -> Iterator[None]:
    """No inference mode, gradients on; what capture saves for backward must not reach a checkpoint's hooks.

    Autocast stays as it is, since the types that the model sees depend on it.
    """
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        stack.enter_context(_quiet("torch._subclasses.fake_tensor"))
        stack.enter_context(torch.autograd.graph.saved_tensors_hooks(_unchanged, _unchanged))
        yield


@contextlib.contextmanager
def _quiet(name: str) -> Iterator[None]:
    """Nothing from one logger: a capture that fails at another size is an answer, not an error."""

    def nothing(record: logging.LogRecord) -> bool:
        return False

    logger = logging.getLogger(name)
    logger.addFilter(nothing)
    try:
        yield
    finally:
        logger.removeFilter(nothing)


@contextlib.contextmanager
def _cumulative_averages(model: nn.Module) -> Iterator[None]:
    """`CUMULATIVE` as the momentum of every BatchNorm that has None.

    Its own code would read the number of batches so far, which has no value while a model is captured.
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
        if func in GRADIENT_HOOKS and _is_called_by_the_user():
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
    """Each autograd function of the user is one node that calls it: its operators alone have not its backward.

    A reentrant checkpoint is one too, whose operators are those of what it runs.
    """
    function = torch.autograd.Function
    original = function.__dict__["apply"]
    opaque = allow_in_pre_dispatch_graph(original.__func__)

    def apply(cls: type, *args: Any, **kwargs: Any) -> Any:
        if cls is CheckpointFunction:
            run, _, *inputs = args
            return run(*inputs)
        is_own = torch.is_grad_enabled() and not cls.__module__.startswith("torch.")
        return (opaque if is_own else original.__func__)(cls, *args, **kwargs)

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
    """The program of `model` for inputs like these, `shift` pixels larger per axis and one more image if given.

    Raises `CaptureError` with the user's line where the model cannot be captured.
    """
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    tensors = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
    shifted = iter([tensor.shape for tensor in tensors] if shift is None else _shifted(tensors, shift))

    def fake(leaf: Any) -> Any:
        if not isinstance(leaf, torch.Tensor):
            return leaf
        with mode:
            return torch.empty(next(shifted), dtype=leaf.dtype, device=leaf.device)

    _refuse_shared_statistics(model)
    _refuse_backward_hooks(model)
    try:
        with _neutral(), _cumulative_averages(model), _opaque_functions(), _RefuseHooks():
            fake_args, fake_kwargs = pytree.tree_map(fake, (tuple(args), dict(kwargs)))
            program = torch.export.export(model, fake_args, fake_kwargs, strict=False)
    except Exception as error:
        raise CaptureError(_explanation(model, error)) from error
    if any(isinstance(constant, FakeTensor) for constant in program.constants.values()):
        raise CaptureError(
            f"{type(model).__name__} takes `.data` of a tensor that it computes, which hides it from capture:"
            " use .detach() instead"
        )
    return program


def _shifted(tensors: Sequence[torch.Tensor], shift: Sequence[int]) -> list[list[int]]:
    """The shapes at another size: one more image, and as many more pixels as the resolution asks for."""
    shapes = [list(tensor.shape) for tensor in tensors]
    images = stream_dims(shapes)
    known = list(zip(shapes, images, strict=True))
    largest, along = max(known, key=lambda k: (len(k[1]), math.prod(k[0])), default=([0], ()))
    batch, extents = largest[0], [largest[dim] for dim in along]
    for shape, dims in known:
        if shape and shape[0] == batch:
            shape[0] += 1
        if len(dims) == len(extents):
            for dim, pixels, extent in zip(dims, shift, extents, strict=False):
                shape[dim] += pixels * shape[dim] // extent
    return shapes


def _explanation(model: nn.Module, error: Exception) -> str:
    """The user's line and the reason in words."""
    own = [frame for frame in traceback.extract_tb(error.__traceback__) if not is_library_file(frame.filename)]
    place = f" at {own[-1].filename}:{own[-1].lineno} (`{own[-1].line}`)" if own else ""
    text = str(error).strip().splitlines()
    reason = text[0] if text else type(error).__name__
    kind = type(error).__name__
    if "DataDependent" in kind or "GuardOnData" in kind:
        reason = f"control flow depends on the values of a tensor: {reason}"
    return f"{type(model).__name__} cannot run on inputs of these shapes and types{place}: {reason}"
