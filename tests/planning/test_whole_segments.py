"""Segments that run whole: what lies between their maps, and what that reads."""

import copy
import itertools

import pytest
import torch
import torch.nn.functional as F
from compare import assert_same
from small_networks import Doubled, Function
from torch import nn

import fxstream
from fxstream.compiler.analysis import analyze
from fxstream.tiling.parts import streamable_parts, whole_segment
from fxstream.tools.check import step


def with_function(m, x):
    x = F.relu(m.a(x))
    return m.c(x + F.relu(m.b(Doubled.apply(x))))


def with_block(m, x):
    x = F.relu(m.a(x))
    with torch.no_grad():
        y = m.b(x).sort(-1).values
    return m.c(x + y)


def with_dropout(m, x):
    return m.c(F.dropout(m.b(m.a(x).sort(-1).values), 0.5))


def network(forward):
    parts = {"a": nn.Conv2d(3, 8, 3, padding=1), "b": nn.Conv2d(8, 8, 3, padding=1)}
    return Function(forward, **parts, c=nn.Conv2d(8, 2, 1)).double()


@pytest.mark.parametrize("forward", [with_function, with_block])
def test_a_stretch_with_code_of_its_own_is_recomputed_exactly(forward):
    """It takes the user's function, or the block, from the module that holds them."""
    model = network(forward)
    most = fxstream.plan(model, 40, memory="1GiB").prediction.plain_bytes
    image = torch.randn(1, 3, 40, 40, dtype=torch.float64, requires_grad=True)
    plain, covered = copy.deepcopy(model), set()
    for share in (0.95, 0.9, 0.8, 0.7):
        compiled = fxstream.compile(copy.deepcopy(model), memory=int(share * most))
        try:
            streamed = step(compiled, compiled.model, [image])
        except fxstream.PlanError:
            continue
        assert_same(streamed, step(plain, plain, [image]), 1e-10)
        covered |= {name for segment in compiled.plan.segments for name in segment.segment.covers}
    assert covered


def test_what_a_stretch_draws_by_size_alone_is_no_part_of_it():
    """The keys of a mask follow from the size of a map in the stretch, not from its values."""
    graph = analyze(network(with_dropout), 32).graph
    parts = streamable_parts(graph)
    segment = whole_segment(graph, "", list(itertools.chain(*parts)))
    assert segment is not None
    assert not any("entry_keys" in name or "randint" in name for name in segment.nodes)
    assert any("dropout" in name for name in segment.nodes)
    assert any("sort" in name for name in segment.nodes)


def test_the_least_memory_is_never_more_than_that_of_the_plain_network():
    """What a convolution reads of a result without tiled dims is one map, also where it is padded."""
    model = network(with_function)
    most = fxstream.plan(model, 96, memory="1GiB").prediction.plain_bytes
    with pytest.raises(fxstream.PlanError) as error:
        fxstream.plan(model, 96, memory="100KiB")
    assert error.value.least_bytes <= most


def test_an_image_on_disk_is_read_by_a_stretch_that_runs_whole(tmp_path):
    """A whole segment has no tiles, whose boxes of the image could be counted."""
    import numpy as np

    model = Function(
        lambda m, x: m.b(F.relu(m.a((x.float() / 255 - m.mean) / m.std)).sort(-1).values),
        a=nn.Conv2d(3, 8, 3, stride=2),
        b=nn.Conv2d(8, 8, 3),
    )
    model.register_buffer("mean", torch.rand(1, 3, 1, 1))
    model.register_buffer("std", torch.rand(1, 3, 1, 1) + 0.5)
    pixels = np.random.default_rng(0).integers(0, 255, (3, 3, 64, 64), dtype=np.uint8)
    source = fxstream.source(pixels, batch=[1])
    most = fxstream.compile(model, memory="1GiB")
    most(source)
    for share in (0.9, 0.8, 0.7, 0.6):
        compiled = fxstream.compile(model, memory=int(share * most.plan.prediction.plain_bytes))
        try:
            assert torch.allclose(compiled(source), model(torch.from_numpy(pixels[1:2])), atol=1e-5)
        except fxstream.PlanError:
            continue


@pytest.mark.filterwarnings("ignore::fxstream.StreamingWarning")
def test_the_share_of_activations_counts_what_has_no_tiled_dims():
    """Half of the work is on windows of pixels that were sorted, without an order in space."""
    layers = [layer for _ in range(4) for layer in (nn.Conv2d(4, 4, 3, padding=1), nn.ReLU())]
    tokens = [layer for _ in range(4) for layer in (nn.Linear(4, 4), nn.ReLU())]

    def forward(m, x):
        y = m.b(m.a(x))
        return m.c(y.permute(0, 2, 3, 1).reshape(y.shape[0], -1, 4).sort(1).values.reshape(-1, 16, 4))

    model = Function(forward, a=nn.Conv2d(3, 4, 3, padding=1), b=nn.Sequential(*layers), c=nn.Sequential(*tokens))
    assert fxstream.plan(model, 64, tile=32).streamed_share < 0.6


def with_a_gate(m, x):
    """A gate of pooled values, whose BatchNorm updates its statistics after the one on the way."""
    x = m.a(x)
    y = F.relu(m.norm(m.b(x)))
    return m.c(y * m.norm_of_gate(m.b(x.mean((2, 3), keepdim=True))).sigmoid())


def test_a_stretch_around_an_effect_that_must_run_in_between():
    """Statistics of the stretch are updated before those of the gate, which it also reads."""
    model = network(with_a_gate).train()
    model.norm, model.norm_of_gate = nn.BatchNorm2d(8).double(), nn.BatchNorm2d(8).double()
    graph = analyze(model, inputs=[(2, 3, 32, 32)]).graph
    (part,) = streamable_parts(graph)
    gate = next(name for name in part if name.startswith("mul"))
    read = set(graph.inputs(gate))
    before = part[: next(i for i, name in enumerate(part) if "mean" in name) + 1]
    assert whole_segment(graph, "", before) is not None
    stretch = [name for name in part if name not in before or name in read]
    assert any("moments" in name for name in stretch)
    assert whole_segment(graph, "", stretch) is None
