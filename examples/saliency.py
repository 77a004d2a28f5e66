"""What does a network look at in a large photograph? Saliency maps as in the paper's Section VII-C and Fig. 4.

A saliency map is the gradient of a network's score by its input. Streaming gives it exactly, tile by tile, for
images whose plain step fits nowhere. As in the paper it is blurred (a standard deviation of 50 pixels for 8192),
capped at its 99th percentile, and laid over the photograph where it is above half of that. `--smoothgrad N`
averages the gradients of N noisy copies of the image; the usual noise, a tenth of the range, would drown the lines
looked for below, so it is 0.005 unless `--noise` says more.

A map is worth looking at only if one knows what it should show. Here a small network of the paper's kind is
trained on random patches of the left half of a photograph of a retina, each with a single number: the share of its
pixels that lie on thin dark lines (vessels), found by scikit-image's Sato filter. The network is never told where
they are. Then the whole photograph is streamed, and its map is compared with the lines on either half, and with
the map of the same network before training. What is learned is a line filter, not medicine.

    python examples/saliency.py --plot examples/pictures/saliency.png    # a minute
    python examples/saliency.py --smoothgrad 8
    python examples/saliency.py --image photograph.png --tile 1024       # another RGB photograph
"""

from __future__ import annotations

import argparse
import copy
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from rich.console import Console
from rich.progress import track
from rich.table import Table
from scipy import ndimage
from skimage import data, filters, io, util
from torch import nn

import fxstream


def thin_dark_lines(photograph: np.ndarray) -> np.ndarray:
    """A mask of the lines that are a few pixels wide, away from the black surroundings of the picture, if any."""
    green = filters.gaussian(util.img_as_float(photograph[..., 1]), 1)
    ridges = filters.sato(green, sigmas=range(2, 7), black_ridges=True)
    inside = ndimage.binary_erosion(green > 0.05, iterations=20, border_value=1)
    return (ridges > filters.threshold_otsu(ridges[inside])) & inside


def block(channels_in: int, channels_out: int) -> list[nn.Module]:
    first, second = (nn.Conv2d(c, channels_out, 3, padding=1) for c in (channels_in, channels_out))
    return [first, nn.ReLU(), second, nn.ReLU(), nn.MaxPool2d(2)]


def regressor() -> nn.Sequential:
    """Three blocks as in the paper's Table III, narrower; the score is a probability's mean over positions."""
    positions = [*block(3, 8), *block(8, 16), *block(16, 16), nn.Conv2d(16, 1, 1)]
    for module in positions:
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight)
    nn.init.constant_(positions[-1].bias, -3.0)  # lines are rare
    return nn.Sequential(*positions, nn.Sigmoid(), nn.AdaptiveAvgPool2d(1), nn.Flatten(0))


def standardised(photograph: np.ndarray) -> torch.Tensor:
    """The image [1, 3, H, W] with mean 0 and deviation 1 in every channel."""
    image = torch.from_numpy(photograph.copy()).permute(2, 0, 1)[None].float()
    return (image - image.mean((2, 3), keepdim=True)) / image.std((2, 3), keepdim=True)


def patches(image: torch.Tensor, lines: torch.Tensor, number: int, size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Random squares of the left half, [number, 3, size, size], and the share of each that lies on lines."""
    height, width = lines.shape
    tops = torch.randint(height - size + 1, (number,)).tolist()
    lefts = torch.randint(width // 2 - size + 1, (number,)).tolist()
    boxes = [(slice(top, top + size), slice(left, left + size)) for top, left in zip(tops, lefts)]
    shares = torch.stack([lines[box].float().mean() for box in boxes])
    return torch.stack([image[0][:, rows, columns] for rows, columns in boxes]), shares


def train(network: nn.Module, image: torch.Tensor, lines: torch.Tensor, steps: int) -> None:
    optimiser = torch.optim.Adam(network.parameters(), 1e-3)
    for _ in track(range(steps), "training", console=Console(stderr=True), transient=True):
        inputs, shares = patches(image, lines, number=32, size=48)
        optimiser.zero_grad()
        nn.functional.binary_cross_entropy(network(inputs), shares).backward()
        optimiser.step()


def input_gradient(module: nn.Module, image: torch.Tensor, copies: int = 0, noise: float = 0.005) -> torch.Tensor:
    """The gradient of the score by the image, or its mean over noisy copies (SmoothGrad).

    The deviation of the noise is a share of the range of the image.
    """
    gradient = torch.zeros_like(image)
    deviation = noise * (image.max() - image.min())
    for _ in range(max(copies, 1)):
        given = image + deviation * torch.randn_like(image) if copies else image.clone()
        given.requires_grad_()
        gradient += torch.autograd.grad(module(given).sum(), given)[0] / max(copies, 1)
    return gradient


def saliency_map(gradient: torch.Tensor, blur: float) -> np.ndarray:
    """Largest magnitude over the channels, blurred, over its 99th percentile and at most 1, [H, W]."""
    smooth = ndimage.gaussian_filter(gradient[0].abs().amax(0).numpy(), blur)
    return np.minimum(smooth / np.quantile(smooth, 0.99), 1)


def hits(saliency: np.ndarray, lines: np.ndarray) -> tuple[float, float]:
    """The share of the highlighted pixels that lie on lines, in the left half and in the right."""
    halves = zip(np.array_split(saliency > 0.5, 2, axis=1), np.array_split(lines, 2, axis=1))
    return tuple(float(line[highlighted].mean()) if highlighted.any() else 0.0 for highlighted, line in halves)


def draw(photograph: np.ndarray, maps: dict[str, np.ndarray], path: Path) -> None:
    """The photograph, and the photograph with the upper half of each map on it."""
    figure = Figure(figsize=(3.3 * (1 + len(maps)), 3.5), layout="constrained")
    for axes, (title, saliency) in zip(figure.subplots(1, 1 + len(maps)), {"photograph": None, **maps}.items()):
        axes.imshow(photograph)
        if saliency is not None:
            axes.imshow(np.ma.masked_less(saliency, 0.5), cmap="viridis", vmin=0.5, vmax=1, alpha=0.8)
        axes.set(title=title, xticks=[], yticks=[])
    figure.savefig(path, dpi=75, pil_kwargs={"optimize": True})


def difference(streamed: nn.Module, plain: nn.Module, image: torch.Tensor) -> float:
    """The largest difference of the two input gradients, in units of the largest value."""
    found, wanted = (input_gradient(module, image) for module in (streamed, plain))
    return ((found - wanted).abs().max() / wanted.abs().max()).item()


def main(arguments: list[str] | None = None) -> dict[str, tuple[float, ...]]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--image", type=Path, help="an RGB photograph instead of the retina")
    parser.add_argument("--tile", type=int, default=512)
    parser.add_argument("--steps", type=int, default=400, help="of training")
    parser.add_argument("--blur", type=float, default=50 / 8192, help="standard deviation over the larger side")
    parser.add_argument("--smoothgrad", type=int, default=0, metavar="N", help="noisy copies of the image")
    parser.add_argument("--noise", type=float, default=0.005, help="of the copies, over the range of the image")
    parser.add_argument("--compare", type=int, default=1024, help="pixels of the corner where plain is run too")
    parser.add_argument("--plot", type=Path, default=Path("saliency.png"), help="where the picture is written")
    options = parser.parse_args(arguments)
    torch.manual_seed(0)
    photograph = data.retina() if options.image is None else io.imread(options.image)[..., :3]
    image, lines = standardised(photograph), thin_dark_lines(photograph)
    before = regressor()
    after = copy.deepcopy(before)
    train(after, image, torch.from_numpy(lines), options.steps)

    maps = {}
    for name, network in (("before training", before), ("after training", after)):
        streamed = fxstream.compile(network, tile=options.tile)
        gradient = input_gradient(streamed, image, options.smoothgrad, options.noise)
        maps[name] = saliency_map(gradient, options.blur * max(lines.shape))
    draw(photograph, maps, options.plot)
    plan = str(streamed.plan)

    found = {name: hits(saliency, lines) for name, saliency in maps.items()}
    found["any pixel"] = hits(np.ones(lines.shape), lines)
    table = Table("highlighted pixels on a line", "left half, trained on", "right half, never seen")
    for name, shares in found.items():
        table.add_row(name, *(f"{share:.1%}" for share in shares))
    console = Console()
    console.print(table)
    corner = image[..., : options.compare, : options.compare]
    found["difference"] = (difference(streamed, after, corner),)
    console.print(
        f"streamed and plain input gradient of {tuple(corner.shape)} differ by {found['difference'][0]:.0e}"
    )
    console.print(plan, highlight=False)
    console.print(f"picture: {options.plot}")
    return found


if __name__ == "__main__":
    main()
