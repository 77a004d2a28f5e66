"""Models that the probe once took for wrong rules."""

import math

import pytest
import torch
import torch.nn.functional as F
from small_networks import Function
from torch import nn

import fxstream
from fxstream.probe.probe import probe


def network(forward):
    return Function(forward, a=nn.Conv2d(3, 4, 3, padding=1), b=nn.Conv2d(4, 4, 3, padding=1))


def median(m, x):
    y = m.a(x)
    return m.b(torch.where(y > 1e9, torch.full_like(y, math.nan), y))


NAN_OF_ITS_OWN = {
    "a constant": median,
    "a filled mask": lambda m, x: m.b(m.a(x).masked_fill(m.a(x) > 1e9, math.nan)),
    "a pad": lambda m, x: m.b(F.pad(m.a(x), (1, 1, 1, 1), value=math.nan).nan_to_num()),
    "a logarithm of what is negative": lambda m, x: m.b((m.a(x) - 1e3).log()),
    "a root of what is negative": lambda m, x: m.b(torch.nan_to_num((-1 - m.a(x).square()).sqrt(), 1.0)),
}


@pytest.mark.parametrize("name", NAN_OF_ITS_OWN)
def test_nan_of_the_model_is_not_taken_for_that_of_the_probe(name):
    analysis = fxstream.analyze(network(NAN_OF_ITS_OWN[name]), 48)
    report = probe(analysis.graph, analysis.regions[0].nodes)
    assert not report.mismatches, report
    assert not report.unprobed, report


class Pyramid(nn.Module):
    """Maps at strides of 4 to 32, each of which is brought to the finest; `stages` are the way down."""

    def __init__(self):
        super().__init__()
        self.stages = nn.ModuleList(
            nn.Sequential(nn.Conv2d(i, 4, s, s), nn.Conv2d(4, 4, 7, padding=3, groups=4))
            for i, s in ((3, 4), (4, 2), (4, 2), (4, 2))
        )

    def forward(self, x):
        maps = []
        for stage in self.stages:
            x = F.gelu(stage(x))
            maps.append(x)
        y, *coarser = maps
        for one in coarser:
            y = y + F.interpolate(one, size=y.shape[-2:], mode="bilinear")
        return F.gelu(y)


@pytest.mark.parametrize("size", [1024, 1056, 1000])
@pytest.mark.parametrize("skipped", [2, 3])
def test_a_part_that_starts_deep_and_reads_finer_maps(size, skipped):
    """On a strip of another residue the coarsest map is no whole number of times smaller than the finest."""
    analysis = fxstream.analyze(Pyramid(), size)
    nodes = [n for n in analysis.regions[0].nodes if _stage(analysis, n) >= skipped]
    report = probe(analysis.graph, nodes)
    assert not report.mismatches, report
    assert not report.unprobed, report
    if size == 1024:
        assert report.measured == report.nodes


def _stage(analysis, name):
    module = analysis.graph.verdicts[name].module.split(".")
    return int(module[1]) if module[0] == "stages" else 4 if "gelu" not in name else _of_input(analysis, name)


def _of_input(analysis, name):
    return _stage(analysis, analysis.graph.inputs(name)[0])


def test_a_wrong_rule_shows_beside_nan_of_the_model(monkeypatch):
    """What is NaN by itself says nothing of the operators before it."""
    from fxstream.geometry import receptive_field

    analysis = fxstream.analyze(network(NAN_OF_ITS_OWN["a logarithm of what is negative"]), 48)
    window = receptive_field.AxisMap.window

    def narrow(kernel, stride, padding, dilation=1):
        return window(kernel - 1, stride, padding, dilation)

    monkeypatch.setattr(receptive_field.AxisMap, "window", staticmethod(narrow))
    analysis = fxstream.analyze(network(NAN_OF_ITS_OWN["a logarithm of what is negative"]), 48)
    assert probe(analysis.graph, analysis.regions[0].nodes).mismatches


def test_a_constant_that_is_not_a_number_does_not_bind_a_model_to_its_size():
    assert not fxstream.analyze(network(median), 48).captured.bound


class Windows(nn.Module):
    """Windows of 4 x 4 pixels as channels, a function of them, and pixels again between two convolutions."""

    def __init__(self, function):
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)
        self.function = function

    def forward(self, x):
        y = self.a(x).permute(0, 2, 3, 1)
        b, h, w, c = y.shape
        y = y.view(b, h // 4, 4, w // 4, 4, c).permute(0, 1, 3, 2, 4, 5).reshape(-1, 16, c)
        y = self.function(y).view(b, h // 4, w // 4, 4, 4, c).permute(0, 1, 3, 2, 4, 5).reshape(b, h, w, c)
        return self.b(y.permute(0, 3, 1, 2))


OF_WINDOWS = {
    "every pixel": torch.sin,
    "sorted": lambda y: y.sort(1).values,
    "summed up": lambda y: y.cumsum(1),
    "in another order": lambda y: y.index_select(1, torch.arange(15, -1, -1)),
    "halves": lambda y: torch.cat([y[:, 8:], y[:, :8]], 1),
    "mixed": lambda y: y.softmax(1),
}


@pytest.mark.parametrize("name", OF_WINDOWS)
def test_pixels_that_are_channels_of_a_window(name):
    analysis = fxstream.analyze(Windows(OF_WINDOWS[name]), 64)
    report = probe(analysis.graph, analysis.regions[0].nodes)
    assert report.agrees, report
    assert report.measured == report.nodes


def test_heads_of_a_model_for_one_size():
    """Its reshapes have the batch as a number, and the channels of a head as what is left."""

    class Heads(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.last = nn.Conv2d(3, 8, 3, 2, 1), nn.Conv2d(8, 2, 3, 1, 1)
            self.bias = nn.Parameter(torch.randn(1, 2, 1, 144))

        def forward(self, x):
            y = F.relu(self.stem(x))
            batch = y.shape[0]
            heads = F.gelu(y.reshape(batch, 2, -1, 144) + self.bias)
            return self.last(heads.reshape(batch, -1, 12, 12))

    analysis = fxstream.analyze(Heads(), 24)
    assert analysis.captured.bound
    reports = [probe(analysis.graph, region.nodes) for region in analysis.regions]
    assert sum(report.measured for report in reports) >= 4
    assert not [str(mismatch) for report in reports for mismatch in report.mismatches]


def test_a_batch_as_a_number_behind_another_dim():
    """As of queries, keys and values in front of the batch, in a reshape for one image."""

    def forward(m, x):
        x = m.a(x).permute(0, 2, 3, 1)
        n, h, w, c = x.shape
        q, k, v = m.qkv(x).reshape(n, h, w, 3, c).permute(3, 0, 1, 2, 4).reshape(3, 1, h, w, c)[..., :2].unbind(0)
        return (q * k + v).permute(0, 3, 1, 2)

    analysis = fxstream.analyze(Function(forward, a=nn.Conv2d(3, 4, 3, padding=1), qkv=nn.Linear(4, 12)), 32)
    report = probe(analysis.graph, analysis.regions[0].nodes)
    assert not report.unprobed
    assert not report.mismatches
    assert report.measured >= 8


def test_gradients_that_grow_through_many_layers():
    """They would be infinite, and NaN where an operator subtracts them."""

    def forward(m, x):
        y = m.a(x)
        y = y / y.norm(dim=1, keepdim=True)
        for _ in range(20):
            y = (y * 1e3).tanh()
        return m.b(y)

    analysis = fxstream.analyze(network(forward), 32)
    assert probe(analysis.graph, analysis.regions[0].nodes).agrees


def test_frames_of_one_video_that_attend_to_each_other():
    """A reshape for a batch of one takes the frames out of the batch: two videos would be one of more frames."""

    def forward(m, x):
        x = m.a(x)[None].permute(0, 3, 4, 1, 2)
        q, k, v = m.qkv(x).chunk(3, -1)
        y = F.scaled_dot_product_attention(q, k, v)
        return m.b(y.reshape(*x.shape[1:3], -1, 4).permute(2, 3, 0, 1))

    parts = {"a": nn.Conv2d(3, 4, 3, padding=1), "qkv": nn.Linear(4, 12), "b": nn.Conv2d(4, 4, 3, padding=1)}
    analysis = fxstream.analyze(Function(forward, **parts), inputs=[(6, 3, 24, 24)])
    report = probe(analysis.graph, analysis.regions[0].nodes)
    assert not report.mismatches
    assert report.unprobed == "it mixes the images of a batch"


def test_a_table_of_positions_beside_an_image():
    """It has no batch, and is the same for all images: what reads it is measured all the same."""

    def forward(m, x):
        x = m.a(x)
        places = torch.arange(x.shape[2])[:, None] * 0.5 + torch.arange(x.shape[3])[None] * 0.3
        return m.b(x.permute(0, 2, 3, 1) * (places[..., None] * m.scale).cos()).permute(0, 3, 1, 2)

    model = Function(forward, a=nn.Conv2d(3, 4, 3, padding=1), b=nn.Linear(4, 2))
    model.scale = nn.Parameter(torch.rand(4))
    analysis = fxstream.analyze(model, 32)
    report = probe(analysis.graph, analysis.regions[0].nodes)
    assert not report.unprobed
    assert not report.mismatches
    assert report.measured >= 4
