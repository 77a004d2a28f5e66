"""From a traced graph to one functional ATen graph that holds for every image and batch size.

Parameters, buffers and constants are placeholders beside the inputs, so the graph owns no tensor and always runs
on the model's tensors, whichever they are at that moment. In-place operators are removed (`functionalize`),
constants that depend on the size are replaced by size arithmetic (`size_symbols`).

NOTE [size independence]
1. The first capture is at the size of the call, so that it is right for this call whatever follows.
2. A second capture, at another batch size and at spatial sizes of other residues, shows which constants differ. A
   model whose code reads sizes is traced again for it, unless it was traced with symbols, and either nothing is
   computed with these or their guards hold: the graph is the same, even where the code would not take this path.
3. Only if some differ, a third capture confirms their explanation.
4. Where the batch size cannot be another, the others are at the same, and the capture is for that `batch`; so it
   is for a number of `frames`, the first of three axes, where the code has a loop over them. If no other size can
   be captured, or a difference cannot be explained, it is `bound`, that is specialised to its size: another size
   is captured again.
5. A model whose code reads sizes may branch on them. A trace with symbols for the sizes has guards for that; where
   they hold, and operators get sizes as they are, the capture holds as well. Where the model's code computes with
   sizes, the traced graph is written down at each new size to confirm that its constants are those of a capture
   (`that_holds`), or else this size gets a capture of its own. Without symbols each new size is traced for that.
"""

from __future__ import annotations

import itertools
import math
import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils import _pytree as pytree

from fxstream.capture.aten import to_aten
from fxstream.capture.casts import ambient_autocast
from fxstream.capture.input_key import FakeInputs
from fxstream.capture.refusals import explained
from fxstream.capture.size_symbols import explain_sizes, size_dependent_constants
from fxstream.capture.trace import Trace, Tracer
from fxstream.capture.traced_graph import Kind, TracedGraph
from fxstream.capture.tracing import LongerTraceError
from fxstream.errors import CaptureError, InputError
from fxstream.graph.captured import Captured
from fxstream.graph.effects import subgraphs
from fxstream.graph.shapes import Meta, fake_tensor_log_silenced, fold_integers, shapes_at, stream_dims

__all__ = ["Retrace", "capture", "capture_graph", "images_and_frames", "retracing", "that_holds"]

SHIFTS = (
    (33, 97, 161), (32, 64, 96), (544, 608, 736), (224, 448, 672), (768, 1536, 2304), (10080, 20160, 30240),
)  # fmt: skip
"""Pixels added per axis for the second capture, in order of preference: odd first, then multiples of a stride.

They differ by so much that two axes of an image do not have the same size at stride 32 either. The third, primes
at stride 32, are more than a window there, and leave other remainders. The last are multiples of windows of 7, 8,
12 and most other sizes, at a stride.
"""
SHIFTS_OF_FRAMES = tuple(shift for frames, *pixels in SHIFTS for shift in ((frames, *pixels), (0, *pixels)))
"""The same for three axes, each also with as many frames."""
TIMES = (3, 2, 4)
"""What the shift of each axis is multiplied by for the third: not the same, or what is equal by chance stays."""
MOST_VOXELS = 2**29
"""Of a volume that is tried: what a model makes from its size alone, as masks of windows, is really computed."""
LONGER = 3
"""A trace at another size that is so many times longer is not of the same graph, and ends there."""
Retrace = Callable[[Sequence[Any], Sequence[int], int], tuple[TracedGraph, list[Any]]]
"""The graph of a call with values like these, so many pixels more per axis and so many images; values for it."""


def capture(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Captured, list[Any]]:
    """The graph of `model` for inputs like these, and fake values for it; the model does not run.

    Raises `GraphBreakError` or `CaptureError`, with the user's line, if the model cannot be captured.
    """
    tracer = Tracer()
    trace = tracer.trace(model, args, kwargs)
    if trace.graph is None:
        raise CaptureError(f"{type(model).__name__} computes nothing with the tensors of the call")
    retrace = retracing(tracer, model, FakeInputs(args, kwargs), trace) if trace.reads_sizes else None
    with explained(model, args, kwargs):
        captured = capture_graph(trace.graph, trace.graph.examples, retrace)
    return captured, trace.graph.values_at(trace.graph.examples, {})


def retracing(tracer: Tracer, model: nn.Module, inputs: FakeInputs, trace: Trace) -> Retrace:
    """What traces a call with such inputs at another size, where this trace does not serve it."""
    leaves, spec = pytree.tree_flatten((inputs.args, inputs.kwargs))
    tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]

    def retrace(values: Sequence[Any], shift: Sequence[int], images: int) -> tuple[TracedGraph, list[Any]]:
        assert trace.graph is not None
        places = trace.graph.tensors_in(inputs.args, inputs.kwargs)
        of_call = {id(tensor): values[i].shape for i, tensor in places.items()}
        shapes = _shifted([of_call.get(id(tensor), tensor.shape) for tensor in tensors], shift, images)
        others = iter(map(_fake, tensors, shapes))
        replaced = [next(others) if isinstance(leaf, torch.Tensor) else leaf for leaf in leaves]
        args, kwargs = pytree.tree_unflatten(replaced, spec)
        has_symbols = trace.sizes is not None
        serves = has_symbols and (not trace.graph.computes_sizes or trace.holds(model, args, kwargs))
        most = LONGER * len(trace.graph.module.graph.nodes)
        traced = trace.graph if serves else tracer.graph(model, args, kwargs, most)
        if traced is None:
            raise CaptureError("at another size it computes nothing")
        if traced.inputs != trace.graph.inputs:
            raise CaptureError("at another size it reads other tensors")
        shifted = {i: tensor.shape for i, tensor in traced.tensors_in(args, kwargs).items()}
        return traced, traced.values_at(values, shifted)

    return retrace


def _fake(tensor: torch.Tensor, shape: Sequence[int]) -> torch.Tensor:
    """A tensor of a call with another shape."""
    with FakeTensorMode(allow_non_fake_inputs=True):
        return torch.empty(shape, dtype=tensor.dtype, device=tensor.device).requires_grad_(tensor.requires_grad)


def capture_graph(traced: TracedGraph, values: Sequence[Any], retrace: Retrace | None = None) -> Captured:
    """The graph for values like these; `retrace` is needed for a model whose code reads sizes.

    Raises what an operator raises that refuses these values.
    """
    autocast = ambient_autocast(values)
    captured = to_aten(traced, traced.values_at(values, {}), autocast)
    batch, frames = images_and_frames([values[i] for i in traced.indices(Kind.ARGUMENT)])
    shifts = SHIFTS if frames is None else SHIFTS_OF_FRAMES
    more = _more(captured, traced, values, retrace, autocast, shifts)
    captured.module.recompile()
    if more is None:
        return replace(captured, bound=True)
    of_batch, of_frames = more
    return replace(captured, batch=None if of_batch else batch, frames=None if of_frames else frames)


def _more(
    captured: Captured,
    traced: TracedGraph,
    values: Sequence[Any],
    retrace: Retrace | None,
    autocast: Sequence[tuple[Any, ...]],
    shifts: Sequence[Sequence[int]],
) -> tuple[bool, bool] | None:
    """Rules 2 to 4 of the NOTE: whether the graph holds for other numbers of images, and of frames.

    None if it is specialised to its size.
    """
    longer: list[Sequence[int]] = []
    _, extents = _largest([values[i].shape for i in traced.indices(Kind.ARGUMENT)])

    def at(shift: Sequence[int], images: int) -> Captured | None:
        voxels = math.prod(map(operator.add, extents, shift))
        is_too_large = len(extents) > 2 and voxels > MOST_VOXELS
        if is_too_large or any(all(map(operator.ge, shift, less)) for less in longer):
            return None
        try:
            with fake_tensor_log_silenced():
                return to_aten(*_shifted_graph(traced, values, retrace, shift, images), autocast)
        except LongerTraceError:  # so is that of any larger image
            longer.append(shift)
            return None
        except Exception:  # whatever an operator raises at a size that is only tried
            return None

    for images, shift in itertools.product((1, 0), shifts):
        second = at(shift, images)
        if second is None or not _same_constants(captured.constants, second.constants):
            continue
        graphs = [captured.graph, second.graph]
        constants = size_dependent_constants(graphs)
        if constants == []:
            return images > 0, shift[0] > 0
        third = at([times * pixels for times, pixels in zip(TIMES, shift)], images) if constants else None
        if third is not None and explain_sizes([*graphs, third.graph]):
            return images > 0, shift[0] > 0
    return None


def _shifted_graph(
    traced: TracedGraph, values: Sequence[Any], retrace: Retrace | None, shift: Sequence[int], images: int
) -> tuple[TracedGraph, list[Any]]:
    """The graph at another size, and values for it."""
    if retrace is not None:
        return retrace(values, shift, images)
    places = traced.indices(Kind.ARGUMENT)
    shapes = dict(zip(places, _shifted([values[i].shape for i in places], shift, images), strict=True))
    return traced, traced.values_at(values, shapes)


def _same_constants(constants: Mapping[str, Any], others: Mapping[str, Any]) -> bool:
    """Whether the tensors that the model makes from numbers have the same values in two captures."""
    return constants.keys() == others.keys() and all(
        type(constants[name]) is type(others[name])
        and (not isinstance(constants[name], torch.Tensor) or torch.equal(constants[name], others[name]))
        for name in constants
    )


def that_holds(captures: Sequence[Captured], traced: TracedGraph, values: Sequence[Any]) -> Captured | None:
    """The first capture whose path and constants are those of a trace at another size (rule 5)."""
    fakes = traced.values_at(values, {})
    other = to_aten(traced, fakes, ambient_autocast(values))
    return next((captured for captured in captures if _still_holds(captured, other, fakes)), None)


def _still_holds(captured: Captured, other: Captured, fakes: Sequence[Any]) -> bool:
    """Whether a capture holds for these values, for which the other one was made."""
    if (other.tensors, other.inputs, other.places) != (captured.tensors, captured.inputs, captured.places):
        return False
    if not _same_constants(other.constants, captured.constants):
        return False
    try:
        metas = shapes_at(captured.module, captured.arguments(fakes)).metas
        has_sizes = any(node.target is torch.ops.aten.sym_size.int for node in other.graph.nodes)
        others = shapes_at(other.module, other.arguments(fakes)).metas if has_sizes else {}
    except InputError:
        return False
    return _calls(captured.graph, metas) == _calls(other.graph, others)


def _calls(graph: fx.Graph, metas: Mapping[str, Meta]) -> list[tuple[Any, ...]]:
    """Every operator call with integers folded and inputs named by their index among the calls."""
    names: dict[str, object] = {}
    calls: list[tuple[Any, ...]] = []

    def named(arguments: Any) -> list[Any]:
        leaves = pytree.tree_leaves(arguments, is_leaf=lambda x: x is None)
        return [names[leaf.name] if isinstance(leaf, fx.Node) else leaf for leaf in leaves]

    for node in graph.nodes:
        if node.op == "call_function" and not isinstance(metas.get(node.name), int):
            calls.append((node.target, named(fold_integers(node, metas))))
            calls += [("in a subgraph", _calls(inner, {})) for inner in subgraphs(node)]
            names[node.name] = ("call", len(calls))
        else:
            names[node.name] = node.name
        if node.op == "output":
            calls.append(("output", named(node.args)))
    return calls


def images_and_frames(tensors: Sequence[torch.Tensor]) -> tuple[int, int | None]:
    """The images of a call, and the extent of the first of three axes; those of its largest tensor."""
    batch, extents = _largest([tensor.shape for tensor in tensors])
    return batch, extents[0] if len(extents) == 3 else None


def _largest(shapes: Sequence[Sequence[int]]) -> tuple[int, list[int]]:
    """The images and the extents of the largest input."""
    inputs = zip(shapes, stream_dims(shapes), strict=True)
    shape, dims = max(inputs, key=lambda i: (len(i[1]), math.prod(i[0])), default=([0], ()))
    return shape[0], [shape[dim] for dim in dims]


def _shifted(shapes: Sequence[Sequence[int]], shift: Sequence[int], images: int) -> list[list[int]]:
    """The shapes at another size: so many images more, and the shift scaled to each input's resolution.

    The shift holds for the largest input; an input at half of its resolution gets half as many pixels more.
    """
    shifted = [list(shape) for shape in shapes]
    batch, extents = _largest(shapes)
    for shape, dims in zip(shifted, stream_dims(shapes), strict=True):
        if shape and shape[0] == batch:
            shape[0] += images
        if len(dims) == len(extents):
            for dim, pixels, extent in zip(dims, shift, extents, strict=False):
                shape[dim] = _scaled(shape[dim], extent, pixels)
    return shifted


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
