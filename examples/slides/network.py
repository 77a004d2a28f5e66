"""The networks of the paper for slides (Table III): 22, 25 and 28 layers for 2048, 4096 and 8192 pixels.

Pairs of 3x3 convolutions, each pair followed by a 2x2 max-pooling; the last one pools the whole map. BatchNorm is
in the last two pairs only, where the paper can have it; fxstream streams it anywhere, batch statistics included. A
layer is a convolution, a pooling, or the linear one at the end.
"""

from collections.abc import Iterator

from torch import nn

REPEATS = {22: 1, 25: 2, 28: 3}
"""How often the pair of 512 channels without BatchNorm stands, by the number of layers."""
LAYERS = {2048: 22, 4096: 25, 8192: 28}
"""The depth at which all image sizes see the same field before the last pooling: 32 x 32 positions."""


def slide_network(
    layers: int = 22, outputs: int = 1, *, width: int = 32, dropout: float = 0.5, norm: bool = True
) -> nn.Sequential:
    """The network of Table III, [N, 3, H, W] -> [N, outputs].

    `width` is the number of channels in the first pair, 32 in the paper. Without `norm` it has no BatchNorm, as
    for CAMELYON17. Weights are initialised after He et al. Raises `ValueError` for another number of layers.

    >>> network = slide_network(28)
    >>> sum(isinstance(layer, (nn.Conv2d, nn.MaxPool2d, nn.AdaptiveMaxPool2d, nn.Linear)) for layer in network)
    28
    """
    if layers not in REPEATS:
        raise ValueError(f"layers must be one of {', '.join(map(str, REPEATS))}, found {layers}")
    local = [width, 2 * width, 4 * width, 8 * width] + [16 * width] * REPEATS[layers]
    modules, channels = [], 3
    for wider in local:
        modules += [*pair(channels, wider, norm=False), nn.MaxPool2d(2)]
        channels = wider
    modules += [*pair(channels, channels, norm), nn.MaxPool2d(2)]
    modules += [*pair(channels, channels, norm), nn.AdaptiveMaxPool2d(1)]
    network = nn.Sequential(*modules, nn.Flatten(), nn.Dropout(dropout), nn.Linear(channels, outputs))
    return network.apply(initialise)


def pair(channels: int, wider: int, norm: bool) -> Iterator[nn.Module]:
    """Two convolutions of 3x3, each with its activation."""
    for before in (channels, wider):
        yield nn.Conv2d(before, wider, 3, padding=1, bias=not norm)
        if norm:
            yield nn.BatchNorm2d(wider)
        yield nn.ReLU()


def initialise(module: nn.Module) -> None:
    """He et al., 2015: normal with variance 2 / fan-in before a ReLU; biases are zero."""
    if isinstance(module, nn.Conv2d):
        nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
    if isinstance(module, nn.Linear):
        nn.init.kaiming_normal_(module.weight, nonlinearity="linear")
    if isinstance(module, (nn.Conv2d, nn.Linear)) and module.bias is not None:
        nn.init.zeros_(module.bias)
