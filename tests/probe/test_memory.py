"""The memory of the probe: strips of a part that would need too much are made of halves of it."""

import pytest
import torch
from small_networks import Function
from torch import nn

import fxstream
from fxstream.machine.meter import PeakMemory
from fxstream.probe import probe as probing
from fxstream.probe.probe import probe
from fxstream.probe.strip import make_strip
from fxstream.tiling.parts import streamable_parts


@pytest.fixture
def analysis():
    layers = [nn.Conv2d(3, 16, 3, 2, 1), nn.ReLU(), nn.MaxPool2d(3, 2, 1)]
    layers += [layer for _ in range(6) for layer in (nn.Conv2d(16, 16, 5, padding=2), nn.ReLU())]
    return fxstream.analyze(nn.Sequential(*layers), 400)


def test_strips_take_no_more_than_there_is(analysis, monkeypatch):
    sizes = []

    def watched(*args):
        strip = make_strip(*args)
        sizes.append((strip.bytes, len(strip.part.segment.nodes)))
        return strip

    monkeypatch.setattr(probing, "make_strip", watched)
    (region,) = analysis.regions
    whole = probe(analysis.graph, region.nodes)
    most = max(size for size, _ in sizes)
    assert len(sizes) == 2
    sizes.clear()
    halved = probe(analysis.graph, region.nodes, memory=most // 4)
    run = [nodes for size, nodes in sizes if size <= most // 4 or nodes == 1]
    assert max(run) < len(region.nodes)
    assert halved.agrees, halved
    assert halved.measured == whole.measured == len(region.nodes)


def test_a_wrong_rule_shows_in_halves(analysis):
    from fxstream.geometry.receptive_field import IDENTITY
    from fxstream.rules import register_rule, unregister_rule
    from fxstream.rules.access import Read
    from fxstream.rules.patterns import Pointwise

    @torch.library.custom_op("fxstream_tests::moved", mutates_args=())
    def moved(x: torch.Tensor) -> torch.Tensor:
        return x.roll(1, -1)

    moved.register_fake(torch.empty_like)
    register_rule("fxstream_tests::moved")(
        lambda call: Pointwise(call["x"].dims, (Read("x", call["x"], call["x"].dims, (IDENTITY,) * 2),))
    )
    try:
        model = nn.Sequential(nn.Conv2d(3, 4, 5), Moved(), nn.Conv2d(4, 4, 5))
        graph = fxstream.analyze(model, 64)
        assert probe(graph.graph, graph.regions[0].nodes, memory=1).mismatches
    finally:
        unregister_rule("fxstream_tests::moved")


class Moved(nn.Module):
    def forward(self, x):
        return torch.ops.fxstream_tests.moved(x)


def test_a_part_is_probed_once_whatever_of_it_streams(monkeypatch):
    from fxstream.compiler import pipeline

    probed = []

    def counted(graph, nodes, *rest):
        probed.append(len(nodes))
        return probe(graph, nodes, *rest)

    monkeypatch.setattr(pipeline, "probe", counted)
    model = nn.Sequential(*[layer for _ in range(4) for layer in (nn.Conv2d(3, 3, 5, padding=2), nn.ReLU())])
    compiled = fxstream.compile(model, memory="300KiB")
    covered = set()
    for size in (64, 80, 96, 104):
        with torch.no_grad() if size == 104 else torch.enable_grad():
            compiled(torch.rand(1, 3, size, size))
        covered.add(frozenset(n for s in compiled.plan.segments for n in s.segment.covers))
    assert len(covered) > 1
    assert probed == [8]


def peak_of(analysis, memory, monkeypatch):
    """Bytes of the tensors at the peak of the probe of all parts."""
    peaks = []
    inside = probing._probe

    def counted(*args):
        with PeakMemory() as memory:
            report = inside(*args)
        peaks.append(memory.peak)
        return report

    monkeypatch.setattr(probing, "_probe", counted)
    for part in streamable_parts(analysis.graph):
        report = probe(analysis.graph, part, memory=memory)
        assert report.agrees, report
        assert report.measured == report.nodes
    monkeypatch.setattr(probing, "_probe", inside)
    return max(peaks)


class Decoder(nn.Module):
    """Down and up again, to the size of the map before."""

    def __init__(self, upsampled):
        super().__init__()
        self.upsampled = upsampled
        self.fine, self.coarse = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 64, 3, 2, 1)
        self.last = nn.Conv2d(72, 2, 3, padding=1)

    def forward(self, x):
        fine = self.fine(x).relu()
        return self.last(torch.cat([fine, self.upsampled(self.coarse(fine).relu(), fine.shape[2:])], 1))


UPSAMPLED = {
    "nearest": lambda x, size: nn.functional.interpolate(x, size=size),
    "bilinear": lambda x, size: nn.functional.interpolate(x, size=size, mode="bilinear"),
}


@pytest.mark.parametrize("how", UPSAMPLED)
@pytest.mark.parametrize("memory", [2**16, 2**30])
def test_a_size_from_elsewhere_does_not_make_the_probe_as_large_as_the_image(how, memory, monkeypatch):
    decoder = Decoder(UPSAMPLED[how])
    small = peak_of(fxstream.analyze(decoder, 128), memory, monkeypatch)
    assert peak_of(fxstream.analyze(decoder, 2048), memory, monkeypatch) <= 1.5 * small
    assert small < 2**22


def test_products_of_all_pairs_in_a_window_are_compared_on_few_windows(monkeypatch):
    """Of a volume, 125 pixels each: on nine windows along each axis the products alone take 182 MB."""

    def forward(m, x):
        n, c, d, h, w = x.shape
        y = x.view(n, c, d // 5, 5, h // 5, 5, w // 5, 5).permute(0, 2, 4, 6, 3, 5, 7, 1).reshape(-1, 125, c)
        y = (y @ y.mT).softmax(-1) @ y
        return y.view(n, d // 5, h // 5, w // 5, 5, 5, 5, c).permute(0, 7, 1, 4, 2, 5, 3, 6).reshape(x.shape)

    analysis = fxstream.analyze(Function(forward), inputs=[(1, 2, 50, 50, 50)])
    assert analysis.barriers == ()
    assert peak_of(analysis, 2**30, monkeypatch) < 2**27


def test_operators_are_compared_in_little_more_than_their_weights(monkeypatch):
    """Means over windows are combined on few positions, and kernels in float64 are drawn once."""
    layers = nn.Sequential(nn.Conv2d(3, 512, 1), nn.Conv2d(512, 512, 3, padding=1), nn.AdaptiveAvgPool2d(7))
    weights = sum(weight.nbytes for weight in layers.parameters())
    assert peak_of(fxstream.analyze(layers, 1024), 2**24, monkeypatch) < 4 * weights
