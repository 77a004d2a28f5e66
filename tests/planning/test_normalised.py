"""Moments at the end of a span go to what follows where that runs whole."""

import pytest
import torch
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
