"""Put the segments into the graph: dense nodes stay ordinary nodes, each segment becomes one call."""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Collection, Hashable, Mapping, Sequence
from typing import Any

import torch
from torch import fx, nn

from fxstream.graph.autograd_saves import in_place_variant
from fxstream.graph.captured import Captured
from fxstream.graph.nodes import attributes_of
from fxstream.graph.typed_graph import TypedGraph
from fxstream.io.sink import Sink
from fxstream.lowering.whole import Whole, result_of, runs_whole
from fxstream.planning.plan import Plan
from fxstream.runtime.ranks import Ranks
from fxstream.runtime.replays.replays import Replays
from fxstream.runtime.stream import Stream, Watch, build_stream
from fxstream.runtime.tile_loop import stream_map
from fxstream.runtime.tile_program import Compiler, whole_in_segment
from fxstream.tiling.fuse import folded_weights
from fxstream.tiling.order import execution_order
from fxstream.tiling.reuse import uncomputed_convolution
from fxstream.tiling.segment import Fusion, Segment
from fxstream.tiling.segment_plan import SegmentPlan
from fxstream.tiling.templates import MemoOfStructure

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
    compiler: Compiler | None = None,
    ranks: Ranks | None = None,
    watch: Watch | None = None,
    memo: MemoOfStructure | None = None,
    replays: Replays | None = None,
) -> fx.GraphModule:
    """The graph at one image size with its segments streamed; takes and returns what the captured one does.

    Dense operators take over their input's memory where that changes nothing (`TypedNode.reuses`). `compiler`
    compiles tile programs; `ranks` share the tiles; `watch` is called for each; they may have `replays`. `memo`
    has what was made at other sizes: the graph is the same, where integers are, and only its segments differ.
    """
    labels = _labels(captured)
    options: dict[str, Any] = {"compiler": compiler, "ranks": ranks, "watch": watch}
    options |= {"offloaded": plan.offloaded, "memo": memo, "replays": replays}
    modules = _streamed(plan.segments, labels, options)
    segments = [part.segment for part in plan.segments]
    sizes = _sizes(typed)
    key = ("rewritten", tuple((segment.name, segment.graph.graph) for segment in segments))
    by_sizes = (memo or MemoOfStructure()).get(key, dict[Hashable, fx.GraphModule])
    if sizes not in by_sizes:
        by_sizes.clear()
        by_sizes[sizes] = _rewritten(captured, typed, segments)
    return _with_segments(by_sizes[sizes], modules)


def _streamed(
    plans: Sequence[SegmentPlan], labels: Mapping[str, str], options: dict[str, Any]
) -> dict[str, nn.Module]:
    """The segments as modules, by name; `labels` are the user's names of inputs."""
    modules: dict[str, nn.Module] = {}
    for plan in plans:
        inputs = tuple(labels.get(one, one) for one in plan.segment.inputs)
        again = _in_parts(plan, labels, options) if plan.parts else None
        modules[plan.segment.name] = StreamedSegment(build_stream(plan, inputs, again=again, **options))
    return modules


def _in_parts(plan: SegmentPlan, labels: Mapping[str, str], options: dict[str, Any]) -> fx.GraphModule:
    """The recomputation of a segment that runs whole: its parts as segments, recorded operators between them.

    As the segment, its parts run alike on all ranks, and yield nothing that is not there only for a while.
    """
    segment, typed = plan.segment, plan.segment.graph
    graph = fx.Graph()
    env = {name: graph.placeholder(name) for name in segment.inputs}
    modules = _streamed(plan.parts, labels, {**options, "ranks": None, "offloaded": frozenset(), "watch": None})
    _write_all(graph, env, typed, [part.segment for part in plan.parts], segment.outputs)
    graph.output(tuple(env[name] for name in segment.outputs))
    graph.lint()
    root = attributes_of(graph, typed.graph.owning_module) | modules
    return fx.GraphModule(root, graph, f"{segment.name}_in_parts")


def _sizes(typed: TypedGraph) -> Hashable:
    """What of a size is in the rewritten graph: integers, and the shapes of moments of what runs whole."""
    integers = tuple(node.integer for node in typed.nodes.values() if node.integer is not None)
    moments = (node for node in typed.nodes.values() if result_of(node.node) is not None)
    return integers, tuple(node.values[0].shape for node in moments)


def _with_segments(made: fx.GraphModule, modules: Mapping[str, nn.Module]) -> fx.GraphModule:
    """The same rewritten graph, with its code, that calls these segments."""
    module: fx.GraphModule = object.__new__(type(made))
    module.__dict__.update(made.__dict__)
    module.__dict__["_modules"] = {**made._modules, **modules}
    return module


def _rewritten(captured: Captured, typed: TypedGraph, segments: Sequence[Segment]) -> fx.GraphModule:
    """The rewritten graph, of which the segments are still empty modules."""
    graph = fx.Graph()
    _write_all(graph, {}, typed, segments)
    graph.lint()
    root = attributes_of(graph, captured.module) | {segment.name: nn.Module() for segment in segments}
    return fx.GraphModule(root, graph, "Streamed")


def _write_all(
    graph: fx.Graph,
    env: dict[str, fx.Node],
    typed: TypedGraph,
    segments: Sequence[Segment],
    outputs: Collection[str] | None = None,
) -> None:
    """Write segments and the dense operators around them; `env` may have some, and gets all.

    In the graph of a segment, which has these `outputs`, no running statistics are updated.
    """
    named = {segment.name: segment for segment in segments}
    order = [name for name in execution_order(typed, segments) if name not in env]
    dense = {name for name in order if name not in named}
    replaced = _write_wholes(typed, dense, outputs)
    for name in order:
        if name in dense:
            replaced.get(name, _copy)(graph, env, typed, name)
            continue
        for fusion in named[name].fusions:
            _write_weights(graph, env, fusion)
        _call_segment(graph, env, named[name])
    for name in sorted(dense.intersection(env)):
        _reuse_input(env, typed, name, dense)


def _write_wholes(typed: TypedGraph, dense: Collection[str], outputs: Collection[str] | None) -> dict[str, Write]:
    """What is written in the place of the nodes of normalisations that run whole."""
    writes: dict[str, Write] = {}
    for moments, whole in runs_whole(typed, dense).items():
        writes |= dict.fromkeys(whole.inside, _write_nothing)
        if outputs is not None:
            writes[moments] = functools.partial(whole_in_segment, whole, outputs)
            continue
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
    target = uncomputed_convolution if typed[name].skips else node.target
    new = graph.create_node(node.op, target, args, kwargs, name=node.name, type_expr=node.type)
    new.meta = dict(node.meta)
    env[node.name] = new
