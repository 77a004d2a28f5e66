"""Operators that look up a class per pixel: losses per pixel, class maps, gathering along channels.

A loss that keeps its pixels (`reduction="none"`) is local. One that sums or averages over space is
feature-map-wide; `lowering.losses` makes it of the local one. A pixel of an ignored class reads nothing, so that
these operators claim to read more than has an influence.
"""

from __future__ import annotations

from fxstream.geometry.receptive_field import IDENTITY
from fxstream.rules.pointwise import pointwise
from fxstream.rules.rule import Answer, Call, Evaluation, Footprint, Kind, Read, Refusal, RuleTable, Value

__all__ = ["CLASS_LOSSES", "PIXEL_LOSSES", "add_rules"]

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
OVER_SPACE = "sums a loss over all pixels"


def add_rules(table: RuleTable) -> None:
    """Losses, class maps, gathering."""
    for name in PIXEL_LOSSES:
        table.add(f"aten::{name}", "classes", pixel_loss)
    for name in CLASS_LOSSES:
        table.add(f"aten::{name}", "classes", class_loss)
    table.add("aten::one_hot", "classes", one_hot)
    table.add("aten::gather", "classes", gather)
    table.add("fxstream::class_weights", "classes", class_weights)


def pixel_loss(call: Call) -> Answer:
    """A pointwise operator where it keeps the pixels."""
    return pointwise(call) if call["reduction"] == 0 else Refusal(Kind.REDUCE, OVER_SPACE)


def class_loss(call: Call) -> Answer:
    """Channels in dim 1, and the class of each pixel, or the probabilities of its classes."""
    image, target = call["self"], call["target"]
    if call["reduction"] != 0:
        return Refusal(Kind.REDUCE, OVER_SPACE)
    if 1 in image.dims or not image.dims or _depends_on_position(call["weight"]):
        return Refusal(Kind.GLOBAL, "its classes or their weights lie along a stream axis")
    dims = _without(image.dims, 1)
    wanted = image.dims if len(target.shape) == len(image.shape) else dims
    if target.dims not in ((), wanted):
        return Refusal(Kind.GLOBAL, "its target has other stream axes than its input", dims)
    if target.dims and target.extents != image.extents:
        return Refusal(Kind.GLOBAL, f"has {target.extents} targets for {image.extents} pixels", dims)
    return _looked_up(call, dims, (("self", image, image.dims), ("target", target, wanted)))


def one_hot(call: Call) -> Answer:
    """A last dim more."""
    image: Value = call["self"]
    if call["num_classes"] < 0:
        return Refusal(Kind.GLOBAL, "counts the classes of the whole map", image.dims)
    return _looked_up(call, image.dims, (("self", image, image.dims),))


def gather(call: Call) -> Answer:
    """Chosen indices of a dim that is not a stream axis."""
    image, index = call["self"], call["index"]
    dims = image.dims or index.dims
    rank = len(image.shape)
    if call["dim"] % rank in dims:
        return Refusal(Kind.GLOBAL, "gathers along a stream axis")
    if index.dims not in ((), dims) or any(image.shape[d] != index.shape[d] for d in dims):
        return Refusal(Kind.GLOBAL, "gathers other positions than its own")
    return _looked_up(call, dims, (("self", image, dims), ("index", index, dims)))


def class_weights(call: Call) -> Answer:
    """The weight of the class of each pixel."""
    target: Value = call["target"]
    if not target.dims or _depends_on_position(call["weight"]):
        return Refusal(Kind.GLOBAL, "its weights depend on the position in the image")
    return _looked_up(call, target.dims, (("target", target, target.dims),))


def _depends_on_position(weight: Value | None) -> bool:
    return weight is not None and bool(weight.dims)


def _without(dims: tuple[int, ...], gone: int) -> tuple[int, ...]:
    return tuple(d - (d > gone) for d in dims)


def _looked_up(call: Call, dims: tuple[int, ...], read: tuple[tuple[str, Value, tuple[int, ...]], ...]) -> Answer:
    maps = (IDENTITY,) * len(dims)
    reads = tuple(Read(argument, value, along, maps) for argument, value, along in read)
    return Footprint(Evaluation.POINTWISE, dims, reads, call.target, tight=False)
