"""The module that a user gets in the place of the model."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import fx, nn

from fxstream.capture.tracing import is_capturing
from fxstream.compiler.shared import Options
from fxstream.compiler.streaming import Streaming
from fxstream.errors import InputError

__all__ = ["StreamedModule", "inspect"]

SHARED = ("_parameters", "_buffers", "_modules", "_non_persistent_buffers_set")
INSPECTED = ("model", "plan", "verdicts", "probe", "graph")
"""What is read from the `Streaming` where the model has no attribute of that name."""


class StreamedModule(nn.Module):
    """A model that streams; made by `compile`.

    It shares the model's parameters, buffers and submodules (the same dictionaries), so `state_dict`, optimisers,
    `.to()` and `.train()` act on both. Any other attribute is the model's, to read and to set. `plan`, `verdicts`,
    `probe`, `graph` and `model` are those of `inspect`, where the model has no such name.
    """

    _fxstream: Streaming

    def __init__(self, model: nn.Module, options: Options) -> None:
        machinery = nn.Module().__dict__
        del machinery["training"]
        shared = {name: model.__dict__[name] for name in SHARED}
        self.__dict__.update(machinery | shared | {"_fxstream": Streaming(model, options)})

    def __reduce__(self) -> tuple[Any, ...]:
        return StreamedModule, (self._fxstream.model, self._fxstream.options)

    def __deepcopy__(self, memo: dict[int, Any]) -> StreamedModule:
        return StreamedModule(copy.deepcopy(self._fxstream.model, memo), self._fxstream.options)

    def _replicate_for_data_parallel(self) -> StreamedModule:
        raise InputError(
            "nn.DataParallel copies a module in every call, and the plan is the original's: use"
            " DistributedDataParallel around the compiled module"
        )

    def train(self, mode: bool = True) -> StreamedModule:
        """Training mode of the model, and so of this module."""
        self._fxstream.model.train(mode)
        return self

    def __getattr__(self, name: str) -> Any:
        """Called where the module itself has no such attribute: the model's, or what `inspect` knows."""
        streaming: Streaming = self.__dict__["_fxstream"]
        try:
            return getattr(streaming.model, name)
        except AttributeError:
            if name not in INSPECTED:
                raise
        return getattr(streaming, name)

    def __setattr__(self, name: str, value: Any) -> None:
        if name in self.__dict__ or hasattr(type(self), name):  # its hooks, and what replaces a method of a module
            object.__setattr__(self, name, value)
        else:
            setattr(self._fxstream.model, name, value)

    def __delattr__(self, name: str) -> None:
        if name in self.__dict__:
            del self.__dict__[name]
        else:
            delattr(self._fxstream.model, name)

    def __dir__(self) -> list[str]:
        return sorted({*super().__dir__(), *dir(self._fxstream.model)})

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the model returns for these arguments, of which images may be arrays (`fxstream.source`).

        A `torch.compile` around it does not look inside. As a part of another model that is compiled, it is what
        its model is. Raises `InputError` where an exporter or a tracer writes the call down.
        """
        if _is_inlined():
            return self._fxstream.model(*args, **kwargs)
        return _untraced_run(self, args, kwargs)

    def extra_repr(self) -> str:
        request = self._fxstream.options.request
        return f"memory={request.memory}" if request.tile is None else f"tile={request.tile}"


def inspect(module: StreamedModule) -> Streaming:
    """How a compiled module streams: its model, its options, and plan and verdicts of the last call.

    `module.plan` is the same, unless the model has an attribute `plan` of its own. Raises `InputError` for
    anything but a compiled module, and where something of the last call is read before the first.
    """
    if not isinstance(module, StreamedModule):
        raise InputError(f"inspect needs a module made by fxstream.compile, found {type(module).__name__}")
    return module._fxstream


def _is_traced(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether an exporter or a tracer writes this call down: ONNX, TorchScript, torch.export, make_fx or fx."""
    proxies = torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.PROXY)
    before_dispatch = torch._C._dispatch_tls_is_dispatch_key_included(torch._C.DispatchKey.PreDispatch)
    if torch._C._get_tracing_state() is not None or proxies is not None or before_dispatch:
        return True
    return any(isinstance(value, fx.Proxy) for value in (*args, *kwargs.values()))


def _run(module: StreamedModule, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    if _is_traced(args, kwargs):
        raise InputError(
            "a stream of tiles cannot be traced or exported: export the model, which is"
            " fxstream.inspect(compiled).model and has the same weights"
        )
    return module._fxstream.run(args, kwargs)


_untraced_run: Callable[..., Any] = torch.compiler.disable(
    _run,
    reason="fxstream compiles this module: without fullgraph=True, it is one call in the graph around it",
)
"""`_run`, which no `torch.compile` around it looks into."""
_is_inlined: Callable[[], bool] = torch.compiler.assume_constant_result(is_capturing)
"""Whether fxstream traces a model around this one; dynamo takes the answer for a constant."""
