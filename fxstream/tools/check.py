"""Streamed against plain: every output, gradient and buffer of one step, compared by name.

In float64 on the CPU both must agree to `TOLERANCE` of the tensor's norm. In another precision neither is exact,
so both are compared with float64: streaming may be no further from it than `FACTOR` times what plain is.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from fxstream.compiler.analysis import example_inputs
from fxstream.compiler.compile import compile
from fxstream.compiler.module import inspect
from fxstream.compiler.options import RequestOptions
from fxstream.errors import InputError
from fxstream.machine.device import is_accelerator
from fxstream.planning.plan import Plan

if TYPE_CHECKING:
    from typing_extensions import Unpack

__all__ = ["CheckReport", "Difference", "check", "least_norms", "relative_error", "step"]

Step = dict[str, torch.Tensor | None]
"""The tensors of a step by name; None is a gradient that is absent."""
TOLERANCE = 1e-10
"""Relative error that is allowed in float64."""
CANCELLED = 1e-4
"""Errors of gradients and of buffers are relative to at least this share of the largest; less is rounding."""
FACTOR = 4.0
"""In another precision streaming may be this much further from float64 than plain is."""


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
) -> Step:
    """Every tensor of one forward and backward of `module`, by name; `model` owns the parameters.

    The loss weighs every output element with a small random integer, the same at every call.
    """
    for parameter in model.parameters():
        parameter.grad = None
    leaves = [tensor.detach().clone().requires_grad_(tensor.requires_grad) for tensor in inputs]
    results = pytree.tree_leaves(module(*leaves, **(kwargs or {})))
    outputs = [result for result in results if isinstance(result, torch.Tensor)]
    tensors: Step = {f"output {i}": output.detach() for i, output in enumerate(outputs)}
    _pull_back(outputs)
    tensors |= {f"grad of {name}": parameter.grad for name, parameter in model.named_parameters()}
    tensors |= {f"grad of input {i}": leaf.grad for i, leaf in enumerate(leaves)}
    tensors |= {f"buffer {name}": buffer.clone() for name, buffer in model.named_buffers()}
    return tensors


def _pull_back(outputs: Sequence[torch.Tensor]) -> None:
    """Backward of the sum of all output elements, each weighted with a small random integer."""
    generator = torch.Generator().manual_seed(7)
    weighted = [
        (output * torch.randint(-2, 3, output.shape, generator=generator).to(output)).sum()
        for output in outputs
        if output.requires_grad
    ]
    if weighted:
        torch.stack([loss.to(weighted[0]) for loss in weighted]).sum().backward()  # type: ignore[no-untyped-call]


def relative_error(result: torch.Tensor | None, expected: torch.Tensor | None, least: float = 1e-300) -> float:
    """Norm of the difference over the norm of what is expected; 0 only where both are the same, NaN included.

    The norm counts as `least` at least. An absent gradient equals a zero one; anything else of another shape or
    type is infinitely far.

    >>> relative_error(torch.tensor([3.0, 4.5]), torch.tensor([3.0, 4.0]))
    0.1
    """
    if result is None or expected is None:
        present = [tensor for tensor in (result, expected) if tensor is not None]
        return 0.0 if all(tensor.count_nonzero() == 0 for tensor in present) else math.inf
    if result.shape != expected.shape or result.dtype != expected.dtype:
        return math.inf
    if torch.equal(torch.nan_to_num(result), torch.nan_to_num(expected)):
        return 0.0 if torch.equal(result.isnan(), expected.isnan()) else math.inf
    difference = (result.double() - expected.double()).norm()
    error = (difference / expected.double().norm().clamp_min(least)).item()
    return math.inf if math.isnan(error) else error


def check(
    model: nn.Module,
    size: int | tuple[int, ...] | None = None,
    *,
    channels: int = 3,
    batch: int = 1,
    inputs: Sequence[torch.Tensor | tuple[int, ...]] | None = None,
    native: bool = False,
    seed: int = 0,
    **options: Unpack[RequestOptions],
) -> CheckReport:
    """Compare one streamed training step of a copy of `model` with the plain step, on a random image.

    Outputs, all gradients and all buffers are compared, in float64 on the CPU, or with `native` in the model's
    type on its device. `size`, `channels` and `batch` are those of the image, `inputs` the shapes of several, as
    in `analyze`; `seed` draws them, a tensor among `inputs` is taken as it is. `options` (`tile`, `memory`, ...)
    are those of `compile`. The model is not changed.

    Returns a report whose `ok` says whether all tensors agree. Raises what `compile` raises, and `InputError` for
    a model on the meta device.
    """
    if any(tensor.is_meta for tensor in (*model.parameters(), *model.buffers())):
        raise InputError("a model on the meta device has no weights to check: build it on a real device")
    plain = copy.deepcopy(model)
    if not native:
        plain = plain.to(device="cpu", dtype=torch.float64)
    compiled = compile(copy.deepcopy(plain), **options)
    examples = example_inputs(plain, size, channels, batch, inputs)
    generators = [examples[0].device] if is_accelerator(examples[0].device) else []
    with torch.random.fork_rng(generators, device_type=examples[0].device.type):
        torch.manual_seed(seed)
        passed = {id(value) for value in inputs or ()}
        images = [_image(example, native, id(example) not in passed) for example in examples]
        streamed = _seeded_step(compiled, inspect(compiled).model, images, seed)
        expected = _seeded_step(plain, plain, images, seed)
        differences = (
            _in_precision(streamed, expected, _exact_step(model, images, seed))
            if native
            else _in_float64(streamed, expected)
        )
    ordered = sorted(differences, key=lambda d: -d.excess)
    dtype = next((image.dtype for image in images if image.requires_grad), images[0].dtype)
    return CheckReport(tuple(ordered), dtype, compiled.plan)


def _image(example: torch.Tensor, native: bool, draw: bool) -> torch.Tensor:
    """An input of the step: drawn or taken as it is, in float64 on the CPU unless `native`; integers stay."""
    image = torch.randn(example.shape, dtype=example.dtype, device=example.device) if draw else example
    if not native:
        image = image.to(device="cpu", dtype=torch.float64 if image.is_floating_point() else image.dtype)
    return image.detach().requires_grad_(image.is_floating_point())


def _seeded_step(module: nn.Module, model: nn.Module, images: Sequence[torch.Tensor], seed: int) -> Step:
    torch.manual_seed(seed)
    return step(module, model, images)


def _exact_step(model: nn.Module, images: Sequence[torch.Tensor], seed: int) -> Step:
    """The step of a copy of the model in float64 on the CPU."""
    exact = copy.deepcopy(model).to(device="cpu", dtype=torch.float64)
    return _seeded_step(exact, exact, [_image(image, False, False) for image in images], seed)


def least_norms(tensors: Step) -> dict[str, float]:
    """The least norm that the error of each gradient and each buffer is divided by; 1e-300 for an output."""
    largest: dict[str, float] = {}
    for name, tensor in tensors.items():
        kind = name.split()[0]
        if kind != "output" and tensor is not None and math.isfinite(norm := tensor.double().norm().item()):
            largest[kind] = max(norm, largest.get(kind, 0.0))
    return {name: max(1e-300, CANCELLED * largest.get(name.split()[0], 0.0)) for name in tensors}


def _in_float64(streamed: Step, plain: Step) -> list[Difference]:
    """Streamed compared with plain, both in float64."""
    least = least_norms(plain)
    return [Difference(n, relative_error(streamed[n], plain[n], least[n]), TOLERANCE) for n in plain]


def _in_precision(streamed: Step, plain: Step, exact: Step) -> list[Difference]:
    """Streamed and plain in another precision, both compared with float64; a tensor of integers must be equal."""
    differences, least = [], least_norms(exact)
    for name, tensor in plain.items():
        reference = _wide(exact[name])
        error, allowed = (
            relative_error(_wide(result[name]), reference, least[name]) for result in (streamed, plain)
        )
        floating = tensor is not None and tensor.is_floating_point()
        unit = torch.finfo(tensor.dtype).eps if tensor is not None and floating else TOLERANCE
        differences.append(Difference(name, error, FACTOR * max(allowed, unit)))
    return differences


def _wide(tensor: torch.Tensor | None) -> torch.Tensor | None:
    return None if tensor is None else tensor.detach().cpu().to(torch.float64)
