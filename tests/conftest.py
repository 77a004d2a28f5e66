"""Set-up that every test file relies on: torchvision importable on a CPU build, one thread and a seed per test.

The suite runs in two processes; more threads in each would only get into each other's way.
"""

import pytest
import torch

from fxstream.tools.zoo import define_missing_torchvision_schemas

define_missing_torchvision_schemas()
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)
