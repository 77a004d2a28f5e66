"""The referee: for every rule, single input pixels are changed and the measured read set is held to the map.

`SAMPLES` has one or more calls per operator of the table; an operator without a sample fails by name. What a
rule claims to read may be an interval around what is read (a dilated window, say), never less.
"""

import functools
import itertools

import pytest
import torch
from torch import nn

import fxstream
from fxstream.geometry.box import Interval
from fxstream.geometry.receptive_field import BROADCAST, AxisExtent
from fxstream.rules import Tileability, register_rule, rules, unregister_rule

A = torch.ops.aten
class_weights, contract = torch.ops.fxstream.class_weights, torch.ops.fxstream.contract
attention = torch.ops.fxstream.attention
W1, W2, W3 = (torch.randn(4, 2, *k) for k in ((3,), (3, 2), (2, 3, 2)))
G = torch.randn(4)


class Call(nn.Module):
    """A module that is one operator call."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


X1, X2, X3 = (1, 2, 14), (1, 2, 10, 9), (1, 2, 6, 5, 6)
C4 = (1, 4, 6, 5)


def quantised_channels(x):
    return A.fake_quantize_per_channel_affine(x, G.abs() * 1e-4, torch.zeros(4), 1, -(2**20), 2**20)


SAMPLES = {
    "conv1d": [(X1, lambda x: A.conv1d(x, W1, None, [2], [1], [2]))],
    "conv2d": [
        (X2, lambda x: A.conv2d(x, W2, None, [2, 1], [1, 0], [1, 2])),
        (X2, lambda x: A.conv2d(x, W2, None, [1], "same")),
    ],
    "conv3d": [
        (X3, lambda x: A.conv3d(x, W3, None, [1], [1])),
        (X2, lambda x: A.conv3d(x.unsqueeze(2), W3, None, [1], [1, 0, 1])),
    ],
    "max_pool1d": [(X1, lambda x: A.max_pool1d(x, 3, 2, 1, 1, True))],
    "max_pool2d": [(X2, lambda x: A.max_pool2d(x, [3, 2], [2, 3], [1, 0], 1, True))],
    "max_pool3d": [
        (X3, lambda x: A.max_pool3d(x, 2, 1)),
        (C4, lambda x: A.max_pool3d(x.unsqueeze(1), [3, 2, 2], 1, [1, 1, 0])),
    ],
    "avg_pool1d": [(X1, lambda x: A.avg_pool1d(x, 3, 2, 1, True, False))],
    "avg_pool2d": [(X2, lambda x: A.avg_pool2d(x, [3, 2], [2, 3], [1, 0], True, False))],
    "avg_pool3d": [
        (X3, lambda x: A.avg_pool3d(x, 2, 1)),
        (C4, lambda x: A.avg_pool3d(x.unsqueeze(1), [3, 2, 1], 1)),
    ],
    "pad": [
        (X2, lambda x: A.pad(x, [1, -2, 3, 0, 1, 0], "constant", 2.0)),
        (X2, lambda x: A.pad(x, [1, -2, 3, 0], "reflect")),
        (X1, lambda x: A.pad(x, [-1, 20], "replicate")),
    ],
    **{
        f"{name}_pad{n}d": [(x, functools.partial(lambda f, p, x: f(x, p), getattr(A, f"{name}_pad{n}d"), pads))]
        for name in ("reflection", "replication")
        for n, x, pads in ((1, X1, [3, 2]), (2, X2, [1, 4, 0, 3]), (3, X3, [1, 0, 2, 2, 3, 1]))
    },
    "constant_pad_nd": [(X2, lambda x: A.constant_pad_nd(x, [1, -2, -3, 2]))],
    "slice": [(X2, lambda x: A.slice(x, 2, 1, -1, 2)), (X2, lambda x: A.slice(x, 1, 0, 1))],
    "narrow": [(X2, lambda x: A.narrow(x, 3, 2, 5)), (X2, lambda x: A.narrow(x, 1, 1, 1))],
    "unfold": [
        (X2, lambda x: A.unfold(x, 2, 3, 2)),
        (X2, lambda x: A.unfold(x, -1, 2, 1)),
        (X2, lambda x: A.unfold(x, 1, 1, 1)),
    ],
    "pixel_unshuffle": [((1, 2, 6, 8), lambda x: A.pixel_unshuffle(x, 2))],
    "pixel_shuffle": [(C4, lambda x: A.pixel_shuffle(x, 2))],
    "upsample_nearest1d": [
        (X1, lambda x: A.upsample_nearest1d(x, None, [3.0])),
        (X1, lambda x: A.upsample_nearest1d(x, [33], None)),
    ],
    "upsample_nearest2d": [
        (X2, lambda x: A.upsample_nearest2d(x, [20, 27])),
        (X2, lambda x: A.upsample_nearest2d(x, None, [2.0, 2.0])),
    ],
    "upsample_nearest3d": [(X3, lambda x: A.upsample_nearest3d(x, None, [2.0, 1.0, 3.0]))],
    "upsample_linear1d": [
        (X1, lambda x: A.upsample_linear1d(x, None, False, [2.0])),
        (X1, lambda x: A.upsample_linear1d(x, None, False, [0.5])),
        (X1, lambda x: A.upsample_linear1d(x, [25], True, None)),
        (X1, lambda x: A.upsample_linear1d.default(x, [9], False, 0.7)),
    ],
    "upsample_bilinear2d": [
        (X2, lambda x: A.upsample_bilinear2d(x, None, False, [2.0, 1.0])),
        (X2, lambda x: A.upsample_bilinear2d(x, [8, 16], True, None)),
        (X2, lambda x: A.upsample_bilinear2d.default(x, [14, 12], False, 1.5, None)),
    ],
    "upsample_trilinear3d": [
        (X3, lambda x: A.upsample_trilinear3d(x, None, False, [2.0, 1.0, 2.0])),
        (X3, lambda x: A.upsample_trilinear3d(x, [7, 6, 5], True, None)),
    ],
    "upsample_bicubic2d": [
        (X2, lambda x: A.upsample_bicubic2d(x, None, False, [2.0, 4.0])),
        (X2, lambda x: A.upsample_bicubic2d(x, [19, 4], False, None)),
    ],
    "_upsample_bilinear2d_aa": [
        (X2, lambda x: A._upsample_bilinear2d_aa(x, [5, 3], False)),
        (X2, lambda x: A._upsample_bilinear2d_aa(x, [13, 4], False)),
    ],
    "_upsample_bicubic2d_aa": [(X2, lambda x: A._upsample_bicubic2d_aa(x, [7, 12], False))],
    "_upsample_nearest_exact1d": [(X1, lambda x: A._upsample_nearest_exact1d(x, None, [2.0]))],
    "_upsample_nearest_exact2d": [(X2, lambda x: A._upsample_nearest_exact2d(x, None, [2.0, 5.0]))],
    "_upsample_nearest_exact3d": [(X3, lambda x: A._upsample_nearest_exact3d(x, None, [2.0, 1.0, 3.0]))],
    "conv_transpose1d": [(X1, lambda x: A.conv_transpose1d(x, W1.transpose(0, 1), None, [3], [1], [2]))],
    "conv_transpose2d": [(X2, lambda x: A.conv_transpose2d(x, W2.transpose(0, 1), None, [2, 4], [1, 0], [1, 3]))],
    "conv_transpose3d": [(X3, lambda x: A.conv_transpose3d(x, W3.transpose(0, 1), None, [2]))],
    "batch_norm": [(C4, lambda x: A.batch_norm(x, G, G, G, G.abs() + 1, False, 0.1, 1e-5, False))],
    "prelu": [(C4, lambda x: A.prelu(x - 3, G))],
    "fake_quantize_per_tensor_affine": [
        (X2, lambda x: A.fake_quantize_per_tensor_affine(x, 1e-4, 0, -(2**20), 2**20))
    ],
    "fake_quantize_per_channel_affine": [(C4, quantised_channels)],
    "fxstream::normalise": [(C4, lambda x: torch.ops.fxstream.normalise(x, G[None], *[G.abs()[None] + 1] * 3))],
    "rrelu": [(X2, lambda x: A.rrelu(x, 0.1, 0.3, False))],
    "dropout": [(X2, lambda x: A.dropout(x, 0.5, False))],
    "fxstream::dropout": [(X2, lambda x: A.dropout(x, 1e-12, True))],
    "feature_dropout": [(X2, lambda x: A.feature_dropout(x, 0.5, False))],
    "alpha_dropout": [(X2, lambda x: A.alpha_dropout(x, 0.0, True))],
    "feature_alpha_dropout": [(X2, lambda x: A.feature_alpha_dropout(x, 0.5, False))],
    "permute": [(X2, lambda x: A.permute(x, [0, 3, 1, 2]))],
    "movedim": [(X2, lambda x: A.movedim(x, [1], [-1]))],
    "moveaxis": [(X2, lambda x: A.moveaxis(x, 1, 3))],
    "transpose": [(X2, lambda x: A.transpose(x, 1, -1))],
    "swapaxes": [(X2, lambda x: A.swapaxes(x, 2, 3))],
    "swapdims": [(X2, lambda x: A.swapdims(x, 1, 2))],
    "view": [(C4, lambda x: A.view(x, [1, 2, 2, 6, 5]))],
    "reshape": [(C4, lambda x: A.reshape(x, [2, 2, 6, 5]))],
    "_unsafe_view": [(C4, lambda x: A._unsafe_view(x, [1, 2, 2, 6, 5]))],
    "flatten": [
        ((2, 1, 6, 5), lambda x: A.flatten(x, 0, 1)),
        ((1, 1, 6, 5), lambda x: A.flatten(x, 1, 2)),
        (X2, lambda x: A.flatten(x.permute(0, 2, 3, 1), 2, 3)),
    ],
    "unflatten": [(C4, lambda x: A.unflatten(x, 1, [2, -1])), (X2, lambda x: A.unflatten(x, 3, [-1, 3]))],
    "squeeze": [((1, 1, 6, 5), lambda x: A.squeeze(x, 1)), ((1, 1, 6, 5), lambda x: A.squeeze(x))],
    "unsqueeze": [(X2, lambda x: A.unsqueeze(x, -3))],
    "expand": [((1, 1, 6, 5), lambda x: A.expand(x, [2, 3, -1, -1]))],
    "repeat": [(X2, lambda x: A.repeat(x, [2, 2, 1, 1]))],
    "select": [(X2, lambda x: A.select(x, 1, -1))],
    "layer_norm": [(X2, lambda x: A.layer_norm(x.permute(0, 2, 3, 1), [2]))],
    "native_layer_norm": [(X2, lambda x: A.native_layer_norm(x.permute(0, 2, 3, 1), [2], None, None, 1e-5)[0])],
    "rms_norm": [(X2, lambda x: A.rms_norm(x.permute(0, 2, 3, 1), [2]))],
    "cat": [(X2, lambda x: A.cat([x, x[:, :1] * 2], 1))],
    "concat": [(X2, lambda x: A.concat([x, x], 1))],
    "concatenate": [(X2, lambda x: A.concatenate([x, x], -3))],
    "stack": [(X2, lambda x: A.stack([x, x * 2], 2))],
    "linear": [(X2, lambda x: A.linear(x.permute(0, 2, 3, 1), torch.ones(3, 2)))],
    "matmul": [(X2, lambda x: A.matmul(x.permute(0, 2, 3, 1), torch.ones(2, 3)))],
    "channel_shuffle": [(C4, lambda x: A.channel_shuffle(x, 2))],
    "unbind": [(X2, lambda x: A.unbind(x, 1)[1])],
    "split": [(C4, lambda x: A.split(x, 2, 1)[1])],
    "split_with_sizes": [(C4, lambda x: A.split_with_sizes(x, [1, 3], 1)[1])],
    "unsafe_split": [(C4, lambda x: A.unsafe_split(x, 2, 1)[1])],
    "chunk": [(C4, lambda x: A.chunk(x, 2, 1)[0])],
    "unsafe_chunk": [(C4, lambda x: A.unsafe_chunk(x, 2, 1)[0])],
    "tensor_split": [(C4, lambda x: A.tensor_split(x, 2, 1)[0])],
    "cumsum": [(C4, lambda x: A.cumsum(x, 1))],
    "cumprod": [(C4, lambda x: A.cumprod(x, 1))],
    "softmax": [(C4, lambda x: A.softmax(x, 1))],
    "_softmax": [(C4, lambda x: A._softmax(x, 1, False))],
    "log_softmax": [(C4, lambda x: A.log_softmax(x, 1))],
    "_log_softmax": [(C4, lambda x: A._log_softmax(x, 1, False))],
    "flip": [(C4, lambda x: A.flip(x, [1]))],
    "roll": [(C4, lambda x: A.roll(x, [1], [1]))],
    "glu": [(C4, lambda x: A.glu(x, 1))],
    "sort": [(C4, lambda x: A.sort(x, 1)[0])],
    "argsort": [(C4, lambda x: A.argsort(x, 1).double())],
    "topk": [(C4, lambda x: A.topk(x, 2, 1)[0])],
    "index": [(C4, lambda x: A.index(x, [None, torch.tensor([2, 0, 0])]))],
    "index_select": [(C4, lambda x: A.index_select(x, 1, torch.tensor([0, 2])))],
    "linalg_vector_norm": [(C4, lambda x: A.linalg_vector_norm(x, 2, [1], True))],
    "norm": [(C4, lambda x: A.norm(x, 2, [1], True))],
    "max": [(C4, lambda x: A.max(x, 1)[0])],
    "min": [(C4, lambda x: A.min(x, 1, True)[0])],
    "var": [(C4, lambda x: A.var(x, [1]))],
    "std": [(C4, lambda x: A.std(x, [1]))],
    "var_mean": [(C4, lambda x: A.var_mean(x, [1])[0])],
    "std_mean": [(C4, lambda x: A.std_mean(x, [1])[0])],
    "all": [(C4, lambda x: A.all(x > 0, 1).double() + x[:, 0])],
    "any": [(C4, lambda x: A.any(x > 0, 1).double() + x[:, 0])],
    "argmax": [(C4, lambda x: A.argmax(x, 1).double())],
    "argmin": [(C4, lambda x: A.argmin(x, 1).double())],
    "count_nonzero": [(C4, lambda x: A.count_nonzero(x > 0, [1]).double() + x[:, 0])],
    "prod": [(C4, lambda x: A.prod(x, 1))],
    "full_like": [(X2, lambda x: A.full_like(x, 2.0) * x)],
    "zeros_like": [(X2, lambda x: A.zeros_like(x) + x)],
    "ones_like": [(X2, lambda x: A.ones_like(x) * x)],
    "type_as": [(X2, lambda x: A.type_as(x, x))],
    "to": [(X2, lambda x: A.to(x, torch.float32))],
    "_to_copy": [(X2, lambda x: A._to_copy(x, dtype=torch.float32))],
    "copy": [(X2, lambda x: A.copy(x, x * 2))],
    "fill": [(X2, lambda x: A.fill(x, 2.0) * x)],
    "divide": [(X2, lambda x: A.divide(x, x * x + 1))],
    "multiply": [(X2, lambda x: A.multiply(x, 3))],
    "broadcast_tensors": [(X2, lambda x: A.broadcast_tensors([x, x[:, :1]])[1] * x)],
    "expand_as": [(X2, lambda x: A.expand_as(x[:, :1], x))],
    "one_hot": [(X2, lambda x: A.one_hot(x.long().clamp(0, 2), 3))],
    "embedding": [(X2, lambda x: A.embedding(torch.eye(3, dtype=torch.double), x.long().clamp(0, 2)))],
    "where": [
        (X2, lambda x: A.where(x > 1, x, x * 2)),
        (X2, lambda x: A.where(x > 1, x, 0.5)),
        (X2, lambda x: A.where(x > 1, 2.0, x)),
    ],
    "gather": [(X2, lambda x: A.gather(x, 1, (x > 1).long()))],
    "cross_entropy_loss": [(X2, lambda x: A.cross_entropy_loss(x, (x[:, 0] > 1).long(), None, 0))],
    "nll_loss_nd": [(X2, lambda x: A.nll_loss_nd(x, (x[:, 0] > 1).long(), None, 0))],
    "fxstream::class_weights": [
        (X2, lambda x: class_weights(x[:, 0].long().clamp(0, 3), G, 9, dtype=torch.double))
    ],
    "fxstream::attention": [
        (X2, lambda x: attention(x.permute(0, 2, 3, 1), *(w[None].to(x) for w in W1.unbind(2)[:2]), None, 2, None))
    ],
    "fxstream::contract": [(X2, lambda x: contract("nchw,kc->nkhw", x, W1[:, :, 0].to(x)))],
    "hinge_embedding_loss": [(X2, lambda x: A.hinge_embedding_loss(x, x.sign(), 1.0, 0))],
    "poisson_nll_loss": [(X2, lambda x: A.poisson_nll_loss(x, x, True, False, 1e-8, 0))],
    "kl_div": [(X2, lambda x: A.kl_div(x, x * 2, 0, log_target=True))],
    "binary_cross_entropy": [(X2, lambda x: A.binary_cross_entropy(x.sigmoid(), x * 0, None, 0))],
    "binary_cross_entropy_with_logits": [
        (X2, lambda x: A.binary_cross_entropy_with_logits(x, x * 0, None, None, 0))
    ],
    "subtract": [(X2, lambda x: A.subtract(x, x * 2))],
    "repeat_interleave": [
        (X2, lambda x: A.repeat_interleave(x, 3, 1)),
        (X2, lambda x: A.repeat_interleave(x, 2, -1)),
        (X1, lambda x: A.repeat_interleave(x, 3, 2, output_size=42)),
    ],
    "slice_scatter": [
        (X2, lambda x: A.slice_scatter(x, x[:, :1] * 2, 1, 0, 1)),
        (X2, lambda x: A.slice_scatter(torch.ones(2, 1, 1).expand(1, 2, 10, 9).to(x), x[:, :1], 1, 1)),
    ],
    "select_scatter": [(X2, lambda x: A.select_scatter(x, x[:, 0] * 2, 1, -1))],
    "index_put": [(X2, lambda x: A.index_put(x, [x > 1], torch.tensor(5.0).to(x)))],
    "__and__": [(X2, lambda x: A.__and__(x > 0, x > 1) * x)],
    "__or__": [(X2, lambda x: A.__or__(x > 0, x > 1) * x)],
    "__lshift__": [(X2, lambda x: A.__lshift__(x.long(), 2) + x)],
    "__rshift__": [(X2, lambda x: A.__rshift__(x.long(), 1) + x)],
}
for name in (
    "alias",
    "clone",
    "contiguous",
    "detach",
    "lift_fresh_copy",
    "hardswish",
    "leaky_relu",
    "log_sigmoid",
):
    SAMPLES[name] = [(X2, getattr(A, name))]
for name in ("mse_loss", "l1_loss", "smooth_l1_loss", "huber_loss", "soft_margin_loss"):
    SAMPLES[name] = [(X2, functools.partial(lambda loss, x: loss(x, x * 3, reduction=0), getattr(A, name)))]
for name in ("amax", "amin", "logsumexp", "mean", "sum"):
    SAMPLES[name] = [(C4, functools.partial(getattr(A, name), dim=[1]))]
for name in ("mT", "numpy_T"):
    SAMPLES[name] = [(X1, getattr(A, name)), (X2, getattr(A, name))]
SAMPLES["t"] = [(X1, lambda x: A.t(x[0])), (X1, lambda x: A.t(x[0, 0])[None])]
for kind in ("fft", "ifft", "rfft", "irfft", "hfft", "ihfft"):
    for axes, dim in (("", 1), ("2", [0, 1]), ("n", [1])):
        transform = functools.partial(getattr(A, f"fft_{kind}{axes}"), dim=dim)
        SAMPLES[f"fft_{kind}{axes}"] = [(C4, functools.partial(lambda f, x: f(x).abs(), transform))]
# operators with the pointwise tag have no row of their own
TAGGED = {
    "relu": A.relu,
    "gelu": A.gelu,
    "silu": A.silu,
    "sigmoid": A.sigmoid,
    "hardtanh": lambda x: A.hardtanh(x, -1, 9.0),
    "add": lambda x: A.add(x, x),
    "mul broadcast": lambda x: A.mul(x, x[:, :1]),
    "clamp_min": lambda x: A.clamp_min(x, 0.1),
    "pow": lambda x: A.pow(x, 2),
}
LOCAL_FAMILIES = {row.operator for row in rules() if row.family not in ("map-wide", "reduction")}
CALLS = [(name, *sample) for name, samples in SAMPLES.items() for sample in samples]
CALLS += [(name, X2, function) for name, function in TAGGED.items()]


def test_every_local_rule_has_a_sample():
    assert {operator.removeprefix("aten::") for operator in LOCAL_FAMILIES} - set(SAMPLES) == set()


@pytest.mark.parametrize("name, shape, function", CALLS, ids=[f"{i}-{c[0]}" for i, c in enumerate(CALLS)])
def test_read_set_equals_the_map(name, shape, function):
    model = Call(function)
    image = torch.rand(shape, dtype=torch.double) + 0.5
    analysis = fxstream.analyze(model, shape[2:], channels=shape[1], batch=shape[0])
    assert analysis.barriers == (), f"not local: {analysis}"
    local = [v for v in analysis.verdicts if v.kind is Tileability.LOCAL]
    image = image.to(next(iter(analysis.graph.nodes.values())).values[0].dtype)
    result = model(image)
    dims = local[-1].pattern.dims
    for axis in range(len(shape) - 2):
        claimed = [claimed_reads(local, analysis, axis, o) for o in range(result.shape[dims[axis]])]
        for pixel in range(shape[2 + axis]):
            changed = measured_writes(model, image, result, dims, axis, pixel)
            claimed_by = {o for o, reads in enumerate(claimed) if reads.start <= pixel < reads.stop}
            assert changed <= claimed_by, f"{name}: pixel {pixel} of axis {axis} reaches {changed - claimed_by}"
        ends_are_read(model, image, result, dims, axis, claimed, name)


@pytest.mark.parametrize("name, shape, function", CALLS, ids=[f"{i}-{c[0]}" for i, c in enumerate(CALLS)])
def test_extents_follow_the_formula(name, shape, function):
    """At this size; whether the formula holds at others is what the windows' own test is for."""
    graph = fxstream.analyze(Call(function), shape[2:], channels=shape[1], batch=shape[0]).graph
    for verdict in graph.verdicts.values():
        if verdict.kind is Tileability.LOCAL:
            pattern = verdict.pattern
            wide = next(read for read in pattern.reads if BROADCAST not in read.maps)
            found = [e.of(i) for e, i in zip(pattern.extents or [AxisExtent.changed(0)] * 3, wide.extents)]
            assert tuple(found) == graph.value(verdict.node).extents, name


def claimed_reads(local, analysis, axis, o) -> Interval:
    """What the image is read at for one output pixel, walking all nodes by their maps."""
    boxes = {local[-1].node: Interval(o, o + 1)}
    for verdict in reversed(local):
        for read in verdict.pattern.reads:
            found = read.needed(axis, boxes.get(verdict.node, Interval(0, 0)))
            boxes[read.value.name] = boxes.get(read.value.name, Interval(0, 0)).hull(found)
    return boxes[next(n for n in boxes if n not in analysis.graph.verdicts)]


def measured_writes(model, image, result, dims, axis, pixel) -> set[int]:
    """The output pixels along an axis that change when an input pixel's row does."""
    changed = set()
    for scale in (10.0, -10.0):
        other = image.clone()
        row = other.select(2 + axis, pixel)
        row.copy_(row * scale + torch.linspace(-3, 2, row.numel()).view(row.shape))
        moved = (model(other) != result).movedim(dims[axis], 0).flatten(1).any(1)
        changed |= set(moved.nonzero().flatten().tolist())
    return changed


GAPS = {
    "_upsample_bilinear2d_aa",
    "_upsample_bicubic2d_aa",
    "conv_transpose1d",
    "conv_transpose2d",
    "zeros_like",
    "argsort",
    "argmax",
    "argmin",
    "sort",
}


def ends_are_read(model, image, result, dims, axis, claimed, name) -> None:
    """Both ends of what interior output pixels claim to read are really read (the map is tight)."""
    if name in GAPS:
        return
    for o, reads in itertools.islice(enumerate(claimed), 1, len(claimed) - 1):
        for end in {reads.start, reads.stop - 1} & set(range(image.shape[2 + axis])):
            assert o in measured_writes(model, image, result, dims, axis, end), f"{name}: {o} does not read {end}"


def test_rule_of_the_user():
    library = torch.library.Library("fxstream_test", "DEF")
    library.define("twice(Tensor x) -> Tensor")
    library.impl("twice", lambda x: x * 2, "CompositeExplicitAutograd")
    model = nn.Sequential(nn.Conv2d(3, 3, 3), Call(lambda x: torch.ops.fxstream_test.twice(x)))
    unknown = fxstream.analyze(model, 16).cut
    assert unknown.kind is Tileability.NO_RULE
    assert "fxstream.register_rule" in unknown.reason
    register_rule("fxstream_test::twice")(fxstream.rules.pointwise)
    try:
        assert fxstream.analyze(model, 16).cut is None
        with pytest.raises(fxstream.RuleError, match="has a rule already"):
            register_rule("fxstream_test::twice")(fxstream.rules.pointwise)
    finally:
        unregister_rule("fxstream_test::twice")
    with pytest.raises(fxstream.RuleError, match="namespace::name"):
        register_rule("twice")(fxstream.rules.pointwise)


def test_positions_that_depend_on_the_data_are_refused_in_a_sentence():
    library = torch.library.Library("torchvision", "FRAGMENT")
    library.define("deform_conv2d(Tensor input, Tensor offset) -> Tensor")
    library.impl("deform_conv2d", lambda x, offset: x * offset, "CompositeExplicitAutograd")
    model = Call(lambda x: torch.ops.torchvision.deform_conv2d(x, x.sin()))
    (barrier,) = fxstream.analyze(model, 16).barriers
    assert barrier.reason == "reads positions that depend on the data"
    model = Call(lambda x: nn.functional.grid_sample(x, x[:, :2].movedim(1, 3), align_corners=False))
    assert fxstream.analyze(model, 16).barriers[0].reason == "reads positions that depend on the data"
