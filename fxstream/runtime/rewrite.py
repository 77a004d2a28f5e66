"""Put the segments into the graph: dense nodes stay ordinary nodes, each segment becomes one call."""

from __future__ import annotations

import operator
from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import fx, nn

from fxstream.graph.capture import Captured
from fxstream.graph.shapes import fold_integers
from fxstream.graph.typed_graph import Locality
from fxstream.planning.plan import Plan, SegmentPlan
from fxstream.runtime.ranks import Ranks
from fxstream.runtime.schedule import Stream, Watch, build_stream
from fxstream.runtime.tile_loop import stream_map
from fxstream.tiling.autograd_saves import Saved
from fxstream.tiling.fold import saved_with_folds, segment_with_folds, write_weights
from fxstream.tiling.order import execution_order
from fxstream.tiling.reuse import reuse_inputs

__all__ = ["StreamedSegment", "read_whole", "rewrite"]


class StreamedSegment(nn.Module):
    """A segment in the rewritten graph: called with its leaves, then its small tensors."""

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
    locality: Locality,
    plan: Plan,
    saved: Mapping[str, Saved] | None = None,
    compile_tiles: bool = False,
    ranks: Ranks | None = None,
    watch: Watch | None = None,
) -> fx.GraphModule:
    """The graph at one image size with its segments streamed; takes and returns what the captured one does.

    With `saved`, what autograd keeps of each operator, memory is reused where that changes nothing (`economy`) and
    frozen BatchNorms are folded (`folding`). `compile_tiles` passes tile programs through `torch.compile`; `ranks`
    share the tiles; `watch` is told of each.
    """
    segments = {plan.segment.name: plan for plan in plan.segments}
    if saved is not None:
        for name, own in segments.items():
            segments[name] = replace(own, segment=segment_with_folds(locality, own.segment))
    labels = _labels(captured)
    graph = fx.Graph()
    env: dict[str, fx.Node] = {}
    modules: dict[str, nn.Module] = {}
    for name in execution_order(locality, [plan.segment for plan in plan.segments]):
        if name in segments:
            segment = segments[name].segment
            inputs = tuple(labels.get(given, given) for given in segment.inputs)
            known = None if saved is None else saved_with_folds(locality, saved, segment.nodes)
            stream = build_stream(locality, segments[name], inputs, known, compile_tiles, ranks)
            stream.watch = watch
            places = enumerate(segment.outputs)
            stream.offloaded = frozenset(k for k, output in places if output in plan.offloaded)
            modules[name] = StreamedSegment(stream)
            if saved is not None:
                write_weights(graph, env, locality, segment.nodes)
            _call_segment(graph, env, segments[name])
        else:
            _copy(graph, env, locality.nodes[name], locality)
    if saved is not None:
        made = {output for plan in plan.segments for output in plan.segment.outputs}
        copied = {env[name]: name for name in locality.verdicts if name in env and name not in made}
        reuse_inputs(graph, copied, locality, saved)
    root = {node.target: getattr(captured.module, node.target) for node in graph.nodes if node.op == "get_attr"}
    graph.lint()
    return fx.GraphModule({**root, **modules}, graph, "Streamed")


def read_whole(streamed: fx.GraphModule) -> frozenset[str]:
    """The inputs of a rewritten graph that something reads other than box by box."""
    found = set()
    for node in streamed.graph.nodes:
        module = streamed.get_submodule(node.target) if node.op == "call_module" else None
        boxes = module.stream.leaf_count if isinstance(module, StreamedSegment) else 0
        leaves = node.args[:boxes]
        found |= {given.name for given in node.all_input_nodes if given not in leaves}
        found |= {given.name for given in node.args[boxes:] if isinstance(given, fx.Node)}
    return frozenset(found)


def _labels(captured: Captured) -> dict[str, str]:
    """The user's name of each model tensor's placeholder."""
    placeholders = [
        n.name for n in captured.graph.nodes if n.op == "placeholder" and n.name not in captured.inputs
    ]
    return dict(zip(placeholders, captured.tensors, strict=True))


def _call_segment(graph: fx.Graph, env: dict[str, fx.Node], plan: SegmentPlan) -> None:
    segment = plan.segment
    inputs = tuple(env[name] for name in segment.inputs)
    call = graph.create_node("call_module", segment.name, inputs, name=segment.name)
    if len(segment.outputs) == 1:
        env[segment.outputs[0]] = call
        return
    for k, output in enumerate(segment.outputs):
        env[output] = graph.create_node("call_function", operator.getitem, (call, k), name=output)


def _copy(graph: fx.Graph, env: dict[str, fx.Node], node: fx.Node, locality: Locality) -> None:
    args, kwargs = fold_integers(node, locality.metas)

    def mapped(given: fx.Node) -> fx.Node:
        return env[given.name]

    new = graph.create_node(
        node.op,
        node.target,
        fx.node.map_arg(args, mapped),
        fx.node.map_arg(kwargs, mapped),
        name=node.name,
        type_expr=node.type,
    )
    new.meta = dict(node.meta)
    env[node.name] = new
