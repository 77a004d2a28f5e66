"""The third drawing of `how_it_works.md`: batch statistics of a map from those of its tiles."""

from dataclasses import dataclass

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import ConnectionPatch, Rectangle
from skimage import data
from style import GREEN, ORANGE, save
from torch import nn

import fxstream
from fxstream.geometry.box import Interval

WHITE = {"boxstyle": "round,pad=0.2", "facecolor": "white", "edgecolor": "none", "alpha": 0.8}
BACKWARD = (
    "backward: the tiles' gradients by\n"
    r"$\mu$ and $\sigma^2$ are summed; what"
    "\n"
    r"follows for $\mu_t, \sigma_t^2$ goes to each tile"
)


@dataclass(frozen=True)
class Part:
    """What one tile owns of a map, and the count, mean and variance of that."""

    rows: Interval
    columns: Interval
    count: int
    mean: torch.Tensor
    variance: torch.Tensor


def reductions(size: int = 192, tile: int = 70) -> None:
    """A convolution of a photograph, its statistics tile by tile and combined, and the normalised map."""
    torch.manual_seed(1)
    model = nn.Sequential(nn.Conv2d(3, 1, 5, padding=2), nn.BatchNorm2d(1, affine=False)).train()
    pixels = data.immunohistochemistry()[: 2 * size : 2, : 2 * size : 2].copy()
    with torch.no_grad():
        conv = model[0](torch.from_numpy(pixels).permute(2, 0, 1)[None] / 255)
        normalised = model[1](conv)[0, 0]
    conv = conv[0, 0]
    parts = parts_of(model, conv, tile)
    mean, variance = combined(parts)
    whole = conv.double()
    differ = max(abs(mean - whole.mean()), abs(variance - whole.var(correction=0)))
    print(f"batch statistics: {mean:.4f} ± {variance.sqrt():.4f}, from the whole map they differ by {differ:.0e}")
    figure = Figure(figsize=(8, 3.5), layout="constrained")
    left, between, right = figure.subplots(1, 3)
    for axes, values, name in ((left, conv, "convolution"), (right, normalised, "batch norm")):
        axes.imshow(values, cmap="gray")
        axes.set_xlabel(f"{name}: {abs(values.mean()):.3f} ± {values.std(correction=0):.3f}", fontsize=9)
    draw_parts(left, parts)
    draw_combination(between, f"= {mean:.3f} ± {variance.sqrt():.3f}")
    left.set_title("1. every tile: count, mean and\nvariance of what it owns", fontsize=10)
    between.set_title("2. all tiles combined,\nin float64", fontsize=10)
    right.set_title("3. every tile is normalised\nwith the same numbers", fontsize=10)
    for axes in (left, between, right):
        axes.set(xticks=[], yticks=[])
    draw_arrow(left, right, 1.02, -0.02, 0.97, ORANGE)
    draw_arrow(right, left, -0.02, 1.02, 0.33, GREEN)
    save(figure, "reductions.png")


def parts_of(model: nn.Module, conv: torch.Tensor, tile: int) -> list[Part]:
    """The tiles that fxstream plans for the statistics of the convolution, and what each finds."""
    first = fxstream.plan(model, tuple(conv.shape), tile=tile, global_ops="stream").segments[0]
    place = next(i for i, name in enumerate(first.segment.outputs) if name.startswith("moments"))
    parts = []
    for rows, columns in first.tiles():
        y, x = rows.outputs[place], columns.outputs[place]
        owned = conv[y.start : y.stop, x.start : x.stop].double()
        parts.append(Part(y, x, owned.numel(), owned.mean(), owned.var(correction=0)))
    return parts


def combined(parts: list[Part]) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and variance of all parts together."""
    count = sum(part.count for part in parts)
    mean = sum(part.count * part.mean for part in parts) / count
    return mean, sum(part.count * (part.variance + (part.mean - mean) ** 2) for part in parts) / count


def draw_parts(axes: Axes, parts: list[Part]) -> None:
    """The rectangle of every tile, and its mean and standard deviation."""
    for part in parts:
        y, x = part.rows, part.columns
        box = (x.start, y.start), len(x), len(y)
        axes.add_patch(Rectangle(*box, fill=False, edgecolor=ORANGE, linewidth=1.5))
        centre = x.start + len(x) / 2, y.start + len(y) / 2
        text = f"{part.mean:.3f}\n± {part.variance.sqrt():.3f}"
        axes.text(*centre, text, ha="center", va="center", fontsize=9, bbox=WHITE)


def draw_combination(axes: Axes, result: str) -> None:
    """The formulas, what they give here, and what the backward does."""
    axes.set_box_aspect(1)
    axes.spines[:].set_visible(False)
    lines = (
        (0.82, r"$\mu = \sum_t\, n_t\,\mu_t\,/\,n$", "black"),
        (0.65, r"$\sigma^2 = \sum_t\, n_t\,(\sigma_t^2 + (\mu_t-\mu)^2)\,/\,n$", "black"),
        (0.49, result, "black"),
        (0.12, BACKWARD, GREEN),
    )
    for y, text, colour in lines:
        axes.text(0.5, y, text, ha="center", va="center", fontsize=9.5, color=colour, transform=axes.transAxes)


def draw_arrow(start: Axes, stop: Axes, first: float, last: float, height: float, colour: str) -> None:
    """An arrow between two panels, from and to shares of their widths."""
    style = {"arrowstyle": "-|>", "color": colour, "linewidth": 1.8, "mutation_scale": 16}
    ends = (first, height), (last, height)
    start.figure.add_artist(ConnectionPatch(*ends, start.transAxes, stop.transAxes, **style))
