"""The budget of a training step as a share of what the plain network's activations need."""

from torch import nn

import fxstream


def budget_of_share(model: nn.Module, size: int, share: float, device: str = "cpu") -> tuple[int, int]:
    """Bytes of the budget, and of the plain network's predicted peak, for an image of `size` pixels per side.

    Twice the gradients of the weights, a tile's and their sum, come on top: they do not grow with the image.
    """
    weights = sum(parameter.nbytes for parameter in model.parameters())
    plain = fxstream.plan(model, size, memory=2**62, device=device).prediction.plain_bytes
    return int(share * (plain - weights)) + 2 * weights, plain
