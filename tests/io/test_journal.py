"""The journal of what is written: continued, refused or begun anew."""

import pytest

import fxstream
from fxstream.geometry.box import Box, Interval
from fxstream.io.journal import Journal

UPPER, LOWER = Box((Interval(0, 4),)), Box((Interval(4, 9),))


def begun(path):
    """A journal with one box of each of two results."""
    notes = Journal(path, {"weights": "1", "pixels": ["a"]}, False)
    notes.tick(0, UPPER, 17)
    notes.tick(1, LOWER, 18)
    return notes


def test_results_have_boxes_of_their_own(tmp_path):
    begun(tmp_path / "journal")
    again = Journal(tmp_path / "journal", {"weights": "1", "pixels": ["a"]}, False)
    assert (again.done(0), again.done(1), again.done(2)) == ({UPPER: 17}, {LOWER: 18}, {})


def test_the_last_checksum_of_a_box_counts(tmp_path):
    begun(tmp_path / "journal").tick(0, UPPER, 19)
    assert Journal(tmp_path / "journal", {"weights": "1", "pixels": ["a"]}, False).done(0) == {UPPER: 19}


def test_a_line_that_was_cut_off_counts_as_not_written(tmp_path):
    path = tmp_path / "journal"
    begun(path)
    path.write_text(path.read_text()[:-4])
    again = Journal(path, {"weights": "1", "pixels": ["a"]}, True)
    assert again.done(1) == {}
    again.tick(1, LOWER, 20)
    assert Journal(path, {"weights": "1", "pixels": ["a"]}, False).done(1) == {LOWER: 20}


def test_a_journal_of_another_prediction_is_refused_or_begun_anew(tmp_path):
    path = tmp_path / "journal"
    begun(path)
    other = {"weights": "2", "pixels": ["b"]}
    with pytest.raises(fxstream.InputError, match=r"its pixels, weights differ.*restart=True to begin it anew"):
        Journal(path, other, False)
    assert Journal(path, {"weights": "1", "pixels": ["a"]}, True).done(0) == {UPPER: 17}  # the same one continues
    (tmp_path / "journal.new").write_text("of a beginning that was killed\n")
    assert Journal(path, other, True).done(0) == {}
    Journal(path, other, False).tick(0, LOWER, 21)
    assert Journal(path, other, False).done(0) == {LOWER: 21}
    assert [one.name for one in tmp_path.iterdir()] == ["journal"]


@pytest.mark.parametrize("text", ["nonsense\n", '{"weights": "1"}\n', "[1]\n"])
def test_a_file_that_is_no_journal_is_never_replaced(tmp_path, text):
    path = tmp_path / "journal"
    path.write_text(text)
    for restart in (False, True):
        with pytest.raises(fxstream.InputError, match="is no journal of this version"):
            Journal(path, {"weights": "1"}, restart)
    assert path.read_text() == text


def test_an_empty_file_is_begun(tmp_path):
    path = tmp_path / "journal"
    path.write_text("\n")
    assert Journal(path, {"weights": "1"}, False).done(0) == {}
    assert path.read_text().count("\n") == 1
