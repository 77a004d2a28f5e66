"""The augmentations of the paper (Section VI-A), on tensors [3, H, W] with values 0..1.

Rotation, flips, shifts of brightness, contrast, saturation and hue, elastic deformation and cutout. All draw from
torch's generator, so `torch.manual_seed` before a call fixes what it does.
"""

import torch
from torch import nn
from torch.nn import functional as F

from fxstream.tools.zoo import define_missing_torchvision_schemas

define_missing_torchvision_schemas()  # for a torchvision without its compiled operators

from torchvision.transforms import InterpolationMode, v2  # noqa: E402


class Elastic(nn.Module):
    """A smooth random displacement: bicubic between `points` x `points` draws of deviation `share` of a side.

    The displacement is drawn on a coarse grid, so that its cost does not grow with its smoothness.
    """

    def __init__(self, points: int = 8, share: float = 0.01) -> None:
        super().__init__()
        self.points, self.share = points, share

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        draws = 2 * self.share * torch.randn(1, 2, self.points, self.points)  # a side is 2 long, from -1 to 1
        displacement = F.interpolate(draws, image.shape[-2:], mode="bicubic", align_corners=True)
        return v2.functional.elastic(image, displacement.permute(0, 2, 3, 1), fill=0.0)


def augmentations() -> v2.Compose:
    """All of them in the paper's order; what rotation and deformation bring in from outside is 0."""
    return v2.Compose(
        [
            v2.RandomRotation(180, interpolation=InterpolationMode.BILINEAR),
            v2.RandomHorizontalFlip(),
            v2.RandomVerticalFlip(),
            v2.ColorJitter(brightness=0.2, contrast=0.2, saturation=0.2, hue=0.05),
            Elastic(),
            v2.RandomErasing(p=0.5, scale=(0.02, 0.1), ratio=(1.0, 1.0), value=0.0),
        ]
    )
