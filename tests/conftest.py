"""Set-up that every test file relies on.

The CPU build of torch has no compiled torchvision operators, and `import torchvision` then fails on the
fake-tensor rules that it registers for two of them. Defining their schemas is enough for the networks, which
use neither; this is the one place where that happens.
"""

import importlib.util

import pytest
import torch


def define_missing_torchvision_schemas() -> None:
    """Define `torchvision::nms` and `torchvision::qnms` where no compiled operators do."""
    library = torch.library.Library("torchvision", "FRAGMENT")
    for name in ("nms", "qnms"):
        if not hasattr(torch.ops.torchvision, name):
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    define_missing_torchvision_schemas.library = library  # keeps the definitions alive


if importlib.util.find_spec("torchvision") is not None and not torch.cuda.is_available():
    define_missing_torchvision_schemas()


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)
