"""What only a GPU shows: its kernels, images in host memory, allocations that really fail."""

import copy
import gc

import pytest
import torch
from compare import assert_same, assert_streams, integer_image, make_integer, relative_error
from compare import step as named_step
from small_networks import CASES
from torch import nn

import fxstream
from fxstream.machine.replay import Replayer
from fxstream.tools import zoo

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def network():
    layers = [nn.Conv2d(3, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 3, padding=1)]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1)).double().cuda()


def step(module, model, image):
    model.zero_grad()
    image.grad = None
    output = module(image)
    output.square().sum().backward()
    return [output.detach(), image.grad, *(parameter.grad for parameter in model.parameters())]


@pytest.mark.parametrize("request_", [{"tile": 60}, {"memory": "2MiB"}])
def test_an_image_in_host_memory_goes_tile_by_tile(request_):
    model = fxstream.freeze_batch_norm(network())
    image = torch.randn(2, 3, 150, 170, dtype=torch.float64, requires_grad=True)
    found = step(fxstream.compile(model, **request_), model, image)
    assert found[0].is_cuda
    assert not found[1].is_cuda
    there = image.detach().cuda().requires_grad_()
    for mine, wanted in zip(found, step(model, model, there), strict=True):
        torch.testing.assert_close(mine.cuda(), wanted, rtol=1e-10, atol=1e-12)


def test_boundaries_in_host_memory():
    model = fxstream.freeze_batch_norm(network())
    image = torch.randn(2, 3, 150, 170, dtype=torch.float64, device="cuda", requires_grad=True)
    module = fxstream.compile(model, tile=60, segments=("2",), offload=True)
    for mine, wanted in zip(step(module, model, image), step(model, model, image), strict=True):
        torch.testing.assert_close(mine, wanted, rtol=1e-10, atol=1e-12)
    assert len(module.plan.offloaded) == 1


def test_bytes_in_an_array():
    class Bytes(nn.Module):
        def __init__(self):
            super().__init__()
            self.network = network()

        def forward(self, image):
            return self.network(image.double() / 255)

    model = Bytes().eval()
    image = torch.randint(0, 255, (150, 170, 3), dtype=torch.uint8)
    with torch.no_grad():
        found = fxstream.compile(model, tile=60)(fxstream.source(image.numpy(), layout="HWC"))
        torch.testing.assert_close(found, model(image.permute(2, 0, 1)[None].cuda()), rtol=1e-10, atol=1e-12)


def test_memory_that_runs_out():
    model = nn.Sequential(nn.Conv2d(3, 64, 3, padding=1), nn.ReLU(), nn.Conv2d(64, 3, 3, padding=1)).cuda()
    image = torch.randn(1, 3, 3000, 3000, device="cuda")
    module, small = (fxstream.compile(model, tile=tile, segments=1) for tile in (2000, 200))
    small(image).square().sum().backward()
    wanted = [parameter.grad.clone() for parameter in model.parameters()]
    model.zero_grad()
    module(image[..., :2001, :2001]).sum().backward()
    model.zero_grad()
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(0).total_memory
    limit = torch.cuda.memory_allocated() + 600 * 2**20
    torch.cuda.set_per_process_memory_fraction(limit / total)
    try:
        with pytest.warns(fxstream.StreamingWarning, match="smaller"):
            module(image).square().sum().backward()
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    for parameter, gradient in zip(model.parameters(), wanted, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-3, atol=1e-3 * gradient.abs().max().item())


@pytest.mark.parametrize("name", CASES)
def test_small_networks(name):
    """To rounding: what cuDNN chooses may transform integers into fractions."""
    model = make_integer(CASES[name]).eval()
    first = model.a if name == "positional parameter" else next(m for m in model.modules() if hasattr(m, "groups"))
    image = integer_image(2, first.in_channels, 21, 17)
    assert_streams(copy.deepcopy(model).cuda(), image.detach().cuda().requires_grad_(), tile=13, segments=1)


def large_network(name):
    return fxstream.freeze_batch_norm(training_network(name))


def training_network(name):
    """With batch statistics; `groups` has statistics of groups and instances."""
    if name != "groups":
        return zoo.build(f"torchvision/{name}", num_classes=7).train().cuda()
    first, second, third = nn.Conv2d(3, 16, 3, 2, 1), nn.Conv2d(16, 16, 3, padding=1), nn.Conv2d(16, 16, 3)
    for conv in (first, second, third):
        conv.bias = None  # its gradient would be 0 but for rounding
    layers = [first, nn.GroupNorm(4, 16), nn.SiLU(), second, nn.InstanceNorm2d(16, affine=True), nn.ReLU()]
    layers += [third, nn.BatchNorm2d(16), nn.ReLU()]
    return nn.Sequential(*layers, nn.Conv2d(16, 2, 1)).cuda()


def within(model, image, share):
    """A share of the plain network's memory, in bytes."""
    everything = fxstream.compile(copy.deepcopy(model), memory="40GiB")
    everything(image)
    return int(share * everything.plan.prediction.plain_bytes)


def formats(model, image, channels_last):
    layout = torch.channels_last if channels_last else torch.contiguous_format
    return model.to(memory_format=layout), image.contiguous(memory_format=layout)


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("request_", [{"tile": 96}, {"memory": 0.6}])
@pytest.mark.parametrize("name", ["resnet50", "densenet121"])
def test_networks(name, request_, channels_last):
    model = large_network(name).double()
    image = torch.randn(2, 3, 197, 235, dtype=torch.float64, device="cuda", requires_grad=True)
    model, image = formats(model, image, channels_last)
    image = image.detach().requires_grad_()
    plain = named_step(model, model, [image])
    if "memory" in request_:
        everything = fxstream.compile(model, memory="40GiB")
        everything(image)
        request_ = {"memory": int(request_["memory"] * everything.plan.prediction.plain_bytes)}
    module = fxstream.compile(model, **request_)
    assert_same(named_step(module, model, [image]), plain, 1e-9)
    assert not module.plan.is_trivial


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("name", ["resnet18", "densenet121", "compiled"])
def test_autocast(name, channels_last):
    """Gradients under bfloat16 are as close to those of float64 as the plain network's."""
    layers = [nn.Conv2d(3, 8, 3, 2, 1), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Conv2d(8, 2, 3)]
    model = nn.Sequential(*layers).cuda() if name == "compiled" else large_network(name)
    model, image = formats(model, torch.randn(1, 3, 320, 288, device="cuda"), channels_last)
    exact, plain = copy.deepcopy(model).double(), copy.deepcopy(model)
    module = fxstream.compile(model, tile=160, compile_tiles=name == "compiled")
    for net, dtype in ((exact, torch.float64), (plain, torch.float32), (module, torch.float32)):
        with torch.autocast("cuda", torch.bfloat16, enabled=net is not exact):
            output = net(image.to(dtype))
        output.double().square().sum().backward()
    for (key, wanted), theirs, mine in zip(
        exact.named_parameters(), plain.parameters(), model.parameters(), strict=True
    ):
        errors = [relative_error(p.grad.double(), wanted.grad) for p in (mine, theirs)]
        assert errors[0] <= 1.5 * errors[1] + 0.02, f"{key}: {errors}"


@pytest.mark.filterwarnings("ignore::fxstream.StreamingWarning")
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("request_", [{"tile": 96}, {"memory": 0.75}, {"memory": 0.6}])
@pytest.mark.parametrize("name", ["resnet18", "resnet50", "groups"])
def test_training_networks(name, request_, channels_last):
    """Streamed statistics, and whole stretches with the model's own operators; running statistics too."""
    model = training_network(name).double()
    image = torch.randn(2, 3, 197, 235, dtype=torch.float64, device="cuda", requires_grad=True)
    model, image = formats(model, image, channels_last)
    image = image.detach().requires_grad_()
    plain = copy.deepcopy(model)
    if "memory" in request_:
        request_ = {"memory": within(model, image, request_["memory"])}
    module = fxstream.compile(model, **request_)
    assert_same(named_step(module, model, [image]), named_step(plain, plain, [image]), 1e-8)
    assert not module.plan.is_trivial


@pytest.mark.filterwarnings("ignore::fxstream.StreamingWarning")
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("request_", [{"tile": 160}, {"memory": 0.75}, {"tile": 160, "compile_tiles": True}])
@pytest.mark.parametrize("name", ["resnet18", "groups"])
def test_training_in_bfloat16(name, request_, channels_last):
    """Gradients and running statistics are as close to those of float64 as the plain network's."""
    model, image = training_network(name), torch.randn(2, 3, 320, 288, device="cuda")
    model, image = formats(model, image, channels_last)
    exact, plain = copy.deepcopy(model).double(), copy.deepcopy(model)
    if "memory" in request_:
        request_ = {"memory": within(model, image, request_["memory"])}
    module = fxstream.compile(model, **request_)
    for net, dtype in ((exact, torch.float64), (plain, torch.float32), (module, torch.float32)):
        with torch.autocast("cuda", torch.bfloat16, enabled=net is not exact):
            output = net(image.to(dtype))
        output.double().square().sum().backward()
    tensors = [
        {**{n: p.grad for n, p in net.named_parameters()}, **dict(net.named_buffers())}
        for net in (exact, plain, model)
    ]
    errors = {}
    for key, wanted in tensors[0].items():
        if wanted.is_floating_point():
            errors[key] = [relative_error(found[key].double(), wanted) for found in tensors[1:]]
    largest = max(theirs for theirs, _ in errors.values())
    assert all(mine <= 2 * theirs + 0.25 * largest for theirs, mine in errors.values()), errors


def replayed(module):
    """How many replays there are."""
    (kept,) = fxstream.inspect(module).shared.replays._kept.values()
    return len(kept.replays)


@pytest.mark.filterwarnings("ignore::fxstream.StreamingWarning")
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("request_", [{"tile": 96}, {"tile": 96, "compile_tiles": True}, {"memory": 0.6}])
@pytest.mark.parametrize("name", ["resnet18", "resnet50", "groups"])
def test_replayed_tiles(name, request_, channels_last):
    """Two steps, of which the second replays all tiles but those that are kept; with other weights in between."""
    model = training_network(name).double()
    image = torch.randn(2, 3, 197, 235, dtype=torch.float64, device="cuda")
    model, image = formats(model, image, channels_last)
    image, plain = image.detach().requires_grad_(), copy.deepcopy(model)
    if "memory" in request_:
        request_ = {"memory": within(model, image, request_["memory"])}
    module = fxstream.compile(model, cuda_graphs=True, **request_)
    for _ in range(3):
        assert_same(named_step(module, model, [image]), named_step(plain, plain, [image]), 1e-8)
        with torch.no_grad():
            for mine, theirs in zip(model.parameters(), plain.parameters(), strict=True):
                mine.mul_(0.9), theirs.mul_(0.9)
    assert replayed(module) > 0 or "memory" in request_


def test_replays_under_autocast_and_without():
    model = fxstream.freeze_batch_norm(training_network("resnet18"))
    image = torch.randn(1, 3, 320, 288, device="cuda")
    without, module = (fxstream.compile(model, tile=160, cuda_graphs=graphs) for graphs in (False, True))
    for enabled in (True, False, True):
        steps = []
        for one in (without, module):
            model.zero_grad()
            with torch.autocast("cuda", torch.bfloat16, enabled=enabled):
                output = one(image)
            output.float().square().sum().backward()
            steps.append({name: parameter.grad.clone() for name, parameter in model.named_parameters()})
        assert_same(*reversed(steps), 1e-2)
    assert replayed(module) > 0


def test_what_waits_for_the_device_is_not_replayed():
    """Then the stream is the one before, tiles run operator by operator, and the device goes on."""
    replayer, stream = Replayer.of(torch.device("cuda", 0)), torch.cuda.current_stream()
    number = torch.ones((), device="cuda")
    with pytest.raises(RuntimeError):
        replayer.replay_of(lambda: print(number.item()))
    assert torch.cuda.current_stream() == stream
    assert (number + 1).item() == 2


def test_memory_of_replays_is_given_back():
    model = nn.Sequential(nn.Conv2d(3, 64, 3, padding=1), nn.ReLU(), nn.Conv2d(64, 3, 3, padding=1)).cuda()
    image = torch.randn(1, 3, 1200, 1200, device="cuda")
    before = torch.cuda.memory_reserved()
    module = fxstream.compile(model, tile=300, segments=1, cuda_graphs=True)
    module(image).sum().backward()
    assert fxstream.inspect(module).shared.replayed_bytes <= module.plan.prediction.peak.replays
    del module
    gc.collect()
    torch.cuda.empty_cache()
    assert torch.cuda.memory_reserved() <= before + 2**25
