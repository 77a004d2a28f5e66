"""The memory of the probe: strips of a part that would need too much are made of halves of it."""

import pytest
import torch
from torch import nn

import fxstream
from fxstream.probe import probe as probing
from fxstream.probe.probe import probe
from fxstream.probe.strip import make_strip


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
