"""Moments at the end of a span go to what follows where that runs whole."""

import pytest
import torch
from small_networks import Function
from torch import nn

import fxstream
from fxstream.planning.search import Span
from fxstream.planning.spans import with_normalisations_whole
from fxstream.tiling.parts import streamable_parts


@pytest.fixture(scope="module")
def graph():
    """Convolution, moments, map, convolution."""
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Conv2d(2, 1, 3))
    module = fxstream.compile(model, tile=12, verify=False)
    module(torch.randn(1, 1, 20, 20))
    return fxstream.inspect(module).last.analysis.graph


@pytest.mark.parametrize(
    "counts, shared",
    [
        (((), ()), [1, 3]),
        (((2, 2), ()), [1, 3]),
        (((2, 2), (1, 2)), [2, 2]),
        (((), None), [2, 2]),
        (((),), [1]),
    ],
)
def test_moments_follow_what_runs_whole(graph, counts, shared):
    (nodes,) = streamable_parts(graph)
    assert graph[nodes[1]].reduces
    spans = [Span(part, count) for part, count in zip((nodes[:2], nodes[2:]), counts, strict=False)]
    moved = with_normalisations_whole(graph, spans)
    assert [len(span.nodes) for span in moved] == shared
    assert [span.counts for span in moved] == list(counts)
    if len(moved) == 2:
        assert moved[0].nodes + moved[1].nodes == nodes


def test_a_map_is_computed_once_for_the_only_normalisation_of_a_network():
    """As of a decoder of coarse features: beside its widest map there are smaller ones, at which to cut too."""

    def forward(m, x):
        coarse = m.coarse(x)
        fine = nn.functional.interpolate(coarse, scale_factor=4, mode="bilinear")
        return m.last(m.norm(m.wide(torch.cat([fine, fine.sin()], 1))).relu())

    coarse = nn.Sequential(nn.Conv2d(3, 8, 4, 4), *(nn.Conv2d(8, 8, 3, padding=1) for _ in range(200)))
    wide, norm, last = nn.Conv2d(16, 64, 3, padding=1), nn.BatchNorm2d(64), nn.Conv2d(64, 2, 1)
    model = Function(forward, coarse=coarse, wide=wide, norm=norm, last=last)
    plan = fxstream.plan(model, 512, memory=180 * 2**20)
    of_wide = [segment for segment in plan.segments if "conv2d_201" in segment.segment.nodes]
    assert len(of_wide) == 1, plan
