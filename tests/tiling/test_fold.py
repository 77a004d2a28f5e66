"""Frozen BatchNorm as a part of the convolution before it: the same results and gradients, and one pass less."""

import copy

import pytest
import torch
from compare import assert_same, integer_image, make_integer, relative_error, step
from torch import nn

import fxstream
from fxstream.machine.meter import measure
from fxstream.planning import plan as planning
from fxstream.runtime.rewrite import StreamedSegment
from fxstream.tiling.fuse import fuse_batch_norms
from fxstream.tiling.parts import streamable_parts
from fxstream.tiling.segment import isolated, make_segment


def streamed(module) -> list[StreamedSegment]:
    return [m for m in fxstream.inspect(module).last.streamed.modules() if isinstance(m, StreamedSegment)]


def code_of(module) -> str:
    return "".join(
        program.code
        for segment in streamed(module)
        for made in segment.stream.schedule.programs
        for program in (made.forward, made.recomputation)
    )


class Branches(nn.Module):
    """Two readers of a convolution that a BatchNorm follows."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.norm, self.b = nn.Conv2d(2, 3, 3, padding=1), nn.BatchNorm2d(3), nn.Conv2d(3, 2, 3)

    def forward(self, x):
        x = self.a(x)
        return self.b(self.norm(x).relu() + x)


def stacked(convolution: nn.Module, norm: nn.Module, last: nn.Module) -> nn.Module:
    return nn.Sequential(convolution, norm, nn.ReLU(), last)


FOLDED = {
    "with a bias": (stacked(nn.Conv2d(2, 3, 3, padding=1), nn.BatchNorm2d(3), nn.Conv2d(3, 2, 3)), 1),
    "without": (stacked(nn.Conv2d(2, 3, 3, bias=False), nn.BatchNorm2d(3), nn.Conv2d(3, 2, 3)), 1),
    "without weights": (stacked(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3, affine=False), nn.Conv2d(3, 2, 3)), 1),
    "strided and grouped": (
        stacked(nn.Conv2d(2, 4, 3, 2, 1, groups=2, bias=False), nn.BatchNorm2d(4), nn.Conv2d(4, 2, 3)),
        1,
    ),
    "at the end": (nn.Sequential(nn.Conv2d(2, 3, 3), nn.ReLU(), nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)), 1),
    "twice": (
        nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3)),
        2,
    ),
    "behind a convolution that is read elsewhere": (Branches(), 0),
    "behind something else": (
        nn.Sequential(nn.Conv2d(2, 3, 3), nn.AvgPool2d(2), nn.BatchNorm2d(3), nn.Conv2d(3, 2, 3)),
        0,
    ),
}


@pytest.mark.parametrize("segments", [1, 2])
@pytest.mark.parametrize("name", FOLDED)
def test_bit_equal_to_the_plain_network(name, segments):
    network, count = FOLDED[name]
    model = make_integer(copy.deepcopy(network)).eval()
    module = fxstream.compile(model, tile=16, segments=segments, verify=segments == 1)
    plain = copy.deepcopy(model)
    image = integer_image(2, 2, 23, 29)
    assert_same(step(module, model, [image]), step(plain, plain, [image]), 0.0)
    assert (".batch_norm.default(" in code_of(module)) == (count == 0)
    with torch.no_grad():
        assert torch.equal(module(image), plain(image))


@pytest.mark.parametrize("axes", [1, 3])
def test_other_numbers_of_axes(axes):
    convolution, norm = ((nn.Conv1d, nn.BatchNorm1d), None, (nn.Conv3d, nn.BatchNorm3d))[axes - 1]
    model = make_integer(stacked(convolution(2, 3, 3), norm(3), convolution(3, 2, 3))).eval()
    module, image = fxstream.compile(model, tile=11, segments=1), integer_image(1, 2, *[18] * axes)
    plain = copy.deepcopy(model)
    assert_same(step(module, model, [image]), step(plain, plain, [image]), 0.0)
    assert ".batch_norm.default(" not in code_of(module)


def test_a_cut_between_them_keeps_both():
    model = make_integer(stacked(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.Conv2d(3, 2, 3))).eval()
    module, plain = fxstream.compile(model, tile=16, segments=("0",)), copy.deepcopy(model)
    image = integer_image(1, 2, 23, 29)
    assert_same(step(module, model, [image]), step(plain, plain, [image]), 0.0)
    assert len(streamed(module)) == 2
    assert ".batch_norm.default(" in code_of(module)


def test_batch_statistics_are_not_folded():
    model = stacked(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.Conv2d(3, 2, 3)).double().train()
    for training, fusions in ((True, 0), (False, 1)):
        graph = fxstream.analyze(model.train(training), 40, channels=2).graph
        (part,) = streamable_parts(graph)
        assert len(fuse_batch_norms(isolated(make_segment(graph, "part", part))).fusions) == fusions


def test_narrow_weights_are_not_rounded_once_more():
    model = stacked(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.Conv2d(3, 2, 3)).bfloat16().eval()
    module = fxstream.compile(model, tile=16, segments=1)
    module(torch.randn(1, 2, 30, 30, dtype=torch.bfloat16))
    assert ".batch_norm.default(" in code_of(module)


def test_whole_segments_fold_too():
    layers = [nn.Conv2d(2, 8, 3, padding=1), nn.BatchNorm2d(8), nn.SiLU()]
    layers += [nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.SiLU(), nn.Conv2d(8, 2, 3, 8)]
    model = nn.Sequential(*layers).double().eval()
    image, plain = torch.randn(1, 2, 64, 64, dtype=torch.float64, requires_grad=True), copy.deepcopy(model)
    everything = fxstream.compile(model, memory="1GiB", verify=False)
    everything(image)
    module = fxstream.compile(model, memory=int(0.65 * everything.plan.prediction.plain_bytes))
    assert_same(step(module, model, [image]), step(plain, plain, [image]), 1e-10)
    assert any(not segment.axes for segment in module.plan.segments), module.plan
    assert ".batch_norm.default(" not in code_of(module)


def test_under_autocast_tiles_are_given_weights_that_are_cast():
    model = stacked(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.Conv2d(3, 2, 3)).eval()
    module, plain = fxstream.compile(model, tile=16, segments=1), copy.deepcopy(model)
    image = torch.randn(1, 2, 40, 40)
    exact = step(*[copy.deepcopy(model).double()] * 2, [image.double()])
    seen = []
    with torch.autocast("cpu", torch.bfloat16):
        module(image)
        (segment,) = streamed(module)
        segment.register_forward_pre_hook(lambda _, given: seen.extend(t.dtype for t in given))
        found, wanted = step(module, model, [image]), step(plain, plain, [image])
    assert seen.count(torch.bfloat16) == 2
    assert module.plan.prediction.peak.folded == 3 * 2 * 3 * 3 * 2
    for name, of in exact.items():
        if of is not None and "grad" in name:
            errors = [relative_error(s[name].double(), of) for s in (found, wanted)]
            assert errors[0] <= 2 * errors[1] + 1e-2, name


def test_nothing_is_kept_for_its_backward():
    """A map less is kept than with the BatchNorm; the prediction knows it."""
    layers = [nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU()]
    model = nn.Sequential(*layers, *copy.deepcopy(layers), nn.AvgPool2d(8)).eval()
    image = torch.randn(1, 4, 128, 128)
    module = fxstream.compile(model, tile=72, segments=1)

    def backward():
        module(image).sum().backward()
        model.zero_grad()

    backward()
    measured = measure(backward).peak_bytes
    assert module.plan.prediction.bytes == pytest.approx(measured, rel=0.05)
    (segment,) = module.plan.segments
    box = 4 * segment.largest(segment.segment.nodes[2])[0] ** 2 * 4
    assert measured < 5 * box  # two that relu keeps, and gradients; two more with the results of the convolutions


def test_gradients_of_parameters_come_once():
    model = stacked(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.Conv2d(3, 2, 3)).eval()
    counts = dict.fromkeys((name for name, _ in model.named_parameters()), 0)
    for name, parameter in model.named_parameters():
        parameter.register_hook(lambda _, name=name: counts.update({name: counts[name] + 1}))
    fxstream.compile(model, tile=16)(torch.randn(1, 2, 40, 40)).sum().backward()
    assert set(counts.values()) == {1}


def test_predictions_count_the_folded_weights():
    model = stacked(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.Conv2d(3, 2, 3)).eval()
    plan = fxstream.plan(model, 200, channels=2, tile=64, segments=1)
    assert isinstance(plan, planning.Plan)
    assert plan.prediction.peak.folded == 3 * 2 * 3 * 3 * 4
    assert "folded weights 216 B" in str(plan)
