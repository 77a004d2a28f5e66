"""Which arrays are the same memory, file or store, and which are copies that nothing else sees."""

import numpy as np
import pytest
import torch

import fxstream
from fxstream.io.sharing import is_in_memory_only, share


def test_memory_is_compared_by_element():
    array = np.zeros((4, 6, 8))
    assert share(array, array[1:3])
    assert share(torch.from_numpy(array)[2:], array[1:3])
    assert share(array[..., ::2], array[::-1, :, 4:])
    assert not share(array[:2], array[2:])
    assert not share(array[..., ::2], array[..., 1::2])
    assert not share(array, array.copy())
    image = fxstream.source(array[:, None], array[::-1, None], layout="NCHW")
    assert share(image, array[2])
    assert not share(image, np.zeros(3))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.bool, torch.complex64, torch.complex128, torch.int64])
def test_tensors_of_every_type(dtype):
    tensor = torch.zeros(4, 6, dtype=dtype)
    storage = tensor.untyped_storage()
    memory = torch.empty(0, dtype=torch.uint8).set_(storage, 0, (storage.nbytes(),)).numpy()
    assert share(tensor[1:], memory)
    assert share(tensor.t(), memory)
    assert not share(tensor[1:], memory[: 6 * tensor.itemsize])


def test_maps_of_one_file(tmp_path):
    whole = np.memmap(tmp_path / "a", mode="w+", shape=(10, 8), dtype="f4")
    other = np.memmap(tmp_path / "b", mode="w+", shape=(10, 8), dtype="f4")
    again = np.memmap(tmp_path / "a", mode="r+", shape=(4, 8), dtype="f4", offset=64)
    behind = np.memmap(tmp_path / "a", mode="r+", shape=(5, 8), dtype="f4", offset=192)
    assert share(whole, again[2:])
    assert share(again[2:], whole)
    assert not share(again, behind)
    assert not share(whole, other)
    assert not share(whole[:2], whole[2:])


def test_stores(tmp_path):
    zarr, h5py = pytest.importorskip("zarr"), pytest.importorskip("h5py")
    first = zarr.create_array(str(tmp_path / "z"), shape=(4, 4), chunks=(2, 2), dtype="f4")
    second = zarr.create_array(str(tmp_path / "y"), shape=(4, 4), chunks=(2, 2), dtype="f4")
    assert share(first, zarr.open(str(tmp_path / "z"), mode="r"))
    assert share(fxstream.target(first, 0), fxstream.target(zarr.open(str(tmp_path / "z"), mode="r"), 1))
    assert not share(first, second)
    assert not share(first, np.zeros(3))
    with h5py.File(tmp_path / "h.h5", "w") as file:
        file["a"], file["b"] = np.zeros(3), np.zeros(3)
        assert share(file["a"], file["a"])
        assert not share(file["a"], file["b"])
        assert is_in_memory_only(file["a"][1:])
        assert not is_in_memory_only(file["a"])
    assert is_in_memory_only(first[1:2])
    assert not is_in_memory_only(first)


def test_what_is_in_memory_only(tmp_path):
    mapped = np.memmap(tmp_path / "a", mode="w+", shape=(10, 8), dtype="f4")
    assert is_in_memory_only(np.zeros(3))
    assert is_in_memory_only(np.zeros((3, 4))[1:, ::-1])
    assert not is_in_memory_only(mapped)
    assert not is_in_memory_only(mapped[1:3].T)
    assert not is_in_memory_only(torch.zeros(3).numpy())
