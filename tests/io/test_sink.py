"""Results into arrays: what is written, what counts as written, and whether boxes cover a box."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import fxstream
from fxstream.geometry.box import Box, Interval
from fxstream.io import journal, sink


def box(*bounds):
    return Box(tuple(Interval(*pair) for pair in bounds))


def test_coverage():
    whole = box((0, 10), (0, 10))
    parts = [box((0, 5), (0, 10)), box((5, 10), (0, 4)), box((4, 10), (4, 10))]
    assert sink._is_covered(whole, parts)
    assert not sink._is_covered(whole, parts[:2])
    assert not sink._is_covered(whole, [*parts[:2], box((4, 10), (5, 10))])


spans = st.tuples(st.integers(0, 7), st.integers(1, 8)).filter(lambda pair: pair[0] < pair[1])
boxes = st.tuples(spans, spans).map(lambda pair: box(*pair))


def marked(*parts):
    mask = np.zeros((8, 8), int)
    for part in parts:
        mask[part.index((0, 1), 2)] += 1
    return mask


@given(boxes, st.lists(boxes, max_size=6))
def test_a_box_is_covered_where_all_of_its_pixels_are(whole, parts):
    covered = bool((marked(*parts)[whole.index((0, 1), 2)] > 0).all())
    assert sink._is_covered(whole, parts) == covered


@given(boxes, boxes)
def test_what_is_left_of_a_box_without_another(one, other):
    left = marked(*sink._less(one, other))
    assert np.array_equal(left, marked(one) * (marked(other) == 0))
    assert sink._meet(one, other) == bool((marked(one) * marked(other)).any())


OPENED = []


def prediction(folder, restart=False):
    """The journal of the folder, which the one before lets go of."""
    while OPENED:
        OPENED.pop().close()
    OPENED.append(journal.Journal(folder / "journal", {"weights": "1"}, restart))
    return OPENED[0]


def sink_of(array, folder, output=0):
    """A sink that goes on from the journal of the folder."""
    writes = sink.Sink(array, array.shape, torch.float32, output)
    writes.resume(prediction(folder))
    return writes


UPPER, LOWER = box((0, 1), (0, 4), (0, 8)), box((0, 1), (4, 8), (0, 8))


def test_a_sink_writes_boxes_and_knows_what_was_written(tmp_path):
    array = np.zeros((1, 8, 8))
    first = sink_of(array, tmp_path)
    assert not first.is_written(UPPER)
    first.write(UPPER, torch.ones(1, 4, 8))
    assert array.sum() == 32
    assert array[0, :4].all()
    again = sink_of(array, tmp_path)
    assert again.is_written(box((0, 1), (1, 3), (2, 7)))
    assert not again.is_written(box((0, 1), (3, 5), (2, 7)))
    assert not sink_of(array, tmp_path, output=1).is_written(box((0, 1), (1, 3), (2, 7)))
    again.write_whole(torch.full((1, 8, 8), 2.0))
    assert (array == 2).all()
    with pytest.warns(fxstream.StreamingWarning, match="in 1 of 2 boxes"):  # the upper half has new values
        sink_of(array, tmp_path).write_whole(torch.full((1, 8, 8), 3.0))
    assert (array == 2).all()


@pytest.mark.parametrize(
    "lost",
    [lambda array: array.fill(0), lambda array: array[0, 7].fill(9), lambda array: array[0, 4, :1].fill(np.nan)],
)
def test_what_an_array_no_longer_holds_is_not_written(tmp_path, lost):
    """As of an array that was made anew, and of a chunk that was torn by a kill."""
    array = np.zeros((1, 8, 8))
    first = sink_of(array, tmp_path)
    first.write(UPPER, torch.zeros(1, 4, 8))
    first.write(LOWER, torch.ones(1, 4, 8))
    lost(array)
    with pytest.warns(
        fxstream.StreamingWarning,
        match=r"numpy.ndarray \[1, 8, 8\] does not hold what was written in 1 of 2 boxes",
    ):
        again = sink_of(array, tmp_path)
    assert again.is_written(UPPER)
    assert not again.is_written(LOWER)


def test_what_cannot_be_read_is_not_written(tmp_path):
    class Torn(np.ndarray):
        def __getitem__(self, index):
            raise ValueError("corrupt chunk")

    array = np.zeros((1, 8, 8))
    sink_of(array, tmp_path).write(UPPER, torch.ones(1, 4, 8))
    with pytest.warns(fxstream.StreamingWarning, match="written again"):
        assert not sink_of(array.view(Torn), tmp_path).is_written(UPPER)


@pytest.mark.parametrize("dtype", ["f4", ">f4", "f2", ">f8"])
def test_zeros_and_nans_are_recognised_whatever_a_store_makes_of_them(tmp_path, dtype):
    array = np.zeros((1, 8, 8), dtype)
    values = torch.tensor([-0.0, torch.nan, -torch.nan, torch.inf, 1 / 3, 0, 1, -1]).expand(1, 4, 8)
    sink_of(array, tmp_path).write(UPPER, values)
    array[array == 0] = 0
    array[np.isnan(array)] = np.nan
    assert sink_of(array, tmp_path).is_written(UPPER)


@pytest.mark.parametrize(
    "values, array, match",
    [
        (torch.int64, "u1", r"type uint8 and the result torch.int64, which it cannot hold.*or give saturate=True"),
        (torch.int64, "i4", "cannot hold"),
        (torch.uint8, "i1", "cannot hold"),
        (torch.int8, "u1", "cannot hold"),
        (torch.float32, "u1", r"cannot hold: convert in the model$"),
        (torch.float32, "?", "cannot hold"),
        (torch.int32, "i8", None),
        (torch.uint8, "i2", None),
        (torch.bool, "u1", None),
        (torch.int64, "f4", None),
        (torch.float64, "f2", None),
    ],
)
def test_types_that_an_array_can_hold(values, array, match):
    if match is None:
        sink.Sink(np.zeros(3, array), (3,), values)
        return
    with pytest.raises(fxstream.InputError, match=match):
        sink.Sink(np.zeros(3, array), (3,), values)


def test_integers_saturate_by_request():
    for dtype, expected in (
        ("u1", [0, 0, 7, 255, 255]),
        ("i1", [-128, -1, 7, 127, 127]),
        ("u8", [0, 0, 7, 255, 2**62]),
    ):
        array = np.zeros(5, dtype)
        saturating = sink.Sink(array, (5,), torch.int64, saturate=True)
        saturating.write(box((0, 5)), torch.tensor([-(2**62), -1, 7, 255, 2**62]))
        assert array.tolist() == expected
    with pytest.raises(fxstream.InputError, match="convert in the model"):
        sink.Sink(np.zeros(5, "u1"), (5,), torch.float32, saturate=True)
