"""Operators of flat tensors that treat all positions alike, and so work on the tensor before it was flattened."""

from __future__ import annotations

import torch

from fxstream.graph.nodes import bind, name_of
from fxstream.lowering.positions.unflatten import FlatOperator, Handler, Result
from fxstream.lowering.proxy import Proxy
from fxstream.lowering.statistics import softmax
from fxstream.rules.channelwise import CLASS_LOSSES, FOURIER, KEEPING, REDUCING, SPLITTING
from fxstream.rules.shuffled import indexed

__all__ = ["HANDLERS"]

CONVOLUTIONS = {2: "conv2d", 3: "conv3d"}


def _permute(op: FlatOperator) -> Result:
    """Any permutation; where dims go shows on a tensor each of whose dims is as large as its number."""
    source, target, (_, *arguments) = op.only("self"), op.node.target, bind(op.node).values()
    order = list(target(torch.empty([*range(op.self.ndim)], device="meta"), *arguments).shape)  # type: ignore
    return source and source.at(source.tensor.permute(source.apart(order)), order.index(source.place))


def _along(op: FlatOperator) -> Result:
    """An operator along dims other than the positions, which it keeps, removes or, one of them, makes."""
    source, dim = op.only("tensors" if "tensors" in op.arguments else "self"), op.arguments.get("dim")
    if source is None or dim is None:
        return None
    rank, rank_out = op.proxy(op.node.all_input_nodes[0]).ndim, len(op.value.shape)
    dims = [d % max(rank, rank_out) for d in ([dim] if isinstance(dim, int) else dim)]
    is_new, is_removed = rank_out > rank, rank_out < rank
    if source.place in dims and not is_new:
        return None
    places = [source.dim(d) for d in dims]
    result = op.again(dim=places[0] if isinstance(dim, int) else places)
    before = sum(d < source.place + is_new for d in dims)
    return source.at(result, source.place + before * (is_new - is_removed))


def _concatenate(op: FlatOperator) -> Result:
    """Along other dims, or of nothing and the positions, as with no token before those of patches."""
    full = [one for one in op.tensors if not _is_empty(op, one)]
    if len(full) != 1 or len(op.tensors) == 1 or full[0].node.op == "placeholder":
        return _along(op)
    is_alone = full[0].dtype == op.value.dtype and full[0].shape == op.value.shape
    return (op.source(full[0]) or full[0]) if is_alone else None


def _is_empty(op: FlatOperator, tensor: Proxy) -> bool:
    """Whether it has no entries at any size."""
    if 0 not in tensor.shape or op.bound:
        return 0 in tensor.shape
    if name_of(tensor.node) != "slice":
        return False
    start, end = (bind(tensor.node)[name] for name in ("start", "end"))
    return isinstance(start, int | None) and isinstance(end, int) and 0 <= end <= (start or 0)


def _index(op: FlatOperator) -> Result:
    """Entries of dims other than the positions."""
    source, indices = op.only("self"), op.indices
    is_mask = any(one is not None and one.dtype == torch.bool for one in indices)
    if source is None or is_mask:
        return None
    rank = max(one.ndim for one in indices if one is not None)
    place = indexed([one is not None for one in indices], op.self.ndim, rank)[source.place]
    if place is None:
        return None
    beyond = [None] * (len(source.extents) - 1) * (len(indices) > source.place)
    return source.at(op.again(indices=[*indices[: source.place], *beyond, *indices[source.place :]]), place)


def _squeeze(op: FlatOperator) -> Result:
    """One dim less, which is not the batch's."""
    dim = op.arguments.get("dim")
    return _along(op) if isinstance(dim, int) and dim % op.self.ndim and op.self.shape[dim] == 1 else None


def _softmax(op: FlatOperator) -> Result:
    source = op.only("self")
    if source is None or op.dim % op.self.ndim != source.place:
        return _along(op)
    return source.at(softmax(op, source.tensor, source.joined))


def _reduce(op: FlatOperator) -> Result:
    """A reduction: along the positions too where it takes several dims, or all."""
    source, dim, rank = op.only("self"), op.arguments.get("dim"), op.self.ndim
    if source is None or "other" in op.arguments:
        return None
    dims = [] if dim is None or isinstance(dim, int) else [d % rank for d in dim or range(rank)]
    if dim is not None and source.place not in dims:
        return _along(op)
    result = op.again() if dim is None else op.again(dim=source.apart(dims))
    return result.flatten(*source.ends) if op.arguments.get("keepdim") else result


def _last_dims(op: FlatOperator) -> Result:
    """A matrix or a normalisation of the last dims."""
    source, dims = op.only("input"), len(op.arguments.get("normalized_shape", [1]))
    return source.at(op.again()) if source is not None and source.place < op.input.ndim - dims else None


def _padded(op: FlatOperator) -> Result:
    """Padding of dims after the positions."""
    source = op.only("self")
    return source.at(op.again()) if source is not None and source.place < op.self.ndim - len(op.pad) // 2 else None


def _expand(op: FlatOperator) -> Result:
    """Broadcast of dims other than the positions."""
    source, sizes = op.only("self"), op.size
    if source is None or len(sizes) != op.self.ndim:
        return None
    kept = [-1] * len(source.extents)
    return source.at(op.again(size=[*sizes[: source.place], *kept, *sizes[source.place + 1 :]]))


def _per_channel(op: FlatOperator) -> Result:
    """A normalisation per channel (dim 1), of positions after it, or of [positions, channels]."""
    source = op.only("input")
    if source is None or source.place >= 2:
        return source and source.at(op.again())
    if source.place or op.name != "batch_norm" or op.input.ndim != 2:
        return None
    channels = len(source.extents)
    result = op.again(input=source.tensor.movedim(channels, 1))
    return source.at(result.movedim(1, channels))


def _convolution(op: FlatOperator) -> Result:
    """A convolution that has a window of one along the positions, in as many dims as these have."""
    source, weight = op.only("input"), op.weight
    if source is None or source.place < 2 or isinstance(op.padding, str):
        return None
    axis, axes, numbers = source.place - 2, len(source.extents), (op.stride, op.padding, op.dilation)
    stride, padding, dilation = (n if len(n) > 1 else [*n] * (op.input.ndim - 2) for n in numbers)
    rank = source.tensor.ndim - 2
    if (weight.shape[source.place], stride[axis], padding[axis]) != (1, 1, 0) or rank not in CONVOLUTIONS:
        return None
    for _ in range(axes - 1):
        weight = weight.unsqueeze(source.place)
    apart = ([*n[:axis], *[n[axis]] * axes, *n[axis + 1 :]] for n in (stride, padding, dilation))
    return source.at(op.call(CONVOLUTIONS[rank], source.tensor, weight, op.bias, *apart, op.groups))


def _class_loss(op: FlatOperator) -> Result:
    """Classes in dim 1; of flat pixels [positions, classes] after the positions."""
    image, target, rank = op.source(op.self), op.source(op.target), op.self.ndim
    if image is None or target is None or not image.fits(target) or rank < 2:
        return None
    scores, is_class = image.tensor, op.target.ndim < rank
    if image.place == 1 or (image.place == 0 and not is_class) or target.place != max(image.place - is_class, 0):
        return None
    if image.place == 0:
        classes = image.dim(1)
        scores = scores.permute([0, classes, *(d for d in range(1, image.dim(rank)) if d != classes)])
    losses = op.again(self=scores)
    return losses if op.reduction else target.at(losses, max(image.place - 1, 0))


HANDLERS: dict[str, Handler] = {
    **dict.fromkeys(("permute", "transpose", "swapaxes", "swapdims", "t", "mT", "numpy_T"), _permute),
    **dict.fromkeys((*FOURIER, *KEEPING, *SPLITTING, "slice", "narrow", "select", "unbind", "unsqueeze"), _along),
    **dict.fromkeys(("cat", "concat", "concatenate"), _concatenate),
    "stack": _along,
    "index": _index,
    "squeeze": _squeeze,
    **dict.fromkeys(("softmax", "log_softmax"), _softmax),
    **dict.fromkeys(REDUCING, _reduce),
    "expand": _expand,
    **dict.fromkeys(("constant_pad_nd", "pad"), _padded),
    **dict.fromkeys(("linear", "layer_norm", "rms_norm"), _last_dims),
    **dict.fromkeys(("batch_norm", "instance_norm", "group_norm"), _per_channel),
    **dict.fromkeys(("conv1d", "conv2d"), _convolution),
    **dict.fromkeys(CLASS_LOSSES, _class_loss),
}
"""Per operator that is not pointwise, how it works on the tensor before (`unflatten`, rule 2)."""
