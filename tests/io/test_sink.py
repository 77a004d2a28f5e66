"""The journal of what is written, and whether boxes cover a box."""

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from fxstream.geometry.box import Box, Interval
from fxstream.io import sink


def box(*bounds):
    return Box(tuple(Interval(*pair) for pair in bounds))


def test_a_chunk_half_written_is_written_again(tmp_path):
    """The tile that was being written shares a chunk with one that was finished."""
    path = tmp_path / "journal"
    notes = sink.Journal(path, {"a": 1})
    notes.note(0, box((0, 10)), done=False)
    notes.note(0, box((0, 10)), done=True)
    notes.note(0, box((10, 20)), done=False)
    assert sink.Journal(path, {"a": 1}).done(0, None) == [box((0, 10))]
    assert sink.Journal(path, {"a": 1}).done(0, (5,)) == [box((0, 10))]
    assert sink.Journal(path, {"a": 1}).done(0, (8,)) == []
    assert sink.Journal(path, {"a": 1}).done(1, None) == []


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


@given(boxes, st.tuples(st.integers(1, 4), st.integers(1, 4)))
def test_a_box_grown_to_chunks_holds_the_chunks_that_it_touches(one, chunks):
    grown = sink._in_chunks(one, chunks)
    for part, whole, size in zip(one, grown, chunks, strict=True):
        assert {p // size for p in range(part.start, part.stop)} == {
            p // size for p in range(whole.start, whole.stop)
        }
        assert whole.start % size == whole.stop % size == 0
    assert sink._in_chunks(one, None) == one


class Chunked(np.ndarray):
    """An array that says that it is stored in chunks."""

    chunks = (1, 4, 4)


def test_a_sink_writes_boxes_and_knows_what_was_written(tmp_path):
    array = np.zeros((1, 8, 8)).view(Chunked)
    journal = sink.Journal(tmp_path / "journal", {"a": 1})
    first = sink.Sink(array, (1, 8, 8), torch.float32, 0, journal)
    assert not first.is_written(box((0, 1), (0, 4), (0, 8)))
    first.write(box((0, 1), (0, 4), (0, 8)), torch.ones(1, 4, 8))
    assert array.sum() == 32
    assert array[0, :4].all()
    again = sink.Sink(array, (1, 8, 8), torch.float32, 0, sink.Journal(tmp_path / "journal", {"a": 1}))
    assert again.is_written(box((0, 1), (1, 3), (2, 7)))
    assert not again.is_written(box((0, 1), (3, 5), (2, 7)))
    assert not sink.Sink(array, (1, 8, 8), torch.float32, 1, journal).is_written(box((0, 1), (1, 3), (2, 7)))
    again.write_whole(torch.full((1, 8, 8), 2.0))
    assert (array == 2).all()
    third = sink.Sink(array, (1, 8, 8), torch.float32, 0, sink.Journal(tmp_path / "journal", {"a": 1}))
    third.write_whole(torch.full((1, 8, 8), 3.0))
    assert (array == 2).all()


def test_results_have_boxes_of_their_own(tmp_path):
    notes = sink.Journal(tmp_path / "journal", {"a": 1})
    notes.note(1, box((0, 4)), done=True)
    again = sink.Journal(tmp_path / "journal", {"a": 1})
    assert (again.done(0, None), again.done(1, None)) == ([], [box((0, 4))])
