"""Streamed against plain by `fxstream.check`'s own comparison, and models whose arithmetic is exact.

A tolerance of 0 demands bit equality (with `make_integer` models: sums of small integers in float64 are exact
in any order).
"""

import copy
import dataclasses

import torch
from torch import nn

import fxstream
from fxstream.planning.plan import Plan
from fxstream.runtime.rewrite import rewrite
from fxstream.tools.check import least_norms, relative_error, step


def assert_same(found, wanted, tolerance: float) -> None:
    """Every tensor of two steps agrees; the message lists the worst first."""
    assert found.keys() == wanted.keys()
    least = least_norms(wanted) if tolerance else dict.fromkeys(wanted, 1e-300)
    errors = {name: relative_error(found[name], wanted[name], least[name]) for name in wanted}
    worst = sorted(errors.items(), key=lambda item: -item[1])
    assert not (worst and worst[0][1] > tolerance), "\n".join(f"{e:.1e} {n}" for n, e in worst[:8])


def assert_streams(
    model: nn.Module,
    *images: torch.Tensor,
    tile,
    segments=None,
    cut=None,
    tolerance: float = 1e-10,
    kwargs=None,
    at_least_tiles: int = 2,
    verify: bool = True,
) -> Plan:
    """The compiled model equals the plain one; at least one segment has that many tiles. Returns the plan."""
    plain = copy.deepcopy(model)
    compiled = fxstream.compile(model, tile=tile, segments=segments, cut=cut, verify=verify)
    assert_same(step(compiled, model, images, kwargs), step(plain, plain, images, kwargs), tolerance)
    tiles = max((plan.tile_count for plan in compiled.plan.segments), default=1)
    assert tiles >= at_least_tiles, f"nothing was tiled: {compiled.plan}"
    return compiled.plan


def make_integer(model: nn.Module, low: int = -1, high: int = 1) -> nn.Module:
    """Small integer weights in float64; BatchNorm with statistics whose square roots are exact."""
    model.double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randint(low, high + 1, parameter.shape))
        for module in model.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_var is not None:
                module.eps = 1.0
                module.running_mean.copy_(torch.randint(-2, 3, module.running_mean.shape))
                module.running_var.copy_(torch.randint(0, 2, module.running_var.shape) * 3)
    return model


def randomise_statistics(model: nn.Module) -> nn.Module:
    """Running statistics that differ per channel, so that a wrong one shows."""
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 1.5)
    return model


def integer_image(*shape: int, requires_grad: bool = True) -> torch.Tensor:
    """Small integers in float64."""
    return torch.randint(-2, 3, shape).double().requires_grad_(requires_grad)


def streams(module):
    """The segments of the last call, made ready to run."""
    return [m.stream for m in fxstream.inspect(module).last.streamed.modules() if hasattr(m, "stream")]


def captures(module):
    """How many captures a compiled module keeps."""
    caches = {id(call.pipeline._cache): call.pipeline._cache for call in fxstream.inspect(module).calls}
    kept = [cache.get(key, tuple) for cache in caches.values() for key in list(cache._entries)]
    return len({id(one.captured) for captures in kept for one in captures})


def replan(module, plan):
    """Let a compiled module run another plan at the size of its last call."""
    last = fxstream.inspect(module).last
    streamed = rewrite(last.analysis.captured, last.analysis.graph, plan)
    (call,) = fxstream.inspect(module).calls
    entries = call.pipeline._sizes._entries
    for key, prepared in entries.items():
        if prepared is last:
            entries[key] = dataclasses.replace(last, plan=plan, streamed=streamed)


class Summed(torch.autograd.Function):
    """A sum whose gradient is a real tensor, as that of a loss is."""

    @staticmethod
    def forward(ctx, y):
        ctx.shape = y.shape
        return y.sum()

    @staticmethod
    def backward(ctx, gradient):
        return torch.ones(ctx.shape, dtype=gradient.dtype)


def backward_step(module, model, image) -> None:
    """A step whose output is there until its gradient is."""
    model.zero_grad()
    y = module(image)
    Summed.apply(y).backward()
