"""Layer-sequential unit-variance initialisation, streamed: the statistics of a layer are those of whole images.

D. Mishkin and J. Matas, "All you need is a good init", ICLR 2016, with a scale per channel as in P. Krähenbühl,
C. Doersch, J. Donahue and T. Darrell, "Data-dependent initializations of convolutional neural networks", ICLR
2016. The paper (Section VII-A) trains networks without BatchNorm from it.

In the order of execution every convolution and Linear layer is scaled so that its output, over all positions of
all batches, has variance one. Weight and bias are divided by the standard deviation, so that the output is divided
by it exactly, and one measurement is enough. Count, mean and variance of an output are reductions over space: they
are streamed like any other operator, and combined over tiles and batches in 64 bits with the term between them,
``var = sum n_i (var_i + (mean_i - mean)**2) / sum n_i``, which does not cancel as ``E[x**2] - mean**2`` does.

Cost: a layer can be measured only when all before it are scaled. So each layer takes a capture of the model, with
its analysis and probe, some seconds whatever the size of the images, and a forward of every batch up to that
layer: about half as many forwards of the network as it has layers, per batch. A copy of the weights is held.
"""

from __future__ import annotations

import copy
import warnings
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from fxstream.capture.trace import Tracer
from fxstream.compiler.compile import compile
from fxstream.compiler.module import StreamedModule, inspect
from fxstream.compiler.options import RequestOptions
from fxstream.errors import InputError, StreamingWarning
from fxstream.tiling.request import belongs

if TYPE_CHECKING:
    from typing_extensions import Unpack

__all__ = ["lsuv_"]

Layer = _ConvNd | nn.Linear


def lsuv_(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    per_channel: bool = True,
    center: bool = False,
    orthogonal: bool = False,
    skip: Collection[str] = (),
    verify: bool = True,
    **options: Unpack[RequestOptions],
) -> nn.Module:
    """Scale every convolution and Linear layer to outputs of variance one over `batches`; returns the model.

    This is layer-sequential unit-variance initialisation, with the statistics of whole images. A batch is what the
    model takes: a tensor, or a tuple of its arguments. All batches are read again for each layer, so a dataset
    that loads its images is fine. Variance is per channel of the output, or with ``per_channel=False`` over all
    its values.

    - `center`: whether layers with a bias get outputs of mean zero as well.
    - `orthogonal`: whether every weight is first drawn from `torch.nn.init.orthogonal_`.
    - `skip`: paths of modules that stay as they are, with all below them.
    - `verify` and `options` (`tile`, `memory`, ...): those of `compile`.

    The model runs in its current mode. Its weights change in place, at the end, and nothing else does; after an
    exception the model is unchanged. Raises `InputError` for a layer that never runs or runs more than once, that
    shares its parameters or computes its weight, and for an output that is constant or not finite; and what a
    compiled module raises.
    """
    model = inspect(model).model if isinstance(model, StreamedModule) else model
    _check_arguments(model, batches, skip)
    scaled = _without_running_statistics(copy.deepcopy(model))
    layers = _layers(scaled, skip)
    if orthogonal:
        for layer in layers.values():
            nn.init.orthogonal_(layer.weight)
    with torch.no_grad():
        for path in _order(scaled, layers, _arguments(next(iter(batches)))):
            measuring = _UpToLayer(scaled, path)
            moments = _measured(compile(measuring, verify=verify, **options), batches)
            measuring.hook.remove()
            mean, variance = _combined(moments, per_channel)
            _check_moments(path, mean, variance, torch.finfo(moments[0][1].dtype).eps)
            _scale(layers[path], mean if center else torch.zeros_like(mean), variance.sqrt())
        for path, layer in layers.items():
            for parameter, new in zip(model.get_submodule(path).parameters(), layer.parameters(), strict=True):
                parameter.copy_(new)
    return model


class _UpToLayer(nn.Module):
    """Per channel of one layer's output: how many values it has, their mean and their variance.

    What runs after the layer has no influence on them, and the capture drops it.
    """

    def __init__(self, model: nn.Module, path: str) -> None:
        super().__init__()
        self.model = model
        self.layer = model.get_submodule(path)
        self.output: torch.Tensor | None = None
        self.hook = self.layer.register_forward_hook(self._keep)

    def _keep(self, layer: nn.Module, inputs: Any, output: torch.Tensor) -> None:
        self.output = output

    def forward(self, *args: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        self.model(*args)
        output, self.output = self.output, None  # so that nothing keeps the whole map
        assert output is not None
        channel = output.ndim - (self.layer.get_parameter("weight").ndim - 1)  # before space, or the last
        others = [dim for dim in range(output.ndim) if dim != channel]
        wide = output.to(torch.promote_types(output.dtype, torch.float32))
        variance, mean = torch.var_mean(wide, others, correction=0)
        return (output == output).sum(others), mean, variance  # NaN would show in the mean


def _check_arguments(model: object, batches: Iterable[Any], skip: Collection[str]) -> None:
    if not isinstance(model, nn.Module):
        raise InputError(f"lsuv_ needs an nn.Module, found {type(model).__name__}")
    if isinstance(batches, (torch.Tensor, Iterator)):
        kind = type(batches).__name__
        raise InputError(f"batches are read once per layer: give a list or a dataset of them, found {kind}")
    if next(iter(batches), None) is None:
        raise InputError("lsuv_ needs at least one batch")
    paths = {path for path, _ in model.named_modules(remove_duplicate=False)}
    unknown = [skip] if isinstance(skip, str) else sorted(set(skip) - paths)
    if unknown:
        raise InputError(f"skip must be a collection of module paths; the model has none named {unknown[0]!r}")


def _arguments(batch: Any) -> tuple[Any, ...]:
    return (batch,) if isinstance(batch, torch.Tensor) else tuple(batch)


def _measured(streamed: nn.Module, batches: Iterable[Any]) -> list[tuple[torch.Tensor, ...]]:
    """The moments of every batch, without a warning for each of the many captures of which little is streamed."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", StreamingWarning)
        return [streamed(*_arguments(batch)) for batch in batches]


def _without_running_statistics(model: nn.Module) -> nn.Module:
    """The model; its BatchNorms in training lose their running statistics, so that no layer has a side effect."""
    for module in model.modules():
        if isinstance(module, _BatchNorm) and module.training:
            module.running_mean = module.running_var = module.num_batches_tracked = None
    return model


def _layers(model: nn.Module, skip: Collection[str]) -> dict[str, Layer]:
    """The layers to scale, by path. Raises `InputError` where a weight is not a parameter of its layer alone."""
    layers = {
        path: module
        for path, module in model.named_modules()
        if isinstance(module, Layer) and not any(belongs(path, other) for other in skip)
    }
    owners = Counter(id(p) for module in model.modules() for p in module._parameters.values() if p is not None)
    for path, layer in layers.items():
        if layer._parameters.get("weight") is None:
            raise InputError(f"the weight of `{path}` is computed, it cannot be scaled: {_advice(path)}")
        if any(owners[id(parameter)] > 1 for parameter in layer.parameters()):
            raise InputError(f"`{path}` shares its parameters with another module: {_advice(path)}")
    return layers


def _advice(path: str) -> str:
    return f"leave it out with skip=[{path!r}]"


def _order(model: nn.Module, layers: dict[str, Layer], args: tuple[Any, ...]) -> list[str]:
    """The paths of the layers in the order in which they run. Raises `InputError` unless each runs once."""
    graph = Tracer().graph(model, args, {})  # on tensors without values
    stacks = [node.meta.get("nn_module_stack", {}) for node in graph.module.graph.nodes] if graph else []
    calls = dict.fromkeys((path, call) for stack in stacks for call, (path, _) in list(stack.items())[-1:])
    ran = [path for path, _ in calls if path in layers]
    times = Counter(ran)
    for path in layers:
        if times[path] != 1:
            many = f"runs {times[path]} times in a forward, and one scale cannot serve each"
            raise InputError(f"`{path}` {many if times[path] else 'never runs'}: {_advice(path)}")
    return ran


def _combined(moments: Sequence[tuple[torch.Tensor, ...]], per_channel: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and variance over all batches, and over all channels unless they are asked for per channel."""
    counts, means, variances = (torch.stack(tensors).cpu().double() for tensors in zip(*moments, strict=True))
    dims = [0] if per_channel else [0, 1]
    shares = counts / counts.sum(dims, keepdim=True)
    mean = (shares * means).sum(dims, keepdim=True)
    variance = (shares * (variances + (means - mean) ** 2)).sum(dims, keepdim=True)
    return mean.expand_as(means[:1])[0], variance.expand_as(means[:1])[0]


def _check_moments(path: str, mean: torch.Tensor, variance: torch.Tensor, eps: float) -> None:
    """Raises `InputError` where an output is not finite, or varies no more than its rounding does."""
    wrong = {
        "not finite": ~(mean.isfinite() & variance.isfinite()),
        "constant, of variance 0": variance <= (eps * mean) ** 2,
    }
    for kind, channels in wrong.items():
        if channels.any():
            count = f"{int(channels.sum())} of its {len(channels)} channels"
            raise InputError(f"the output of `{path}` over all batches is {kind} in {count}: {_advice(path)}")


def _scale(layer: Layer, mean: torch.Tensor, deviation: torch.Tensor) -> None:
    """Change the layer, in place, so that its output becomes ``(output - mean) / deviation`` per channel."""
    factor = (1 / deviation).to(layer.weight)
    if isinstance(layer, _ConvTransposeNd):  # [in, out / groups, ...], the groups along the first
        weight = layer.weight.unflatten(0, (layer.groups, -1))
        factors = factor.view(layer.groups, 1, -1)
    else:
        weight, factors = layer.weight, factor
    weight.mul_(factors.view(*factors.shape, *[1] * (weight.ndim - factors.ndim)))
    if layer.bias is not None:
        layer.bias.sub_(mean.to(layer.bias)).mul_(factor)
