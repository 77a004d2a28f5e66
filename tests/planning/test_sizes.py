"""One compiled module at several sizes: a decision made at one is exact at the others."""

import dataclasses
import time

import pytest
import torch
from compare import assert_same, integer_image, make_integer, step
from small_networks import Function, conv
from torch import nn

import fxstream
from fxstream.io.inputs import inputs_of
from fxstream.planning import plan as planning
from fxstream.planning.decision import DecidedSpan, Decision, Decisions


def residual(m, x):
    y = m.b(m.norm(m.a(x)).relu()) + m.a(x)
    return m.last(torch.cat([y, m.up(m.down(y))], 1))


def network():
    parts = {"a": conv(2, 4, padding=1), "norm": nn.BatchNorm2d(4).eval(), "b": conv(4, 4, padding=1)}
    parts |= {"down": conv(4, 4, 2, stride=2), "up": nn.ConvTranspose2d(4, 4, 2, 2), "last": conv(8, 2)}
    torch.manual_seed(0)
    return make_integer(Function(residual, **parts))


def deep(layers=8):
    torch.manual_seed(0)
    blocks = [m for _ in range(layers) for m in (conv(8, 8, padding=1), nn.ReLU())]
    return make_integer(nn.Sequential(conv(2, 8), nn.ReLU(), *blocks[:4], conv(8, 8, stride=2), *blocks[4:]))


@pytest.fixture
def searches(monkeypatch):
    """How often the planner searched."""
    counted = []
    real = planning._searched
    monkeypatch.setattr(planning, "_searched", lambda *a: counted.append(a) or real(*a))
    return counted


def compiled_within(model, image, share, **options):
    whole = fxstream.plan(model, inputs=[image], memory=2**40).prediction.plain_bytes
    return fxstream.compile(model, memory=int(share * whole), verify=False, **options)


SIZES = [(64, 64), (62, 66), (60, 66), (61, 65)]


def test_a_decision_is_exact_at_other_sizes_within_a_memory(searches, monkeypatch):
    monkeypatch.setattr("fxstream.planning.decision.TOLERANCE", 2.0)  # on images this small a tile more is dear
    model = deep()
    module = compiled_within(model, integer_image(1, 2, *SIZES[0]), 0.5)
    searches.clear()
    for size in SIZES:
        image = integer_image(1, 2, *size)
        assert_same(step(module, model, [image]), step(model, model, [image]), 0.0)
        assert module.plan.segments
    assert len(searches) == 1


@pytest.mark.parametrize(
    "sizes", [[(24, 24), (26, 22), (32, 26), (22, 24)], [(30, 30), (34, 32), (28, 40), (8, 10)]]
)
def test_a_decision_is_exact_at_other_sizes_with_a_tile(sizes):
    model = network()
    module = fxstream.compile(model, tile=14, verify=False)
    for size in sizes:
        image = integer_image(2, 2, *size)
        assert_same(step(module, model, [image]), step(model, model, [image]), 0.0)


def test_a_larger_image_that_does_not_fit_is_searched(searches):
    model = deep()
    module = compiled_within(model, integer_image(1, 2, 48, 48), 0.6)
    searches.clear()
    for size in (48, 64):
        module(integer_image(1, 2, size, size))
    assert len(searches) == 2
    assert module.plan.prediction.bytes <= fxstream.inspect(module).options.request.memory


def test_a_saved_decision_needs_no_search(searches):
    model, image = deep(), integer_image(1, 2, *SIZES[0])
    module = compiled_within(model, image, 0.5)
    module(image)
    decision = Decision.from_json(module.plan.decision.to_json())
    assert decision == module.plan.decision
    assert "tiles of" in str(decision)
    again = compiled_within(model, image, 0.5, plan=decision)
    searches.clear()
    for size in (SIZES[0], SIZES[2]):
        image = integer_image(1, 2, *size)
        assert_same(step(again, model, [image]), step(model, model, [image]), 0.0)
        assert again.plan.decision == decision
    assert not searches


def test_a_decision_of_another_network_is_refused():
    decision = Decision((DecidedSpan("conv9", "relu9", ((8, 8),)),))
    with pytest.raises(fxstream.PlanError, match="another network"):
        compiled_within(deep(), integer_image(1, 2, 64, 64), 0.5, plan=decision)(integer_image(1, 2, 64, 64))
    with pytest.raises(fxstream.InputError, match="decision of a plan"):
        fxstream.compile(deep(), plan="plan.json")
    with pytest.raises(fxstream.InputError, match=r"to_json wrote; found .none."):
        Decision.from_json("none")


def test_a_decision_holds_near_what_was_searched_and_no_dearer():
    decision, decisions = Decision(()), Decisions()
    assert not decisions.holds(decision, (100, 100), 1.0)
    decisions.add(decision, (100, 100), 1.0)
    assert decisions.holds(decision, (100, 100), 1.03)
    assert not decisions.holds(decision, (100, 100), 1.1)
    assert decisions.holds(decision, (150, 120), 1.8)
    assert not decisions.holds(decision, (250, 100), 2.5)
    assert decisions.holds(decision, (98, 98), 0.96)
    assert not decisions.holds(decision, (70, 80), 0.56)  # with less pixels more may run whole
    saved = Decisions(saved=dataclasses.replace(decision))
    assert saved.holds(saved.saved, (250, 100), 99.0)
    assert list(saved) == [decision]


def test_a_wide_image_is_planned_as_fast_as_a_small_one():
    model = nn.Sequential(conv(2, 8), nn.ReLU(), conv(8, 8, stride=2), nn.ReLU(), conv(8, 2))
    module = fxstream.compile(model, tile=4096, segments=1, verify=False)

    def prepared(*size):
        start = time.process_time()
        fxstream.inspect(module).ready(inputs_of(model, (torch.zeros(1).expand(1, 2, *size),), {}))
        return time.process_time() - start

    prepared(4096, 5000)
    assert prepared(10**6, 10**6) < 0.2
    assert module.plan.segments[0].tile_count > 50000


def test_a_little_larger_image_is_searched_among_the_cuts_of_the_decision(searches):
    model = deep()
    module = compiled_within(model, integer_image(1, 2, 128, 128), 0.5)
    memory = fxstream.inspect(module).options.request.memory
    for size in ((128, 128), (132, 128), (136, 132)):
        searches.clear()
        image = integer_image(1, 2, *size)
        assert_same(step(module, model, [image]), step(model, model, [image]), 0.0)
        assert len(searches) == (size == (128, 128))
        assert module.plan.prediction.bytes <= memory
        alone = fxstream.plan(model, inputs=[image], memory=memory)
        assert module.plan.prediction.seconds <= 1.05 * alone.prediction.seconds
