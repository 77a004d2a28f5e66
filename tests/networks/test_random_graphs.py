"""Random graphs as plain data, streamed with tiles down to one pixel, bit-equal on the integer oracle.

Every graph that once failed is in `CORPUS`. The campaign (`-m campaign`) draws thousands.
"""

import math
import warnings

import pytest
import torch
from compare import assert_same, integer_image, step
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from random_graphs import CHANNELS, RandomGraph, far_graphs, graphs, pair, smooth_graphs

import fxstream
from fxstream.tiling import segment_plan


def plain_step(graph, size):
    """The network, its image and one plain step; None where that cannot run or leaves the exact integers."""
    torch.manual_seed(0)
    model, image = RandomGraph(graph), integer_image(2, CHANNELS, *size)
    try:
        wanted = step(model, model, [image])
    except (RuntimeError, ValueError, IndexError):
        return None
    if any(t is not None and (t.numel() == 0 or t.abs().max() > 2**50) for t in wanted.values()):
        return None
    return model, image, wanted


def tolerance(graph) -> float:
    """Nothing, but for normalisations, and for an average pooling and equal maxima: both divide by 3."""
    kinds = {step[0] for step in graph}
    return 1e-10 if "norm" in kinds else 1e-12 if kinds & {"avg_pool", "peak"} else 0.0


def run(graph, size, tile, segments, **options) -> bool:
    """Compare one case; False where the plain network itself cannot run or the case is trivial."""
    plain = plain_step(graph, size)
    if plain is None:
        return False
    model, image, wanted = plain
    for _ in range(6):
        module = fxstream.compile(model, tile=tile, segments=segments, **options)
        try:
            found = step(module, model, [image])
        except fxstream.PlanError as error:
            if error.least_tile is None:
                return False
            tile = max(tile + 1, error.least_tile)
            continue
        assert_same(found, wanted, tolerance(graph))
        return not module.plan.is_trivial
    return False


def run_in_uniform_tiles(graph, size, tile, segments) -> bool:
    """The same in tiles of one shape wherever they are possible, without compilation."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(segment_plan, "MOST_EXTRA", math.inf)
        patch.setattr(segment_plan, "MOST_TRIED", 30)
        patch.setattr(torch, "compile", lambda program, **options: program)
        return run(graph, size, tile, segments, compile_tiles=True, verify=False)


def run_at_sizes(graph, size, tile, segments):
    """One compiled module at four sizes, bit-equal; False where the plain network cannot run."""
    torch.manual_seed(0)
    model = RandomGraph(graph)
    module = fxstream.compile(model, tile=tile, segments=segments, verify=False)
    tiled = False
    for more in [(0, 0), (2, 1), (1, 3), (-1, 2)]:
        plain = plain_step(graph, tuple(max(1, n + m) for n, m in zip(size, more, strict=True)))
        if plain is None:
            continue
        _, image, wanted = plain
        try:
            found = step(module, model, [image])
        except fxstream.PlanError:
            continue
        assert_same(found, wanted, tolerance(graph))
        tiled = tiled or not module.plan.is_trivial
    return tiled


def run_within(graph, size, share) -> bool:
    """The same within a share of the plain network's memory, where the planner chooses segments and tiles."""
    plain = plain_step(graph, size)
    if plain is None:
        return False
    model, image, wanted = plain
    whole = fxstream.compile(model, memory=2**40, verify=False)
    whole(image)
    module = fxstream.compile(model, memory=f"{max(1, int(share * whole.plan.prediction.bytes))}B", verify=False)
    try:
        found = step(module, model, [image])
    except fxstream.PlanError as error:
        module = fxstream.compile(model, memory=f"{error.least_bytes}B", verify=False)
        found = step(module, model, [image])
    assert_same(found, wanted, tolerance(graph))
    return not module.plan.is_trivial


CORPUS = [
    # (graph, size, tile, segments): cases that once failed
    ((("conv", 0, (2, 2, 1, 1), (1, 1), (2, 2), (1, 1)),), (5, 4), 1, 1),
    ((("up", 0, (2, 3)), ("conv", 1, (2, 2, 3, 3), (2, 2), (1, 1), (1, 1))), (7, 5), 3, 1),
    ((("transposed", 0, (2, 2, 1, 2), (3, 3), (1, 0), (2, 1), 1, (1, 1)), ("relu", 1)), (4, 5), 2, 1),
    (
        (
            ("conv", 0, (2, 2, 3, 3), (1, 1), (1, 1), (1, 1)),
            ("max_pool", 1, (2, 2), (2, 2), (1, 0), (1, 1), True),
            ("join", 1, 2, True),
        ),
        (9, 8),
        4,
        1,
    ),
]


VIEWS = ((("stride", 0, 0, 1),), (7, 6), 3, 1)


def test_a_graph_of_views_alone():
    assert run(*VIEWS)


PROBED = [  # cases that the probe once took for a wrong rule
    ((("join", 0, 0, False), ("pad", 1, (0, 0, 1, -1))), (1, 2), 1, 1),
    ((("join", 0, 0, False), ("conv", 1, (2, 2, 1, 1), (1, 2), (0, 1), (1, 1))), (1, 2), 1, 1),
    ((("join", 0, 0, False), ("conv", 1, (2, 2, 1, 2), (1, 1), (0, 1), (1, 2))), (7, 9), 4, 1),
    (
        (
            ("conv", 0, (2, 2, 1, 1), (1, 1), (0, 0), (1, 1)),
            ("transposed", 1, (2, 2, 1, 1), (1, 2), (0, 0), (0, 0), 1, (1, 1)),
        ),
        (5, 6),
        2,
        1,
    ),
    (
        (
            ("relu", 0),
            ("pad", 0, (0, 0, 0, 1)),
            ("conv", 0, (2, 2, 1, 1), (1, 1), (0, 0), (1, 1)),
            ("max_pool", 2, (1, 1), (2, 1), (0, 0), (1, 1), False),
        ),
        (9, 8),
        2,
        1,
    ),
    (
        (
            ("transposed", 0, (2, 2, 1, 2), (1, 3), (0, 0), (0, 0), 1, (1, 2)),
            ("max_pool", 1, (1, 1), (1, 2), (0, 0), (1, 1), False),
        ),
        (9, 8),
        2,
        1,
    ),
    (
        (
            ("join", 0, 0, False),
            ("relu", 0),
            ("relu", 0),
            ("conv", 0, (2, 2, 1, 1), (1, 1), (0, 1), (1, 1)),
            ("shuffle", 0),
            ("join", 0, 4, False),
        ),
        (1, 3),
        1,
        1,
    ),
    ((("join", 0, 0, False), ("join", 0, 0, False), ("shuffle", 1), ("join", 0, 3, False)), (1, 3), 1, 1),
    (
        (
            ("conv", 0, (2, 2, 1, 1), (2, 1), (3, 0), (1, 1)),
            ("join", 0, 0, False),
            ("conv", 0, (2, 2, 1, 1), (1, 1), (0, 0), (1, 1)),
            ("pad", 1, (0, 0, 2, 0)),
            ("join", 0, 0, False),
            ("avg_pool", 0, (1, 1), (1, 1), (0, 0), False, True),
            ("max_pool", 4, (2, 1), (3, 1), (0, 0), (2, 1), False),
        ),
        (16, 1),
        1,
        1,
    ),
]


@pytest.mark.parametrize("graph, size, tile, segments", PROBED)
def test_corpus_of_the_probe(graph, size, tile, segments):
    run(graph, size, tile, segments)


UNTILED = [  # cases that once failed and where nothing can be tiled
    ((("pad", 0, (0, 0, 0, -1)), ("pad", 1, (0, 0, 1, 0))), (1, 3), 1, 1),
    ((("pad", 0, (0, 0, 0, -1)), ("pad", 1, (0, 0, 0, 1))), (1, 3), 1, 1),
]


@pytest.mark.parametrize("case", CORPUS)
def test_corpus(case):
    assert run(*case)


def test_a_crop_to_all_of_a_map_is_that_of_its_own_size():
    """Traces that are the same once captured, each with its size in it: the plain path runs its own."""
    graph = (("total", 0), ("join", 6, 6, True), ("total", 0), ("up", 0, (1, 1)), ("join", 2, 1, False))
    run_at_sizes(graph, (4, 4), 9, 1)


@pytest.mark.parametrize("case", UNTILED)
@pytest.mark.filterwarnings("ignore::fxstream.StreamingWarning")
def test_corpus_of_trivial_cases(case):
    assert not run(*case)


SETTINGS = {"deadline": None, "suppress_health_check": list(HealthCheck), "derandomize": True, "database": None}


def quietly(run, *case):
    """A run without the warnings of what does not stream."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        run(*case)


def counted(run, examples, *strategies):
    """Draw cases, others in each run, and print how many were really tiled."""
    counts = {"drawn": 0, "tiled": 0}

    @settings(max_examples=examples, **SETTINGS | {"derandomize": False})
    @given(st.tuples(*strategies))
    def campaign(case):
        counts["drawn"] += 1
        counts["tiled"] += run(*case)

    quietly(campaign)
    print(counts)


@settings(max_examples=100, **SETTINGS)
@given(graphs, pair(1, 18), st.integers(1, 14), st.sampled_from([1, 1, None]))
def test_random_graphs(graph, size, tile, segments):
    quietly(run, graph, size, tile, segments)


@pytest.mark.campaign
@pytest.mark.parametrize("repeat", range(20))
def test_campaign_of_random_graphs_with_what_reads_far(repeat):
    """A thousand graphs of windows, rolls, flips, attention and the like."""
    counted(run, 1000, far_graphs, pair(1, 20), st.integers(1, 14), st.sampled_from([1, 1, None]))


@settings(max_examples=28, **SETTINGS)
@given(graphs, pair(8, 40), st.integers(3, 24), st.sampled_from([1, 2, None]))
def test_random_graphs_in_uniform_tiles(graph, size, tile, segments):
    quietly(run_in_uniform_tiles, graph, size, tile, segments)


@pytest.mark.campaign
@pytest.mark.parametrize("drawn", [graphs, smooth_graphs, far_graphs], ids=["all", "smooth", "far"])
def test_campaign_of_random_graphs_in_uniform_tiles(drawn):
    """Thousands of graphs."""
    counted(run_in_uniform_tiles, 3000, drawn, pair(5, 40), st.integers(3, 24), st.sampled_from([1, 2, None]))


@settings(max_examples=28, **SETTINGS)
@given(graphs, pair(4, 18), st.integers(2, 14), st.sampled_from([1, None]))
def test_random_graphs_at_four_sizes(graph, size, tile, segments):
    quietly(run_at_sizes, graph, size, tile, segments)


@pytest.mark.campaign
def test_campaign_of_random_graphs_at_four_sizes():
    """Hundreds of graphs, each with one compiled module."""
    counted(run_at_sizes, 500, graphs, pair(4, 30), st.integers(2, 16), st.sampled_from([1, None]))


@settings(max_examples=35, **SETTINGS)
@given(graphs, pair(8, 24), st.floats(0.05, 0.95))
def test_random_graphs_within_a_memory(graph, size, share):
    quietly(run_within, graph, size, share)


@settings(max_examples=18, **SETTINGS)
@given(smooth_graphs, pair(4, 24), st.floats(0.05, 0.95))
def test_random_graphs_with_normalisations_within_a_memory(graph, size, share):
    quietly(run_within, graph, size, share)


@pytest.mark.campaign
def test_campaign_of_random_graphs_with_normalisations_within_a_memory():
    """Hundreds of graphs."""
    counted(run_within, 800, smooth_graphs, pair(4, 40), st.floats(0.05, 0.95))


@pytest.mark.campaign
def test_campaign_of_random_graphs_within_a_memory():
    """Hundreds of graphs."""
    counted(run_within, 800, graphs, pair(8, 40), st.floats(0.05, 0.95))


@pytest.mark.campaign
def test_campaign_of_random_graphs():
    """Thousands of graphs."""
    counted(run, 3000, graphs, pair(1, 24), st.integers(1, 14), st.sampled_from([1, 1, None]))
