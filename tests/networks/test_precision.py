"""Low precision: streamed gradients are no further from float64 than the plain network's, over many tiles."""

import copy

import pytest
import torch
from compare import assert_same, relative_error
from torch import nn

import fxstream

LOW = [torch.bfloat16, torch.float16]
CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
DEVICES = ["cpu", pytest.param("cuda", marks=CUDA)]


def network() -> nn.Module:
    """Batch statistics, statistics of groups and a mean: reductions next to convolutions."""
    layers = [
        nn.Conv2d(2, 8, 3, padding=1, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, stride=2),
    ]
    layers += [nn.GroupNorm(2, 8), nn.SiLU(), nn.Conv2d(8, 8, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    return nn.Sequential(*layers, nn.Linear(8, 3))


def image(device) -> torch.Tensor:
    return torch.randn(2, 2, 78, 75, device=device)


def gradients(net, x, autocast=None) -> dict[str, torch.Tensor]:
    """Output and gradients of one step, in float64."""
    x = x.clone().requires_grad_()
    with torch.autocast(x.device.type, autocast or torch.bfloat16, enabled=autocast is not None):
        y = net(x)
    y.double().square().sum().backward()
    found = {"output": y.detach(), "image": x.grad} | {n: p.grad for n, p in net.named_parameters()}
    return {name: tensor.double() for name, tensor in found.items()}


def assert_as_close(model, x, autocast=None) -> fxstream.StreamedModule:
    """Streamed is as close to float64 as plain is, up to twice the largest of its errors."""
    plain = copy.deepcopy(model)
    module = fxstream.compile(model, tile=20, segments=1)
    exact = gradients(copy.deepcopy(model).double(), x.double())
    results = [gradients(net, x, autocast) for net in (module, plain)]
    errors = [{n: relative_error(r[n], exact[n]) for n in exact} for r in results]
    for name, error in errors[0].items():
        assert error <= 2 * errors[1][name] + 0.25 * max(errors[1].values()), f"{name}: {errors}"
    assert max(plan.tile_count for plan in module.plan.segments) >= 36
    return module


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", LOW, ids=str)
def test_autocast_with_weights_in_float32(device, dtype):
    model = network().to(device)
    assert_as_close(model, image(device), dtype)
    assert all(p.dtype == p.grad.dtype == torch.float32 for p in model.parameters())


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", LOW, ids=str)
def test_a_network_in_low_precision(device, dtype):
    model = network().to(device, dtype)
    assert_as_close(model, image(device).to(dtype))
    assert all(p.grad.dtype == dtype for p in model.parameters())


@pytest.mark.parametrize("dtype", LOW, ids=str)
@pytest.mark.parametrize(
    "norm", [nn.InstanceNorm2d(3, affine=True), nn.LayerNorm([3, 30, 29]), nn.RMSNorm([30, 29])]
)
@pytest.mark.filterwarnings("ignore::fxstream.StreamingWarning")
def test_normalisations_keep_a_low_precision(norm, dtype):
    """They gave float32, and RMSNorm took the epsilon of the type of the image, not of what it computes in."""
    model = nn.Sequential(nn.Conv2d(2, 3, 3), norm, nn.Conv2d(3, 2, 1)).to(dtype)
    module, x = fxstream.compile(model, tile=16, segments=1), 0.01 * torch.randn(2, 2, 32, 31).to(dtype)
    exact, plain, found = copy.deepcopy(model).double()(x.double()), model(x), module(x)
    assert found.dtype == plain.dtype == dtype
    assert relative_error(found.double(), exact) <= 1.5 * relative_error(plain.double(), exact)
    assert not module.plan.is_trivial


def test_autocast_switched_between_calls():
    model = fxstream.freeze_batch_norm(network())
    module, plain, x = fxstream.compile(model, tile=20), copy.deepcopy(model), image("cpu")
    for dtype in (None, torch.bfloat16, torch.float16, None):
        for net in (model, plain):
            net.zero_grad()
        found, wanted = (gradients(net, x, dtype) for net in (module, plain))
        assert_same(found, wanted, 1e-4 if dtype is None else 0.1)


@pytest.mark.parametrize("device", DEVICES)
def test_grad_scaler(device):
    """The scale grows and falls, and the step is taken or left out, as with the plain model."""
    model = fxstream.freeze_batch_norm(network()).to(device)
    plain, scales = copy.deepcopy(model), []
    x = image(device)
    for net in (fxstream.compile(model, tile=20), plain):
        scaler = torch.amp.GradScaler(device, init_scale=2.0**22, growth_interval=1)
        optimiser = torch.optim.SGD(net.parameters(), 0.01)
        scales.append([])
        for _ in range(8):
            optimiser.zero_grad()
            with torch.autocast(device, torch.float16):
                loss = net(x).square().mean()
            scaler.scale(loss).backward()
            scaler.unscale_(optimiser)
            nn.utils.clip_grad_norm_(net.parameters(), 1.0)
            scaler.step(optimiser)
            scaler.update()
            scales[-1].append(scaler.get_scale())
    assert scales[0] == scales[1]
    assert 2.0**22 > scales[0][0] > min(scales[0])  # the first steps overflow
    assert sorted(scales[0], reverse=True) != scales[0]  # and later ones do not
    assert_same(dict(model.state_dict()), dict(plain.state_dict()), 0.01)
