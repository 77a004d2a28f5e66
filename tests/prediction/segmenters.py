"""Small networks for predictions, which the command line names by this file, and image files for them."""

import numpy as np
import torch
from torch import nn


class Segmenter(nn.Module):
    """A class per pixel, as a byte."""

    def __init__(self, classes=3, channels=3):
        super().__init__()
        self.layers = scores(classes, channels)

    def forward(self, image):
        return self.layers(image).argmax(1, keepdim=True).to(torch.uint8)


def scores(classes=3, channels=3, seed=0):
    """Scores of classes per pixel; weights that make all classes occur."""
    generator = torch.Generator().manual_seed(seed)
    layers = [nn.Conv2d(channels, 6, 3, padding=1), nn.Tanh(), nn.Conv2d(6, classes, 3, padding=1)]
    network = nn.Sequential(*layers)
    for parameter in network.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator) / 4
    return network.eval()


class IntegerSegmenter(nn.Module):
    """A class per pixel, at half the resolution and back; small integer weights, so that sums are exact."""

    def __init__(self):
        super().__init__()
        self.down, self.deep = nn.Conv2d(3, 8, 3, 2, 1), nn.Conv2d(8, 8, 3, padding=1)
        self.up = nn.Conv2d(8, 3, 3, padding=1)
        generator = torch.Generator().manual_seed(0)
        for parameter in self.parameters():
            parameter.data = torch.randint(-1, 2, parameter.shape, generator=generator).float()

    def forward(self, image):
        deep = torch.relu(self.deep(torch.relu(self.down(image))))
        scores = self.up(nn.functional.interpolate(deep, scale_factor=2))
        return scores.argmax(1, keepdim=True).to(torch.uint8)


def integer_segmenter():
    return IntegerSegmenter().eval()


def vector():
    """A vector per image."""
    return nn.Sequential(scores(), nn.AdaptiveAvgPool2d(1), nn.Flatten()).eval()


def strided():
    """A map of a quarter of the resolution, without padding."""
    layers = [nn.Conv2d(3, 4, 5, stride=2), nn.ReLU(), nn.Conv2d(4, 2, 3, stride=2)]
    torch.manual_seed(0)
    return nn.Sequential(*layers).eval()


def picture(height, width, channels=3, seed=0):
    """Bytes [height, width, channels], coarse enough to look like an image."""
    random = np.random.default_rng([seed, height, width])
    coarse = random.integers(0, 256, (-(-height // 8), -(-width // 8), channels), dtype=np.uint8)
    return np.kron(coarse, np.ones((8, 8, 1), np.uint8))[:height, :width]


def plain(network, pixels, divisor=1.0):
    """What the network returns for bytes [height, width, channels], as an array without the batch."""
    image = torch.from_numpy(np.ascontiguousarray(pixels)).permute(2, 0, 1)[None].float() / divisor
    with torch.no_grad():
        return network(image)[0].numpy()
