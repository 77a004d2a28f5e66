"""Put the segments into the graph: dense nodes stay ordinary nodes, each segment becomes one call."""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Collection, Mapping
from typing import Any

import torch
from torch import fx, nn

from fxstream.graph.autograd_saves import in_place_variant
from fxstream.graph.captured import Captured
from fxstream.graph.nodes import attributes_of
from fxstream.graph.typed_graph import TypedGraph
from fxstream.io.sink import Sink
from fxstream.lowering.whole import Whole, runs_whole
from fxstream.planning.plan import Plan
from fxstream.runtime.ranks import Ranks
from fxstream.runtime.schedule import Stream, Watch, build_stream
from fxstream.runtime.tile_loop import stream_map
from fxstream.tiling.fuse import folded_weights
from fxstream.tiling.order import execution_order
from fxstream.tiling.segment import Fusion, Segment

__all__ = ["StreamedSegment", "read_whole", "rewrite", "with_sinks"]


Write = Callable[[fx.Graph, dict[str, fx.Node], TypedGraph, str], None]
"""Writes a node of the model's graph into the rewritten one."""


class StreamedSegment(nn.Module):
    """A segment in the rewritten graph: called with its spatial inputs, then its whole inputs."""

    def __init__(self, stream: Stream) -> None:
        super().__init__()
        self.stream = stream

    def forward(self, *tensors: torch.Tensor) -> torch.Tensor | tuple[torch.Tensor, ...]:
        """The whole outputs of the segment; a tuple if there are several."""
        outputs = stream_map(self.stream, tensors)
        return outputs if len(outputs) > 1 else outputs[0]

    def extra_repr(self) -> str:
        return str(self.stream.plan)


def rewrite(
    captured: Captured,
    typed: TypedGraph,
    plan: Plan,
    compile_tiles: bool = False,
    ranks: Ranks | None = None,
    watch: Watch | None = None,
) -> fx.GraphModule:
    """The graph at one image size with its segments streamed; takes and returns what the captured one does.

    Dense operators take over their input's memory where that changes nothing (`TypedNode.reuses`). `compile_tiles`
    passes tile programs through `torch.compile`; `ranks` share the tiles; `watch` is called for each.
    """
    segments = {plan.segment.name: plan for plan in plan.segments}
    labels = _labels(captured)
    graph = fx.Graph()
    env: dict[str, fx.Node] = {}
    modules: dict[str, nn.Module] = {}
    order = execution_order(typed, [plan.segment for plan in plan.segments])
    dense = {name for name in order if name not in segments}
    replaced = _write_wholes(typed, dense)
    for name in order:
        if name in dense:
            replaced.get(name, _copy)(graph, env, typed, name)
            continue
        segment = segments[name].segment
        options = {"compile_tiles": compile_tiles, "ranks": ranks, "watch": watch, "offloaded": plan.offloaded}
        names = tuple(labels.get(one, one) for one in segment.inputs)
        modules[name] = StreamedSegment(build_stream(segments[name], names, **options))  # type: ignore[arg-type]
        for fusion in segment.fusions:
            _write_weights(graph, env, fusion)
        _call_segment(graph, env, segment)
    for name in sorted(dense.intersection(env)):
        _reuse_input(env, typed, name, dense)
    root = attributes_of(graph, captured.module)
    graph.lint()
    return fx.GraphModule({**root, **modules}, graph, "Streamed")


def _write_wholes(typed: TypedGraph, dense: Collection[str]) -> dict[str, Write]:
    """What is written in the place of the nodes of normalisations that run whole."""
    writes: dict[str, Write] = {}
    for moments, whole in runs_whole(typed, dense).items():
        writes |= dict.fromkeys(whole.inside, _write_nothing)
        if whole.updates_alone(typed):
            updates = [user for user in typed[moments].node.users if user.name not in whole.inside]
            updates += [last for user in updates for last in user.users]
            writes |= {node.name: _write_nothing for node in updates}
        writes[moments] = functools.partial(_write_whole, whole)
    return writes


def _write_nothing(graph: fx.Graph, env: dict[str, fx.Node], typed: TypedGraph, name: str) -> None:
    """What is part of another node."""


def _write_whole(whole: Whole, graph: fx.Graph, env: dict[str, fx.Node], typed: TypedGraph, name: str) -> None:
    """A normalisation as the model has it."""
    if whole.has_update and not whole.updates_alone(typed):
        env[whole.result], env[name] = whole.write_with_statistics(graph, env, typed)
    else:
        env[whole.result] = whole.write(graph, env)


def _write_weights(graph: fx.Graph, env: dict[str, fx.Node], fusion: Fusion) -> None:
    """Write what makes the weights of a fusion; `env` gets them by their names."""
    tensors = [env[name] if name is not None else None for name in fusion.tensors]
    both = graph.call_function(folded_weights, (*tensors, fusion.eps, fusion.dtype))
    for index, name in enumerate((fusion.weight, fusion.bias)):
        env[name] = graph.call_function(operator.getitem, (both, index), name=name)


def _reuse_input(env: Mapping[str, fx.Node], typed: TypedGraph, name: str, dense: Collection[str]) -> None:
    """Let a dense operator take over the memory of its input, if a dense operator made that for it alone."""
    node, copy = typed[name], env[name]
    if node.reuses and node.inputs[0] in dense and len(copy.all_input_nodes[0].users) == 1:
        copy.target = in_place_variant(copy.target) or copy.target


def with_sinks(streamed: fx.GraphModule, sinks: Mapping[int, Sink]) -> tuple[fx.GraphModule, set[int]]:
    """The same graph, whose segments write results into sinks, by index; and the indices of these results.

    Only what tiles make, for the result alone.
    """
    outputs: Any = streamed.graph.output_node().args[0]
    attached: dict[str, dict[int, Sink]] = {}
    written = set()
    for index, sink in sinks.items():
        node: Any = outputs[index]
        call, k = node.args if node.target is operator.getitem else (node, 0)
        segment = streamed.get_submodule(call.target) if call.op == "call_module" else None
        is_read_once = len(node.users) == 1 and list(outputs).count(node) == 1
        is_tiled = isinstance(segment, StreamedSegment) and bool(segment.stream.plan.axes)
        if is_tiled and is_read_once and k not in segment.stream.combined:  # type: ignore[union-attr,operator]
            attached.setdefault(call.target, {})[k] = sink
            written.add(index)
    modules: dict[str, Any] = {name: streamed.get_submodule(name) for name in attached}
    root = {n.target: _attribute(streamed, n) for n in streamed.graph.nodes if n.op in ("get_attr", "call_module")}
    root |= {n: StreamedSegment(module.stream.writing(attached[n])) for n, module in modules.items()}
    return fx.GraphModule(root, streamed.graph, "Streamed"), written


def _attribute(module: fx.GraphModule, node: fx.Node) -> Any:
    return operator.attrgetter(str(node.target))(module)


def read_whole(streamed: fx.GraphModule) -> frozenset[str]:
    """The inputs of a rewritten graph that something reads other than box by box."""
    whole = set()
    for node in streamed.graph.nodes:
        module = streamed.get_submodule(node.target) if node.op == "call_module" else None
        boxes = module.stream.spatial_count if isinstance(module, StreamedSegment) else 0
        spatial = node.args[:boxes]
        whole |= {one.name for one in node.all_input_nodes if one not in spatial}
        whole |= {one.name for one in node.args[boxes:] if isinstance(one, fx.Node)}
    return frozenset(whole)


def _labels(captured: Captured) -> dict[str, str]:
    """The user's name of each model tensor's placeholder."""
    placeholders = [
        n.name for n in captured.graph.nodes if n.op == "placeholder" and n.name not in captured.inputs
    ]
    return dict(zip(placeholders, captured.tensors, strict=True))


def _call_segment(graph: fx.Graph, env: dict[str, fx.Node], segment: Segment) -> None:
    inputs = tuple(env[name] for name in segment.inputs)
    call = graph.create_node("call_module", segment.name, inputs, name=segment.name)
    if len(segment.outputs) == 1:
        env[segment.outputs[0]] = call
        return
    for k, output in enumerate(segment.outputs):
        env[output] = graph.create_node("call_function", operator.getitem, (call, k), name=output)


def _copy(graph: fx.Graph, env: dict[str, fx.Node], typed: TypedGraph, name: str) -> None:
    node = typed[name].node
    args, kwargs = fx.node.map_arg(typed.arguments(node), lambda one: env[one.name])
    new = graph.create_node(node.op, node.target, args, kwargs, name=node.name, type_expr=node.type)
    new.meta = dict(node.meta)
    env[node.name] = new
