"""`torch.compile(model, backend="fxstream")`, and `torch.compile` around and inside of a compiled module."""

import copy
import logging
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from compare import assert_same, relative_error, step
from torch import nn
from torch._dynamo.testing import CompileCounter
from torchvision.models import resnet18

import fxstream

fxstream.backend.register()


@pytest.fixture(autouse=True)
def _fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture
def plans(caplog):
    """The first line of every plan that was made."""
    caplog.set_level(logging.INFO, "fxstream")
    return lambda: [m.split("\n")[0] for m in caplog.messages if "segments, " in m]


def streamed(model, **options):
    return torch.compile(model, backend="fxstream", options={"tile": 16, **options})


def image(height=33, width=35, batch=2):
    return torch.randn(batch, 3, height, width, dtype=torch.double)


class Net(nn.Module):
    """Batch statistics, a buffer, sizes in the graph, keyword arguments, outputs of all kinds; a break at will."""

    def __init__(self, breaks=False):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU())
        self.body = nn.Sequential(nn.Conv2d(4, 4, 3, stride=2), nn.ReLU(), nn.Conv2d(4, 4, 3))
        self.head, self.breaks = nn.Linear(4, 2), breaks
        self.register_buffer("offset", torch.randn(1, 4, 1, 1))
        self.double()

    def forward(self, x, *, scale=1.0):
        x = self.stem(x)
        if self.breaks:
            torch._dynamo.graph_break()
        small = self.body(x) + self.offset
        x = F.interpolate(small, size=x.shape[2:]) * scale
        return self.head(x.mean((2, 3))), {"map": x, "height": small.shape[2], "pair": (small, None)}


@pytest.mark.parametrize("breaks", [False, True])
def test_a_training_loop_over_sizes(breaks, plans):
    model = Net(breaks)
    plain = copy.deepcopy(model)
    compiled = streamed(model)
    optimisers = [torch.optim.SGD(m.parameters(), 0.01) for m in (model, plain)]
    for size, scale in ((33, 2.0), (41, 2.0), (38, 3.0), (33, 2.0)):
        x = image(size)
        found, wanted = (step(net, own, [x], {"scale": scale}) for net, own in ((compiled, model), (plain, plain)))
        assert_same(found, wanted, 1e-9)
        for optimiser in optimisers:
            optimiser.step()
            optimiser.zero_grad()
    assert int(model.stem[1].num_batches_tracked) == 4
    assert len(plans()) == (4 + 4 * breaks)
    assert all("100% of the activations" in plan for plan in plans())
    for net in (model, plain):
        net.eval()
    with torch.no_grad():
        assert relative_error(compiled(x)[0], plain(x)[0]) < 1e-9


def test_resnet18(plans):
    model = fxstream.freeze_batch_norm(resnet18(num_classes=3)).double()
    plain, x = copy.deepcopy(model), image(72, 75, 1)
    assert_same(
        step(streamed(model, tile=48, cut="layer2", verify=False), model, [x]), step(plain, plain, [x]), 1e-10
    )
    assert len(plans()) == 1


def test_options_are_those_of_compile(plans):
    model = Net()
    with pytest.raises(fxstream.InputError, match="no option 'tiles', 'x'; it has tile, memory, segments, cut, "):
        streamed(model, tiles=3, x=1)(image())
    with pytest.raises(fxstream.InputError, match="tile must be a positive int"):
        streamed(model, tile=0)(image())
    with pytest.raises(fxstream.InputError, match="no modes"):
        torch.compile(model, backend="fxstream", mode="reduce-overhead")(image())
    with pytest.raises(fxstream.PlanError, match=r"no module `layer9` .*its parts are body, head, stem"):
        streamed(model, cut="layer9")(image())
    torch.compile(model, backend=fxstream.backend.backend, options={"memory": "1MiB", "verify": False})(image())
    assert len(plans()) == 1


def test_a_changed_parameter_is_named_as_the_user_knows_it():
    model = Net().eval()
    y = streamed(model)(image())[0].sum()
    with torch.no_grad():
        model.body[2].weight.mul_(2)
    with pytest.raises(fxstream.StreamError, match=r"`body\.2\.weight` was changed in place"):
        y.backward()


def test_one_graph_serves_two_modules(plans):
    """Dynamo does not guard on which module of a kind it is: weights are bound at each call."""
    conv = partial(nn.Conv2d, 3, 3, 3, padding=1)
    blocks = nn.ModuleList(nn.Sequential(conv(), nn.ReLU(), conv()) for _ in range(2)).double()
    plain = copy.deepcopy(blocks)
    block = streamed(lambda module, x: torch.relu(module(x)))
    x = image().requires_grad_()
    wanted = step(lambda x: torch.relu(plain[1](torch.relu(plain[0](x)))), plain, [x])
    assert_same(step(lambda x: block(blocks[1], block(blocks[0], x)), blocks, [x]), wanted, 1e-10)
    assert len(plans()) == 1


def test_functions_and_weights_from_anywhere(plans):
    weight = torch.randn(4, 3, 3, 3, dtype=torch.double, requires_grad=True)

    def network(x, weights):
        return F.conv2d(torch.relu(F.conv2d(x, weight)), weights["second"])

    second, x = torch.randn(2, 4, 3, 3, dtype=torch.double, requires_grad=True), image()
    results = [net(x, {"second": second}) for net in (streamed(network), network)]
    grads = [torch.autograd.grad(y.square().sum(), (weight, second)) for y in results]
    assert all(relative_error(a, b) < 1e-12 for a, b in zip(*grads, strict=True))
    assert "100% of the activations" in plans()[0]


def test_several_images_in_a_list_and_a_mask():
    conv = nn.Conv2d(3, 3, 3, padding=1).double()

    def network(given, mask=None):
        x = torch.relu(conv(given["images"][0])) + conv(given["images"][1])
        return conv(x) * mask.unsqueeze(1)

    compiled = streamed(network)
    for size in (33, 40):
        images, mask = [image(size, size), image(size, size)], torch.rand(2, size, size) > 0.5
        found, wanted = (net({"images": images}, mask=mask) for net in (compiled, network))
        assert relative_error(found.detach(), wanted.detach()) < 1e-12


def test_modes_types_and_replaced_weights():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 2, 3))
    plain, x = copy.deepcopy(model), image().float()
    compiled = streamed(model)
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            assert relative_error(compiled(x), plain(x)) < 1e-5
    with torch.autocast("cpu", torch.bfloat16):
        assert relative_error(compiled(x).detach(), plain(x).detach()) < 0.03
    other = {name: 2 * tensor for name, tensor in plain.double().state_dict().items()}
    for net in (model.double(), plain):
        net.load_state_dict(other, assign=True)
    assert relative_error(compiled(x.double()).detach(), plain(x.double()).detach()) < 1e-12


def test_what_has_no_image_runs_as_it_is(plans):
    model = nn.Linear(4, 3).double()
    x = torch.randn(5, 4, dtype=torch.double)
    assert torch.equal(streamed(model)(x), model(x))
    assert plans() == []


class Branches(nn.Module):
    """Control flow on values, and a checkpoint."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = (nn.Conv2d(3, 3, 3, padding=1) for _ in range(3))

    def forward(self, x):
        x = torch.utils.checkpoint.checkpoint(self.b, torch.relu(self.a(x)), use_reentrant=False)
        if x.sum() > 0:
            x = -x
        return self.c(torch.relu(x))


def test_control_flow_on_values_breaks_the_graph(plans):
    model = Branches().double()
    plain, x = copy.deepcopy(model), image()
    assert_same(step(streamed(model), model, [x]), step(plain, plain, [x]), 1e-11)
    assert len(plans()) == 2


class Double(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad):
        return 2 * grad


@pytest.mark.filterwarnings("ignore:.*of the activations")
@pytest.mark.parametrize("apply", [Double.apply, torch.compiler.disable(Double.apply)])
def test_autograd_functions_keep_their_backward(apply):
    conv, x = nn.Conv2d(3, 3, 3).double(), image()
    double, other = apply, copy.deepcopy(conv)
    found = step(streamed(lambda x: conv(double(conv(x)))), conv, [x])
    assert_same(found, step(lambda x: other(double(other(x))), other, [x]), 1e-11)


def test_torch_compile_around_a_compiled_module_sees_one_call():
    counter, model = CompileCounter(), Net()
    module, plain = fxstream.compile(model, tile=16), copy.deepcopy(model)
    around = torch.compile(lambda x: module(x * 2)[0] * 3, backend=counter)
    for size in (33, 41):
        x = image(size)
        assert_same(step(around, model, [x]), step(lambda x: plain(x * 2)[0] * 3, plain, [x]), 1e-10)
        model.zero_grad(), plain.zero_grad()
    assert not module.plan.is_trivial
    assert counter.op_count <= 4  # the two products, for a fixed and for a changing size
    torch._dynamo.reset()
    whole = torch.compile(module, backend=counter, fullgraph=True)
    with pytest.raises(torch._dynamo.exc.Unsupported, match="without fullgraph=True"):
        whole(image())


def test_torch_compile_inside():
    counter, model = CompileCounter(), Net().eval()
    plain, x = copy.deepcopy(model), image()
    model.body = torch.compile(model.body, backend=counter)
    model.forward = torch.compile(model.forward, backend=counter)
    module = fxstream.compile(model, tile=16)
    found, wanted = step(module, model, [x]), step(plain, plain, [x])
    assert_same({n.replace("._orig_mod", ""): t for n, t in found.items()}, wanted, 1e-12)
    assert not module.plan.is_trivial
    assert counter.frame_count == 0
    small = fxstream.compile(model, tile=64)
    assert relative_error(small(x)[0], plain(x)[0]) < 1e-12
    assert small.plan.is_trivial
    assert counter.frame_count == 0


def test_a_model_that_torch_has_compiled():
    model = fxstream.freeze_batch_norm(Net())
    plain, x = copy.deepcopy(model), image()
    module = fxstream.compile(torch.compile(model, backend=CompileCounter()), tile=16)
    assert_same(step(module, model, [x]), step(plain, plain, [x]), 1e-12)
    assert not module.plan.is_trivial
