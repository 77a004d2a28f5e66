"""Operators that work along dims which must not be stream axes: channels, groups, heads.

LayerNorm over channels, softmax, linear, norms and sums over channels, concatenation, splits. Along a stream
axis the same operators are reductions or need the whole map.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from fxstream.geometry.receptive_field import IDENTITY
from fxstream.rules.pointwise import aligned_read
from fxstream.rules.reductions import over_space
from fxstream.rules.rule import Answer, Call, Evaluation, Footprint, Kind, Read, Refusal, RuleTable, Value

__all__ = ["add_rules"]

KEEPING = (
    "cumsum",
    "cumprod",
    "log_softmax",
    "_log_softmax",
    "softmax",
    "_softmax",
    "flip",
    "roll",
    "glu",
    "sort",
    "argsort",
    "topk",
    "index_select",
)
"""Operators along `dim` or `dims` whose result keeps the dim."""

REDUCING = (
    "all",
    "amax",
    "amin",
    "any",
    "argmax",
    "argmin",
    "count_nonzero",
    "linalg_vector_norm",
    "logsumexp",
    "max",
    "mean",
    "min",
    "norm",
    "prod",
    "std",
    "std_mean",
    "sum",
    "var",
    "var_mean",
)
"""Operators that reduce `dim`, all dims where it is not given, and drop it unless `keepdim`."""

SOFTMAXES = ("aten::softmax", "aten::log_softmax")
SPLITTING = ("split", "split_with_sizes", "chunk", "tensor_split", "unsafe_split", "unsafe_chunk")


def add_rules(table: RuleTable) -> None:
    """Everything along channels."""
    for name in KEEPING + SPLITTING:
        table.add(f"aten::{name}", "channelwise", along_dim)
    for name in REDUCING:
        table.add(f"aten::{name}", "channelwise", reduction)
    table.add("aten::unbind", "channelwise", unbind)
    for name in ("layer_norm", "native_layer_norm", "rms_norm"):
        table.add(f"aten::{name}", "channelwise", layer_norm)
    for name in ("cat", "concat", "concatenate"):
        table.add(f"aten::{name}", "channelwise", concatenation)
    table.add("aten::stack", "channelwise", stack)
    table.add("aten::linear", "channelwise", linear)
    table.add("aten::matmul", "channelwise", matmul)
    table.add("aten::channel_shuffle", "channelwise", channel_shuffle)


def _image(call: Call) -> tuple[str, Value]:
    """The first tensor argument and its name in the schema."""
    argument, _, value = call.tensors()[0]
    return argument, value


def _touched(call: Call, rank: int) -> list[int]:
    """The dims an operator works along, from its `dim` or `dims`; all where none is given."""
    given = call.arguments.get("dim", call.arguments.get("dims"))
    if given is None or (isinstance(given, Sequence) and not given):
        return list(range(rank))
    return [d % rank for d in ([given] if isinstance(given, int) else given)]


def _pass_through(call: Call, dims: Callable[[int], int] = lambda d: d, **footprint: Any) -> Answer:
    """Each box of the result reads the same box of the only spatial argument."""
    argument, image = _image(call)
    if not call.only_spatial(argument):
        return Refusal(Kind.GLOBAL, "its other operands depend on the position in the image", image.dims)
    read = Read(argument, image, image.dims, (IDENTITY,) * len(image.dims))
    new = tuple(dims(d) for d in image.dims)
    return Footprint(Evaluation.POINTWISE, new, (read,), call.target, **footprint)


def along_dim(call: Call) -> Answer:
    """An operator along one or several dims that its result keeps."""
    _, image = _image(call)
    touched = _touched(call, len(image.shape))
    if set(touched) & set(image.dims):
        if call.target._schema.name in SOFTMAXES and set(image.dims) <= set(touched):
            return Refusal(Kind.REDUCE, "normalises over all positions", image.dims)
        same = call.shape == image.shape
        return Refusal(Kind.GLOBAL, f"works along dims {touched}, a stream axis", image.dims if same else ())
    return _pass_through(call)


def reduction(call: Call) -> Answer:
    """A reduction over dims that are not stream axes; over stream axes it is feature-map-wide."""
    _, image = _image(call)
    if "other" in call.arguments:
        return Refusal(Kind.NO_RULE, "is used as a binary operator under a reduction's name")
    touched = _touched(call, len(image.shape))
    if set(touched) & set(image.dims):
        return over_space(call, image, touched)
    keep = call.arguments.get("keepdim", False)
    return _pass_through(call, lambda d: d if keep else d - sum(t < d for t in touched))


def unbind(call: Call) -> Answer:
    """All indices of a dim that is not a stream axis."""
    _, image = _image(call)
    (dim,) = _touched(call, len(image.shape))
    if dim in image.dims:
        return Refusal(Kind.GLOBAL, "takes a stream axis apart")
    return _pass_through(call, lambda d: d - (d > dim))


def layer_norm(call: Call) -> Answer:
    """Normalisation over the last dims; local when these are channels."""
    _, image = _image(call)
    normalised = set(range(len(image.shape) - len(call["normalized_shape"]), len(image.shape)))
    if normalised & set(image.dims):
        return Refusal(Kind.REDUCE, "normalises over space: every output pixel needs the whole map", image.dims)
    return _pass_through(call)


def concatenation(call: Call) -> Answer:
    """Concatenation along a dim that is not a stream axis; parts may have any receptive field."""
    images = call.spatial()
    dims, rank = images[0].dims, len(call.shape)
    dim = call["dim"] % rank
    if any(image.dims != dims for image in images):
        return Refusal(Kind.GLOBAL, "concatenates maps whose stream axes are different dims")
    if dim in dims:
        return Refusal(Kind.NO_RULE, "concatenates along a stream axis")
    reads = [aligned_read(call, argument, i, value, dims) for argument, i, value in call.tensors()]
    if refused := [read for read in reads if isinstance(read, Refusal)]:
        return refused[0]
    whole = any(read is None for read in reads)
    if whole and math.prod(call.shape[d] for d in dims) > 1:
        return Refusal(Kind.GLOBAL, "concatenates a small part that has no stream axis", dims)
    kept = tuple(read for read in reads if isinstance(read, Read))
    return Footprint(Evaluation.POINTWISE, dims, kept, call.target)


def stack(call: Call) -> Answer:
    """Concatenation along a new dim."""
    images = call.spatial()
    dims = images[0].dims
    if any(image.dims != dims for image in images):
        return Refusal(Kind.GLOBAL, "stacks maps whose stream axes are different dims")
    if any(not value.dims for _, _, value in call.tensors()):
        return Refusal(Kind.GLOBAL, "stacks a small part with maps")
    new = call["dim"] % len(call.shape)
    maps = (IDENTITY,) * len(dims)
    reads = tuple(Read(argument, value, dims, maps, index) for argument, index, value in call.tensors())
    return Footprint(Evaluation.POINTWISE, tuple(d + (d >= new) for d in dims), reads, call.target)


def linear(call: Call) -> Answer:
    """A matrix applied to the last dim: a 1x1 convolution of a channels-last network."""
    image: Value = call["input"]
    if len(image.shape) - 1 in image.dims:
        return Refusal(Kind.GLOBAL, "mixes all positions of the last stream axis", ())
    return _pass_through(call, macs=math.prod(call.shape) * image.shape[-1])


def matmul(call: Call) -> Answer:
    """A matrix of weights applied to the last dim; products of two maps mix positions."""
    image, other = call["self"], call["other"]
    if other.dims or len(other.shape) != 2 or not image.dims or len(image.shape) - 1 in image.dims:
        return Refusal(Kind.GLOBAL, "multiplies matrices that mix positions")
    return _pass_through(call, macs=math.prod(call.shape) * image.shape[-1])


def channel_shuffle(call: Call) -> Answer:
    """A permutation of dim 1."""
    _, image = _image(call)
    return Refusal(Kind.GLOBAL, "shuffles a stream axis") if 1 in image.dims else _pass_through(call)
