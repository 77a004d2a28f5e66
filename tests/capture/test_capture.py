"""Capture: one graph for every image and batch size, the model's own tensors, no in-place operators."""

import collections
import copy

import pytest
import torch
import torch.nn.functional as F
from compare import assert_same, integer_image, make_integer, step
from small_networks import Function
from torch import nn

import fxstream
from fxstream.capture import capture
from fxstream.compiler import pipeline
from fxstream.graph.effects import mutated_inputs
from fxstream.graph.user_code import module_path

BATCH_NORM = ("running_mean", "running_var", "weight", "bias")


class Sized(nn.Module):
    """Every way in which a size gets into a graph of an ordinary network."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = (
            nn.Conv2d(2, 4, 3, padding=1),
            nn.Conv2d(4, 4, 3, stride=2, padding=1),
            nn.Conv2d(8, 2, 3),
        )
        self.head = nn.Linear(2, 3)

    def forward(self, x):
        n, _, h, w = x.shape
        skip = self.a(x)
        x = self.b(skip)
        x = x.view(n, 2, 2, *x.shape[2:]).transpose(1, 2).reshape(n, 4, *x.shape[2:])
        x = F.interpolate(x, size=skip.shape[-2:])
        x = self.c(torch.cat([x, skip], 1))
        return self.head(x.reshape(n, 2, (h - 2) * (w - 2)).mean(-1))


@pytest.fixture
def captures(monkeypatch):
    """How often a model was captured."""
    count = collections.Counter()

    def counted(*args):
        count["captures"] += 1
        return capture.capture_graph(*args)

    monkeypatch.setattr(pipeline, "capture_graph", counted)
    return count


def check(module, model, *shape):
    image = integer_image(*shape)
    assert_same(step(module, model, [image]), step(model, model, [image]), 1e-12)


def test_one_capture_serves_every_size_and_batch(captures):
    model = make_integer(nn.Sequential(nn.Conv2d(2, 3, 3), nn.ReLU(), nn.Conv2d(3, 3, 3)))
    module = fxstream.compile(model, tile=12)
    for shape in [(1, 2, 20, 21), (3, 2, 20, 21), (1, 2, 33, 18), (2, 2, 9, 50), (1, 2, 8, 8)]:
        check(module, model, *shape)
    assert captures["captures"] == 1


def test_constants_that_move_with_the_size(captures):
    model = make_integer(Sized())
    module = fxstream.compile(model, tile=26)
    for shape in [(1, 2, 40, 44), (3, 2, 36, 40), (2, 2, 64, 28)]:
        check(module, model, *shape)
    assert captures["captures"] == 1


class AtHalf(nn.Module):
    """A loss over a target at half of the image's resolution, divided by the pixels of the image."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 2, 3, 2, 1))

    def forward(self, image, target):
        return (self.net(image) - target).square().sum() / (image.shape[2] * image.shape[3])


@pytest.mark.parametrize("first", [40, 45])
def test_a_target_at_half_of_the_resolution_is_captured_once(captures, first):
    model = AtHalf().double()
    module = fxstream.compile(model, tile=16, verify=False)
    for size in (first, 51, 60, 77):
        image, target = (
            torch.randn(1, 3, size, size).double(),
            torch.randn(1, 2, -(-size // 2), -(-size // 2)).double(),
        )
        assert torch.allclose(module(image, target), model(image, target), rtol=1e-12)
    assert captures["captures"] == 1


class Bound(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.head = nn.Conv2d(2, 3, 3), nn.Linear(3 * 18 * 18, 2)

    def forward(self, x):
        return self.head(self.conv(F.relu(self.conv(x)[:, :2])).flatten(1)) if x.shape[-1] == 22 else x


def test_a_model_bound_to_its_size_is_captured_for_it_and_says_so_once(captures):
    model = make_integer(Bound())
    module = fxstream.compile(model, tile=14)
    with pytest.warns(fxstream.StreamingWarning, match="bound to the size of its input"):
        check(module, model, 1, 2, 22, 22)
    check(module, model, 1, 2, 22, 22)
    check(module, model, 2, 2, 22, 22)
    assert captures["captures"] == 2


class Branching(nn.Module):
    """Takes another path, or another constant, at sizes that no capture has looked at."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(2, 2, 3), nn.Conv2d(2, 2, 3)

    def forward(self, x):
        x = F.relu(self.a(x))
        if x.shape[-1] > 300:
            x = -x
        return self.b(x[:, :, : min(x.shape[2], 200)])


def test_a_branch_on_the_size_is_seen_at_every_size(captures):
    model = make_integer(Branching())
    module = fxstream.compile(model, tile=40, segments=1)
    check(module, model, 1, 2, 50, 60)
    check(module, model, 1, 2, 60, 50)
    assert captures["captures"] == 1
    check(module, model, 1, 2, 50, 310)
    assert captures["captures"] == 2
    check(module, model, 1, 2, 250, 45)
    check(module, model, 2, 2, 70, 45)
    assert captures["captures"] == 3


def test_recapture_when_mode_structure_or_type_changes(captures):
    model = nn.Sequential(nn.Conv2d(2, 3, 3), nn.Dropout(0.0), nn.Conv2d(3, 2, 3))
    module, image = fxstream.compile(model, tile=12), torch.randn(1, 2, 20, 20)
    for change in (lambda: None, module.eval, module.train, module.double):
        change()
        module(image.to(model[0].weight.dtype))
    assert captures["captures"] == 3


def test_tensors_are_the_models_own_and_names_are_the_users():
    model = nn.Sequential(collections.OrderedDict(stem=nn.Conv2d(2, 3, 3), bn=nn.BatchNorm2d(3))).eval()
    captured, _ = capture.capture(model, (torch.randn(1, 2, 9, 9),), {})
    assert captured.tensors == ("stem.weight", "stem.bias", *(f"bn.{name}" for name in BATCH_NORM))
    assert [module_path(n) for n in captured.graph.nodes if n.op == "call_function"] == ["stem", "bn"]


def test_source_line_of_the_user():
    verdict = fxstream.analyze(Sized(), 40, channels=2).verdicts[0]
    assert verdict.source.startswith(__file__)


class InPlace(nn.Module):
    """In-place operators of every kind; the last one changes a view of a tensor that is used later."""

    def __init__(self, through_view):
        super().__init__()
        self.conv = nn.Conv2d(2, 4, 3, padding=1)
        self.through_view = through_view

    def forward(self, x):
        x = self.conv(x).add_(2).mul_(3)
        y = x + 1
        x.add_(y).neg_()
        if self.through_view:
            x[:, 0] += y[:, 1]
        return F.max_pool2d(x, 2) + F.relu_(y * 2)[:, :, ::2, ::2]


@pytest.mark.parametrize("through_view", [False, True])
def test_in_place_operators(through_view):
    model = make_integer(InPlace(through_view))
    module = fxstream.compile(model, tile=12, segments=1)
    check(module, model, 2, 2, 20, 24)
    nodes = [n for n in module.graph.nodes if n.op == "call_function"]
    assert not any(mutated_inputs(n) for n in nodes)
    assert not module.plan.is_trivial


def test_capture_allocates_nothing_of_the_images_size():
    model = nn.Sequential(nn.Conv2d(2, 64, 3), nn.ReLU(), nn.Conv2d(64, 2, 3))
    analysis = fxstream.analyze(model, 200_000, channels=2)
    assert analysis.graph.activation_bytes([v.node for v in analysis.verdicts]) > 10**13


def test_the_model_is_not_changed_by_capture():
    model = nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.ReLU())
    before = {n: t.clone() for n, t in model.state_dict().items()}
    fxstream.analyze(model, 32, channels=2)
    assert all(torch.equal(before[n], t) for n, t in model.state_dict().items())
    assert all(p.grad is None and p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("budget", [{"tile": 12}, {"memory": 2**40}])
def test_a_power_of_a_negative_number(budget):
    """In tiles, and where the traced graph runs as it is."""
    model = make_integer(
        Function(lambda m, x: m.a(x) * ((-1) ** torch.arange(4)).view(4, 1, 1), a=nn.Conv2d(2, 4, 3))
    )
    plain, image = copy.deepcopy(model), integer_image(1, 2, 20, 22)
    compiled = fxstream.compile(model, **budget)
    assert_same(step(compiled, model, [image]), step(plain, plain, [image]), 0)
