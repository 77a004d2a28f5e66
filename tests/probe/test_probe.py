"""The probe agrees with true rules, and every seeded fault in a rule makes it disagree."""

import math
import types

import pytest
import torch
import torch.nn.functional as F
from small_networks import Function
from torch import nn

import fxstream
from fxstream.errors import ProbeError
from fxstream.geometry import receptive_field
from fxstream.probe.probe import probe
from fxstream.rules import reductions, register_rule, unregister_rule
from fxstream.tools import zoo


class Everything(nn.Module):
    """Branches, dilation, strides, even and asymmetric kernels, pooling, upsampling, NHWC."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, (7, 4), 2, (3, 1))
        self.pool = nn.MaxPool2d(3, 2, 1)
        self.wide = nn.Conv2d(8, 8, 3, padding=3, dilation=3, groups=4)
        self.down = nn.Conv2d(8, 8, 2, 2)
        self.up = nn.ConvTranspose2d(8, 8, 4, 2, 1)
        self.norm = nn.LayerNorm(8)
        self.mean = nn.AvgPool2d(3, 1, 1, count_include_pad=False)

    def forward(self, x):
        x = F.relu(self.pool(self.stem(x)))
        y = F.interpolate(self.down(x), scale_factor=2)
        x = torch.cat([x, self.wide(x)], 1)[:, 4:12]
        x = self.norm((x + y).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        return self.mean(F.gelu(self.up(F.silu(x))))


def report_of(model, size=200):
    analysis = fxstream.analyze(model, size)
    assert len(analysis.regions) >= 1
    return probe(analysis.graph, analysis.regions[0].nodes)


def frozen(name):
    return fxstream.freeze_batch_norm(zoo.build(name)).train()


def test_every_kind_of_operator():
    report = report_of(Everything())
    assert report.agrees, report
    assert report.measured == report.nodes


@pytest.mark.parametrize(
    "name", ["torchvision/resnet18", "torchvision/mobilenet_v2", "torchvision/squeezenet1_1", "timm/convnext_atto"]
)
def test_networks(name):
    report = report_of(frozen(name), 256)
    assert report.agrees, report
    assert report.measured > 0.95 * report.nodes


@pytest.mark.parametrize("dims", [1, 2, 3])
def test_one_to_three_axes(dims):
    conv, pool = getattr(nn, f"Conv{dims}d"), getattr(nn, f"MaxPool{dims}d")
    model = nn.Sequential(conv(2, 4, 3, 2, 1), nn.ReLU(), pool(3, 2, 1), conv(4, 4, 3, padding=2, dilation=2))
    analysis = fxstream.analyze(model, (60,) * dims, channels=2)
    report = probe(analysis.graph, analysis.regions[0].nodes)
    assert report.agrees, report
    assert report.measured == 4


def test_several_regions_and_inputs():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 4, 3, 2, 1), nn.Conv2d(3, 4, 3, 1, 1)
            self.norm, self.c = nn.GroupNorm(2, 4), nn.Conv2d(4, 4, 5)

        def forward(self, x, y):
            return self.c(self.norm(F.relu(self.a(x)) + self.b(y)))

    model = Two()
    module = fxstream.compile(model, tile=16, segments=1)
    x, y = torch.randn(1, 3, 64, 64), torch.randn(1, 3, 32, 32)
    torch.testing.assert_close(module(x, y), model(x, y))
    (report,) = module.probe  # both sides of the normalisation, and its statistics
    assert report.agrees
    assert report.nodes == report.measured == 8


def test_in_a_tile_of_ones_the_border_fades():
    """Algorithm 2 as printed, in float32: 40 layers of 1/3 take 40 pixels away, the count finds about 25."""
    values, kernel = torch.ones(1, 1, 400), torch.full((1, 1, 3), 1 / 3)
    for _ in range(40):
        values = F.conv1d(values, kernel, padding=1)
    assert int((values[0, 0, :200] < values.max()).sum()) < 30
    report = probe_of_chain(40)
    assert report.agrees
    assert report.measured == 40


def probe_of_chain(layers):
    model = nn.Sequential(*(nn.Conv1d(1, 1, 3, padding=1) for _ in range(layers)))
    analysis = fxstream.analyze(model, (400,), channels=1)
    return probe(analysis.graph, analysis.regions[0].nodes)


def faulty_window(change):
    window = receptive_field.AxisMap.window.__func__

    def wrong(cls, kernel, stride, padding, dilation=1):
        return change(cls, window(cls, kernel, stride, padding, dilation), kernel, stride, padding, dilation)

    return classmethod(wrong)


WINDOW_FAULTS = {
    "halo one short before": lambda cls, m, *w: cls(m.num, m.den, m.first + (w[0] > 1), m.last),
    "halo one short after": lambda cls, m, *w: cls(m.num, m.den, m.first, m.last - (w[0] > 1)),
    "offset shifted on": lambda cls, m, *w: cls(m.num, m.den, m.first + 1, m.last + 1),
    "offset shifted back": lambda cls, m, *w: cls(m.num, m.den, m.first - 1, m.last - 1),
    "dilation forgotten": lambda cls, m, k, s, p, d: cls(s, 1, -p, -p + k - 1),
    "dilation one more": lambda cls, m, k, s, p, d: cls(s, 1, -p, -p + (d + 1) * (k - 1)),
    "stride forgotten": lambda cls, m, k, s, p, d: cls(1, 1, m.first, m.last),
}


@pytest.mark.parametrize("fault", WINDOW_FAULTS)
def test_wrong_windows_are_found(fault, monkeypatch):
    monkeypatch.setattr(receptive_field.AxisMap, "window", faulty_window(WINDOW_FAULTS[fault]))
    report = report_of(Everything())
    assert report.mismatches, report


@pytest.mark.parametrize("fault", ["halo one short before", "offset shifted on", "dilation forgotten"])
def test_a_fault_in_one_deep_operator_is_found_there(fault, monkeypatch):
    def only_dilated(cls, m, k, s, p, d):
        return WINDOW_FAULTS[fault](cls, m, k, s, p, d) if d == 3 else m

    monkeypatch.setattr(receptive_field.AxisMap, "window", faulty_window(only_dilated))
    report = report_of(Everything())
    assert report.mismatches
    assert any(mismatch.module == "wide" for mismatch in report.mismatches)


LARGER = {
    "halo one longer before": lambda cls, m, *w: cls(m.num, m.den, m.first - (w[0] > 1), m.last),
    "halo one longer after": lambda cls, m, *w: cls(m.num, m.den, m.first, m.last + (w[0] > 1)),
    "a dilated window one longer": lambda cls, m, *w: cls(m.num, m.den, m.first, m.last + (w[3] > 1)),
}
"""Claims that hold all that is read, and more: results are right, tiles are larger than they need to be."""


@pytest.mark.parametrize("fault", LARGER)
def test_claims_that_are_too_large_are_found_in_both_directions(fault, monkeypatch):
    monkeypatch.setattr(receptive_field.AxisMap, "window", faulty_window(LARGER[fault]))
    report = report_of(Everything())
    assert {mismatch.direction for mismatch in report.mismatches} >= {"forward", "backward"}, report


@pytest.mark.parametrize("infinity", [0.0, -math.inf])
def test_wrong_fill_of_a_pooling_is_found(monkeypatch, infinity):
    monkeypatch.setattr("fxstream.rules.windowed.math", types.SimpleNamespace(inf=infinity, prod=math.prod))
    report = report_of(nn.Sequential(nn.Conv2d(3, 4, 3), nn.MaxPool2d(3, 2, 1)))
    assert [m.operator for m in report.mismatches] == ["aten::max_pool2d"]
    assert report.mismatches[0].direction == "values"


def test_wrong_divisor_of_a_pooling_is_found(monkeypatch):
    monkeypatch.setattr(fxstream.rules.Average, "counts", lambda self, out, less=0: (1,) * len(out))
    report = report_of(Everything())
    assert {m.operator for m in report.mismatches} == {"aten::avg_pool2d"}


def test_wrong_crop_of_an_upsampling_is_found(monkeypatch):
    produce = fxstream.rules.OutputSpan.of

    def late(self, read):
        found = produce(self, read)
        return type(found)(found.start + 1, found.stop + 1)

    monkeypatch.setattr(fxstream.rules.OutputSpan, "of", late)
    assert report_of(Everything()).mismatches


def equally(partials, counts):
    """The maximum of the maxima of tiles, of which each that attains it weighs the same."""
    return partials.double()[:, 0].amax(0)


def detached(partials, counts):
    return reductions._maxima(partials.detach(), counts)


@pytest.mark.parametrize("combine", [equally, detached])
def test_wrong_gradient_of_a_combined_result_is_found(combine, monkeypatch):
    """A maximum that several tiles attain: its value is right, and its gradient is not."""
    model = Function(lambda m, x: m.a(x).relu().amax((2, 3)), a=nn.Conv2d(3, 4, 3)).double()
    image = torch.randn(1, 3, 40, 40).double()
    fxstream.compile(model, tile=20, segments=1)(image)
    monkeypatch.setitem(
        reductions.REDUCERS, "amax", lambda call: reductions.Reducer(reductions.maximum_of, combine)
    )
    with pytest.raises(ProbeError, match="the gradient of the result combined from tiles"):
        fxstream.compile(model, tile=20, segments=1)(image)


library = torch.library.Library("fxstream_probe", "DEF")
library.define("neighbours(Tensor x) -> Tensor")
library.impl("neighbours", lambda x: x + F.pad(x, (0, 1))[..., 1:], "CompositeImplicitAutograd")


class Neighbours(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)

    def forward(self, x):
        return torch.ops.fxstream_probe.neighbours_op(self.conv(x))


@torch.library.custom_op("fxstream_probe::neighbours_op", mutates_args=())
def neighbours_op(x: torch.Tensor) -> torch.Tensor:
    return x + F.pad(x, (0, 1))[..., 1:]


@neighbours_op.register_fake
def _(x):
    return torch.empty_like(x)


neighbours_op.register_autograd(lambda ctx, g: g + F.pad(g, (1, 0))[..., :-1])


@pytest.fixture
def wrong_rule():
    register_rule("fxstream_probe::neighbours_op")(fxstream.rules.pointwise)
    yield
    unregister_rule("fxstream_probe::neighbours_op")


@pytest.mark.usefixtures("wrong_rule")
def test_compile_refuses_a_wrong_rule_of_the_user():
    model, image = Neighbours(), torch.randn(1, 3, 40, 40)
    module = fxstream.compile(model, tile=20, segments=1)
    with pytest.raises(ProbeError, match=r"neighbours_op.*axis 1.*claimed .* measured .*correct what it reads"):
        module(image)
    unverified = fxstream.compile(model, tile=20, segments=1, verify=False)
    assert not torch.equal(unverified(image), model(image))
    assert unverified.probe == ()


def test_once_per_capture(monkeypatch):
    probed = []
    monkeypatch.setattr("fxstream.compiler.pipeline.probe", lambda *a: probed.append(a[2]) or probe(*a))
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3))
    module = fxstream.compile(model, tile=20, segments=1)
    for size in (40, 41, 60):
        module(torch.randn(2, 3, size, size))
    assert probed == ["region 0"]
    module(torch.randn(2, 3, 10, 10))
    assert module.probe == ()


def test_sizes_of_a_reshape_that_are_numbers_are_those_of_a_strip():
    class Bound(nn.Module):
        def __init__(self):
            super().__init__()
            self.position = nn.Parameter(torch.randn(1, 4, 30, 30))
            self.conv = nn.Conv2d(3, 4, 3, padding=1)

        def forward(self, x):
            x = (self.conv(x) + self.position).reshape(1, 4, 30, 30)
            return x.permute(0, 2, 3, 1).reshape(1, 30, 30, 2, 2)

    analysis = fxstream.analyze(Bound(), 30)
    assert analysis.captured.bound
    report = probe(analysis.graph, analysis.regions[0].nodes, "part")
    assert (report.measured, report.unprobed, report.mismatches) == (5, "", ())


def test_what_cannot_be_measured_is_said():
    class Bound(nn.Module):
        def __init__(self):
            super().__init__()
            self.position = nn.Parameter(torch.randn(1, 4, 30, 30))
            self.conv = nn.Conv2d(3, 4, 3, padding=1)

        def forward(self, x):
            return (self.conv(x) + self.position).expand(1, 4, 30, 30)

    analysis = fxstream.analyze(Bound(), 30)
    report = probe(analysis.graph, analysis.regions[0].nodes, "part")
    assert report.unprobed
    assert not report.agrees
    assert str(report).startswith("part: not probed, ")


def test_operators_that_carry_no_nan_blur():
    class Gate(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3)

        def forward(self, x):
            x = self.conv(x)
            return torch.where(x > 0, x, torch.zeros_like(x)) * (x > 1)

    report = report_of(Gate(), 60)
    assert not report.mismatches, report
    assert report.blurred > 0


def test_leaves_the_model_and_the_process_alone():
    model = frozen("torchvision/resnet18")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    state = torch.get_rng_state()
    report_of(model, 256)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.is_grad_enabled()


@torch.library.custom_op("fxstream_probe::far", mutates_args=())
def far(x: torch.Tensor) -> torch.Tensor:
    return x + F.pad(x, (18, 0))[..., :-18]


@far.register_fake
def _(x):
    return torch.empty_like(x)


def test_a_wrong_rule_that_forgets_a_far_pixel():
    register_rule("fxstream_probe::far")(fxstream.rules.pointwise)
    try:

        class Far(nn.Module):
            def __init__(self):
                super().__init__()
                self.a, self.b = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3)

            def forward(self, x):
                return self.b(torch.ops.fxstream_probe.far(self.a(x)))

        assert any(m.operator == "fxstream_probe::far" for m in report_of(Far(), 100).mismatches)
    finally:
        unregister_rule("fxstream_probe::far")


GATES = {
    "clamp below a level": lambda y: y.clamp(max=0.7),
    "clamp": lambda y: y.clamp(0, 0.6),
    "hardtanh": lambda y: F.hardtanh(y, -0.6, 0.6),
    "softshrink": lambda y: F.softshrink(y, 0.8),
    "relu6": F.relu6,
    "hardswish": F.hardswish,
    "comparison": lambda y: y * (y > 0.1),
    "detach": lambda y: y + y.detach(),
}


class Between(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.a, self.b, self.function = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3), function

    def forward(self, x, *others):
        return self.b(self.function(self.a(x), *others))


@pytest.mark.parametrize("gate", GATES)
def test_gates_that_close_are_no_wrong_claims(gate):
    report = report_of(Between(GATES[gate]), 96)
    assert report.agrees, report
    assert report.blurred <= 1


def agrees_when_streamed(model, *inputs):
    module = fxstream.compile(model, tile=48, segments=1)
    torch.testing.assert_close(module(*inputs), model(*inputs))
    assert module.probe
    assert all(report.agrees for report in module.probe), module.probe


@pytest.mark.filterwarnings("ignore::fxstream.StreamingWarning")
def test_images_of_integers_masks_and_gates_of_a_batch():
    class Scaled(Between):
        def forward(self, x):
            return super().forward(x.float() / 255)

    class Gated(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.gate = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3), nn.Conv2d(4, 4, 1)

        def forward(self, x):
            y = self.a(x)
            return self.b(F.relu(y) * self.gate(y.mean((2, 3), keepdim=True)).sigmoid())

    agrees_when_streamed(Scaled(F.relu), torch.randint(0, 255, (1, 3, 96, 128), dtype=torch.uint8))
    agrees_when_streamed(Gated(), torch.randn(3, 3, 96, 128))
    agrees_when_streamed(Between(torch.mul), torch.randn(1, 3, 96, 128), torch.rand(1, 1, 94, 126) > 0.5)


def test_a_stream_that_is_not_probed_is_told(monkeypatch):
    monkeypatch.setattr("fxstream.probe.probe.make_strip", lambda *a: 1 / 0)
    module = fxstream.compile(Between(F.relu), tile=48, segments=1)
    with pytest.warns(
        fxstream.StreamingWarning, match=r"not probed, it fails .*ZeroDivisionError.* by its rules alone"
    ):
        module(torch.randn(1, 3, 96, 128))
