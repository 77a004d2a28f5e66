"""Each defect that was found, as its smallest case."""

import copy

import pytest
import torch
import torch.nn.functional as F
from compare import assert_same, assert_streams, integer_image, make_integer, relative_error, step
from small_networks import Function, conv
from torch import nn
from torch.utils import _pytree as pytree
from torch.utils.checkpoint import checkpoint
from torchvision.ops import StochasticDepth

import fxstream


def no_grad_average(m, x):
    y = m.a(x)
    with torch.no_grad():
        m.average.mul_(0.5).add_(y.mean((0, 2, 3)))
    return m.b(y)


def detached_average(m, x):
    y = m.a(x)
    m.average.mul_(0.5).add_(y.detach().mean((0, 2, 3)))
    return m.b(F.relu(y))


@pytest.mark.parametrize("forward", [no_grad_average, detached_average])
@pytest.mark.filterwarnings("ignore::fxstream.StreamingWarning")
def test_buffer_updated_without_gradient(forward):
    model = make_integer(Function(forward, a=conv(3, 4), b=conv(4, 4)))
    model.register_buffer("average", torch.zeros(4, dtype=torch.double))
    assert_streams(model, integer_image(1, 3, 40, 40), tile=16, segments=1, tolerance=1e-12, at_least_tiles=1)
    assert not model.average.requires_grad
    copy.deepcopy(model)


def random_in_a_block(m, x):
    y = m.a(x)
    with torch.autocast("cpu", enabled=False):
        s = F.dropout(y.mean((2, 3), keepdim=True), 0.5, True)
    return m.b(y) * s * (torch.rand(4, 1, 1, dtype=y.dtype) > 0.5)


def stochastic_depth(m, x):
    return m.b(m.drop(m.a(x)))


@pytest.mark.parametrize("forward", [random_in_a_block, stochastic_depth])
@pytest.mark.filterwarnings("ignore::fxstream.StreamingWarning")
def test_random_draws_keep_their_order(forward):
    model = Function(forward, a=conv(3, 4), b=conv(4, 4), drop=StochasticDepth(0.5, "row")).double().train()
    plain, image = copy.deepcopy(model), integer_image(4, 3, 30, 40)
    module = fxstream.compile(model, tile=16, segments=1)
    results = []
    for net, owner in ((module, model), (plain, plain)):
        torch.manual_seed(5)
        results.append(step(net, owner, [image]))
    assert_same(*results, 1e-12)


def size_in_a_block(m, x):
    y = m.a(x)
    with torch.no_grad():
        s = y.mean() * 0 + x.shape[2]
    return y * s


SIZED = {
    "in a block": size_in_a_block,
    "as a tensor": lambda m, x: m.a(x) * torch.tensor(x.shape[2], dtype=x.dtype),
    "half the batch": lambda m, x: m.a(x)[: x.shape[0] // 2],
    "centre crop": lambda m, x: m.a(x)[:, :, : min(x.shape[2:]), : min(x.shape[2:])],
    "capped": lambda m, x: m.a(x)[:, :, : min(x.shape[2], 44)],
    "rounded": lambda m, x: m.a(x)[:, :, : (x.shape[2] + 1) // 2],
    "coinciding": lambda m, x: F.interpolate(m.a(x), size=((x.shape[2] + 3) // 4, x.shape[3])),
}


@pytest.mark.filterwarnings("ignore::fxstream.StreamingWarning")
@pytest.mark.parametrize("name", SIZED)
def test_sizes_that_the_model_computes(name):
    model = make_integer(Function(SIZED[name], a=conv(3, 4)))
    module = fxstream.compile(model, tile=16, segments=1)
    for shape in ((2, 3, 30, 40), (4, 3, 50, 44), (2, 3, 43, 31)):
        image = integer_image(*shape)
        assert_same(step(module, model, [image]), step(model, model, [image]), 1e-12)


def test_nearest_upsampling_by_a_factor_that_is_not_the_ratio():
    model = make_integer(nn.Sequential(conv(3, 4, padding=1), nn.Upsample(scale_factor=2.02), conv(4, 4)))
    assert_streams(model, integer_image(1, 3, 40, 40), tile=24, segments=1, tolerance=1e-12)


def test_complex_values_in_the_middle():
    def spectral(m, x):
        f = torch.fft.fft2(m.a(x)) * m.w.view(1, -1, 1, 1)
        return torch.fft.ifft2((f * f + 1) * 2).real

    model = Function(spectral, a=conv(3, 4).double(), w=nn.Parameter(torch.randn(4, dtype=torch.cdouble)))
    module, image = fxstream.compile(model, tile=16, segments=1), integer_image(1, 3, 24, 24)
    module(image).sum().backward()
    found, model.w.grad = model.w.grad, None
    model(image).sum().backward()
    assert (found - model.w.grad).abs().max() <= 1e-10 * model.w.grad.abs().max()


def through_data(m, x):
    y = m.a(x)
    y.data.relu_()
    return m.b(y)


def through_einsum(m, x):
    y = m.a(x)
    torch.einsum("nchw->ncwh", y).add_(1)
    return m.b(y)


def copy_in_place(m, x):
    y = m.a(x)
    y.copy_(y * 2)
    return m.b(y)


def transpose_in_place(m, x):
    y = m.a(x).detach()
    y.transpose_(2, 3)
    return m.b(y)


@pytest.mark.parametrize("forward", [through_einsum, copy_in_place, transpose_in_place])
@pytest.mark.filterwarnings("ignore::fxstream.StreamingWarning")
def test_in_place_through_unusual_ways(forward):
    model = make_integer(Function(forward, a=conv(3, 4), b=conv(4, 4)))
    assert_streams(model, integer_image(1, 3, 40, 40), tile=16, segments=1, tolerance=1e-12, at_least_tiles=1)


def test_data_of_a_computed_tensor_has_no_gradient():
    """A write through it changes the values behind autograd's back, which is no part of a stream."""
    model, image = make_integer(Function(through_data, a=conv(3, 4), b=conv(4, 4))), integer_image(1, 3, 40, 40)
    compiled = fxstream.compile(model, tile=16)
    with pytest.warns(fxstream.StreamingWarning, match="storage is changed in place by `relu_`"):
        streamed = step(compiled, model, [image])
    assert_same(streamed, step(model, model, [image]), 0)


def test_stack_behind_the_last_dim():
    layers = {"a": conv(1, 1, padding=1), "b": conv(1, 1, padding=1)}
    model = make_integer(Function(lambda m, x: torch.stack([m.a(x), m.b(m.a(x))], -1), **layers))
    assert_streams(model, integer_image(1, 1, 40, 40), tile=16, segments=1, tolerance=0.0)


def test_statistics_read_behind_a_batch_norm_in_training():
    def forward(m, x):
        a = m.a(x)
        z = m.bn(a)
        return m.b(F.relu(a) + m.bn.running_mean.view(1, -1, 1, 1)), z

    model = Function(forward, a=conv(3, 4), b=conv(4, 4), bn=nn.BatchNorm2d(4)).double().train()
    assert_streams(model, integer_image(2, 3, 40, 40), tile=16, segments=1, at_least_tiles=1)


def test_detached_output_requires_no_gradient():
    model = make_integer(Function(lambda m, x: (m.b(m.a(x)), m.a(x).detach()), a=conv(3, 4), b=conv(4, 4)))
    module, image = fxstream.compile(model, tile=20, segments=1), integer_image(1, 3, 40, 40)
    found = [output.requires_grad for output in module(image)]
    assert found == [output.requires_grad for output in model(image)]
    assert not module.plan.is_trivial


def test_type_of_the_model_under_autocast():
    model = Function(
        lambda m, x: (lambda y: m.b(y).float().mul(1.001).to(y.dtype))(m.a(x)), a=conv(3, 4), b=conv(4, 4)
    )
    module, image = fxstream.compile(model, tile=16, segments=1), torch.randn(1, 3, 40, 40)
    module(image)
    with torch.autocast("cpu", torch.bfloat16):
        assert module(image).dtype == model(image).dtype == torch.bfloat16
    assert module(image).dtype == torch.float32


def test_arguments_that_are_equal_but_of_other_types():
    model = make_integer(
        Function(lambda m, x, k: m.a(x) * (0.5 if isinstance(k, float) else 3 if k is True else k), a=conv(3, 4))
    )
    module, image = fxstream.compile(model, tile=16, segments=1), integer_image(1, 3, 40, 40)
    for k in (1, True, 1.0):
        assert torch.equal(module(image, k), model(image, k))


def test_changes_of_the_model_between_calls():
    model = make_integer(nn.Sequential(conv(3, 4), nn.ReLU(), conv(4, 4)))
    module, image = fxstream.compile(model, tile=16, segments=1), integer_image(1, 3, 40, 40)
    for change in (
        lambda: None,
        lambda: setattr(model[0], "padding", (1, 1)),
        lambda: model.__setitem__(1, nn.LeakyReLU(0.5)),
        lambda: setattr(model[1], "negative_slope", 2.0),
        lambda: model[0].register_forward_hook(lambda m, i, o: o * 2),
    ):
        change()
        assert_same(step(module, model, [image]), step(model, model, [image]), 0.0)


def test_a_counter_in_forward_counts_and_is_traced_twice():
    class Counting(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.calls = conv(3, 4), 0

        def forward(self, x):
            self.calls += 1
            return F.relu(self.a(x))

    model = Counting()
    module = fxstream.compile(model, tile=16, segments=1)
    for _ in range(4):
        module(torch.randn(1, 3, 40, 40))
    assert model.calls == 4
    assert len(fxstream.inspect(module).calls) == 2  # at its first value, and at any


@pytest.mark.parametrize("dtype", [torch.int64, torch.float16])
def test_average_pooling_of_other_types_at_the_border(dtype):
    def forward(m, x):
        return F.avg_pool2d((x * m.scale).to(dtype), 9, 9, 4, count_include_pad=False)

    model = Function(forward, scale=nn.Parameter(torch.ones(()), requires_grad=False))
    image = torch.full((1, 3, 40, 40), 2000.0)
    found, wanted = fxstream.compile(model, tile=24, segments=1)(image), model(image)
    assert found.dtype == wanted.dtype
    assert relative_error(found, wanted) < 1e-3


@pytest.mark.filterwarnings("ignore::fxstream.StreamingWarning")
def test_a_parameter_read_along_two_alignments():
    def forward(m, x):
        y = m.a(x)
        return y * m.p + (y.permute(0, 2, 3, 1) * m.p).permute(0, 3, 1, 2)

    model = make_integer(Function(forward, a=conv(3, 24, padding=1), p=nn.Parameter(torch.zeros(1, 24, 24))))
    assert_streams(model, integer_image(1, 3, 24, 24), tile=12, segments=1, tolerance=0.0)


@pytest.mark.parametrize(
    "shape", [lambda y: y.unflatten(2, (1, y.shape[2])).squeeze(2), lambda y: y.view(torch.int64).double()]
)
def test_unusual_views(shape):
    model = make_integer(
        Function(lambda m, x: m.b(F.relu(m.a(x)) + shape(m.a(x)) * 0), a=conv(3, 4), b=conv(4, 4))
    )
    assert_streams(model, integer_image(1, 3, 30, 30), tile=16, segments=1, tolerance=1e-12, at_least_tiles=1)


def test_a_tile_that_needs_nothing_of_a_leaf():
    def forward(m, x):
        return m.a(x), F.relu(x)[:, :, :1, :1], F.pad(m.a(x), (0, 2, 0, 0))

    model = make_integer(Function(forward, a=conv(2, 2, 1)))
    image = integer_image(2, 2, 17, 5)
    outputs = pytree.tree_leaves(fxstream.compile(model, tile=30, segments=1)(image))
    assert all(torch.equal(a, b) for a, b in zip(outputs, model(image), strict=True))


def test_sizes_inside_the_stream_do_not_end_a_region():
    """A channel shuffle views its input by its own sizes; these are integers, not barriers."""

    class Shuffle(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3)

        def forward(self, x):
            for part in (self.a, self.b):
                x = part(x)
                n, c, h, w = x.shape
                x = x.view(n, 2, c // 2, h, w).transpose(1, 2).reshape(n, c, h, w)
            return x

    analysis = fxstream.analyze(Shuffle(), 40)
    assert len(analysis.regions) == 1
    assert_streams(make_integer(Shuffle()), integer_image(2, 3, 31, 27), tile=12, tolerance=0.0)


class Reversal(torch.autograd.Function):
    """A gradient that is not the derivative of its forward, and an argument that is no tensor."""

    @staticmethod
    def forward(ctx, x, factor):
        ctx.factor = factor
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad):
        return -ctx.factor * grad, None


class Reversed(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = (nn.Conv2d(2, 2, 3) for _ in range(3))

    def forward(self, x):
        return self.c(Reversal.apply(self.b(torch.relu(self.a(x))), 3.0))


class ReentrantCheckpoint(Reversed):
    def forward(self, x):
        return self.c(checkpoint(self.b, torch.relu(self.a(x)), use_reentrant=True))


@pytest.mark.parametrize("model", [Reversed, ReentrantCheckpoint])
def test_autograd_functions_keep_their_backward(model):
    """Their operators alone were captured: a gradient that the user wrote became another, or none."""
    for grad in (True, False):
        assert_streams(
            make_integer(model()), integer_image(2, 2, 30, 31, requires_grad=grad), tile=16, tolerance=0
        )


def test_torchs_counter_of_operations_works_around_a_step():
    """Its hooks on modules refuse inputs that are leaves, as a recomputed tile's are."""
    from torch.utils.flop_counter import FlopCounterMode

    model = nn.Sequential(nn.Conv2d(2, 4, 3), nn.ReLU(), nn.Conv2d(4, 2, 3))
    module = fxstream.compile(model, tile=12, segments=1, verify=False)
    image = torch.randn(1, 2, 20, 20)
    module(image)
    with FlopCounterMode(display=False) as plain:
        model(image).sum().backward()
    with FlopCounterMode(display=False) as streamed:
        module(image).sum().backward()
    assert plain.get_total_flops() < streamed.get_total_flops() < 2 * plain.get_total_flops()


def test_torchs_counter_of_operations_counts_none_of_the_preparation():
    from torch.utils.flop_counter import FlopCounterMode

    layers = [nn.Conv2d(2, 4, 3), nn.GroupNorm(2, 4), nn.ReLU(), nn.Conv2d(4, 2, 3)]
    module, image = fxstream.compile(nn.Sequential(*layers), tile=12), torch.randn(1, 2, 20, 20)
    counts = []
    for _ in range(2):
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            module(image)
        counts.append(counter.get_total_flops())
    assert module.probe
    assert counts[0] == counts[1] > 0
