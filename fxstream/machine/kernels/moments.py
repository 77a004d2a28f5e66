"""Moments of a map, of tiles and of both together, and the affine map that normalises with them.

NOTE [the kernels]
1. Means and variances of a tile are one operator where channels are kept (`batch_norm_update_stats`, which on CUDA
   reads each format as it is), in at least 32 bits. On the CPU that operator is slow where channels are not the
   innermost dim: there it is a mean and a mean of squared distances.
2. The backward of moments is an affine map of the input per channel: the batch norm kernel with statistics given.
3. That operator has no form for tensors without values, by which shapes are found: there it is one of torch's.
4. Between tiles means and variances are combined with the term between them (Chan, Golub, LeVeque, "Updating
   formulae and a pairwise algorithm for computing sample variances", 1979).
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from fxstream.machine.device import HOST
from fxstream.machine.kernels.one_sample import settled, with_settled_gradient
from fxstream.machine.operators import has_values, operator, untraced, wide

__all__ = ["affine", "combined_moments", "mean_variance", "moments", "normalise", "update_statistics_"]

PARTS = 8
SMALL = 2**14
"""Elements of which the distances from the mean may be held at once on a CPU."""


def _mean_variance(tensor: torch.Tensor, dims: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and variance over `dims`, kept with extent 1, by the fastest operators of the device.

    On the CPU these are two passes, but of channels that are the innermost dim.
    """
    is_host, channels = tensor.device.type in HOST, [1, -1, *[1] * (tensor.ndim - 2)]
    is_fast = not is_host or (_is_channels_last(tensor) and tensor.dtype.itemsize > 2)
    if is_fast and _is_per_channel(tensor, dims) and has_values(tensor):
        mean, variance = torch.ops.aten.batch_norm_update_stats(tensor, None, None, 0.0)
        return mean.view(channels), variance.view(channels)
    tensor = wide(tensor)
    if not is_host or not has_values(tensor):
        variance, mean = torch.var_mean(tensor, dims, correction=0, keepdim=True)
        return mean, variance
    # Some channels at a time, so that the distances do not take the memory of another map.
    kept = [dim for dim, size in enumerate(tensor.shape) if size > 1 and dim not in _positive(tensor, dims)]
    if not kept or tensor.numel() <= SMALL:
        return _in_two_passes(tensor, dims)
    means, variances = zip(*(_in_two_passes(part, dims) for part in tensor.chunk(PARTS, kept[0])), strict=True)
    return torch.cat(means, kept[0]), torch.cat(variances, kept[0])


def _in_two_passes(tensor: torch.Tensor, dims: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    mean = tensor.mean(dims, True)
    apart = tensor - mean
    rest = apart.mean(dims, True)  # what the mean lost in rounding
    return mean + rest, torch.addcmul(apart.mul_(apart).mean(dims, True), rest, rest, value=-1)


def _positive(tensor: torch.Tensor, dims: list[int]) -> list[int]:
    return sorted(dim % tensor.ndim for dim in dims)


def _is_per_channel(tensor: torch.Tensor, dims: list[int]) -> bool:
    return tensor.ndim > 1 and _positive(tensor, dims) == [0, *range(2, tensor.ndim)]


def _is_channels_last(tensor: torch.Tensor) -> bool:
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    layout = formats.get(tensor.ndim)
    return layout is not None and not tensor.is_contiguous() and tensor.is_contiguous(memory_format=layout)


class _Moments(torch.autograd.Function):
    """Mean and variance, stacked in front; backward makes one new tensor of the size of the input."""

    @staticmethod
    def forward(ctx: Any, tensor: torch.Tensor, dims: list[int]) -> torch.Tensor:
        mean, variance = _mean_variance(tensor, dims)
        ctx.save_for_backward(tensor, mean)
        ctx.dims, ctx.count = dims, tensor.numel() // max(1, mean.numel())
        return torch.stack([mean.squeeze(dims), variance.squeeze(dims)])

    @staticmethod
    @once_differentiable
    @untraced
    def backward(ctx: Any, gradients: torch.Tensor) -> tuple[torch.Tensor, None]:
        tensor, mean = ctx.saved_tensors
        of_mean, of_variance = gradients.div(ctx.count).view(2, *mean.shape)
        factor = of_variance * 2
        if _is_per_channel(tensor, ctx.dims):
            operands = (factor.flatten(), of_mean.flatten(), mean.flatten(), torch.ones_like(mean).flatten())
            return torch.ops.aten.native_batch_norm(tensor, *operands, False, 0.0, 0.0)[0], None
        return (tensor - mean).mul_(factor).add_(of_mean).to(tensor.dtype), None


def mean_variance(tensor: torch.Tensor, dims: list[int]) -> torch.Tensor:
    """Mean and variance over `dims`, stacked in front, in at least 32 bits."""
    pair: torch.Tensor = _Moments.apply(tensor, dims)  # type: ignore[no-untyped-call]
    return pair


@operator("moments(Tensor self, int[] dim) -> Tensor")
def moments(tensor: torch.Tensor, dims: list[int]) -> torch.Tensor:
    """Mean, variance and sample variance over `dims`, stacked in front, in at least 32 bits.

    >>> moments(torch.tensor([[1.0, 3.0]]), [1])
    tensor([[2.],
            [1.],
            [2.]])
    """
    pair = mean_variance(tensor, dims)
    count = math.prod(tensor.shape[dim] for dim in dims)
    return torch.cat([pair, pair[1:] * (count / (count - 1) if count > 1 else math.nan)])


class _CombinedMoments(torch.autograd.Function):
    """Moments of tiles [T, 2, ...] as those of the whole [3, ...], in 64 bits; `elements` [T] are their counts."""

    @staticmethod
    def forward(ctx: Any, partials: torch.Tensor, elements: torch.Tensor) -> torch.Tensor:
        means, variances = partials.double().view(len(partials), 2, -1).unbind(1)
        count = elements.sum()
        mean = means[0] + elements @ (means - means[0]) / count  # of equal means no difference is left
        apart = means - mean
        squares = elements @ torch.addcmul(variances, apart, apart)
        ctx.save_for_backward(apart, elements, count)
        ctx.dtype = partials.dtype
        return torch.stack([mean, squares / count, squares / (count - 1)]).view(3, *partials.shape[2:])

    @staticmethod
    @once_differentiable
    @untraced
    def backward(ctx: Any, gradients: torch.Tensor) -> tuple[torch.Tensor, None]:
        apart, elements, count = ctx.saved_tensors
        of_mean, of_variance, of_sample = gradients.view(3, -1)
        of_squares = of_variance / count + of_sample / (count - 1)
        rows = torch.stack([torch.addcmul(of_mean / count, apart, 2 * of_squares), of_squares.expand_as(apart)], 1)
        return rows.mul_(elements.view(-1, 1, 1)).view(-1, 2, *gradients.shape[1:]).to(ctx.dtype), None


def combined_moments(partials: torch.Tensor, elements: torch.Tensor) -> torch.Tensor:
    """Mean, variance and sample variance of the whole from mean and variance of tiles, [T, 2, ...], in 64 bits.

    `elements` [T] are the elements that each row of a tile is taken over (float64).
    """
    whole: torch.Tensor = _CombinedMoments.apply(partials, elements)  # type: ignore[no-untyped-call]
    return whole


class _Affine(torch.autograd.Function):
    """The affine map of a normalisation from its moments; see `affine`."""

    @staticmethod
    def forward(
        ctx: Any,
        moments: torch.Tensor,
        weight: torch.Tensor | None,
        bias: torch.Tensor | None,
        eps: float,
        repeats: int,
    ) -> tuple[torch.Tensor, ...]:
        rows = moments[:2] if repeats == 1 else moments[:2].repeat_interleave(repeats, -1)
        centre, root = rows[0].clone(), (rows[1] + eps).rsqrt()
        scale = root.clone() if weight is None else root * weight
        shift = torch.zeros_like(centre) if bias is None else bias.to(centre.dtype).expand_as(centre).clone()
        unit = torch.ones_like(centre)
        ctx.save_for_backward(root, scale)
        ctx.like = [tensor if tensor is None else tensor.new_empty(0) for tensor in (weight, bias)]
        ctx.repeats = repeats
        ctx.mark_non_differentiable(centre, unit)
        return scale, shift, centre, unit

    @staticmethod
    @once_differentiable
    @untraced
    def backward(ctx: Any, of_scale: torch.Tensor, of_shift: torch.Tensor, *_: Any) -> tuple[Any, ...]:
        root, scale = ctx.saved_tensors
        of_weight = of_scale * root
        rows = [-of_shift * scale, of_weight * root * scale * -0.5, torch.zeros_like(root)]
        of_moments = torch.stack(rows)
        if ctx.repeats > 1:
            of_moments = of_moments.unflatten(-1, (-1, ctx.repeats)).sum(-1)
        gradients = (
            None if like is None else gradient.reshape(-1, gradient.shape[-1]).sum(0).to(like.dtype)
            for gradient, like in zip((of_weight, of_shift), ctx.like, strict=True)
        )
        return of_moments, *gradients, None, None


@operator(
    "affine(Tensor moments, Tensor? weight, Tensor? bias, float eps, int repeats=1)"
    " -> (Tensor, Tensor, Tensor, Tensor)"
)
def affine(
    moments: torch.Tensor, weight: torch.Tensor | None, bias: torch.Tensor | None, eps: float, repeats: int = 1
) -> tuple[torch.Tensor, ...]:
    """What normalises a map with these moments as ``(x - centre) * scale + shift``: scale, shift, centre, ones.

    Each moment is that of so many channels. The gradient of the mean goes through the shift, whose value is the
    bias.
    """
    operands: tuple[torch.Tensor, ...] = _Affine.apply(moments, weight, bias, eps, repeats)  # type: ignore[no-untyped-call]
    return operands


@operator("normalise(Tensor self, Tensor scale, Tensor shift, Tensor centre, Tensor unit) -> Tensor")
def normalise(
    tensor: torch.Tensor, scale: torch.Tensor, shift: torch.Tensor, centre: torch.Tensor, unit: torch.Tensor
) -> torch.Tensor:
    """``(tensor - centre) * scale + shift`` with operands [N, C], by the batch norm kernel wherever that can be.

    `unit` is the variance, of ones, that this kernel takes. One sample broadcasts against the operands of several.

    >>> one = torch.ones(1, 1)
    >>> normalise(torch.tensor([[[1.0, 3.0]]]), one, one, 2 * one, one)
    tensor([[[0., 2.]]])
    """
    is_one = len(tensor) == 1
    if len(tensor) == len(scale) and (is_one or tensor.is_contiguous()):
        flat = [operand.flatten() for operand in (scale, shift, centre, unit)]
        rows = settled(tensor if is_one else tensor.view(1, -1, *tensor.shape[2:]))
        result = torch.ops.aten.batch_norm(rows, *flat, False, 0.0, 0.0, False)
        return with_settled_gradient(result).view_as(tensor)
    axes = [1] * (tensor.ndim - 2)
    spread = [operand.view(*operand.shape, *axes) for operand in (scale * unit.rsqrt(), shift, centre)]
    return torch.addcmul(spread[1], tensor - spread[2], spread[0]).to(tensor.dtype)


@operator(
    "update_statistics_(Tensor(a!) running_mean, Tensor(b!) running_var, Tensor moments, float momentum,"
    " Tensor? share=None) -> Tensor(a!)"
)
def update_statistics_(
    mean: torch.Tensor,
    variance: torch.Tensor,
    moments: torch.Tensor,
    momentum: float,
    share: torch.Tensor | None = None,
) -> torch.Tensor:
    """Running statistics moved towards moments of a batch, by `momentum` or, where it is given, by a `share`."""
    running, batch = [mean, variance], list(moments.detach().to(mean.dtype).unbind())[::2]
    if share is None:
        torch._foreach_mul_(running, 1 - momentum)
        torch._foreach_add_(running, batch, alpha=momentum)
    else:
        torch._foreach_mul_(running, 1 - share)
        torch._foreach_add_(running, torch._foreach_mul(batch, share))
    return mean
