"""A model that is not one graph: dynamo splits it, and every part with an image among its inputs is streamed.

Within a memory each part is planned within what those before it leave, which keep something for their backward.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import fx, nn

from fxstream.capture.traced_graph import Kind, TracedGraph
from fxstream.compiler.pipeline import Pipeline
from fxstream.compiler.shared import Shared
from fxstream.graph.shapes import is_image

__all__ = ["Parts", "streamed_part"]


def streamed_part(module: fx.GraphModule, shared: Shared) -> Callable[..., Any]:
    """A graph of dynamo as a function that streams, if there is an image among its inputs."""
    traced = TracedGraph(_copied(module))
    arguments = [traced.examples[i] for i in traced.indices(Kind.ARGUMENT)]
    if not any(is_image(tensor) for tensor in arguments):
        return lambda *values: traced(traced.taken(values))
    # Dynamo traces each size that it does not keep symbolic: that such a graph is bound to it is no news.
    shared.warned.add("bound")
    pipeline = Pipeline(traced, shared)
    return lambda *values: pipeline.run(traced.taken(values), {})


def _copied(module: fx.GraphModule) -> fx.GraphModule:
    """The module with a graph of its own, for dynamo reads the inputs of its graph again."""
    graph, nodes = fx.Graph(), dict[fx.Node, fx.Node]()
    graph.output(graph.graph_copy(module.graph, nodes))
    for node in module.graph.find_nodes(op="placeholder"):
        nodes[node]._dynamo_source = node._dynamo_source
    return fx.GraphModule(module, graph)


class Parts:
    """Calls of a model whose parts are streamed one by one."""

    def __init__(self, model: nn.Module, shared: Shared) -> None:
        self._model, self._shared = model, shared
        self._compiled: Callable[..., Any] | None = None

    def run(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """What the model returns."""
        if self._compiled is None:
            self._compiled = torch._dynamo.optimize(self._part)(self._model.__call__)
        self._shared.retained.bytes = 0
        return self._compiled(*args, **kwargs)

    def _part(self, module: fx.GraphModule, examples: Sequence[Any]) -> Callable[..., Any]:
        shared, part = self._shared, streamed_part(module, self._shared)

        def run(*values: Any) -> Any:
            before = shared.last
            outputs = part(*values)
            if shared.last is not None and shared.last is not before:
                shared.retained.bytes += shared.last.kept
            return outputs

        return run
