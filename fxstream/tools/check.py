"""Streamed against plain: every output, gradient and buffer of one step, compared by name.

In float64 on the CPU both must agree to `TOLERANCE` of the tensor's norm. In another precision neither is exact,
so both are compared with float64: streaming may be no further from it than `FACTOR` times what plain is.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from fxstream.compiler.analysis import example_image
from fxstream.compiler.compile import compile
from fxstream.errors import InputError
from fxstream.planning.plan import Plan

__all__ = ["CheckReport", "Difference", "check", "least_norms", "relative_error", "step"]

TOLERANCE = 1e-10
CANCELLED = 1e-4
"""A gradient, or a buffer, is measured at least on this share of the largest: one that cancels is but rounding."""
FACTOR = 4.0


@dataclass(frozen=True, slots=True)
class Difference:
    """One tensor of the step: how far streamed is from plain (or from float64), and how far it may be.

    Both are norms of differences over the norm of the tensor.
    """

    name: str
    error: float
    allowed: float

    @property
    def ok(self) -> bool:
        """Whether it is within what is allowed."""
        return self.error <= self.allowed

    @property
    def excess(self) -> float:
        """The error in units of what is allowed."""
        return self.error / self.allowed if self.error else 0.0


@dataclass(frozen=True, slots=True, repr=False)
class CheckReport:
    """Every tensor of a step, worst first, and the plan that was checked."""

    differences: tuple[Difference, ...]
    dtype: torch.dtype
    plan: Plan

    @property
    def ok(self) -> bool:
        """Whether everything is within what is allowed."""
        return all(difference.ok for difference in self.differences)

    def __str__(self) -> str:
        wrong = sum(not difference.ok for difference in self.differences)
        tiles = sum(segment.tile_count for segment in self.plan.segments)
        verdict = f"{wrong} DIFFER" if wrong else "all agree"
        verdict += "; nothing was cut into tiles, try a smaller tile" if self.plan.is_trivial else ""
        lines = [
            f"{len(self.differences)} tensors, {str(self.dtype).removeprefix('torch.')}, {tiles} tiles in"
            f" {len(self.plan.segments)} segments: {verdict}"
        ]
        lines += [f"  {d.error:.1e} of {d.allowed:.1e} allowed  {d.name}" for d in self.differences[:8]]
        if len(self.differences) > 8:
            lines.append(f"  and {len(self.differences) - 8} with smaller errors")
        return "\n".join(lines)

    __repr__ = __str__


def step(
    module: nn.Module, model: nn.Module, inputs: Sequence[torch.Tensor], kwargs: Mapping[str, Any] | None = None
) -> dict[str, torch.Tensor | None]:
    """Every tensor of one forward and backward of `module`, by name; `model` owns the parameters.

    The loss weighs every output element with a small random integer, the same at every call.
    """
    for parameter in model.parameters():
        parameter.grad = None
    own = [given.detach().clone().requires_grad_(given.requires_grad) for given in inputs]
    results = pytree.tree_leaves(module(*own, **(kwargs or {})))
    outputs = [result for result in results if isinstance(result, torch.Tensor)]
    found: dict[str, torch.Tensor | None] = {f"output {i}": output.detach() for i, output in enumerate(outputs)}
    generator = torch.Generator().manual_seed(7)
    weighted = [
        (output * torch.randint(-2, 3, output.shape, generator=generator).to(output)).sum()
        for output in outputs
        if output.requires_grad
    ]
    if weighted:
        torch.stack([loss.to(weighted[0]) for loss in weighted]).sum().backward()  # type: ignore[no-untyped-call]
    found |= {f"grad of {name}": parameter.grad for name, parameter in model.named_parameters()}
    found |= {f"grad of input {i}": given.grad for i, given in enumerate(own)}
    found |= {f"buffer {name}": buffer.clone() for name, buffer in model.named_buffers()}
    return found


def relative_error(found: torch.Tensor | None, wanted: torch.Tensor | None, least: float = 1e-300) -> float:
    """Norm of the difference over the norm of what is wanted; 0 only where both are the same, NaN included.

    The norm counts as `least` at least. An absent gradient equals a zero one; anything else of another shape or
    type is infinitely far.

    >>> relative_error(torch.tensor([3.0, 4.5]), torch.tensor([3.0, 4.0]))
    0.1
    """
    if found is None or wanted is None:
        present = [tensor for tensor in (found, wanted) if tensor is not None]
        return 0.0 if all(tensor.count_nonzero() == 0 for tensor in present) else math.inf
    if found.shape != wanted.shape or found.dtype != wanted.dtype:
        return math.inf
    if torch.equal(torch.nan_to_num(found), torch.nan_to_num(wanted)):
        return 0.0 if torch.equal(found.isnan(), wanted.isnan()) else math.inf
    difference = (found.double() - wanted.double()).norm()
    error = (difference / wanted.double().norm().clamp_min(least)).item()
    return math.inf if math.isnan(error) else error


def check(
    model: nn.Module,
    size: int | tuple[int, ...],
    *,
    tile: int | tuple[int, ...] | None = None,
    memory: float | str | None = None,
    segments: int | tuple[str, ...] | None = None,
    cut: str | None = None,
    global_ops: str = "auto",
    channels: int = 3,
    batch: int = 1,
    native: bool = False,
    seed: int = 0,
) -> CheckReport:
    """Compare one streamed training step of a copy of `model` with the plain step, on a random image.

    Outputs, all gradients and all buffers are compared, in float64 on the CPU, or with `native` in the model's
    type on its device. `size`, `channels` and `batch` are those of the image, as in `analyze`; `tile`, `memory`,
    `segments`, `cut` and `global_ops` are those of `compile`; `seed` draws the image. The model is not changed.

    Returns a report whose `ok` says whether all tensors agree. Raises what `compile` raises, and `InputError` for
    a model on the meta device.
    """
    if any(tensor.is_meta for tensor in (*model.parameters(), *model.buffers())):
        raise InputError("a model on the meta device has no weights to check: build it on a real device")
    plain = copy.deepcopy(model)
    if not native:
        plain = plain.to(device="cpu", dtype=torch.float64)
    streamed = copy.deepcopy(plain)
    image = example_image(plain, size, channels, batch)
    with torch.random.fork_rng(devices=[image.device] if image.is_cuda else []):
        torch.manual_seed(seed)
        image = torch.randn(image.shape, dtype=image.dtype, device=image.device).requires_grad_()
        compiled = compile(streamed, tile=tile, memory=memory, segments=segments, cut=cut, global_ops=global_ops)
        found = _seeded_step(compiled, streamed, image, seed)
        wanted = _seeded_step(plain, plain, image, seed)
        if native:
            exact = copy.deepcopy(model).to(device="cpu", dtype=torch.float64)
            reference = _seeded_step(exact, exact, image.detach().cpu().double().requires_grad_(), seed)
            differences = _against(found, wanted, reference)
        else:
            least = least_norms(wanted)
            differences = [Difference(n, relative_error(found[n], wanted[n], least[n]), TOLERANCE) for n in wanted]
    ordered = sorted(differences, key=lambda d: -d.excess)
    return CheckReport(tuple(ordered), image.dtype, compiled.plan)


def _seeded_step(
    module: nn.Module, model: nn.Module, image: torch.Tensor, seed: int
) -> dict[str, torch.Tensor | None]:
    torch.manual_seed(seed)
    return step(module, model, [image])


def least_norms(tensors: Mapping[str, torch.Tensor | None]) -> dict[str, float]:
    """The norm on which each gradient and each buffer is measured at least; outputs are measured on their own."""
    largest: dict[str, float] = {}
    for name, tensor in tensors.items():
        kind = name.split()[0]
        if kind != "output" and tensor is not None and math.isfinite(norm := tensor.double().norm().item()):
            largest[kind] = max(norm, largest.get(kind, 0.0))
    return {name: max(1e-300, CANCELLED * largest.get(name.split()[0], 0.0)) for name in tensors}


def _against(
    found: Mapping[str, torch.Tensor | None],
    wanted: Mapping[str, torch.Tensor | None],
    reference: Mapping[str, torch.Tensor | None],
) -> list[Difference]:
    """Streamed and plain, both compared with float64; a tensor of integers must be equal."""
    differences, least = [], least_norms(reference)
    for name, exact in reference.items():
        errors = [
            relative_error(_wide(tensor), _wide(exact), least[name]) for tensor in (found[name], wanted[name])
        ]
        plain = wanted[name]
        unit = torch.finfo(plain.dtype).eps if plain is not None and plain.is_floating_point() else TOLERANCE
        differences.append(Difference(name, errors[0], FACTOR * max(errors[1], unit)))
    return differences


def _wide(tensor: torch.Tensor | None) -> torch.Tensor | None:
    return None if tensor is None else tensor.detach().cpu().to(torch.float64)
