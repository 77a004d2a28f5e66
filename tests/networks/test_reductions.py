"""Feature-map-wide operators, streamed: small modules of every kind, then whole networks in training mode."""

import copy
import dataclasses
import functools

import pytest
import torch
import torch.nn.functional as F
from compare import assert_same, assert_streams, randomise_statistics
from small_networks import Function
from torch import nn

import fxstream
from fxstream.errors import ProbeError
from fxstream.rules import reductions
from fxstream.tiling.parts import streamable_parts, sweeps
from fxstream.tools.check import step
from fxstream.tools.model_spec import load


def image(*shape):
    return torch.randn(shape, dtype=torch.double, requires_grad=True)


def normalised(norm, channels=3, axes=2):
    conv = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[axes - 1]
    return nn.Sequential(
        conv(channels, 6, 3, padding=1), norm, nn.SiLU(), conv(6, 4, 3, stride=2), nn.Tanh(), conv(4, 2, 2)
    )


def squeeze_excite(m, x):
    x = m.a(x)
    return m.c(x * m.up(F.relu(m.down(F.adaptive_avg_pool2d(x, 1)))).sigmoid()).tanh()


def channel_attention(m, x):
    x = F.relu(m.a(x))
    gates = [
        m.up(F.relu(m.down(pooled))) for pooled in (x.mean((2, 3), keepdim=True), x.amax((2, 3), keepdim=True))
    ]
    x = x * sum(gates).sigmoid()
    spatial = torch.cat([x.mean(1, keepdim=True), x.amax(1, keepdim=True)], 1)
    return m.c(x * m.s(spatial).sigmoid())


def response_norm(m, x):
    x = m.a(x)
    norm = x.norm(p=2, dim=(2, 3), keepdim=True)
    return m.c(x + m.gamma * x * norm / (norm.mean(1, keepdim=True) + 1e-6))


def linalg_norm(m, x):
    x = m.a(x)
    return m.c(
        x / torch.linalg.vector_norm(x, dim=(1, 2, 3), keepdim=True) + torch.linalg.vector_norm(x, 1, (2, 3), True)
    )


def smooth_maximum(m, x):
    x = m.a(x)
    return m.c(x) * torch.logsumexp(x, (2, 3)).sum(1)[:, None, None, None], x.amin((-1, -2))


def statistics_of_two_maps(m, x):
    a, b = m.a(x), m.b(x)
    return m.c(a * b.sum((2, 3), keepdim=True) + b * a.mean((2, 3), keepdim=True)), (a * b).sum()


def nested(m, x):
    x = m.norm(m.a(x))
    x = F.relu(m.norm2(m.b(x)) + x)
    return m.c(m.norm3(x)).mean((2, 3))


def parts(channels=6):
    return {"a": nn.Conv2d(3, channels, 3, padding=1), "c": nn.Conv2d(channels, 2, 3)}


def gate(channels=6):
    return {"down": nn.Conv2d(channels, 3, 1), "up": nn.Conv2d(3, channels, 1)}


MODULES = {
    "batch norm": lambda: normalised(nn.BatchNorm2d(6)),
    "batch norm without weights and statistics": lambda: normalised(
        nn.BatchNorm2d(6, affine=False, track_running_stats=False)
    ),
    "group norm": lambda: normalised(nn.GroupNorm(3, 6)),
    "group norm without weights": lambda: normalised(nn.GroupNorm(2, 6, affine=False)),
    "instance norm": lambda: normalised(nn.InstanceNorm2d(6)),
    "instance norm with statistics": lambda: normalised(
        nn.InstanceNorm2d(6, affine=True, track_running_stats=True)
    ),
    "squeeze and excitation": lambda: Function(squeeze_excite, **parts(), **gate()),
    "channel attention": lambda: Function(channel_attention, **parts(), **gate(), s=nn.Conv2d(2, 1, 5, padding=2)),
    "response norm": lambda: Function(response_norm, **parts(), gamma=nn.Parameter(torch.randn(6, 1, 1))),
    "norms": lambda: Function(linalg_norm, **parts()),
    "logsumexp and minimum": lambda: Function(smooth_maximum, **parts()),
    "two maps": lambda: Function(statistics_of_two_maps, **parts(), b=nn.Conv2d(3, 6, 5, padding=2)),
    "three norms": lambda: Function(
        nested,
        **parts(),
        norm=nn.BatchNorm2d(6),
        b=nn.Conv2d(6, 6, 3, padding=1),
        norm2=nn.BatchNorm2d(6),
        norm3=nn.GroupNorm(1, 6),
    ),
}


@pytest.mark.parametrize("tile, segments", [(9, None), (14, 1), (30, None)])
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("name", MODULES)
def test_equal_to_the_plain_module(name, batch, tile, segments):
    model = MODULES[name]().double()
    probed = (batch, tile) == (1, 9)
    plan = assert_streams(model, image(batch, 3, 23, 31), tile=tile, segments=segments, verify=probed)
    assert plan.streamed_share > 0.8, plan


@pytest.mark.parametrize("norm", [nn.LayerNorm, nn.RMSNorm])
@pytest.mark.filterwarnings("ignore::fxstream.StreamingWarning")
def test_norm_over_space_with_weights_of_the_map(norm):
    model = normalised(norm((6, 20, 17))).double()
    with torch.no_grad():
        model[1].weight.normal_()
    assert_streams(model, image(2, 3, 20, 17), tile=8)


def test_signals_and_volumes():
    assert_streams(normalised(nn.BatchNorm1d(6), 2, axes=1).double(), image(2, 2, 41), tile=12)
    assert_streams(normalised(nn.GroupNorm(2, 6), 2, axes=3).double(), image(1, 2, 11, 9, 12), tile=7)


@pytest.mark.parametrize("share", [0.9, 0.6, 0.45])
def test_within_a_memory(share):
    layers = [nn.Conv2d(3, 8, 3, padding=1)]
    for _ in range(5):
        layers += [nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1)]
    model = nn.Sequential(*layers).double()
    plain, x = copy.deepcopy(model), image(1, 3, 64, 48)
    whole = fxstream.plan(model.train(), (64, 48), memory=2**40).prediction.bytes
    module = fxstream.compile(model, memory=int(share * whole))
    assert_same(step(module, model, [x]), step(plain, plain, [x]), 1e-10)
    assert module.plan.prediction.bytes <= share * whole
    assert int(model[1].num_batches_tracked) == 1
    assert share < 0.9 or any(not segment.axes for segment in module.plan.segments)


@pytest.mark.parametrize("global_ops", ["auto", "cut"])
def test_cumulative_averages(global_ops):
    """Momentum None: also where the statistics are of a vector, and where they end the stream."""

    def forward(m, x):
        return m.head(m.a(x).mean((2, 3)))

    body = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, momentum=None), nn.ReLU(), nn.Conv2d(4, 4, 3, bias=False)
    )
    model = Function(forward, a=body, head=nn.BatchNorm1d(4, momentum=None)).double()
    plain = copy.deepcopy(model)
    module = fxstream.compile(model, tile=14, global_ops=global_ops)
    for _ in range(3):
        x = image(3, 3, 23, 31)
        assert_same(step(module, model, [x]), step(plain, plain, [x]), 1e-9)
    assert model.head.momentum is None
    assert int(model.head.num_batches_tracked) == 3
    assert_same(step(module.eval(), model, [x]), step(plain.eval(), plain, [x]), 1e-9)  # it takes no average now


def test_statistics_over_processes_are_refused(monkeypatch):
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda group=None: 2)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.SyncBatchNorm(4))
    with pytest.raises(
        fxstream.CaptureError, match=r"`1` \(SyncBatchNorm\) takes its statistics over all processes"
    ):
        fxstream.compile(model, tile=14)(torch.randn(1, 3, 30, 30))


def test_first_call_in_inference_mode():
    model, x = MODULES["squeeze and excitation"]().double(), image(1, 3, 23, 31).detach()
    module = fxstream.compile(model, tile=14)
    with torch.inference_mode():
        torch.testing.assert_close(module(x), model(x), rtol=1e-10, atol=1e-12)


@pytest.mark.filterwarnings("ignore::fxstream.StreamingWarning")
def test_a_part_without_its_reductions_is_cut():
    model = MODULES["batch norm"]().double()
    module = fxstream.compile(model, tile=14, global_ops="cut")
    plain, x = copy.deepcopy(model), image(1, 3, 23, 31)
    assert_same(step(module, model, [x]), step(plain, plain, [x]), 1e-10)
    assert not fxstream.inspect(module).last.analysis.graph.reductions()


def test_statistics_are_as_accurate_as_the_plain_ones():
    x = (torch.randn(2, 4, 96, 80, dtype=torch.double) + 1e4).requires_grad_()
    for norm in (nn.BatchNorm2d(4), nn.GroupNorm(2, 4), nn.InstanceNorm2d(4)):
        model = nn.Sequential(norm, nn.Conv2d(4, 4, 3))
        exact = copy.deepcopy(model).double()
        wanted = step(exact, exact, [x])
        found = {}
        for name, run in (
            ("streamed", fxstream.compile(copy.deepcopy(model), tile=32)),
            ("plain", copy.deepcopy(model)),
        ):
            own = run.model if name == "streamed" else run
            found[name] = step(run, own, [x.detach().float().requires_grad_()])
        for key, value in wanted.items():
            if value is not None and value.is_floating_point():
                errors = {k: (f[key].double() - value).norm().item() for k, f in found.items()}
                floor = 1e-6 * value.norm().item()
                assert errors["streamed"] <= 2 * errors["plain"] + floor, (type(norm).__name__, key, errors)


def ten_steps(dtype, streamed):
    """The losses and running statistics of ten steps of SGD on ResNet-18."""
    torch.manual_seed(0)
    model = load("torchvision/resnet18", weights=True).to(dtype).train()
    run = fxstream.compile(model, tile=64, verify=False) if streamed else model
    optimiser = torch.optim.SGD(model.parameters(), 1e-3, momentum=0.9)
    losses = []
    for _ in range(10):
        x, y = torch.randn(4, 3, 97, 112, dtype=torch.double).to(dtype), torch.randint(0, 10, (4,))
        optimiser.zero_grad()
        loss = F.cross_entropy(run(x)[:, :10], y)
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    kept = {k: v.double() for k, v in model.state_dict().items() if "running" in k or "num_batches" in k}
    return torch.tensor(losses, dtype=torch.double), kept


def test_ten_steps_of_training():
    exact, statistics = ten_steps(torch.double, False)
    losses, found = ten_steps(torch.double, True)
    torch.testing.assert_close(losses, exact, rtol=1e-8, atol=0)
    torch.testing.assert_close(found, statistics, rtol=1e-8, atol=1e-10)


@pytest.mark.campaign
def test_ten_steps_of_training_in_single_precision():
    exact, statistics = ten_steps(torch.double, False)
    (plain, plain_statistics), (single, single_statistics) = (
        ten_steps(torch.float, False),
        ten_steps(torch.float, True),
    )
    assert (single - exact).abs().max() <= 4 * (plain - exact).abs().max()
    for name, value in statistics.items():
        errors = [(other[name] - value).norm() for other in (single_statistics, plain_statistics)]
        assert errors[0] <= 4 * errors[1] + 1e-6 * value.norm(), name


class UpDown(nn.Module):
    """A U-Net with BatchNorm; `up` makes the upsampling layer."""

    def __init__(self, axes, up):
        super().__init__()
        conv = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[axes - 1]
        norm = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)[axes - 1]
        pool = (nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d)[axes - 1]
        self.a = nn.Sequential(conv(2, 4, 3, padding=1), norm(4), nn.ReLU())
        self.b = nn.Sequential(pool(2), conv(4, 8, 3, padding=1), norm(8), nn.ReLU())
        self.c = nn.Sequential(pool(2), conv(8, 8, 3, padding=1), norm(8), nn.ReLU())
        self.up_c, self.up_b = up(8, 8), up(8, 4)
        self.d = nn.Sequential(conv(16, 8, 3, padding=1), norm(8), nn.ReLU())
        self.out = nn.Sequential(conv(8, 4, 3, padding=1), norm(4), nn.ReLU(), conv(4, 3, 1))

    def forward(self, x):
        a = self.a(x)
        b = self.b(a)
        c = self.c(b)
        d = self.d(torch.cat([b, self.up_c(c)], 1))
        return self.out(torch.cat([a, self.up_b(d)], 1))


def bilinear(i, o):
    return nn.Sequential(nn.Upsample(scale_factor=2, mode="bilinear"), nn.Conv2d(i, o, 1))


class WaveNet(nn.Module):
    """Gated dilated convolutions on a signal, with a global feature."""

    def __init__(self):
        super().__init__()
        self.first = nn.Conv1d(1, 6, 3, padding=1)
        self.layers = nn.ModuleList(nn.Conv1d(6, 12, 3, padding=d, dilation=d) for d in (1, 2, 4, 8))
        self.norms = nn.ModuleList(nn.BatchNorm1d(6) for _ in range(4))
        self.last = nn.Conv1d(12, 2, 1)

    def forward(self, x):
        x, skips = self.first(x), []
        for layer, norm in zip(self.layers, self.norms, strict=True):
            gate, value = layer(x).chunk(2, 1)
            skips.append(gate.sigmoid() * value.tanh())
            x = norm(x + skips[-1])
        summary = x.mean(-1, keepdim=True).expand_as(x)
        return self.last(torch.cat([sum(skips), summary], 1))


class Decoder(nn.Module):
    """A decoder of latents: residual blocks with GroupNorm, attention in the middle, upsampling."""

    def __init__(self):
        super().__init__()
        self.first, self.norm = nn.Conv2d(4, 8, 3, padding=1), nn.GroupNorm(2, 8)
        self.q, self.k, self.v, self.o = (nn.Conv2d(8, 8, 1) for _ in range(4))
        self.blocks = nn.ModuleList(
            nn.ModuleList([nn.GroupNorm(2, 8), nn.Conv2d(8, 8, 3, padding=1)]) for _ in range(4)
        )
        self.last = nn.Sequential(nn.GroupNorm(4, 8), nn.SiLU(), nn.Conv2d(8, 3, 3, padding=1))

    def block(self, x, i):
        norm, conv = self.blocks[i]
        return x + conv(F.silu(norm(x)))

    def attention(self, x):
        n, c, h, w = x.shape
        y = self.norm(x)
        q, k, v = (f(y).reshape(n, c, h * w).transpose(1, 2) for f in (self.q, self.k, self.v))
        y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(n, c, h, w)
        return x + self.o(y)

    def forward(self, x):
        x = self.attention(self.block(self.first(x), 0))
        for i in (1, 2, 3):
            x = F.interpolate(self.block(x, i), scale_factor=2.0)
        return self.last(x)


class Style(nn.Module):
    """A style-transfer network: reflection padding, InstanceNorm, residual blocks, nearest upsampling."""

    def __init__(self):
        super().__init__()
        self.down = nn.Sequential(*self.layer(3, 6, 9, 1), nn.ReLU(), *self.layer(6, 8, 3, 2), nn.ReLU())
        self.residual = nn.ModuleList(
            nn.Sequential(*self.layer(8, 8, 3, 1), nn.ReLU(), *self.layer(8, 8, 3, 1)) for _ in range(2)
        )
        self.up = nn.Sequential(nn.Upsample(scale_factor=2), *self.layer(8, 6, 3, 1), nn.ReLU())
        self.out = nn.Sequential(nn.ReflectionPad2d(4), nn.Conv2d(6, 3, 9))

    def layer(self, i, o, kernel, stride):
        return nn.ReflectionPad2d(kernel // 2), nn.Conv2d(i, o, kernel, stride), nn.InstanceNorm2d(o, affine=True)

    def forward(self, x):
        x = self.down(x)
        for block in self.residual:
            x = x + block(x)
        return self.out(self.up(x))


NETWORKS = {
    "U-Net, bilinear": (lambda: UpDown(2, bilinear), (2, 2, 44, 36), 24, 0.95),
    "U-Net, transposed": (
        lambda: UpDown(2, lambda i, o: nn.ConvTranspose2d(i, o, 2, 2)),
        (1, 2, 44, 36),
        17,
        0.95,
    ),
    "U-Net, volumes": (
        lambda: UpDown(3, lambda i, o: nn.ConvTranspose3d(i, o, 2, 2)),
        (1, 2, 12, 16, 20),
        11,
        0.95,
    ),
    "WaveNet": (WaveNet, (2, 1, 151), 40, 0.9),
    "decoder with attention": (Decoder, (1, 4, 9, 11), 6, 0.9),
    "style transfer": (Style, (1, 3, 46, 38), 26, 0.95),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_networks_written_here(name):
    build, shape, tile, least_share = NETWORKS[name]
    plan = assert_streams(build().double(), image(*shape), tile=tile)
    assert plan.streamed_share > least_share, plan


def named(name):
    torch.manual_seed(0)
    model = load(name, weights=True).double().train()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0  # the mask of a stream is its own
    return randomise_statistics(model)


TRAINED = {
    "torchvision/resnet50": ((1, 3, 160, 129), 128),
    "torchvision/mobilenet_v3_small": ((2, 3, 193, 224), 192),
    "timm/efficientnet_b0": ((1, 3, 193, 224), 192),
    "timm/regnety_002": ((1, 3, 129, 160), 96),
    "timm/convnextv2_atto": ((1, 3, 256, 288), 256),
    "timm/resnet26t": ((3, 3, 97, 128), 96),
}


def assert_trains(name, shape, **request):
    model = named(name)
    plain, x = copy.deepcopy(model), image(*shape)
    module = fxstream.compile(model, **request)
    torch.manual_seed(1)
    found = step(module, model, [x])
    torch.manual_seed(1)
    assert_same(found, step(plain, plain, [x]), 1e-10)
    return module.plan


IN_CAMPAIGN = {"timm/convnextv2_atto", "timm/efficientnet_b0", "timm/resnet26t"}
"""Of the same make as others."""


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.campaign] * (name in IN_CAMPAIGN)) for name in TRAINED]
)
def test_networks_in_training_mode(name):
    shape, tile = TRAINED[name]
    # On images this small the vectors of squeeze and excitation are a few percent of all results.
    assert assert_trains(name, shape, tile=tile).streamed_share > (0.93 if "regnety" in name else 0.95)


@pytest.mark.campaign
@pytest.mark.parametrize(
    "name, shape, request_",
    [
        ("torchvision/densenet121", (1, 3, 129, 160), {"tile": 128}),
        ("torchvision/densenet121", (3, 3, 161, 129), {"memory": 2**28}),
        ("timm/seresnet50", (1, 3, 129, 160), {"tile": 96}),
        ("timm/resnet50_gn", (1, 3, 129, 160), {"tile": 128}),
        ("torchvision/resnet50", (3, 3, 161, 193), {"memory": 300 * 2**20}),
        ("torchvision/fcn_resnet50", (2, 3, 129, 161), {"tile": 128}),
        ("torchvision/deeplabv3_resnet50", (2, 3, 161, 193), {"memory": 450 * 2**20}),
        ("torchvision/lraspp_mobilenet_v3_large", (2, 3, 193, 161), {"tile": 192}),
    ],
)
def test_large_networks_in_training_mode(name, shape, request_):
    assert assert_trains(name, shape, **request_).streamed_share > 0.3


def test_each_position_is_reduced_once():
    model = MODULES["three norms"]().double()
    module = fxstream.compile(model, tile=11, segments=1)
    module(image(1, 3, 23, 31))
    streams = [m.stream for m in fxstream.inspect(module).last.streamed.modules() if hasattr(m, "stream")]
    reduced = [(s, k) for s in streams for k in s.combined]
    assert len(reduced) == 4
    for stream, k in reduced:
        owned = sum(call.positions[k] for call in stream.schedule.tasks)
        assert owned == (21 * 29 if stream.outputs[k].shape == (1, 2) else 23 * 31)


def test_passes_depend_on_earlier_ones_only():
    model = MODULES["three norms"]().double()
    graph = fxstream.analyze(model.train(), (23, 31)).graph
    (part,) = streamable_parts(graph)
    known = set()
    for segment in sweeps(graph, "s", part):
        assert set(segment.covers) <= set(part)
        assert all(graph[output].stage >= len(known) - 1 for output in segment.outputs)
        known |= set(segment.outputs)
    assert {v.node for v in graph.reductions()} <= known


def test_a_wrong_combination_is_found(monkeypatch):
    def forgets_the_counts(others, partials, counts):
        return reductions._moments(others, partials, torch.ones_like(counts))

    real = reductions.moments

    def rule(call):
        return dataclasses.replace(real(call), combine=functools.partial(forgets_the_counts, 1))

    row = fxstream.rules.rule_of(torch.ops.fxstream.moments.default)
    monkeypatch.setattr(
        fxstream.rules._TABLE,
        "_rows",
        {**fxstream.rules._TABLE._rows, row.operator: type(row)(row.operator, row.family, rule)},
    )
    module = fxstream.compile(MODULES["batch norm"]().double(), tile=14)
    with pytest.raises(ProbeError, match="combined from tiles"):
        module(image(1, 3, 23, 31))
