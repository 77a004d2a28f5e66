"""The network of a prediction: named or built, with weights of a file, and with what its pixels are turned
into."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fxstream.errors import InputError
from fxstream.prediction.libraries import library
from fxstream.tools.model_spec import load

__all__ = ["Normalise", "Normalised", "moments_of", "network_of"]

Moments = tuple[tuple[float, ...], tuple[float, ...]]
Normalise = str | tuple[Sequence[float], Sequence[float]] | None
NAMED: Mapping[str, Moments] = {
    "unit": ((0.0,), (1.0,)),
    "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
}
"""Mean and deviation of values from 0 to 1, by name."""


def network_of(
    model: nn.Module | str, weights: str | os.PathLike[str] | None, device: torch.device | None
) -> nn.Module:
    """The network in evaluation mode: a module as it is, or the one that a spec names, with weights, on a device.

    Raises `InputError` for a module in training mode or on another device, and for weights that do not fit.
    """
    if isinstance(model, str):
        if weights is None and model.startswith(("torchvision/", "timm/")):
            raise InputError(f"{model} is built without weights: give a file of them, as --weights model.pt")
        network = load(model, weights=True).eval()
        if weights is not None:
            _fill(network, Path(weights))
        return network.to(device or "cpu")
    if weights is not None:
        raise InputError("weights are for a model that is named by a text: load them into the module")
    if any(module.training for module in model.modules()):
        raise InputError("the model is in training mode: call model.eval() before it predicts")
    place = next((parameter.device for parameter in model.parameters()), None)
    if device is not None and place is not None and place != device:
        raise InputError(f"the model is on {place} and device is {device}: move the model")
    return model


def _fill(network: nn.Module, path: Path) -> None:
    """Load the weights of a file. Raises `InputError` for what does not fit."""
    if not path.is_file():
        raise InputError(f"there is no file {path} of weights")
    try:
        if path.suffix == ".safetensors":
            state = library("safetensors.torch", f"weights in {path.name}").load_file(path)
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
    except InputError:
        raise
    except Exception as error:
        raise InputError(f"{path} is no file of weights: {type(error).__name__}: {error}") from error
    for key in ("state_dict", "model"):
        state = state[key] if isinstance(state, dict) and isinstance(state.get(key), dict) else state
    try:
        network.load_state_dict(state)
    except (RuntimeError, TypeError, AttributeError) as error:
        raise InputError(f"the weights of {path} are not of this network: {error}") from error


def moments_of(normalise: Normalise) -> Moments | None:
    """Mean and deviation per channel, of values from 0 to 1. Raises `InputError` for what is none.

    >>> moments_of("0.5/0.25")
    ((0.5,), (0.25,))
    """
    if normalise is None or normalise in NAMED:
        return None if normalise is None else NAMED[str(normalise)]
    try:
        parts = normalise.split("/") if isinstance(normalise, str) else normalise
        mean, deviation = (
            tuple(float(number) for number in (part.split(",") if isinstance(part, str) else part))
            for part in parts
        )
    except (TypeError, ValueError):
        mean, deviation = (), ()
    if not mean or len(mean) != len(deviation) or min(deviation) <= 0:
        raise InputError(
            f"normalise={normalise!r} is no normalisation: give unit, imagenet, or means and deviations per"
            " channel, of values from 0 to 1: 0.5,0.5,0.5/0.25,0.25,0.25"
        )
    return mean, deviation


class Normalised(nn.Module):
    """A network behind ``(image / largest - mean) / deviation``, per channel."""

    factor: torch.Tensor
    offset: torch.Tensor

    def __init__(self, network: nn.Module, moments: Moments, largest: float, axes: int) -> None:
        super().__init__()
        self.network = network.eval()
        like: Any = next((p for p in network.parameters() if p.is_floating_point()), torch.empty(0))
        mean, deviation = (torch.tensor(values, dtype=torch.float64).view(-1, *[1] * axes) for values in moments)
        self.register_buffer("factor", (1 / (deviation * largest)).to(like), persistent=False)
        self.register_buffer("offset", (-mean / deviation).to(like), persistent=False)
        self.eval()

    def forward(self, image: torch.Tensor) -> Any:
        return self.network(image * self.factor + self.offset)
