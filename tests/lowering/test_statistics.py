"""Statistics, norms and adaptive poolings over space: streamed as reductions, equal to the plain network."""

import functools
import math

import pytest
import torch
import torch.nn.functional as F
from compare import assert_streams, captures, integer_image, make_integer
from small_networks import Function
from torch import nn

import fxstream
from fxstream.rules import Tileability

A = torch.ops.aten
SPACE = [2, 3]


def two_convolutions(axes: int = 2) -> dict[str, nn.Module]:
    kind = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[axes - 1]
    return {"a": kind(2, 4, 3, padding=1), "b": kind(4, 3, 3)}


def around(statistic, axes: int = 2) -> nn.Module:
    """A statistic of a map, and a convolution of the map that it weighs."""

    def forward(m, x):
        h = m.a(x)
        found = statistic(h)
        return m.b(h * found if isinstance(found, torch.Tensor) else h * found[0] + found[1])

    return Function(forward, **two_convolutions(axes)).double()


def assert_reduced(model: nn.Module, image: torch.Tensor, tile, **options) -> None:
    """It streams as the plain model does, and nothing is left that needs the whole map."""
    assert_streams(model, image, tile=tile, **options)
    analysis = fxstream.analyze(model, image.shape[2:], channels=image.shape[1], batch=image.shape[0])
    assert analysis.barriers == ()


STATISTICS = {
    "var": lambda h: A.var.dim(h, SPACE, True, True),
    "var without correction": lambda h: A.var.correction(h, SPACE, correction=0, keepdim=True),
    "var without dims": lambda h: A.var.default(h, False),
    "var over the batch too": lambda h: h.var((0, 2, 3), keepdim=True),
    "var over all but the batch": lambda h: h.var((-1, -2, -3)).view(-1, 1, 1, 1),
    "std": lambda h: A.std.dim(h, SPACE, True, True),
    "std without correction": lambda h: h.std(SPACE, correction=0, keepdim=True),
    "std of everything": lambda h: torch.std(h),
    "var_mean": lambda h: torch.var_mean(h, SPACE, keepdim=True),
    "std_mean": lambda h: torch.std_mean(h, SPACE, correction=0, keepdim=True),
    "norm of order 1": lambda h: A.norm.ScalarOpt_dim(h, 1, SPACE, True),
    "norm of order 2": lambda h: A.norm.ScalarOpt_dim(h, None, [-1, -2], True),
    "norm of everything": lambda h: A.norm.Scalar(h, 2),
    "norm of infinite order": lambda h: torch.linalg.vector_norm(h, math.inf, SPACE, keepdim=True),
}


@pytest.mark.parametrize("batch, size, tile", [(1, (17, 23), 7), (3, (20, 19), 11)])
@pytest.mark.parametrize("name", STATISTICS)
def test_statistics(name, batch, size, tile):
    image = torch.randn(batch, 2, *size).double().requires_grad_()
    assert_reduced(around(STATISTICS[name]), image, tile, verify=batch == 1)


def test_variance_of_the_last_dims_of_channels_last():
    def forward(m, x):
        h = m.a(x).permute(0, 2, 3, 1)
        return m.b((h / h.std((1, 2), keepdim=True)).permute(0, 3, 1, 2))

    image = torch.randn(2, 2, 13, 18).double().requires_grad_()
    assert_reduced(Function(forward, **two_convolutions()).double(), image, 8)


def test_deviation_of_a_constant_has_no_gradient():
    """Every channel is constant where the weights are zero: any rounding between tiles would show."""
    model = Function(lambda m, x: m.a(x).std(SPACE), **two_convolutions()).double()
    with torch.no_grad():
        model.a.weight.zero_()
        model.a.bias.copy_(torch.tensor([0.1, -0.3, 1e5, 0.7]))
    assert_streams(model, torch.rand(1, 2, 21, 23).double().requires_grad_(), tile=7, tolerance=0.0)


@pytest.mark.filterwarnings("ignore::fxstream.StreamingWarning")
@pytest.mark.parametrize("correction", [2, 0.5])
def test_other_corrections_stay_whole(correction):
    model = around(lambda h: h.var(SPACE, correction=correction, keepdim=True))
    assert_streams(model, torch.randn(1, 2, 17, 23).double(), tile=7, at_least_tiles=1)
    kinds = {v.operator: v.kind for v in fxstream.analyze(model, (17, 23), channels=2).barriers}
    assert kinds == {"aten::var": Tileability.REDUCTION}


@pytest.mark.filterwarnings("ignore::fxstream.StreamingWarning")
def test_variance_along_one_of_the_axes_stays_whole():
    model = around(lambda h: h.var(2, keepdim=True))
    assert_streams(model, torch.randn(1, 2, 17, 23).double(), tile=7, at_least_tiles=1)


def test_statistics_in_half_precision():
    """Types are the plain model's; a variance of a billion elements is not one in 8 bits."""
    model = around(lambda h: torch.std_mean(h, SPACE, keepdim=True)).bfloat16()
    image = torch.randn(1, 2, 40, 41).bfloat16()
    found, wanted = fxstream.compile(model, tile=15)(image), model(image)
    assert found.dtype == wanted.dtype == torch.bfloat16
    assert torch.allclose(found, wanted, rtol=0.1, atol=0.1)


@pytest.mark.parametrize("size", [1, 2, 3, 6, (2, 5), (7, 1)])
@pytest.mark.parametrize("batch, extents, tile", [(1, (17, 23), 7), (3, (30, 18), 11), (1, (5, 13), 4)])
def test_means_of_windows(size, batch, extents, tile):
    model = Function(lambda m, x: F.adaptive_avg_pool2d(m.a(x), size), **two_convolutions()).double()
    image = torch.randn(batch, 2, *extents).double().requires_grad_()
    assert_streams(model, image, tile=tile, verify=extents == (17, 23))


@pytest.mark.parametrize("size", [1, 2, 3, (2, 5), (6, 1)])
@pytest.mark.parametrize("batch, extents, tile", [(1, (17, 23), 7), (3, (30, 18), 11), (1, (5, 13), 4)])
def test_maxima_of_windows_with_ties(size, batch, extents, tile):
    """On integers, many of them zero: the gradient goes to torch's pixel and no other."""

    def forward(m, x):
        return F.adaptive_max_pool2d(F.relu(m.a(x)), size, return_indices=True)

    model = make_integer(Function(forward, **two_convolutions()))
    image, probed = integer_image(batch, 2, *extents), extents == (17, 23)
    assert_streams(model, image, tile=tile, tolerance=0.0, verify=probed)


@pytest.mark.parametrize("axes, extents", [(1, (41,)), (3, (9, 13, 8))])
@pytest.mark.parametrize("pool", ["avg", "max"])
@pytest.mark.parametrize("count", [1, 3])
def test_windows_along_any_number_of_axes(pool, axes, extents, count):
    function = getattr(F, f"adaptive_{pool}_pool{axes}d")
    model = Function(lambda m, x: function(m.a(x), count), **two_convolutions(axes))
    image = integer_image(2, 2, *extents)
    assert_streams(make_integer(model), image, tile=5, tolerance=1e-13 if pool == "avg" else 0.0)


def test_everything_that_pools_is_a_reduction():
    def forward(m, x):
        h = F.relu(m.a(x))
        return F.adaptive_avg_pool2d(h, 3), F.adaptive_max_pool2d(h, 2)

    model = Function(forward, **two_convolutions()).double()
    assert_reduced(model, torch.randn(2, 2, 19, 22).double().requires_grad_(), 9)


def test_pyramid_pooling():
    """As in PSPNet: poolings to 1, 2, 3 and 6 windows, each enlarged to the map and joined with it."""

    def forward(m, x):
        h = F.relu(m.a(x))
        pooled = [m.narrow(F.adaptive_avg_pool2d(h, k)) for k in (1, 2, 3, 6)]
        levels = [F.interpolate(p, h.shape[2:], mode="nearest") for p in pooled]
        return m.last(torch.cat([h, *levels], 1))

    parts = two_convolutions() | {"narrow": nn.Conv2d(4, 1, 1), "last": nn.Conv2d(8, 2, 1)}
    assert_streams(Function(forward, **parts).double(), torch.randn(1, 2, 24, 30).double(), tile=12)


def test_windows_at_sizes_that_were_not_captured():
    """One capture serves all sizes: which pixels a window holds is computed from the size at hand."""

    def forward(m, x):
        h = m.a(x)
        return F.adaptive_avg_pool2d(h, 3), F.adaptive_max_pool2d(h, (2, 3)), h.std((2, 3))

    model = Function(forward, **two_convolutions()).double()
    compiled = fxstream.compile(model, tile=9)
    for size in ((17, 23), (31, 12), (20, 20)):
        image = torch.randn(2, 2, *size).double()
        for found, wanted in zip(compiled(image), model(image), strict=True):
            assert torch.allclose(found, wanted, rtol=1e-12, atol=1e-12)
    assert captures(compiled) == 1


def test_nan_and_infinity_stay_in_their_windows():
    model = make_integer(Function(lambda m, x: F.adaptive_avg_pool2d(m.a(x), 4), a=nn.Conv2d(1, 2, 3)))
    image = integer_image(1, 1, 34, 34, requires_grad=False)
    image[0, 0, 3, 9], image[0, 0, 25, 30] = torch.nan, torch.inf
    assert_streams(model, image, tile=11, tolerance=0.0)


@pytest.mark.filterwarnings("ignore::fxstream.StreamingWarning")
def test_many_windows_stay_whole():
    model = Function(lambda m, x: F.adaptive_avg_pool2d(m.a(x), 17), **two_convolutions()).double()
    assert_streams(model, torch.randn(1, 2, 40, 40).double(), tile=17, at_least_tiles=1)
    assert fxstream.analyze(model, 40, channels=2).cut.operator == "aten::adaptive_avg_pool2d"


def test_normalisations_in_a_row():
    """Each reads what the one before it was taken apart to."""
    model = nn.Sequential(
        nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.InstanceNorm2d(4), nn.GroupNorm(2, 4), nn.Conv2d(4, 2, 3)
    )
    assert_streams(model.double().train(), torch.randn(2, 2, 20, 19).double().requires_grad_(), tile=9)


def test_a_reduction_that_only_its_own_map_reads():
    model = around(lambda h: 1 / (1 + h.abs().sum(SPACE, keepdim=True)))
    assert_streams(model, torch.randn(2, 2, 20, 19).double().requires_grad_(), tile=9, segments=1)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("norm", [nn.BatchNorm2d, functools.partial(nn.GroupNorm, 2), nn.InstanceNorm2d])
def test_a_model_without_memory_is_planned_as_one_with(norm, layout):
    plans = []
    for device in ("cpu", "meta"):
        model = nn.Sequential(nn.Conv2d(3, 8, 3), norm(8), nn.ReLU()).to(device).to(memory_format=layout)
        image = torch.empty(1, 3, 64, 64, device=device).to(memory_format=layout)
        plans.append(str(fxstream.plan(model, inputs=[image], tile=32)))
    assert "100% of the activations" in plans[0]
    assert plans[0] == plans[1]


def tokens_normalised(m, x):
    tokens = m.a(x).flatten(2).transpose(1, 2)
    return torch.einsum("btn,bnc->btc", m.norm(m.scores(tokens).transpose(1, 2)), tokens)


@pytest.mark.parametrize("batch", [1, 2])
def test_instance_norm_of_transposed_tokens(batch):
    """The channels are the innermost dim of what is normalised, in tiles of one image too."""
    parts = {"scores": nn.Linear(4, 5), "norm": nn.InstanceNorm1d(5, affine=True)}
    model = Function(tokens_normalised, **two_convolutions(), **parts).double()
    image = torch.randn(batch, 2, 17, 14, dtype=torch.double, requires_grad=True)
    assert_reduced(model, image, tile=9, segments=1)
