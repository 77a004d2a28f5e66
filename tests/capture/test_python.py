"""What Python does in a model's forward happens in every call, and what it has looked at is looked at again.

Each test is one kind of state: a compiled model and its copy take the same calls, with the same changes in
between, and return the same, keep the same, and have the same gradients.
"""

import copy
import dataclasses
import enum
import gc
import random
import types

import numpy
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor

import fxstream

LARGE, SMALL = (1, 2, 26, 30), (2, 2, 9, 11)


class Net(nn.Module):
    """Three convolutions with a function of the module, the image and the features between them."""

    def __init__(self, function, **attributes):
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(2, 3, 3), nn.Conv2d(3, 3, 3), nn.Conv2d(3, 2, 3)
        for name, value in attributes.items():
            setattr(self, name, value)
        self.function = function

    def forward(self, x, *args, **kwargs):
        return self.c(self.function(self, torch.relu(self.b(torch.relu(self.a(x)))), *args, **kwargs))


def flat(result):
    return [t for t in torch.utils._pytree.tree_leaves(result) if isinstance(t, torch.Tensor)]


def same(model, changes=(None, None, None), shapes=(LARGE, SMALL, LARGE), calls=((),), tile=16):
    """Compare a compiled model with a copy of it over calls, each after a change of both."""
    model = model.double()
    plain = copy.deepcopy(model)
    module = fxstream.compile(model, tile=tile, verify=False)
    for i, (change, shape) in enumerate(zip(changes, shapes * len(changes), strict=False)):
        arguments = calls[i % len(calls)]
        image = torch.randn(shape, dtype=torch.double)
        for one in (model, plain):
            if change is not None:
                change(one)
        results = []
        for one in (module, plain):
            torch.manual_seed(i), random.seed(i), numpy.random.seed(i)
            results.append(flat(one(image.clone(), *arguments)))
        for mine, theirs in zip(*results, strict=True):
            assert type(mine) is type(theirs)
            assert torch.allclose(mine, theirs, rtol=1e-10, atol=1e-12), i
        for one in results:
            sum(t.sum() for t in one if t.requires_grad).backward()
        for (name, mine), theirs in zip(model.named_parameters(), plain.parameters(), strict=True):
            assert (mine.grad is None) == (theirs.grad is None), name
            assert mine.grad is None or torch.allclose(mine.grad, theirs.grad, rtol=1e-9, atol=1e-10), name
    return module, model, plain


def warm_up(m, y):
    m.step += 1
    return y * min(1.0, m.step / 4)


def annealed(m, y):
    m.tau *= 0.9
    return y / m.tau


def alternating(m, y):
    m.flip = not m.flip
    return y if m.flip else -y


def averaged(m, y):
    m.mean = 0.9 * m.mean + 0.1 * y.detach().mean()
    return y - m.mean


def counted_in_a_dict(m, y):
    m.state["calls"] = m.state.get("calls", 0) + 1
    return y if m.state["calls"] < 3 else y * 2


@pytest.mark.parametrize(
    ("function", "attributes"),
    [
        (warm_up, {"step": 0}),
        (annealed, {"tau": 1.0}),
        (alternating, {"flip": False}),
        (averaged, {"mean": torch.zeros((), dtype=torch.double)}),
        (counted_in_a_dict, {"state": {}}),
    ],
)
def test_state_that_forward_changes(function, attributes):
    _, model, plain = same(Net(function, **attributes), [None] * 5)
    for name in attributes:
        mine, theirs = getattr(model, name), getattr(plain, name)
        assert type(mine) is type(theirs)
        assert mine == theirs if isinstance(mine, dict) else torch.allclose(*map(torch.as_tensor, (mine, theirs)))


class Kind(enum.Enum):
    ONE, TWO = 1, 2


class Settings:
    scale = 1.0


def set_in(name, key, value):
    return lambda m: getattr(m, name).__setitem__(key, value)


@pytest.mark.parametrize(
    ("function", "attributes", "change"),
    [
        (lambda m, y: y * m.scales[0], {"scales": [1.0, 2.0]}, set_in("scales", 0, 3.0)),
        (lambda m, y: y * m.names["a"]["b"], {"names": {"a": {"b": 2}}}, lambda m: m.names["a"].update(b=5)),
        (lambda m, y: y if m.kind is Kind.ONE else -y, {"kind": Kind.ONE}, lambda m: setattr(m, "kind", Kind.TWO)),
        (lambda m, y: y * m.settings.scale, {"settings": Settings()}, lambda m: setattr(m.settings, "scale", 4.0)),
        (lambda m, y: sum(f(y) for f in m.list), {"list": [torch.sin]}, lambda m: m.list.append(torch.cos)),
        (lambda m, y: y if "on" in m.flags else 2 * y, {"flags": {"on"}}, lambda m: m.flags.discard("on")),
    ],
)
def test_attributes_at_any_depth(function, attributes, change):
    same(Net(function, **attributes), [None, change, None])


class Adapted(nn.Module):
    """A layer with an adapter of low rank, which may be scaled, merged or switched off."""

    def __init__(self, base):
        super().__init__()
        self.base, self.scale, self.merged, self.active = base, 1.0, False, {"default": True}
        out, inner = base.weight.shape[:2]
        self.up, self.down = nn.Parameter(torch.randn(out, 2)), nn.Parameter(torch.randn(2, inner))

    def forward(self, x):
        y = self.base(x)
        if not self.merged and self.active["default"]:
            y = y + self.scale * F.conv2d(x, (self.up @ self.down)[..., None, None])
        return y


def merge(m):
    with torch.no_grad():
        m.adapter.base.weight += m.adapter.scale * (m.adapter.up @ m.adapter.down)[..., None, None]
    m.adapter.merged = True


@pytest.mark.parametrize(
    "change",
    [
        lambda m: setattr(m.adapter, "scale", 0.5),
        merge,
        lambda m: m.adapter.active.update(default=False),
        lambda m: setattr(m, "adapter", m.adapter.base),
    ],
)
def test_adapters(change):
    same(Net(lambda m, y: m.adapter(y), adapter=Adapted(nn.Conv2d(3, 3, 1))), [None, change, None])


def stored(m, y):
    m.features = y
    return y


def listed(m, y):
    m.history.append(y.mean())
    return y


def lazily(m, y):
    if m.buffer is None:
        m.buffer = torch.ones(3, 1, 1, dtype=y.dtype) * 2
    return y * m.buffer


@pytest.mark.parametrize(
    ("function", "attributes"),
    [(stored, {"features": None}), (listed, {"history": []}), (lazily, {"buffer": None})],
)
def test_what_forward_stores_is_a_tensor_of_this_call(function, attributes):
    _, model, plain = same(Net(function, **attributes))
    name = next(iter(attributes))
    mine, theirs = (flat(getattr(one, name)) for one in (model, plain))
    for tensor, wanted in zip(mine, theirs, strict=True):
        assert type(tensor) is torch.Tensor
        assert torch.allclose(tensor, wanted, rtol=1e-10)
        assert tensor.requires_grad == wanted.requires_grad


@pytest.mark.parametrize("kind", ["forward hook", "pre-hook", "a hook that changes", "removed"])
def test_hooks(kind):
    model, seen = Net(lambda m, y: y).double(), []
    hooks = {
        "forward hook": lambda: model.b.register_forward_hook(lambda m, i, o: seen.append(o)),
        "pre-hook": lambda: model.b.register_forward_pre_hook(lambda m, i: seen.append(i[0])),
        "a hook that changes": lambda: model.b.register_forward_hook(lambda m, i, o: o * 2),
        "removed": lambda: model.b.register_forward_hook(lambda m, i, o: o * 3),
    }
    module, plain, image = fxstream.compile(model, tile=16, verify=False), model, torch.randn(LARGE).double()
    before = plain(image)
    module(image)
    handle = hooks[kind]()
    if kind == "removed":
        module(image)
        handle.remove()
        assert torch.allclose(module(image), before)
        return
    result = module(image)
    mine = [*seen]
    seen.clear()
    assert torch.allclose(result, plain(image), rtol=1e-10)
    assert len(mine) == len(seen)
    for tensor, wanted in zip(mine, seen, strict=True):
        assert type(tensor) is torch.Tensor
        assert torch.allclose(tensor, wanted, rtol=1e-10)
        (one,) = torch.autograd.grad(tensor.square().sum(), model.a.weight)
        (other,) = torch.autograd.grad(wanted.square().sum(), model.a.weight)
        assert torch.allclose(one, other, rtol=1e-9)


@pytest.mark.filterwarnings("ignore:Net is not one graph")
@pytest.mark.parametrize(
    "function",
    [
        lambda m, y: y if torch.is_grad_enabled() else y.sigmoid(),
        lambda m, y: y if torch.is_inference_mode_enabled() else y.sigmoid(),
        lambda m, y: 2 * y if m.a.weight.requires_grad else y,
        lambda m, y: 2 * y if y.requires_grad else y,
        lambda m, y: y if torch.is_autocast_enabled("cpu") else -y,
        lambda m, y: 2 * y if torch.compiler.is_compiling() else y,
    ],
)
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, "frozen", "autocast"])
def test_ambient_state(function, mode):
    model = Net(function).double()
    module, image = fxstream.compile(model, tile=16, verify=False), torch.randn(LARGE).double()
    assert torch.allclose(module(image), model(image), rtol=1e-10)
    if mode == "frozen":
        model.requires_grad_(False)
        assert torch.allclose(module(image), model(image), rtol=1e-10)
        return
    with torch.autocast("cpu", torch.bfloat16) if mode == "autocast" else mode():
        assert torch.allclose(module(image), model(image), rtol=1e-10 if mode != "autocast" else 0.05)


@pytest.mark.parametrize(
    "function",
    [lambda m, y: y if m.image.is_contiguous() else 2 * y, lambda m, y: y * (2 if m.image.stride(1) == 1 else 1)],
)
def test_memory_formats(function):
    def forward(m, x):
        m.image = x
        return m.c(function(m, torch.relu(m.b(m.a(x)))))

    model = Net(function).double()
    model.forward = types.MethodType(forward, model)
    module, image = fxstream.compile(model, tile=16, verify=False), torch.randn(LARGE).double()
    for given in (image, image.to(memory_format=torch.channels_last), image[..., 1:], image):
        assert torch.allclose(module(given), model(given), rtol=1e-10)


def without_gradient(m, y):
    with torch.no_grad():
        weight = y.mean((2, 3), keepdim=True).sigmoid()
        y = y + F.conv2d(y, m.b.weight, padding=1)
    return y * weight


def in_float32(m, y):
    with torch.autocast("cpu", enabled=False):
        return y + F.conv2d(y, m.b.weight, padding=1)


def in_inference_mode(m, y):
    with torch.inference_mode():
        shift = y.mean((2, 3), keepdim=True).sigmoid()
    return y + shift


def checkpointed(m, y):
    return torch.utils.checkpoint.checkpoint(lambda t: F.dropout(m.b(t), 0.0).relu(), y, use_reentrant=False)


@pytest.mark.parametrize("block", [without_gradient, in_float32, in_inference_mode, checkpointed])
def test_blocks_are_streamed(block):
    module, _, _ = same(Net(block))
    module(torch.randn(LARGE).double())
    assert module.plan.streamed_share > 0.9


def test_a_block_under_autocast_has_its_casts_in_the_stream():
    class Mixed(Net):
        def forward(self, x):
            with torch.autocast("cpu", torch.bfloat16):
                y = torch.relu(self.b(torch.relu(self.a(x))))
                with torch.autocast("cpu", enabled=False):
                    y = self.b(y.float())
            return self.c(y)

    model = Mixed(None)
    module, image = fxstream.compile(model, tile=16, verify=False), torch.randn(LARGE)
    mine, theirs = module(image), model(image)
    assert module.plan.streamed_share > 0.9
    assert mine.dtype == theirs.dtype
    assert torch.allclose(mine, theirs, rtol=0.02, atol=0.02)
    gradients = [torch.autograd.grad(t.sum(), list(model.parameters())) for t in (mine, theirs)]
    for one, other in zip(*gradients, strict=True):
        assert one.dtype == other.dtype
        assert torch.allclose(one, other, rtol=0.05, atol=0.05 * other.abs().max().item())


class Straight(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.round()

    @staticmethod
    def backward(ctx, gradient):
        return 3 * gradient


class Saving(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, scale):
        ctx.save_for_backward(x)
        ctx.scale = scale
        return x.square() * scale

    @staticmethod
    def backward(ctx, gradient):
        (x,) = ctx.saved_tensors
        return 5 * x * gradient * ctx.scale, None


ALIAS = Straight.apply


def wrapped(x):
    return Saving.apply(x, 2.0)


@pytest.mark.parametrize(
    "function",
    [
        lambda m, y: ALIAS(y),
        lambda m, y: m.operator(y),
        lambda m, y: wrapped(y),
        lambda m, y: getattr(Straight, "apply")(y),  # noqa: B009
    ],
)
def test_autograd_functions_by_any_way(function):
    same(Net(function, operator=Straight.apply))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "function",
    [
        lambda m, y: y * random.random(),
        lambda m, y: y if random.randint(0, 1) else -y,
        lambda m, y: y * float(numpy.random.rand()),
        lambda m, y: y * numpy.random.uniform(0.5, 1.5),
    ],
)
def test_random_numbers_of_python_and_numpy(function):
    same(Net(function))


@pytest.mark.parametrize(
    ("function", "calls"),
    [
        (lambda m, y, t: y * t, [(0.5,), (0.25,), (2.0,), (0.5,)]),
        (lambda m, y, t: y + t, [(1,), (2,), (3,), (4,)]),
        (lambda m, y, t: y if t == "a" else -y, [("a",), ("b",), ("a",), ("c",)]),
    ],
)
def test_arguments_that_change_with_each_call(function, calls):
    module, _, _ = same(Net(function), [None] * 6, calls=calls)
    assert len(fxstream.inspect(module).calls) <= 9


def test_traces_are_freed(monkeypatch):
    monkeypatch.setattr("fxstream.compiler.streaming.MOST_TRACES", 3)
    module = fxstream.compile(Net(lambda m, y, name: y if name else -y), tile=16, verify=False)
    for i in range(5):
        module(torch.randn(LARGE), f"slide {i}")
    assert len(fxstream.inspect(module).calls) == 3


def test_captures_are_freed_with_the_model():
    """Torch's finalizers on what is guarded, and results that are saved for backward, once held every graph."""

    def alive(model, steps):
        for step in steps:
            step(model)
        del model
        gc.collect()
        return sum(type(o) in (torch.fx.Graph, FakeTensor) for o in gc.get_objects())

    steps = (
        lambda model: fxstream.plan(model, 64, tile=32, channels=2),
        lambda model: fxstream.compile(model, tile=40)(torch.randn(LARGE)).square().mean().backward(),
    )
    counts = [alive(Net(lambda m, y: y.sigmoid() * y.sin()), steps) for _ in range(4)]
    assert counts[3] <= counts[1]  # what other tests have left behind may be freed meanwhile


@dataclasses.dataclass
class Output:
    logits: torch.Tensor
    aux: torch.Tensor


class Returning(Net):
    def forward(self, x):
        y = torch.relu(self.b(torch.relu(self.a(x))))
        return Output(self.c(y), y.mean())


def test_results_of_any_class():
    model = Returning(None).double()
    module, image = fxstream.compile(model, tile=16, verify=False), torch.randn(LARGE).double()
    mine, theirs = module(image), model(image)
    assert type(mine) is Output
    assert torch.allclose(mine.logits, theirs.logits, rtol=1e-10)
    assert torch.allclose(mine.aux, theirs.aux, rtol=1e-10)


def with_generator(m, y):
    generator = torch.Generator().manual_seed(3)
    return y + torch.rand(y.shape, generator=generator, dtype=y.dtype)


def computed_weights(m, y):
    weights = {"weight": m.b.weight.flip(0) * 2, "bias": m.b.bias}
    return torch.func.functional_call(m.b, weights, (y,))


def gradient_inside(m, y):
    with torch.enable_grad():
        leaf = y.detach().requires_grad_()
        (gradient,) = torch.autograd.grad(leaf.square().sum(), leaf)
    return y + gradient


def compiled_part(m, y):
    return m.part(y)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("function", "attributes"),
    [
        (with_generator, {}),
        (computed_weights, {}),
        (gradient_inside, {}),
        (compiled_part, {"part": fxstream.compile(nn.Conv2d(3, 3, 1), tile=8)}),
    ],
)
def test_what_is_not_a_plain_graph(function, attributes):
    same(Net(function, **attributes))


@pytest.mark.filterwarnings("ignore:Net is not one graph")
def test_a_scripted_part():
    model = Net(compiled_part, part=torch.jit.script(nn.Conv2d(3, 3, 1)))
    module, image = fxstream.compile(model, tile=16, verify=False), torch.randn(LARGE)
    mine, theirs = module(image), model(image)
    assert torch.allclose(mine, theirs, rtol=1e-4, atol=1e-5)
    gradients = [torch.autograd.grad(t.sum(), list(model.parameters())) for t in (mine, theirs)]
    for one, other in zip(*gradients, strict=True):
        assert torch.allclose(one, other, rtol=1e-3, atol=1e-3)


class InParts(nn.Module):
    """Two parts of a network with Python between them that no graph can hold."""

    def __init__(self):
        super().__init__()
        self.a, self.b = (nn.Sequential(nn.Conv2d(c, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3)) for c in (2, 8))

    def forward(self, x):
        y = self.a(x)
        return self.b(-y if y.sum() > 1e9 else y)


@pytest.mark.filterwarnings("ignore:.*bound to the size")
def test_parts_are_planned_within_what_those_before_leave():
    model, image = InParts(), torch.randn(1, 2, 160, 170)
    module = fxstream.compile(model, memory=6_000_000, verify=False)
    with pytest.warns(fxstream.StreamingWarning, match=r"is not one graph: it breaks at .*test_python\.py:\d+"):
        result = module(image)
    assert torch.allclose(result, model(image), rtol=1e-4, atol=1e-5)
    first = fxstream.plan(model.a, inputs=[tuple(image.shape)], memory=6_000_000).prediction.bytes
    second = module.plan.prediction.bytes
    assert first < 6_000_000
    assert (
        second
        <= 6_000_000 - first
        < fxstream.plan(model.b, inputs=[(1, 8, 156, 166)], memory=6_000_000).prediction.bytes
    )


@pytest.mark.filterwarnings("ignore:.*(not one graph|bound to the size)")
def test_what_is_not_one_graph_is_traced_once(monkeypatch):
    model, image, traced = InParts(), torch.randn(1, 2, 30, 30), []
    module = fxstream.compile(model, tile=16, verify=False)
    original = fxstream.inspect(module)._tracer.trace
    monkeypatch.setattr(
        fxstream.inspect(module)._tracer, "trace", lambda *a, **k: traced.append(1) or original(*a, **k)
    )
    for _ in range(3):
        assert torch.allclose(module(image), model(image), rtol=1e-4, atol=1e-5)
    assert traced == [1]


def tripled(m, y):
    if y.requires_grad:
        y.register_hook(lambda gradient: 3 * gradient)
    return y


def test_a_hook_on_the_gradient_of_what_the_model_computes():
    module, _, _ = same(Net(tripled))
    module(torch.randn(LARGE).double())
    assert any("hook_1" in str(node.target) for node in module.graph.nodes)


class ScaledDraws(nn.Module):
    """A number of Python, beside an operator whose size is that of the batch."""

    def __init__(self):
        super().__init__()
        self.first, self.last, self.count = nn.Conv2d(2, 3, 3), nn.Conv2d(3, 2, 3), 0

    def forward(self, x):
        drawn = torch.rand(x.shape[0], 3, 1, 1, dtype=x.dtype)
        return self.last(torch.relu(self.first(x)) * drawn * (1 + self.count))


@pytest.mark.filterwarnings("ignore::fxstream.StreamingWarning")
def test_a_number_that_changes_is_captured_at_the_size_of_its_call():
    torch.manual_seed(0)
    model = ScaledDraws().double()
    plain, module = copy.deepcopy(model), fxstream.compile(model, tile=12, verify=False)
    for batch, count in [(2, 0), (2, 1), (2, 2), (1, 1), (1, 2), (2, 2), (1, 3), (2, 3)]:
        model.count = plain.count = count
        image, results = torch.randn(batch, 2, 18, 20).double(), []
        for one in (module, plain):
            torch.manual_seed(count)
            results.append(one(image))
        torch.testing.assert_close(*results, rtol=1e-10, atol=1e-10)
