"""What is made once of a capture, and a graph made ready for one image size."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import fx

from fxstream.capture.casts import without_autocast
from fxstream.compiler.analysis import Analysis, Earlier
from fxstream.compiler.cache import Cache
from fxstream.errors import StreamError
from fxstream.graph.captured import Captured
from fxstream.graph.shapes import Shape
from fxstream.graph.typed_graph import Saves
from fxstream.io.inputs import whole
from fxstream.planning.plan import Plan
from fxstream.probe.probe import ProbeReport
from fxstream.runtime.rewrite import StreamedSegment, read_whole
from fxstream.tiling.templates import Memo

__all__ = ["CapturedModel", "Prepared"]

BYTES_OF_NODE, BYTES_OF_TILE = 2**11, 2**10
"""About what a node of a graph takes at one size, with programs of this size alone, and what a tile does."""
MOST_PROBES = 256
"""Parts of one capture whose reports are kept."""


@dataclass(frozen=True, slots=True)
class CapturedModel:
    """Everything that is made once per capture: its graph, lowered, what autograd saves, the probe's reports."""

    captured: Captured
    lowered: Captured
    saves: dict[str, Saves]
    probes: Cache = field(default_factory=lambda: Cache(MOST_PROBES))
    memo: Memo = field(default_factory=Memo)
    typed: Earlier = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Prepared:
    """A graph made ready for one image size; `streamed` is None where the plain path does the same."""

    analysis: Analysis
    plan: Plan
    probe: tuple[ProbeReport, ...]
    streamed: fx.GraphModule | None

    @property
    def plan_as_run(self) -> Plan:
        """The plan, and what of it the last call did not compute."""
        modules = () if self.streamed is None else self.streamed.children()
        streams = [module.stream for module in modules if isinstance(module, StreamedSegment)]
        repeated = tuple(text for stream in streams if (text := stream.repeated_text))
        return replace(self.plan, repeated=repeated) if repeated else self.plan

    @property
    def bytes(self) -> int:
        """About what it takes in memory."""
        segments = self.plan.segments
        nodes = len(self.analysis.graph.nodes) + sum(len(part.segment.nodes) for part in segments)
        return BYTES_OF_NODE * nodes + BYTES_OF_TILE * sum(part.tile_count for part in segments)

    @property
    def graph(self) -> fx.Graph:
        """The rewritten graph; the captured one where the plain path is taken."""
        return self.analysis.captured.graph if self.streamed is None else self.streamed.graph

    @property
    def kept(self) -> int:
        """The bytes that are kept from its forward to its backward, as predicted: boundaries, graphs, outputs."""
        if not self.plan.prediction.training:
            return 0
        if self.plan.is_trivial:
            return self.plan.prediction.bytes
        metas = (self.analysis.graph.metas.get(name or "") for name in self.analysis.captured.outputs)
        outputs = sum(meta.bytes for meta in metas if isinstance(meta, Shape))
        return int(outputs + self.plan.prediction.peak.boundaries + self.plan.prediction.peak.kept)

    def run(self, values: Sequence[Any], outside: Mapping[int, Any]) -> list[Any]:
        """What the streamed graph returns; images from outside are read whole where it needs them whole."""
        assert self.streamed is not None
        captured = self.analysis.captured
        in_whole, names = read_whole(self.streamed), ("",) * len(captured.tensors) + captured.inputs
        arguments = captured.arguments(values)
        for k, (place, name) in enumerate(zip(captured.places, names, strict=True)):
            if place in outside:
                real = outside[place]  # type: ignore[index]
                arguments[k] = whole(real, values[place].device) if name in in_whole else real  # type: ignore[index]
        with without_autocast(captured):
            outputs: list[Any] = self.streamed(*arguments)
        for place in reversed(captured.changed):
            _change(values[place], outputs.pop(), place in outside)
        return outputs


def _change(tensor: torch.Tensor, became: torch.Tensor, is_outside: bool) -> None:
    """Do to a tensor of the call what the model does in place. Raises `StreamError` where that cannot be done."""
    if is_outside or tensor.requires_grad:
        why = "it is read from outside of the device's memory" if is_outside else "it has a gradient"
        raise StreamError(
            f"the model changes the image in place, and {why}: let it work on a copy (x = x - mean, not x -= mean)"
        )
    with torch.no_grad():
        tensor.copy_(became)
