"""A job that several workers share: leases, their loss, and what a worker that is dead leaves behind."""

import json
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

import fxstream
from fxstream.geometry.box import Box, Interval
from fxstream.io.journal import Journal
from fxstream.prediction import job as jobs
from fxstream.prediction.job import Job

SETTINGS = {"weights": "1"}
IMAGE = Path("one.npy")


def taken(job, image=IMAGE):
    """The lease of an image, as a worker gets it; None where another one has it."""
    return job._claim(jobs._key(image))


def test_one_worker_gets_an_image(tmp_path):
    workers = [Job(tmp_path, SETTINGS) for _ in range(8)]
    with ThreadPoolExecutor(8) as pool:
        leases = [lease for lease in pool.map(taken, workers) if lease is not None]
    assert len(leases) == 1
    assert [taken(worker) for worker in workers] == [None] * 8
    with leases[0]:
        assert taken(workers[0]) is None
    again = taken(workers[0])  # it was let go
    assert again.folder.name == "2"
    assert (leases[0].is_lost, again.is_lost) == (True, False)
    with pytest.raises(fxstream.StreamError, match="another worker took this image"):
        workers[0].finish(IMAGE, leases[0], again.folder / "made", "one.txt")


def test_a_folder_is_joined_by_all_or_refused(tmp_path):
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda _: Job(tmp_path, SETTINGS), range(16)))
    assert [path.name for path in tmp_path.iterdir()] == [".job"]
    with pytest.raises(fxstream.InputError, match=r"another job .weights was 1 and is 2.: give another folder"):
        Job(tmp_path, {"weights": "2"})
    (tmp_path / "file").write_text("")
    with pytest.raises(fxstream.InputError, match="cannot be written"):
        Job(tmp_path / "file", SETTINGS)


WORKER = """
import sys, time
from pathlib import Path
from fxstream.prediction.job import Job
job = Job(Path(sys.argv[1]), {"weights": "1"})
for image, lease in job.leases([Path("one.npy")]):
    (lease.folder / "half").write_text("half of the work")
    print("works", flush=True)
    time.sleep(600)
"""


def worker(folder):
    """A process that works at an image and does not come to an end."""
    paths = os.environ | {"PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[2]), *sys.path])}
    command = [sys.executable, "-c", WORKER, str(folder)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=paths)
    assert process.stdout.readline() == "works\n"
    return process


@pytest.mark.skipif(os.name != "posix", reason="needs SIGKILL")
def test_the_image_of_a_killed_worker_is_taken_over_at_once(tmp_path):
    with worker(tmp_path) as process:
        job = Job(tmp_path, SETTINGS)
        assert taken(job) is None
        process.send_signal(signal.SIGKILL)
        process.wait()
    (image, lease), *_ = [next(job.leases([IMAGE]))]
    assert (image, lease.folder.name) == (IMAGE, "2")
    assert (lease.folder / "half").read_text() == "half of the work"


@pytest.mark.skipif(os.name != "posix", reason="needs SIGSTOP")
def test_the_image_of_a_worker_that_is_silent_is_taken_over(tmp_path, monkeypatch):
    """As of another machine, whose processes are not seen. One that comes back cannot put its result there."""
    monkeypatch.setattr(jobs, "PATIENCE", 0.3)
    monkeypatch.setattr(jobs, "_is_alive", lambda pid: True)
    with worker(tmp_path) as process:
        job, since = Job(tmp_path, SETTINGS), time.monotonic()
        while (lease := taken(job)) is None:
            time.sleep(0.01)
        assert time.monotonic() - since > 0.3
        process.kill()
    assert lease.folder.name == "2"


def test_one_that_comes_back_writes_into_no_file_of_the_other(tmp_path):
    """Nor do its locks stand in the way."""
    slow, other = Job(tmp_path, SETTINGS), Job(tmp_path, SETTINGS)
    first = taken(slow)
    with Journal(first.folder / "journal", SETTINGS) as journal:
        journal.tick(0, Box((Interval(0, 4),)), 1)
        (first.folder / "lease").write_text(json.dumps({"released": True}))
        second = taken(other)
        with Journal(second.folder / "journal", SETTINGS) as continued:
            assert len(continued.done(0)) == 1
            journal.tick(0, Box((Interval(4, 8),)), 2)
    assert len(Journal(second.folder / "journal", SETTINGS).done(0)) == 1


def test_an_image_that_was_lost_is_waited_for(tmp_path):
    slow, other = Job(tmp_path, SETTINGS), Job(tmp_path, SETTINGS)
    seen = []
    for _, lease in slow.leases([IMAGE]):
        seen.append(lease.folder.name)
        if len(seen) == 1:
            (lease.folder / "lease").write_text(json.dumps({"released": True}))
            with taken(other):
                pass
            continue
        done(slow, lease)
    assert seen == ["1", "3"]
    assert slow.result(IMAGE) == tmp_path / "one.txt"


def test_a_lease_that_is_touched_is_kept(tmp_path, monkeypatch):
    monkeypatch.setattr(jobs, "PATIENCE", 0.3)
    monkeypatch.setattr(jobs, "BEAT", 0.05)
    other, job = Job(tmp_path, SETTINGS), Job(tmp_path, SETTINGS)
    with taken(other):
        end = time.monotonic() + 1
        while time.monotonic() < end:
            assert taken(job) is None
            time.sleep(0.02)


def done(job, lease, text="result"):
    (lease.folder / "made").write_text(text)
    job.finish(IMAGE, lease, lease.folder / "made", "one.txt")


def test_a_result_is_put_in_place_once(tmp_path):
    job = Job(tmp_path, SETTINGS)
    for image, lease in job.leases([IMAGE]):
        assert image == IMAGE
        assert not job.is_settled(IMAGE)
        done(job, lease)
    assert (tmp_path / "one.txt").read_text() == "result"
    assert job.result(IMAGE) == tmp_path / "one.txt"
    assert sorted(path.suffix for path in (tmp_path / ".job").iterdir()) == [".done", ".json"]
    assert list(job.leases([IMAGE])) == []
    late = taken(job)  # by one that looked before it was done
    with pytest.raises(fxstream.InputError, match="is there already and is not of this image"):
        done(job, late, "another")
    assert (tmp_path / "one.txt").read_text() == "result"


def test_a_worker_that_was_killed_between_mark_and_result(tmp_path):
    job = Job(tmp_path, SETTINGS)
    (tmp_path / ".job" / f"{jobs._key(IMAGE)}.done").write_text(json.dumps({"result": "one.txt"}))
    assert job.result(IMAGE) is None
    for _, lease in job.leases([IMAGE]):
        done(job, lease)
    left = taken(job).folder  # of one that was killed before it tidied up
    (left / "lease").write_text(json.dumps({"released": True}))
    assert list(job.leases([IMAGE])) == []
    assert not left.parent.exists()


def test_a_failure_counts_for_the_workers_that_run(tmp_path):
    running = Job(tmp_path, SETTINGS)
    for _ in running.leases([IMAGE]):
        running.fail(IMAGE, "no such level")
    assert running.failure(IMAGE) == "no such level"
    time.sleep(0.02)
    later = Job(tmp_path, SETTINGS)
    assert later.failure(IMAGE) is None
    for _, lease in later.leases([IMAGE]):
        done(later, lease)
    assert later.result(IMAGE) == running.result(IMAGE) == tmp_path / "one.txt"


def test_keys_tell_places_apart():
    assert jobs._key(Path("a/one.tif")) != jobs._key(Path("b/one.tif"))
    assert jobs._key(Path("a/../b/one.tif")) == jobs._key(Path("b/one.tif"))
