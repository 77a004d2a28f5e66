"""The module that a user gets in the place of the model."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import fx, nn
from torch.fx.experimental.proxy_tensor import get_proxy_mode

from fxstream.compiler.pipeline import Options, Pipeline, Prepared
from fxstream.errors import InputError
from fxstream.graph.export import is_capturing
from fxstream.graph.typed_graph import Verdict
from fxstream.planning.plan import Plan
from fxstream.probe.probe import ProbeReport

__all__ = ["StreamedModule"]


class _BeforeFirstCallError(InputError, AttributeError):
    """A property of the last call was read before the first: for `hasattr` it is not there."""


class StreamedModule(nn.Module):
    """A model that streams; made by `compile`.

    It shares the model's parameters, buffers and submodules (the same dictionaries), so `state_dict`,
    optimisers, `.to()` and `.train()` act on both.
    """

    model: nn.Module
    pipeline: Pipeline
    _untraced_run: Callable[..., Any]

    def __init__(self, model: nn.Module, options: Options) -> None:
        super().__init__()
        shared = ("_parameters", "_buffers", "_modules", "_non_persistent_buffers_set")
        # Not registered as a submodule: the model's parts are ours under their own names.
        self.__dict__ |= {parts: model.__dict__[parts] for parts in shared} | {"model": model}
        self.pipeline = Pipeline(model, options)
        self.training = model.training
        self._untraced_run = _untraced_run()

    def __reduce__(self) -> tuple[Any, ...]:
        return StreamedModule, (self.model, self.pipeline.options)

    def __deepcopy__(self, memo: dict[int, Any]) -> StreamedModule:
        return StreamedModule(copy.deepcopy(self.model, memo), self.pipeline.options)

    def _replicate_for_data_parallel(self) -> StreamedModule:
        raise InputError(
            "nn.DataParallel copies a module in every call, and the plan is the original's: use"
            " DistributedDataParallel around the compiled module"
        )

    def train(self, mode: bool = True) -> StreamedModule:
        """Training mode of the model and of this module."""
        self.training = mode
        self.model.train(mode)
        return self

    @property
    def verdicts(self) -> tuple[Verdict, ...]:
        """The verdict on every node, for the last input."""
        return self._last().analysis.verdicts

    @property
    def plan(self) -> Plan:
        """Segments and tiles for the last input, and how many of these were equal to others."""
        return self._last().plan_as_run

    @property
    def probe(self) -> tuple[ProbeReport, ...]:
        """What the probe measured on each streamed region, for the last input; empty where it was not run."""
        return self._last().probe

    @property
    def graph(self) -> fx.Graph:
        """The rewritten graph for the last input; the captured one where the plain path was taken."""
        return self._last().graph

    def _last(self) -> Prepared:
        if self.pipeline.last is None:
            raise _BeforeFirstCallError("nothing is known before the first call: call the module on an image")
        return self.pipeline.last

    def __getattr__(self, name: str) -> Any:
        """Called where `name` is no attribute, or a property of the last call before there was one."""
        if isinstance(getattr(type(self), name, None), property):
            self._last()
        return super().__getattr__(name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the model returns for these arguments, of which images may be arrays (`fxstream.source`).

        A `torch.compile` around it does not look inside. As a part of another model that is compiled, it is what
        its model is. Raises `InputError` where an exporter or a tracer writes the call down.
        """
        return self._untraced_run(self, args, kwargs)

    def extra_repr(self) -> str:
        request = self.pipeline.options.request
        return f"memory={request.memory}" if request.tile is None else f"tile={request.tile}"


def _is_traced(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether an exporter or a tracer writes this call down: ONNX, TorchScript, torch.export, make_fx or fx."""
    if torch._C._get_tracing_state() is not None or torch.compiler.is_exporting() or get_proxy_mode() is not None:
        return True
    return any(isinstance(value, fx.Proxy) for value in (*args, *kwargs.values()))


def _run(module: StreamedModule, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    if is_capturing():
        return module.model(*args, **kwargs)
    if _is_traced(args, kwargs):
        raise InputError(
            "a stream of tiles cannot be traced or exported: export the model, which is compiled.model and has the"
            " same weights"
        )
    return module.pipeline.run(args, kwargs)


@functools.cache
def _untraced_run() -> Callable[..., Any]:
    """`_run`, which no `torch.compile` around it looks into. Loads dynamo, as the capture does."""
    reason = (
        "fxstream compiles this module by itself: without fullgraph=True, it is one call in the graph around it"
    )
    return torch.compiler.disable(_run, reason=reason)  # type: ignore[no-any-return]
