"""Operators that work along dims which must not be tiled: channels, groups, heads, classes.

LayerNorm over channels, softmax, linear, norms and sums over channels, concatenation, splits. Along a stream
axis the same operators are reductions or need the whole map.

A class is looked up per pixel, along channels: a loss that keeps its pixels (`reduction="none"`) is local. One
that sums or averages over space is feature-map-wide; `lowering.losses` makes it of the local one. A pixel of an
ignored class reads nothing, so that these operators claim to read more than has an influence.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch

from fxstream.geometry.receptive_field import IDENTITY
from fxstream.rules.access import Read, Value
from fxstream.rules.patterns import Pointwise
from fxstream.rules.pointwise import aligned_read, pointwise
from fxstream.rules.reasons import NotTileable, Reason
from fxstream.rules.reductions import over_space
from fxstream.rules.rule import Answer, Call, RuleTable

__all__ = ["CLASS_LOSSES", "FOURIER", "PIXEL_LOSSES", "add_rules"]

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

FOURIER = tuple(
    f"fft_{kind}{axes}" for kind in ("fft", "ifft", "rfft", "irfft", "hfft", "ihfft") for axes in ("", "2", "n")
)
"""Discrete Fourier transforms along `dim`, the result of which may have another size there."""

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

PIXEL_LOSSES = (
    "mse_loss",
    "l1_loss",
    "smooth_l1_loss",
    "huber_loss",
    "binary_cross_entropy",
    "binary_cross_entropy_with_logits",
    "kl_div",
    "soft_margin_loss",
    "poisson_nll_loss",
    "hinge_embedding_loss",
)
"""Losses of every element with the same element of a target."""
CLASS_LOSSES = ("cross_entropy_loss", "nll_loss_nd")
"""Losses of the channels of a pixel with the class of that pixel."""

SOFTMAXES = ("aten::softmax", "aten::log_softmax")
SPLITTING = ("split", "split_with_sizes", "chunk", "tensor_split", "unsafe_split", "unsafe_chunk")


def add_rules(table: RuleTable) -> None:
    """Everything along channels, and losses, class maps and gathering along them."""
    for name in KEEPING + SPLITTING:
        table.add(f"aten::{name}", "channelwise", along_dim)
    for name in FOURIER:
        table.add(f"aten::{name}", "channelwise", fourier)
    for name in REDUCING:
        table.add(f"aten::{name}", "channelwise", reduction)
    table.add("aten::unbind", "channelwise", unbind)
    for name in ("layer_norm", "native_layer_norm", "rms_norm"):
        table.add(f"aten::{name}", "channelwise", layer_norm)
    for name in ("cat", "concat", "concatenate"):
        table.add(f"aten::{name}", "channelwise", concatenation)
    for name in ("slice_scatter", "select_scatter"):
        table.add(f"aten::{name}", "channelwise", scatter)
    table.add("aten::stack", "channelwise", stack)
    table.add("aten::linear", "channelwise", linear)
    table.add("aten::matmul", "channelwise", matmul)
    table.add("aten::channel_shuffle", "channelwise", channel_shuffle)
    for name in PIXEL_LOSSES:
        table.add(f"aten::{name}", "classes", pixel_loss)
    for name in CLASS_LOSSES:
        table.add(f"aten::{name}", "classes", class_loss)
    table.add("aten::one_hot", "classes", one_hot)
    table.add("aten::index_put", "classes", index_put)
    table.add("aten::gather", "classes", gather)
    table.add("aten::embedding", "classes", embedding)
    table.add("fxstream::class_weights", "classes", class_weights)


def _image(call: Call) -> tuple[str, Value]:
    """The first tensor argument and its name in the schema."""
    argument, _, value = call.tensors()[0]
    return argument, value


def _touched(call: Call, rank: int) -> list[int]:
    """The dims an operator works along, from its `dim` or `dims`; all where none is given."""
    dims = call.arguments.get("dim", call.arguments.get("dims"))
    if dims is None or (isinstance(dims, Sequence) and not dims):
        return list(range(rank))
    return [d % rank for d in ([dims] if isinstance(dims, int) else dims)]


def _pass_through(call: Call, dims: Callable[[int], int] = lambda d: d) -> Answer:
    """Each box of the result reads the same box of the only spatial argument."""
    argument, image = _image(call)
    if not call.only_spatial(argument):
        return NotTileable(Reason.OTHER_OPERANDS_POSITIONAL, image.dims)
    read = Read(argument, image, image.dims, (IDENTITY,) * len(image.dims))
    return Pointwise(tuple(dims(d) for d in image.dims), (read,))


def along_dim(call: Call) -> Answer:
    """An operator along one or several dims that its result keeps."""
    _, image = _image(call)
    touched = _touched(call, len(image.shape))
    if set(touched) & set(image.dims):
        if call.target._schema.name in SOFTMAXES:
            return NotTileable(Reason.NORMALISES_POSITIONS, image.dims)
        if call.target._schema.name == "aten::flip":
            return NotTileable(Reason.MIRRORS_TILED_DIM, image.dims, (touched,))
        same = call.shape == image.shape
        return NotTileable(Reason.ALONG_TILED_DIM, image.dims if same else (), (touched,))
    return _pass_through(call)


def fourier(call: Call) -> Answer:
    """A transform of windows, or along channels; along tiled dims it reads the whole map."""
    _, image = _image(call)
    if set(_touched(call, len(image.shape))) & set(image.dims):
        return NotTileable(Reason.TRANSFORMS_MAP, image.dims if call.shape == image.shape else ())
    return _pass_through(call)


def reduction(call: Call) -> Answer:
    """A reduction over dims that are not tiled dims; over tiled dims it is feature-map-wide."""
    _, image = _image(call)
    if "other" in call.arguments:
        return NotTileable(Reason.BINARY_UNDER_REDUCTION)
    touched = _touched(call, len(image.shape))
    if set(touched) & set(image.dims):
        return over_space(call, image, touched)
    keep = call.arguments.get("keepdim", False)
    return _pass_through(call, lambda d: d if keep else d - sum(t < d for t in touched))


def unbind(call: Call) -> Answer:
    """All indices of a dim that is not a tiled dim."""
    _, image = _image(call)
    (dim,) = _touched(call, len(image.shape))
    if dim in image.dims:
        return NotTileable(Reason.UNBINDS_TILED_DIM)
    return _pass_through(call, lambda d: d - (d > dim))


def layer_norm(call: Call) -> Answer:
    """Normalisation over the last dims; local when these are channels."""
    _, image = _image(call)
    normalised = set(range(len(image.shape) - len(call["normalized_shape"]), len(image.shape)))
    if normalised & set(image.dims):
        return NotTileable(Reason.NORMALISES_SPACE, image.dims)
    return _pass_through(call)


def concatenation(call: Call) -> Answer:
    """Concatenation along a dim that is not a tiled dim; parts may have any receptive field."""
    images = call.spatial()
    dims, rank = images[0].dims, len(call.shape)
    dim = call["dim"] % rank
    if any(image.dims != dims for image in images):
        return NotTileable(Reason.DIFFERENT_DIMS, (), (sorted({image.dims for image in images}),))
    if dim in dims:
        return NotTileable(Reason.CONCATENATES_TILED_DIM, dims, ([dim],))
    reads = [aligned_read(call, argument, i, value, dims) for argument, i, value in call.tensors()]
    if refused := [read for read in reads if isinstance(read, NotTileable)]:
        return refused[0]
    whole = any(read is None for read in reads)
    if whole and math.prod(call.shape[d] for d in dims) > 1:
        return NotTileable(Reason.CONCATENATES_WHOLE, dims)
    kept = tuple(read for read in reads if isinstance(read, Read))
    return Pointwise(dims, kept)


def scatter(call: Call) -> Answer:
    """A map with other values at some indices of a dim that is not tiled."""
    image, values = call["self"], call["src"]
    dims, dim = image.dims or values.dims, call["dim"] % len(image.shape)
    is_less = len(values.shape) < len(image.shape)
    if not image.dims:
        dims = tuple(d + (is_less and d >= dim) for d in dims)
    if dim in dims:
        return NotTileable(Reason.WRITES_POSITIONS, dims)
    reads = []
    for name, value in (("self", image), ("src", values)):
        along = tuple(d - (len(value.shape) < len(image.shape) and d > dim) for d in dims)
        if value.dims not in ((), along):
            return NotTileable(Reason.DIFFERENT_DIMS, dims, (sorted({image.dims, values.dims}),))
        reads.append(Read(name, value, along, (IDENTITY,) * len(dims)))
    return Pointwise(dims, tuple(reads))


def stack(call: Call) -> Answer:
    """Concatenation along a new dim."""
    images = call.spatial()
    dims = images[0].dims
    if any(image.dims != dims for image in images):
        return NotTileable(Reason.DIFFERENT_DIMS, (), (sorted({image.dims for image in images}),))
    if any(not value.dims for _, _, value in call.tensors()):
        return NotTileable(Reason.CONCATENATES_WHOLE)
    new = call["dim"] % len(call.shape)
    maps = (IDENTITY,) * len(dims)
    reads = tuple(Read(argument, value, dims, maps, index) for argument, index, value in call.tensors())
    return Pointwise(tuple(d + (d >= new) for d in dims), reads)


def linear(call: Call) -> Answer:
    """A matrix applied to the last dim: a 1x1 convolution of a channels-last network."""
    image: Value = call["input"]
    if len(image.shape) - 1 in image.dims:
        return NotTileable(Reason.MIXES_LAST_DIM)
    return _pass_through(call)


def matmul(call: Call) -> Answer:
    """A matrix of weights applied to the last dim; products of two maps mix positions."""
    image, other = call["self"], call["other"]
    if other.dims or len(other.shape) != 2 or not image.dims or len(image.shape) - 1 in image.dims:
        return NotTileable(Reason.MIXES_POSITIONS)
    return _pass_through(call)


def channel_shuffle(call: Call) -> Answer:
    """A permutation of dim 1."""
    _, image = _image(call)
    return NotTileable(Reason.SHUFFLES_TILED_DIM) if 1 in image.dims else _pass_through(call)


def pixel_loss(call: Call) -> Answer:
    """A pointwise operator where it keeps the pixels."""
    return pointwise(call) if call["reduction"] == 0 else NotTileable(Reason.LOSS_OVER_SPACE)


def class_loss(call: Call) -> Answer:
    """Channels in dim 1, and the class of each pixel, or the probabilities of its classes."""
    image, target = call["self"], call["target"]
    if call["reduction"] != 0:
        return NotTileable(Reason.LOSS_OVER_SPACE)
    if 1 in image.dims or not image.dims or _depends_on_position(call["weight"]):
        return NotTileable(Reason.CLASSES_ALONG_TILED_DIM)
    dims = _without(image.dims, 1)
    expected = image.dims if len(target.shape) == len(image.shape) else dims
    if target.dims not in ((), expected):
        return NotTileable(Reason.TARGET_DIMS_DIFFER, dims)
    if target.dims and target.extents != image.extents:
        return NotTileable(Reason.TARGETS_DIFFER, dims, (target.extents, image.extents))
    return _looked_up(call, dims, (("self", image, image.dims), ("target", target, expected)))


def one_hot(call: Call) -> Answer:
    """A last dim more."""
    image: Value = call["self"]
    if call["num_classes"] < 0:
        return NotTileable(Reason.COUNTS_CLASSES, image.dims)
    return _looked_up(call, image.dims, (("self", image, image.dims),))


def index_put(call: Call) -> Answer:
    """One value wherever a mask says so."""
    image, indices, values = call["self"], call["indices"], call["values"]
    is_mask = len(indices) == 1 and indices[0] is not None and indices[0].dtype == torch.bool
    if not is_mask or len(indices[0].shape) != len(image.shape) or values.elements != 1 or call["accumulate"]:
        return NotTileable(Reason.WRITES_DATA_POSITIONS, image.dims)
    return pointwise(call)


def gather(call: Call) -> Answer:
    """Chosen indices of a dim that is not a tiled dim."""
    image, index = call["self"], call["index"]
    dims = image.dims or index.dims
    rank = len(image.shape)
    if call["dim"] % rank in dims:
        return NotTileable(Reason.GATHERS_TILED_DIM)
    if index.dims not in ((), dims) or any(image.shape[d] != index.shape[d] for d in dims):
        return NotTileable(Reason.GATHERS_POSITIONS)
    return _looked_up(call, dims, (("self", image, dims), ("index", index, dims)))


def embedding(call: Call) -> Answer:
    """The vector of the class of each pixel, in a last dim more."""
    indices: Value = call["indices"]
    if _depends_on_position(call["weight"]):
        return NotTileable(Reason.WEIGHTS_POSITIONAL)
    if call["scale_grad_by_freq"] or call["sparse"]:
        return NotTileable(Reason.COUNTS_CLASSES, indices.dims)
    return _looked_up(call, indices.dims, (("indices", indices, indices.dims),))


def class_weights(call: Call) -> Answer:
    """The weight of the class of each pixel."""
    target: Value = call["target"]
    if not target.dims or _depends_on_position(call["weight"]):
        return NotTileable(Reason.WEIGHTS_POSITIONAL)
    return _looked_up(call, target.dims, (("target", target, target.dims),))


def _depends_on_position(weight: Value | None) -> bool:
    return weight is not None and bool(weight.dims)


def _without(dims: tuple[int, ...], removed: int) -> tuple[int, ...]:
    return tuple(d - (d > removed) for d in dims)


def _looked_up(call: Call, dims: tuple[int, ...], read: tuple[tuple[str, Value, tuple[int, ...]], ...]) -> Answer:
    maps = (IDENTITY,) * len(dims)
    reads = tuple(Read(argument, value, along, maps) for argument, value, along in read)
    return Pointwise(dims, reads, is_tight=False)
