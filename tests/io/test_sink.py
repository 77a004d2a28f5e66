"""The journal of what is written, and whether boxes cover a box."""

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
