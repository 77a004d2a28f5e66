"""The journal of what is written: continued, refused or begun anew."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

import fxstream
from fxstream.geometry.box import Box, Interval
from fxstream.io.journal import Journal

SAME = {"weights": "1", "pixels": ["a"]}
UPPER, LOWER = Box((Interval(0, 4),)), Box((Interval(4, 9),))


def begun(path):
    """A journal with one box of each of two results."""
    notes = Journal(path, SAME)
    notes.tick(0, UPPER, 17)
    notes.tick(1, LOWER, 18)
    notes.close()


def test_results_have_boxes_of_their_own(tmp_path):
    begun(tmp_path / "journal")
    again = Journal(tmp_path / "journal", SAME)
    assert (again.done(0), again.done(1), again.done(2)) == ({UPPER: 17}, {LOWER: 18}, {})


def test_the_last_checksum_of_a_box_counts(tmp_path):
    begun(tmp_path / "journal")
    with Journal(tmp_path / "journal", SAME) as notes:
        notes.tick(0, UPPER, 19)
    assert Journal(tmp_path / "journal", SAME).done(0) == {UPPER: 19}


def test_a_line_that_was_cut_off_counts_as_not_written(tmp_path):
    path = tmp_path / "journal"
    begun(path)
    path.write_text(path.read_text()[:-4])
    with Journal(path, SAME, True) as again:
        assert again.done(1) == {}
        again.tick(1, LOWER, 20)
    assert Journal(path, SAME).done(1) == {LOWER: 20}


@pytest.mark.parametrize("length", [1, 30])
def test_a_first_line_that_was_cut_off_is_written_again(tmp_path, length):
    path = tmp_path / "journal"
    begun(path)
    path.write_text(path.read_text()[:length])
    assert Journal(path, SAME).done(0) == {}
    assert Journal(path, SAME).path.read_text().count("form 2") == 1


OTHER_PROCESS = """
import sys
from fxstream.io.journal import Journal
notes = Journal(sys.argv[1], {"weights": "1", "pixels": ["a"]})
print("writes", flush=True)
sys.stdin.read()
"""


@pytest.mark.skipif(os.name != "posix", reason="needs flock")
@pytest.mark.parametrize("ends", ["terminate", "kill"])
def test_two_processes_do_not_write_one_journal(tmp_path, ends):
    path = tmp_path / "journal"
    begun(path)
    command = [sys.executable, "-c", OTHER_PROCESS, str(path)]
    paths = os.environ | {"PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[2]), *sys.path])}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "env": paths}
    with subprocess.Popen(command, **pipes) as other:
        assert other.stdout.readline() == "writes\n"
        for restart in (False, True):
            with pytest.raises(fxstream.StreamError, match=r"another process writes the journal .*journal: wait"):
                Journal(path, SAME, restart)
        getattr(other, ends)()
    assert Journal(path, SAME).done(0) == {UPPER: 17}


def test_the_files_of_all_ranks_are_put_together(tmp_path):
    path = tmp_path / "journal"
    begun(path)
    middle = Box((Interval(9, 12),))
    with Journal(path, SAME) as first, Journal(path, SAME, rank=1) as second:
        assert second.done(0) == {UPPER: 17}
        first.tick(0, LOWER, 20)
        second.tick(0, middle, 21)
        with pytest.raises(fxstream.StreamError, match="another process writes"):
            Journal(path, SAME, rank=1)
    (tmp_path / "journal.7").write_text("of something else\n")
    with Journal(path, SAME) as again:
        assert again.done(0) == {UPPER: 17, LOWER: 20, middle: 21}
    assert sorted(one.name for one in tmp_path.iterdir()) == ["journal", "journal.7"]
    with Journal(path, SAME) as _, Journal(path, SAME, rank=1) as second:
        second.tick(1, middle, 22)
    assert Journal(path, {"weights": "2"}, True).done(1) == {}  # what others wrote of another prediction is gone
    assert sorted(one.name for one in tmp_path.iterdir()) == ["journal", "journal.7"]


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs a device that is full")
def test_a_full_disk_is_told(tmp_path):
    notes = Journal(tmp_path / "journal", SAME)
    full = os.open("/dev/full", os.O_WRONLY)
    os.dup2(full, notes._file._number)
    os.close(full)
    with pytest.raises(fxstream.StreamError, match=r"writing the journal .* No space left.*next start continues"):
        notes.tick(0, UPPER, 17)


def test_a_journal_of_another_prediction_is_refused_or_begun_anew(tmp_path):
    path = tmp_path / "journal"
    begun(path)
    other = {"weights": "2", "pixels": ["b"]}
    with pytest.raises(fxstream.InputError, match=r"its pixels, weights differ.*restart=True to begin it anew"):
        Journal(path, other, False)
    assert Journal(path, SAME, True).done(0) == {UPPER: 17}  # the same one continues
    assert Journal(path, other, True).done(0) == {}
    with Journal(path, other) as notes:
        notes.tick(0, LOWER, 21)
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
