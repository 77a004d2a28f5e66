"""A network of a package as data, what builds it, and the calls of those that need more than an image.

Nothing of a package is imported before one of its networks is built.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from fxstream.tools import zoo

__all__ = ["Network", "build"]

Use = Callable[[nn.Module, torch.Tensor], Any]
PIP_NAMES = {
    "dynamic_network_architectures": "dynamic-network-architectures",
    "segmentation_models_pytorch": "segmentation-models-pytorch",
}
"""What pip calls a package, where that is not the name that it is imported by."""


@dataclass(frozen=True)
class Network:
    """A network: `make` is `module:class`, which gets `options`, in transformers as a `config` of that class.

    `shape` is that of the image; `use` calls the network where that takes more than an image, or returns more than
    tensors.
    """

    name: str
    make: str
    shape: tuple[int, ...]
    options: dict[str, Any] = field(default_factory=dict)
    use: Use | None = None
    config: str = ""

    @property
    def imported(self) -> str:
        """The package, as it is imported."""
        return self.make.partition(":")[0].partition(".")[0]

    @property
    def package(self) -> str:
        """The package, as pip calls it."""
        return PIP_NAMES.get(self.imported, self.imported)


class Used(nn.Module):
    """A network as a function calls it."""

    def __init__(self, network: nn.Module, use: Use) -> None:
        super().__init__()
        self.network, self.use = network, use

    def forward(self, image: torch.Tensor) -> Any:
        return self.use(self.network, image)


def build(network: Network) -> nn.Module:
    """The network with random weights. Raises `ModuleNotFoundError` where its package is not installed."""
    zoo.define_missing_torchvision_schemas()
    module, _, name = network.make.partition(":")
    package = importlib.import_module(module)
    kind = getattr(package, name)
    options = network.options
    made = kind(getattr(package, network.config)(**options)) if network.config else kind(**options)
    return made if network.use is None else Used(made, network.use)


def attribute(name: str) -> Use:
    """A call that takes an attribute of what the network returns."""
    return lambda model, image: getattr(model(image), name)


def item(key: int) -> Use:
    """A call that takes an item of what the network returns."""
    return lambda model, image: model(image)[key]


def decoded(model: nn.Module, latent: torch.Tensor) -> torch.Tensor:
    return model.decode(latent).sample


def encoded(model: nn.Module, image: torch.Tensor) -> torch.Tensor:
    return model.encode(image).latent_dist.mode()


def reconstructed(model: nn.Module, image: torch.Tensor) -> torch.Tensor:
    return model.decode(model.encode(image).latent_dist.mode()).sample


def reconstructed_plainly(model: nn.Module, image: torch.Tensor) -> torch.Tensor:
    return model.decode(model.encode(image)[0])[0]


def at_step(model: nn.Module, noisy: torch.Tensor) -> torch.Tensor:
    return model(noisy, torch.tensor([3]))


def sampled_at_step(model: nn.Module, noisy: torch.Tensor) -> torch.Tensor:
    return model(noisy, 3).sample


def with_text(model: nn.Module, noisy: torch.Tensor) -> torch.Tensor:
    return model(noisy, 3, torch.ones(1, 4, 8, dtype=noisy.dtype)).sample


def of_class(model: nn.Module, noisy: torch.Tensor) -> torch.Tensor:
    return model(noisy, timestep=torch.tensor([3]), class_labels=torch.tensor([1])).sample


def without_noise(model: nn.Module, image: torch.Tensor) -> torch.Tensor:
    return model(image, randomize_noise=False)[0]


def likelihoods(model: nn.Module, image: torch.Tensor) -> tuple[torch.Tensor, ...]:
    results = model(image)
    return (results["x_hat"], *results["likelihoods"].values())
