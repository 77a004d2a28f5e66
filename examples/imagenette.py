"""Train the network of the paper's Table II conventionally and streamed, and draw both loss curves (its Fig. 2).

Section V asks whether a network that streams trains as the ordinary one does: five blocks of convolution, ReLU and
max-pool, SGD with a rate of 1e-3, batches of 4 images of 320 x 320, the first two blocks streamed in tiles of
160 x 160. Here both networks start from the same weights and see the same batches in the same order. The table
names no strides and no padding; with a stride of 2 in the first convolution and padding that keeps the extent, the
last pool covers its whole map, as its size of 10 x 10 says. Weights are drawn after He et al., as in Section VI.
A tile of 160 includes its overlap here, so that there are 3 x 3 of them.

The paper takes 100 training images of each of 10 classes of ImageNet. With `--images FOLDER`, a folder with one
folder per class under `train` and `val`, as Imagenette has it, so does this. Without, a STAND-IN is used that
needs no download: the classes are 10 photographs that scikit-image carries, the images are random crops of them,
training crops from the left 60% of a photograph and held-out crops from the rest. It shows that both networks
learn the same on real pixels; it is no benchmark of classification: its task is to tell photographs apart.

In float32 the two drift apart by rounding, as any two orders of summation do; `--double` shows that nothing else
is in it.

    python examples/imagenette.py                                     # 80 images, 10 epochs: a minute
    python examples/imagenette.py --per-class 30 --epochs 30 --plot examples/pictures/imagenette.png
    python examples/imagenette.py --images imagenette2-320 --per-class 100 --epochs 300
"""

import argparse
import copy
import statistics
from collections import OrderedDict, defaultdict
from pathlib import Path

import torch
from matplotlib.figure import Figure
from PIL import Image
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from skimage import data
from torch import nn
from torch.utils.data import DataLoader, Dataset, Subset

import fxstream
from fxstream.tools.zoo import define_missing_torchvision_schemas

define_missing_torchvision_schemas()
from torchvision import datasets, transforms  # noqa: E402

SIZE = 320
COLOUR = ("astronaut", "chelsea", "coffee", "hubble_deep_field", "immunohistochemistry", "retina", "rocket")
GREY = ("brick", "grass")
TO_TENSOR = [transforms.ToTensor(), transforms.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))]
AUGMENT = transforms.Compose([transforms.RandomResizedCrop(SIZE), *TO_TENSOR])
CENTRE = transforms.Compose([transforms.Resize(SIZE), transforms.CenterCrop(SIZE), *TO_TENSOR])


def block(channels_in: int, channels_out: int, kernel: int, pool: int, stride: int = 1) -> nn.Sequential:
    convolution = nn.Conv2d(channels_in, channels_out, kernel, stride, padding=kernel // 2)
    return nn.Sequential(convolution, nn.ReLU(), nn.MaxPool2d(pool))


def table_two_network(classes: int) -> nn.Sequential:
    """The paper's Table II, for images of 320 x 320; 397,098 parameters for 10 classes."""
    blocks = {
        "block1": block(3, 16, kernel=7, pool=2, stride=2),
        "block2": block(16, 32, kernel=3, pool=2),
        "block3": block(32, 64, kernel=3, pool=2),
        "block4": block(64, 128, kernel=3, pool=2),
        "block5": block(128, 256, kernel=3, pool=10),
    }
    network = nn.Sequential(OrderedDict(**blocks, flatten=nn.Flatten(), classifier=nn.Linear(256, classes)))
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight)
            nn.init.zeros_(module.bias)
    return network


class PhotographCrops(Dataset):
    """Random crops of the columns `start` to `end`, shares of the width, of every photograph: the label."""

    def __init__(self, start: float, end: float, per_class: int):
        pixels = [getattr(data, name)() for name in COLOUR + GREY] + [data.stereo_motorcycle()[0]]
        areas = [p[:, int(start * p.shape[1]) : int(end * p.shape[1])] for p in pixels]
        self.areas = [Image.fromarray(area).convert("RGB") for area in areas]
        self.per_class = per_class

    def __len__(self) -> int:
        return self.per_class * len(self.areas)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        if index >= len(self):
            raise IndexError(index)
        return AUGMENT(self.areas[index // self.per_class]), index // self.per_class


def first_of_each_class(folder: datasets.ImageFolder, per_class: int) -> Subset:
    indices = [[i for i, label in enumerate(folder.targets) if label == k] for k in range(len(folder.classes))]
    return Subset(folder, [i for of_class in indices for i in of_class[:per_class]])


def load(folder: Path | None, per_class: int) -> tuple[Dataset, list[tuple[torch.Tensor, int]]]:
    """Images to train on, cropped anew at every access, and held-out images, always the same."""
    if folder is None:
        return PhotographCrops(0.0, 0.6, per_class), list(PhotographCrops(0.6, 1.0, per_class))
    training = first_of_each_class(datasets.ImageFolder(folder / "train", AUGMENT), per_class)
    return training, list(first_of_each_class(datasets.ImageFolder(folder / "val", CENTRE), per_class))


def train(model: nn.Module, optimiser: torch.optim.Optimizer, images: torch.Tensor, labels: torch.Tensor) -> float:
    optimiser.zero_grad()
    loss = nn.functional.cross_entropy(model(images), labels)
    loss.backward()
    optimiser.step()
    return loss.item()


@torch.no_grad()
def evaluate(model: nn.Module, images: torch.Tensor, labels: torch.Tensor) -> float:
    return nn.functional.cross_entropy(model(images), labels).item()


def relative_difference(a: float, b: float) -> float:
    return abs(a - b) / abs(a)


def compare(options: argparse.Namespace) -> list[dict[str, float]]:
    """Mean losses of both networks, a dictionary for every epoch."""
    torch.manual_seed(options.seed)
    dtype = torch.float64 if options.double else torch.float32
    training, held_out = load(options.images, options.per_class)
    batches = DataLoader(training, options.batch, shuffle=True, drop_last=True)
    plain = table_two_network(classes=1 + max(label for _, label in held_out)).to(options.device, dtype)
    streamed = fxstream.compile(copy.deepcopy(plain), tile=options.tile, segments=1, cut="block2")
    networks = {"plain": plain, "streamed": streamed}
    optimisers = {name: torch.optim.SGD(model.parameters(), options.rate) for name, model in networks.items()}
    history = []
    with Progress(console=Console(stderr=True), transient=True) as progress:
        for _ in progress.track(range(options.epochs), description="epochs"):
            losses = defaultdict(list)
            for images, labels in batches:
                batch = images.to(options.device, dtype), labels.to(options.device)
                for name, model in networks.items():
                    losses[name].append(train(model, optimisers[name], *batch))
            for images, labels in DataLoader(held_out, options.batch):
                batch = images.to(options.device, dtype), labels.to(options.device)
                for name, model in networks.items():
                    losses[f"{name}, held out"].append(evaluate(model, *batch))
            history.append({name: statistics.fmean(values) for name, values in losses.items()})
    return history


def draw(history: list[dict[str, float]], path: Path) -> None:
    """Both loss curves, and below them how far they differ."""
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    losses, differences = figure.subplots(2, sharex=True, height_ratios=(3, 1))
    epochs = range(1, len(history) + 1)
    for suffix, colour in (("", "C0"), (", held out", "C1")):
        a, b = ([row[name + suffix] for row in history] for name in ("plain", "streamed"))
        losses.plot(epochs, a, color=colour, linewidth=4, alpha=0.4, label="conventional" + suffix)
        losses.plot(epochs, b, "--", color=colour, label="streamed" + suffix)
        differences.semilogy(epochs, list(map(relative_difference, a, b)), color=colour)
    losses.set(ylabel="cross entropy", ylim=(0, None), title="Table II's network, conventional and streamed")
    losses.legend()
    differences.set(xlabel="epoch", ylabel="relative\ndifference")
    figure.savefig(path, dpi=100)


def table_of(history: list[dict[str, float]], rows: int = 10) -> Table:
    table = Table("epoch", "loss plain", "streamed", "differ by", "held out plain", "streamed", "differ by")
    for epoch in sorted({round((i + 1) * len(history) / rows) for i in range(rows)} - {0}):
        cells = []
        for suffix in ("", ", held out"):
            a, b = (history[epoch - 1][name + suffix] for name in ("plain", "streamed"))
            cells += [f"{a:.6f}", f"{b:.6f}", f"{relative_difference(a, b):.0e}"]
        table.add_row(str(epoch), *cells)
    return table


def main(arguments: list[str] | None = None) -> list[dict[str, float]]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=Path, help="a folder with train/CLASS/IMAGE and val/CLASS/IMAGE")
    parser.add_argument("--per-class", type=int, default=8, help="images of each class, to train on and held out")
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--rate", type=float, default=1e-3)
    parser.add_argument("--tile", type=int, default=160)
    parser.add_argument("--double", action="store_true", help="in float64")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--plot", type=Path, default=Path("imagenette.png"), help="where the picture is written")
    options = parser.parse_args(arguments)
    history = compare(options)
    draw(history, options.plot)
    console = Console()
    console.print(table_of(history))
    console.print(f"picture: {options.plot}")
    return history


if __name__ == "__main__":
    main()
