"""Operators that compute each output pixel from the same pixel of their inputs.

Most carry `torch.Tag.pointwise`; the additions below do not but behave so. Operands broadcast as torch does:
a small operand is passed whole, an operand that has a tiled dim at full extent is cut to the box, one that
has it at extent 1 is read at that one pixel.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from fxstream.geometry.receptive_field import BROADCAST, IDENTITY, AxisMap
from fxstream.machine.kernels.affine import BATCH_NORM
from fxstream.rules.access import Read, Value
from fxstream.rules.patterns import Pointwise
from fxstream.rules.reasons import NotTileable, Reason
from fxstream.rules.rule import Answer, Call, RuleTable

__all__ = ["add_rules", "aligned_read", "pointwise", "random_draw"]

ADDITIONS = (
    "alias",
    "clone",
    "contiguous",
    "detach",
    "lift_fresh_copy",
    "to",
    "_to_copy",
    "type_as",
    "zeros_like",
    "ones_like",
    "full_like",
    "copy",
    "fill",
    "__and__",
    "__lshift__",
    "__or__",
    "__rshift__",
    "divide",
    "fake_quantize_per_tensor_affine",
    "hardswish",
    "leaky_relu",
    "log_sigmoid",
    "multiply",
    "subtract",
    "where",
)
BROADCASTS = ("broadcast_tensors", "expand_as")
"""Operators that read of some operands only the shape."""
DROPOUTS = ("dropout", "feature_dropout", "alpha_dropout", "feature_alpha_dropout")


def add_rules(table: RuleTable) -> None:
    """The operators without the pointwise tag; tagged ones are found by their tag."""
    for name in ADDITIONS:
        table.add(f"aten::{name}", "pointwise", pointwise)
    for name in DROPOUTS:
        table.add(f"aten::{name}", "pointwise", dropout)
    for name in BROADCASTS:
        table.add(f"aten::{name}", "pointwise", broadcast)
    table.add("fxstream::dropout", "pointwise", pointwise)
    table.add("aten::batch_norm", "pointwise", batch_norm)
    table.add("aten::prelu", "pointwise", with_operands)
    table.add("fxstream::normalise", "pointwise", normalise)
    table.add("aten::rrelu", "pointwise", rrelu)
    table.add("aten::fake_quantize_per_channel_affine", "pointwise", along_channels)


def pointwise(call: Call) -> Answer:
    """The rule of every pointwise operator, with any mix of spatial and small operands."""
    rank = len(call.shape)
    aligned = {tuple(d + rank - len(v.shape) for d in v.dims) for v in call.spatial()}
    if len(aligned) != 1:
        return NotTileable(Reason.DIFFERENT_DIMS, (), (sorted(aligned),))
    (dims,) = aligned
    reads = []
    for argument, index, value in call.tensors():
        read = aligned_read(call, argument, index, value, dims)
        if isinstance(read, NotTileable):
            return read
        if read is not None:
            reads.append(read)
    return Pointwise(dims, tuple(reads))


def aligned_read(
    call: Call, argument: str, index: int | None, value: Value, dims: tuple[int, ...]
) -> Read | NotTileable | None:
    """How an operand that broadcasts against a result with tiled dims `dims` is read; None if whole."""
    missing = len(call.shape) - len(value.shape)
    sizes = [value.shape[d - missing] if d >= missing else 1 for d in dims]
    positional = [size != 1 for size in sizes]
    if not value.dims and not any(positional):
        return None
    if any(d < missing for d in dims):
        return NotTileable(Reason.SOME_DIMS_MISSING, dims, (value.name,))
    maps = []
    for dim, size in zip(dims, sizes, strict=True):
        if size != call.shape[dim] and size != 1:
            return NotTileable(Reason.PIXELS_DIFFER, (), (value.name, size, call.shape[dim]))
        maps.append(IDENTITY if size == call.shape[dim] else BROADCAST)
    return Read(argument, value, tuple(d - missing for d in dims), tuple(maps), index)


def broadcast(call: Call) -> Answer:
    """Operands brought to one shape."""
    answer = pointwise(call)
    return replace(answer, is_tight=False) if isinstance(answer, Pointwise) else answer


def batch_norm(call: Call) -> Answer:
    """With running statistics a per-channel affine map; with batch statistics a reduction."""
    image: Value = call["input"]
    if call["training"] or call["running_mean"] is None:
        return NotTileable(Reason.BATCH_STATISTICS, image.dims)
    answer = per_channel(call, image)
    return replace(answer, target=BATCH_NORM) if isinstance(answer, Pointwise) else answer


def with_operands(call: Call) -> Answer:
    """Operands per channel."""
    return per_channel(call, call["self"])


def normalise(call: Call) -> Answer:
    """Operands per sample and channel, which lie along the samples where these are frames of a video."""
    image: Value = call["self"]
    if 0 in image.dims and call["scale"].shape[0] > 1:
        return NotTileable(Reason.OPERAND_ALONG_TILED_DIM, image.dims, ([0],))
    return with_operands(call)


def along_channels(call: Call) -> Answer:
    """Operands per channel, where channels are the second dim."""
    image: Value = call["self"]
    if call["axis"] % len(image.shape) != 1:
        return NotTileable(Reason.OPERAND_ALONG_TILED_DIM, image.dims)
    return per_channel(call, image)


def per_channel(call: Call, image: Value) -> Answer:
    """A pointwise operator whose other operands are vectors along dim 1."""
    if 1 in image.dims or any(value.dims for _, _, value in call.tensors() if value.name != image.name):
        return NotTileable(Reason.OPERAND_ALONG_TILED_DIM, image.dims)
    argument = next(name for name, _, value in call.tensors() if value.name == image.name)
    maps: tuple[AxisMap, ...] = (IDENTITY,) * len(image.dims)
    return Pointwise(image.dims, (Read(argument, image, image.dims, maps),))


def dropout(call: Call) -> Answer:
    """The identity outside training; a random draw in training."""
    return random_draw(call) if call["train"] and call["p"] > 0 else pointwise(call)


def rrelu(call: Call) -> Answer:
    """A leaky ReLU outside training; a random draw in training."""
    return random_draw(call) if call["training"] else pointwise(call)


def random_draw(call: Call) -> NotTileable:
    """An operator whose result depends on the random generator: one draw for the whole image."""
    image = call.spatial()[0]
    dims = image.dims if image.shape == call.shape else ()
    return NotTileable(Reason.RANDOM_DRAW, dims)


def is_tagged(target: torch._ops.OpOverload) -> bool:
    """Whether torch itself declares the operator pointwise."""
    return torch.Tag.pointwise in target.tags
