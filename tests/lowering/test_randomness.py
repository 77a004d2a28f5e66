"""Random draws inside the stream: one mask per image, whatever the tiling; a seed gives the same step again."""

import copy
import dataclasses
import math

import pytest
import torch
import torch.nn.functional as F
from compare import assert_same, captures, integer_image, make_integer, replan
from small_networks import Function
from timm.layers import DropPath
from torch import nn
from torchvision.ops import StochasticDepth

import fxstream
from fxstream.tools.check import step

ONCE = {
    "dropout of channels": nn.Dropout2d(0.5),
    "stochastic depth per sample": StochasticDepth(0.5, "row"),
    "stochastic depth per batch": StochasticDepth(0.5, "batch"),
    "drop path": DropPath(0.5),
}
"""Draws per sample or channel: those of the plain model."""
ELEMENTS = {
    "dropout": nn.Dropout(0.5),
    "dropout in place": nn.Dropout(0.5, inplace=True),
}


def residual(drop: nn.Module) -> nn.Module:
    def forward(m, x):
        x = m.a(x)
        return m.c(x + m.drop(m.b(x)))

    parts = {"a": nn.Conv2d(2, 4, 3, padding=1), "b": nn.Conv2d(4, 4, 3, padding=1), "c": nn.Conv2d(4, 2, 3)}
    return make_integer(Function(forward, drop=drop, **parts)).train()


def seeded(module, model, image, seed=3):
    torch.manual_seed(seed)
    return step(module, model, [image])


def compiled(model, **options):
    own = copy.deepcopy(model)
    return fxstream.compile(own, **options), own


def assert_nothing_is_whole(module) -> None:
    assert [v for v in module.verdicts if v.kind.value in ("global", "no rule")] == []


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("name", ONCE)
def test_what_is_drawn_once_is_what_the_plain_model_draws(name, batch):
    model, image = residual(ONCE[name]), integer_image(batch, 2, 20, 23)
    wanted = seeded(model, model, image)
    for tile, segments in ((9, 1), (9, None), (14, 2)):
        module, own = compiled(model, tile=tile, segments=segments, verify=(tile, segments) == (9, 1))
        assert_same(seeded(module, own, image), wanted, 0.0)
        assert all(report.agrees for report in module.probe)


@pytest.mark.parametrize("name", ELEMENTS)
def test_one_mask_whatever_the_tiling(name):
    model, image = residual(ELEMENTS[name]), integer_image(3, 2, 20, 23)
    steps = []
    for tile, segments in ((9, 1), (9, 3), (14, 2), ((8, 23), 1), (22, 1)):
        module, own = compiled(model, tile=tile, segments=segments, verify=(tile, segments) == (9, 1))
        steps.append(seeded(module, own, image))
        assert_nothing_is_whole(module)
        assert all(report.agrees for report in module.probe)
        assert max(plan.tile_count for plan in module.plan.segments) > 1
    for other in steps[1:]:
        assert_same(other, steps[0], 0.0)
    assert not torch.equal(seeded(module, own, image, seed=4)["output 0"], steps[0]["output 0"])


def test_draws_are_no_reductions():
    """A stream that ends at reductions over space goes through draws."""
    model, image = residual(nn.Sequential(nn.Dropout(0.5), nn.Dropout2d(0.5))), integer_image(1, 2, 20, 23)
    steps = []
    for global_ops in ("cut", "stream"):
        module, own = compiled(model, tile=9, global_ops=global_ops)
        steps.append(seeded(module, own, image))
        assert_nothing_is_whole(module)
    assert_same(steps[1], steps[0], 0.0)


def test_kept_tiles_have_the_mask_of_recomputed_ones():
    model, image = residual(nn.Dropout(0.5)), integer_image(2, 2, 20, 23)
    module, own = compiled(model, tile=9, segments=2)
    wanted = seeded(module, own, image)
    last = fxstream.inspect(module).last
    plans = tuple(dataclasses.replace(s, kept=s.tile_count // 2) for s in last.plan.segments)
    replan(module, dataclasses.replace(last.plan, segments=plans))
    assert_same(seeded(module, own, image), wanted, 0.0)


def test_every_call_and_every_layer_draws_anew():
    def forward(m, x):
        return m.d(F.relu(m.a(x))), m.d(F.relu(m.a(x)))

    model = Function(forward, a=nn.Conv2d(1, 3, 3), d=nn.Dropout(0.5)).train()
    with torch.no_grad():
        model.a.weight.zero_()
        model.a.bias.fill_(1.0)
    module = fxstream.compile(model, tile=15)
    image = torch.randn(2, 1, 40, 41)
    masks = [mask.bool() for _ in range(2) for mask in module(image)]
    assert max(plan.tile_count for plan in module.plan.segments) > 1
    for i, mask in enumerate(masks):
        for other in masks[:i]:
            same = (mask == other).double().mean().item()
            assert abs(same - 0.5) < 4 * 0.5 / math.sqrt(mask.numel())


def test_training_with_batch_norm_and_several_draws():
    """A whole step: masks, statistics and buffers agree between tilings, also where passes are recomputed."""

    def forward(m, x):
        x = m.d1(F.relu(m.n1(m.a(x))))
        return m.d2(m.n2(m.b(x))).mean((2, 3))

    parts = {
        "a": nn.Conv2d(2, 4, 3),
        "n1": nn.BatchNorm2d(4),
        "d1": nn.Dropout(0.3),
        "b": nn.Conv2d(4, 4, 3),
        "n2": nn.BatchNorm2d(4),
        "d2": nn.Dropout2d(0.4),
    }
    model = Function(forward, **parts).double().train()
    image = torch.randn(3, 2, 22, 25).double().requires_grad_()
    steps = []
    for tile, segments in ((9, 1), (13, None), ((25, 8), 3)):
        module, own = compiled(model, tile=tile, segments=segments, verify=(tile, segments) == (9, 1))
        steps.append(seeded(module, own, image))
        assert_nothing_is_whole(module)
    for other in steps[1:]:
        assert_same(other, steps[0], 1e-10)


def test_draws_at_sizes_and_batches_that_were_not_captured():
    module = fxstream.compile(residual(nn.Sequential(nn.Dropout(0.5), nn.Dropout2d(0.2))), tile=12)
    for shape in ((1, 2, 20, 23), (3, 2, 31, 17), (2, 2, 40, 40)):
        assert module(integer_image(*shape)).shape == (shape[0], 2, shape[2] - 2, shape[3] - 2)
    assert captures(module) == 1


def test_channels_last_and_other_axes():
    for shape, kind in (((2, 2, 50), nn.Conv1d), ((1, 2, 9, 11, 10), nn.Conv3d)):
        model = make_integer(nn.Sequential(kind(2, 3, 3), nn.Dropout(0.5), kind(3, 2, 2))).train()
        image, steps = integer_image(*shape), []
        for tile in (6, 8):
            module, own = compiled(model, tile=tile)
            steps.append(seeded(module, own, image))
        assert_same(steps[1], steps[0], 0.0)
    model = make_integer(
        Function(
            lambda m, x: m.b(m.d(m.a(x).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)),
            a=nn.Conv2d(2, 3, 3),
            d=nn.Dropout(0.5),
            b=nn.Conv2d(3, 2, 2),
        )
    ).train()
    image, steps = integer_image(2, 2, 19, 23), []
    for tile in (8, 12):
        module, own = compiled(model, tile=tile)
        steps.append(seeded(module, own, image))
        assert_nothing_is_whole(module)
    assert_same(steps[1], steps[0], 0.0)


@pytest.mark.parametrize("kind", [nn.Dropout, nn.Dropout2d, nn.AlphaDropout, nn.FeatureAlphaDropout])
@pytest.mark.parametrize("p", [0.0, 1.0])
def test_nothing_and_everything_dropped(kind, p):
    model, image = residual(kind(p)), integer_image(1, 2, 20, 23)
    module, own = compiled(model, tile=9)
    assert_same(seeded(module, own, image), seeded(model, model, image), 0.0)


def map_of(drop: nn.Module, value: float = 2.0, size: int = 120, batch: int = 2) -> torch.Tensor:
    """What a dropout makes of a constant map, streamed."""
    model = nn.Sequential(nn.Conv2d(1, 8, 3), nn.ReLU(), drop).double().train()
    with torch.no_grad():
        model[0].weight.zero_()
        model[0].bias.fill_(value)
    module = fxstream.compile(model, tile=50)
    result = module(torch.zeros(batch, 1, size, size, dtype=torch.double))
    assert max(plan.tile_count for plan in module.plan.segments) > 1
    return result


@pytest.mark.parametrize("p", [0.001, 0.1, 0.5, 0.9])
def test_distribution_of_dropout(p):
    found = map_of(nn.Dropout(p))
    assert torch.allclose(found.unique(), torch.tensor([0.0, 2 / (1 - p)]).double())
    dropped = (found == 0).double().mean().item()
    assert abs(dropped - p) < 4 * math.sqrt(p * (1 - p) / found.numel())


@pytest.mark.parametrize("kind", [nn.AlphaDropout, nn.FeatureAlphaDropout])
def test_alpha_dropout_has_torchs_two_values(kind):
    torch.manual_seed(2)
    wanted = kind(0.4)(torch.full((64, 8, 3, 3), 2.0).double()).unique()
    found = map_of(kind(0.4), batch=12 if kind is nn.FeatureAlphaDropout else 2)
    if kind is nn.AlphaDropout:
        assert abs((found < 1).double().mean().item() - 0.4) < 4 * math.sqrt(0.24 / found.numel())
    assert torch.allclose(found.flatten().sort()[0][[0, -1]], wanted, rtol=1e-12)
    assert len(found.unique()) == 2


def mask_of(seed: int, shape: tuple[int, int, int, int], p: float) -> torch.Tensor:
    """A mask as centred numbers of variance 1."""
    operators, (n, c, h, w) = torch.ops.fxstream, shape
    factor, summand = operators.entry_keys(torch.tensor([seed]), [n, c, 1, 1])
    places = [operators.positions([1, 1, h, w], dim) for dim in (2, 3)]
    kept = operators.dropout(torch.ones(shape), factor, summand, places, p, 1.0, 0.0, 0.0)
    return ((1 - kept).double() - p) / math.sqrt(p * (1 - p))


@pytest.mark.parametrize("p", [0.5, 0.1])
@pytest.mark.parametrize("seed", [0, 1, -(2**62)])
def test_masks_are_independent_of_one_another_and_of_position(seed, p):
    """Means of products are normal with deviation 1 / sqrt(count): neighbours, rows, channels, samples, keys."""
    mask = mask_of(seed, (2, 64, 96, 80), p)
    assert standard(mask) < 4.5
    for dim in range(4):
        for shift in (1, 2) if dim else (1,):
            a, b = mask.narrow(dim, shift, mask.shape[dim] - shift), mask.narrow(dim, 0, mask.shape[dim] - shift)
            assert standard(a * b) < 4.5, f"shift {shift} along dim {dim}"
    square = mask[..., 1:, 1:] * mask[..., :-1, :-1] * mask[..., 1:, :-1] * mask[..., :-1, 1:]
    assert standard(square) < 5
    assert standard(mask * mask_of(seed + 1, (2, 64, 96, 80), p)) < 4.5
    for dims in ((2, 3), (0, 1, 3), (0, 1, 2), (0, 1)):
        sums = mask.sum(dims) / math.sqrt(mask.numel() / mask.sum(dims).numel())
        excess = ((sums**2).sum().item() - sums.numel()) / math.sqrt(2 * sums.numel())
        assert abs(excess) < 5, f"sums over {dims}"


def test_channels_are_pairwise_independent():
    mask = mask_of(5, (1, 256, 64, 64), 0.5).flatten(2)[0]
    products = (mask @ mask.T / math.sqrt(mask.shape[1])).fill_diagonal_(0)
    assert products.abs().max().item() < 6
    assert abs(products.std().item() - 1) < 0.03


def standard(numbers: torch.Tensor) -> float:
    """By how many standard deviations the mean of numbers of variance 1 is from 0."""
    return abs(numbers.mean().item()) * math.sqrt(numbers.numel())


def test_only_the_mask_is_kept_for_backward():
    operators = torch.ops.fxstream
    factor, summand = operators.entry_keys(torch.tensor([5]), [1, 4, 1, 1])
    places = [operators.positions([1, 1, 8, 8], dim) for dim in (2, 3)]
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        operators.dropout(torch.ones(1, 4, 8, 8, requires_grad=True), factor, summand, places, 0.3, 2.0, 0.5, 0.1)
    assert [tensor.dtype for tensor in kept] == [torch.bool]
