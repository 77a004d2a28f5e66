"""Set-up that every test file relies on: torchvision importable on a CPU build, a seed per test."""

import pytest
import torch

from fxstream.zoo import define_missing_torchvision_schemas

define_missing_torchvision_schemas()


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)
