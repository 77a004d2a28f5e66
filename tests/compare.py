"""The one comparison of streamed with plain: outputs, every gradient by name, buffers.

`Comparison.exact` demands bit equality (with `make_integer` models: sums of small integers in float64 are exact
in any order); otherwise the largest relative error must stay below `tolerance`.
"""

import copy
import math
from dataclasses import dataclass

import torch
from torch import nn
from torch.utils import _pytree as pytree

import fxstream
from fxstream.planning import Plan


@dataclass
class Result:
    """Every tensor of one step, by name."""

    tensors: dict[str, torch.Tensor]


def step(module: nn.Module, model: nn.Module, images, kwargs=None) -> Result:
    """Outputs, gradients of parameters and inputs, and buffers after one forward and backward."""
    for parameter in model.parameters():
        parameter.grad = None
    images = [image.detach().clone().requires_grad_(image.requires_grad) for image in images]
    outputs = [t for t in pytree.tree_leaves(module(*images, **(kwargs or {}))) if isinstance(t, torch.Tensor)]
    tensors = {f"output {i}": output.detach() for i, output in enumerate(outputs)}
    generator = torch.Generator().manual_seed(7)
    weighted = [
        (output * torch.randint(-2, 3, output.shape, generator=generator).to(output.dtype)).sum()
        for output in outputs
        if output.requires_grad
    ]
    if weighted:
        sum(weighted).backward()
    tensors |= {f"grad of {n}": p.grad for n, p in model.named_parameters()}
    tensors |= {f"grad of input {i}": image.grad for i, image in enumerate(images)}
    tensors |= {f"buffer {n}": b.clone() for n, b in model.named_buffers()}
    return Result(tensors)


def relative_error(found: torch.Tensor | None, wanted: torch.Tensor | None) -> float:
    """Norm of the difference over the norm of what is wanted; 0 only where both are the same, NaN included."""
    if found is None or wanted is None:
        absent = [t for t in (found, wanted) if t is not None]
        return 0.0 if all(t.count_nonzero() == 0 for t in absent) else math.inf
    if found.shape != wanted.shape or found.dtype != wanted.dtype:
        return math.inf
    if torch.equal(torch.nan_to_num(found), torch.nan_to_num(wanted)):
        return 0.0 if torch.equal(found.isnan(), wanted.isnan()) else math.inf
    difference = (found.double() - wanted.double()).norm()
    return (difference / wanted.double().norm().clamp_min(1e-300)).item()


def assert_same(found: Result, wanted: Result, tolerance: float) -> None:
    """Every tensor agrees; the message lists the worst first."""
    assert found.tensors.keys() == wanted.tensors.keys()
    errors = {name: relative_error(found.tensors[name], wanted.tensors[name]) for name in wanted.tensors}
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
) -> Plan:
    """The compiled model equals the plain one; at least one segment has that many tiles. Returns the plan."""
    plain = copy.deepcopy(model)
    compiled = fxstream.compile(model, tile=tile, segments=segments, cut=cut)
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
                module.eps = 0.0
                module.running_mean.copy_(torch.randint(-2, 3, module.running_mean.shape))
                module.running_var.copy_(torch.randint(0, 2, module.running_var.shape) * 3 + 1)
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
