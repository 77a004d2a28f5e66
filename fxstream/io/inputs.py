"""What a call is given: tensors on the model's device, tensors in host memory, arrays on disk.

Capture, planning and the probe look at shapes, types and devices only. For an image that is not in the device's
memory they are given a stand-in: a tensor of its shape on the device that holds one element. The tile loop then
reads boxes of the image itself (`reading`); what is not streamed gets it whole.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from fxstream.errors import InputError
from fxstream.graph.shapes import is_image
from fxstream.io.source import LARGEST_AXES, Source, is_array, source
from fxstream.machine.device import is_accelerator

__all__ = ["Inputs", "inputs_of", "whole"]


@dataclass(frozen=True, slots=True)
class Inputs:
    """The arguments of a call with stand-ins for images from outside, their tensors, and the real ones."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    tensors: list[torch.Tensor]
    real: list[torch.Tensor | Source]

    @property
    def outside(self) -> dict[int, torch.Tensor | Source]:
        """What tensors stand for that is outside of the device's memory, by the id of the stand-in."""
        pairs = zip(self.tensors, self.real, strict=True)
        return {id(tensor): real for tensor, real in pairs if tensor is not real}


def inputs_of(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Inputs:
    """The inputs of a call, arrays as sources. Raises `InputError` for what no network takes."""
    device = next((parameter.device for parameter in model.parameters()), None)
    leaves, spec = pytree.tree_flatten((args, dict(kwargs)))
    placed, tensors, real = [], [], []
    for leaf in leaves:
        if is_array(leaf) and not isinstance(leaf, Source) and 2 < len(leaf.shape) <= 2 + LARGEST_AXES:
            leaf = source(leaf)
        if isinstance(leaf, Source):
            leaf = leaf.to(device or leaf.device)
        if isinstance(leaf, (torch.Tensor, Source)):
            real.append(leaf)
            leaf = _stand_in(leaf, device)
            tensors.append(leaf)
        placed.append(leaf)
    _check(model, tensors)
    args, kwargs = pytree.tree_unflatten(placed, spec)
    return Inputs(args, dict(kwargs), tensors, real)


def _stand_in(image: torch.Tensor | Source, device: torch.device | None) -> torch.Tensor:
    """The tensor itself where it is one on the device; else one of its shape and type that holds one element."""
    if isinstance(image, torch.Tensor):
        on_host = device is not None and is_accelerator(device) and not is_accelerator(image.device)
        if not on_host or not is_image(image):
            return image
        empty = torch.empty(1, dtype=image.dtype, device=device).expand(image.shape)
        return empty.requires_grad_(image.requires_grad)
    return torch.empty(1, dtype=image.dtype, device=device or image.device).expand(image.shape)


def whole(image: torch.Tensor | Source, device: torch.device) -> torch.Tensor:
    """An image from outside, read into the memory of a device."""
    return image[()] if isinstance(image, Source) else image.to(device)


def _check(model: nn.Module, tensors: list[torch.Tensor]) -> None:
    images = [tensor for tensor in tensors if is_image(tensor)]
    if not images:
        raise InputError("no image among the arguments: fxstream needs a tensor [N, C, spatial dims...]")
    for image in images:
        if image.is_complex():
            raise InputError(
                f"a complex image ({image.dtype}) cannot be streamed: pass real and imaginary channels"
            )
        if image.numel() == 0:
            raise InputError(f"the image is empty: its shape is {list(image.shape)}")
    devices = {tensor.device for tensor in tensors} | {p.device for p in model.parameters()}
    if len(devices) > 1:
        listed = ", ".join(sorted(map(str, devices)))
        raise InputError(f"image and model are on different devices ({listed}): move them to one")
