"""Parts of arrays as the places for results, against numpy's indexing."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import fxstream

SHAPE = (4, 5, 6)


class Store:
    """An array whose slices are copies, as zarr's and HDF5's are: one slice per axis, without steps."""

    def __init__(self, shape):
        self.values, self.shape, self.dtype, self.flushed = np.zeros(shape), shape, np.dtype(float), 0

    def _checked(self, index):
        assert len(index) == len(self.shape)
        assert all(
            isinstance(part, slice) and part.step is None and 0 <= part.start <= part.stop for part in index
        )
        return index

    def __getitem__(self, index):
        return self.values[self._checked(index)].copy()

    def __setitem__(self, index, values):
        assert self.values[self._checked(index)].shape == values.shape
        self.values[index] = values

    def flush(self):
        self.flushed += 1


@st.composite
def indices(draw):
    """What stands in brackets: integers, slices and None, and an ellipsis so that numpy gives an array."""
    count = draw(st.integers(0, 3))
    entries = [
        draw(st.one_of(st.integers(-size, size - 1), st.builds(slice, st.integers(0, size - 1), st.none())))
        for size in SHAPE[:count]
    ]
    for _ in range(draw(st.integers(0, 2))):
        entries.insert(draw(st.integers(0, len(entries))), None)
    return (*entries, ...)


@given(indices(), st.data())
def test_a_part_is_what_numpy_takes(index, data):
    store, expected = Store(SHAPE), np.zeros(SHAPE)
    part = fxstream.target(store, index)
    assert part.shape == expected[index].shape
    starts = [data.draw(st.integers(0, size - 1)) for size in part.shape]
    box = tuple(slice(start, data.draw(st.integers(start + 1, size))) for start, size in zip(starts, part.shape))
    values = np.random.default_rng(0).standard_normal(expected[index][box].shape)
    part[box] = values
    expected[index][box] = values
    assert np.array_equal(store.values, expected)
    assert np.array_equal(part[box], values)


def test_one_entry_stands_for_itself():
    assert fxstream.target(Store(SHAPE), slice(1, 2)).shape == (1, 5, 6)
    assert fxstream.target(Store(SHAPE), -1).shape == (5, 6)


@pytest.mark.parametrize(
    "index, match",
    [
        ((0, 0, 0, 0), r"does not fit an array of shape \[4, 5, 6\]"),
        ((..., 0, ...), "does not fit"),
        (np.s_[::2], r"of axis 0 takes no part .*slices without a step"),
        (np.s_[0, ::-1], "of axis 1 takes no part"),
        (np.s_[4], "of axis 0 takes no part"),
        (np.s_[4:], "takes no part"),
        ("name", "takes no part"),
        ([1, 2], "takes no part"),
    ],
)
def test_other_indices_are_refused(index, match):
    with pytest.raises(fxstream.InputError, match=match):
        fxstream.target(Store(SHAPE), index)


def test_a_target_is_part_of_an_array():
    with pytest.raises(fxstream.InputError, match="needs an array with shape, dtype and slices; found str"):
        fxstream.target("scores.zarr", 0)


def test_a_result_into_a_plane_of_a_store(tmp_path):
    """Where a slice of it would be a copy; with a journal, which continues."""
    zarr = pytest.importorskip("zarr")
    stored = zarr.create_array(str(tmp_path / "z"), shape=(3, 40, 46), chunks=(1, 16, 16), dtype="f8")
    torch.manual_seed(0)
    model = torch.nn.Conv2d(2, 1, 3).double()
    image = torch.randn(1, 2, 38, 46, dtype=torch.float64)
    module = fxstream.compile(model, tile=15, segments=1, verify=False)
    for _ in range(2):
        place = fxstream.target(stored, np.s_[None, 1:2, 4:, 2:])
        assert fxstream.infer(module, image, out=place, journal=tmp_path / "journal") is place
    lines = (tmp_path / "journal").read_text().split()
    expected = np.zeros((3, 40, 46))
    expected[1, 4:, 2:] = model(image).detach()[0, 0]
    np.testing.assert_allclose(stored[:], expected, rtol=1e-12, atol=1e-12)
    assert sum("sum" in line for line in lines) == module.plan.segments[0].tile_count
    assert repr(place) == "Target(Array, [1, 1, 36, 44], float64)"


def test_a_target_brings_its_array_to_the_disk():
    store = Store(SHAPE)
    fxstream.target(store, 0).flush()
    assert store.flushed == 1
