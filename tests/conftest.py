"""Set-up that every test file relies on: torchvision importable on a CPU build, one thread, a seed per test, and
the same examples of hypothesis in every run.

The suite runs in two processes; more threads in each would only get into each other's way.
"""

import gc

import pytest
import torch
from hypothesis import settings

from fxstream.tools.zoo import define_missing_torchvision_schemas

define_missing_torchvision_schemas()
torch.set_num_threads(1)
settings.register_profile("suite", deadline=None, derandomize=True, database=None)
settings.load_profile("suite")


@pytest.fixture(autouse=True, scope="module")
def _without_what_was_there():
    """Collections of garbage, of which some tests make many, pass over what was imported and cached before."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)
