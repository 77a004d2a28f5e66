"""The streaming of one model: its traces, each with the pipeline of its graph, and what the last call ran.

A call runs the first trace that holds for it; where none does, the model is traced once more. What dynamo cannot
trace as one graph runs as Python between several, each of which is streamed by itself.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import fx, nn

from fxstream.capture.capture import retracing
from fxstream.capture.input_key import FakeInputs, input_formats, input_key
from fxstream.capture.trace import Trace, Tracer
from fxstream.compiler.parts import Parts
from fxstream.compiler.pipeline import Pipeline
from fxstream.compiler.prepared import Prepared
from fxstream.compiler.sharded import gathered
from fxstream.compiler.shared import Options, Shared
from fxstream.errors import CaptureError, GraphBreakError, InputError
from fxstream.graph.typed_graph import Verdict
from fxstream.io.inputs import Inputs, inputs_of
from fxstream.planning.plan import Plan
from fxstream.probe.probe import ProbeReport
from fxstream.runtime.tile_loop import refuse_transforms

__all__ = ["Streaming", "TracedCall"]

MOST_TRACES = 64
"""Traces of a model that are kept; the one used least recently leaves first."""
OFTEN = 8
"""Traces of one kind of call after which a warning says what changes from call to call."""


class BeforeFirstCallError(InputError, AttributeError):
    """A property of the last call was read before the first: for `hasattr` it is not there."""


@dataclass(frozen=True, slots=True)
class Ready:
    """A call that is ready to run: its graph, the values for it, and the node of each flat result of the model.

    A result that the graph does not compute has None.
    """

    prepared: Prepared
    values: Sequence[Any]
    results: tuple[str | None, ...]


class _ReadyError(Exception):
    """Ends a call when its graph would run."""

    def __init__(self, ready: Ready) -> None:
        super().__init__()
        self.ready = ready


@dataclass(frozen=True, slots=True)
class TracedCall:
    """A trace, the tensors that it serves (of certain shapes and formats, where it reads them), its pipeline."""

    key: Any
    shapes: Any
    formats: Any
    trace: Trace
    pipeline: Pipeline | None

    def run(
        self,
        model: nn.Module,
        inputs: Inputs,
        compute: Callable[[Pipeline, Sequence[Any], Mapping[int, Any]], Any] = Pipeline.run,
    ) -> Any:
        """What the model returns; `compute` gets the pipeline, values of its graph, and images from outside."""
        outside = inputs.outside

        def graph(*values: Any) -> Any:
            assert self.pipeline is not None
            real = {i: outside[id(value)] for i, value in enumerate(values) if id(value) in outside}
            return compute(self.pipeline, values, real)

        return self.trace.run(graph, model, inputs.args, inputs.kwargs)


class Streaming:
    """How a compiled model streams: the model, its options, and verdicts, plan, probe and graph of the last call.

    Of a model of several graphs it is the last graph that ran.
    """

    def __init__(self, model: nn.Module, options: Options) -> None:
        self.model, self.options = model, options
        self.shared = Shared(type(model).__name__, options)
        self._calls: list[TracedCall] = []
        self._breaks: dict[Any, GraphBreakError] = {}
        self._tracer = Tracer()
        self._parts = Parts(model, self.shared)
        self._lock = threading.RLock()

    @property
    def last(self) -> Prepared:
        """What the last call ran."""
        if self.shared.last is None:
            raise BeforeFirstCallError("nothing is known before the first call: call the module on an image")
        return self.shared.last

    @property
    def verdicts(self) -> tuple[Verdict, ...]:
        """The verdict on every node, for the last input."""
        return self.last.analysis.verdicts

    @property
    def plan(self) -> Plan:
        """Segments and tiles for the last input, and how many of these were equal to others."""
        return self.last.plan_as_run

    @property
    def probe(self) -> tuple[ProbeReport, ...]:
        """What the probe measured on each streamed region, for the last input; empty where it was not run."""
        return self.last.probe

    @property
    def graph(self) -> fx.Graph:
        """The rewritten graph for the last input; the captured one where the plain path was taken."""
        return self.last.graph

    @property
    def calls(self) -> tuple[TracedCall, ...]:
        """The traces that are kept."""
        return tuple(self._calls)

    def run(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """What the model returns for these arguments."""
        refuse_transforms()
        return gathered(self.model.modules(), lambda: self._run(args, kwargs))

    def _run(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        inputs = inputs_of(self.model, args, kwargs)
        try:
            call = self.call(inputs)
        except GraphBreakError as error:
            if inputs.outside:
                raise CaptureError(
                    f"{error}. An image from outside of the device's memory needs a model that is one graph"
                ) from error
            self.shared.warn_once("parts", f"{error}. Its parts are streamed one by one")
            return self._parts.run(inputs.args, inputs.kwargs)
        return call.run(self.model, inputs)

    def call(self, inputs: Inputs, flat: bool = False) -> TracedCall:
        """The trace that serves a call; with `flat` one whose results are known."""
        key = (flat, *input_key(inputs.args, inputs.kwargs))
        shapes = tuple(tuple(tensor.shape) for tensor in inputs.tensors)
        call = self._kept(key, shapes, inputs)
        if call is None:
            with self._lock:
                call = self._kept(key, shapes, inputs) or self._unless_broken(key, shapes, inputs, flat)
        return call

    def ready(self, inputs: Inputs, written: Sequence[int] | None = None) -> Ready:
        """What a call would run, which does not run; with `written` one without gradients that writes results.

        Raises `CaptureError` for a model that is not one graph.
        """
        call = self.call(inputs, flat=True)
        assert call.trace.results is not None
        outputs = call.trace.results.outputs
        places = None if written is None else [place for i in written if (place := outputs[i]) is not None]

        def stop(pipeline: Pipeline, values: Sequence[Any], outside: Mapping[int, Any]) -> Any:
            prepared = pipeline.agreed(values, outside, places)
            names = prepared.analysis.captured.outputs
            results = tuple(None if place is None else names[place] for place in outputs)
            raise _ReadyError(Ready(prepared, values, results))

        try:
            call.run(self.model, inputs, stop)
        except _ReadyError as stopped:
            return stopped.ready
        raise CaptureError(f"{self.shared.name} computes nothing with the tensors of the call")

    def _unless_broken(self, key: Any, shapes: Any, inputs: Inputs, flat: bool) -> TracedCall:
        """A new trace; what was not one graph once is not tried again."""
        if key in self._breaks:
            raise self._breaks[key]
        try:
            return self._traced(key, shapes, inputs, flat)
        except GraphBreakError as error:
            self._breaks[key] = error.with_traceback(None)
            raise

    def _kept(self, key: Any, shapes: Any, inputs: Inputs) -> TracedCall | None:
        for call in self.calls:
            if not (call.key == key and call.shapes in (None, shapes)):
                continue
            fits = call.formats is None or call.formats == input_formats(inputs.tensors)
            if fits and call.trace.holds(self.model, inputs.args, inputs.kwargs):
                if call is not self._calls[0]:
                    with self._lock:
                        self._calls = [call, *(other for other in self._calls if other is not call)]
                return call
        return None

    def _traced(self, key: Any, shapes: Any, inputs: Inputs, flat: bool) -> TracedCall:
        """A new trace; where it is for one size, or checked at each, pipelines serve all traces that they fit."""
        model, others = self.model, [call for call in self._calls if call.key == key]
        self._warn_of_changes(others, inputs)
        trace = self._tracer.trace(model, inputs.args, inputs.kwargs, flat)
        is_of_one_size = trace.reads_sizes and trace.sizes is None
        pipeline = None
        if trace.graph is not None:
            fakes = FakeInputs(inputs.args, inputs.kwargs)
            again = retracing(self._tracer, model, fakes, trace) if trace.reads_sizes else None
            pipelines = [other.pipeline for other in others if other.pipeline is not None]
            is_checked = is_of_one_size or trace.graph.computes_sizes
            serving = (one for one in pipelines if is_checked and one.serves(trace.graph))
            pipeline = next((one.of(trace.graph, again) for one in serving), None)
            pipeline = pipeline or Pipeline(trace.graph, self.shared, again)
        formats = input_formats(inputs.tensors) if trace.reads_formats else None
        call = TracedCall(key, shapes if is_of_one_size else None, formats, trace, pipeline)
        self._calls = [call, *self._calls][:MOST_TRACES]
        return call

    def _warn_of_changes(self, others: Sequence[TracedCall], inputs: Inputs) -> None:
        same = [call for call in others if call.shapes is None]
        if len(same) >= OFTEN:
            reason = same[0].trace.changed(self.model, inputs.args, inputs.kwargs)
            self.shared.warn_once(
                "changes", f"{self.shared.name} is captured for the {len(same) + 1}th time: {reason} has changed"
            )
