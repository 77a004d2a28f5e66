"""The command in many processes: each image once whoever is killed, the tiles of one image as by one process."""

import contextlib
import os
import random
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from segmenters import Segmenter, picture, plain, scores

import fxstream

zarr = pytest.importorskip("zarr")
pytestmark = [
    pytest.mark.skipif(os.name != "posix", reason="needs SIGKILL"),
    pytest.mark.xdist_group("sharing"),
]
HERE = Path(__file__).parent
ENVIRONMENT = {"PYTHONPATH": os.pathsep.join([str(HERE.parents[1]), *sys.path]), "OMP_NUM_THREADS": "1"}


def command(*arguments):
    """The command, with a network of this folder."""
    target = f"{HERE}/segmenters.py:{arguments[0]}"
    return [sys.executable, "-m", "fxstream", "predict", target, *map(str, arguments[1:])]


@contextlib.contextmanager
def started(commands, folder, **others):
    """Processes, with what they print in files; none of them outlives the block."""
    own = [{key: str(of[i]) for key, of in others.items()} for i in range(len(commands))]
    with contextlib.ExitStack() as stack:
        files = [stack.enter_context((folder / f"printed_{i}").open("a")) for i in range(len(commands))]
        processes = []
        try:
            for one, file, variables in zip(commands, files, own, strict=True):
                variables |= os.environ | ENVIRONMENT
                processes.append(subprocess.Popen(one, stdout=file, stderr=file, env=variables))
            yield processes
        finally:
            for process in processes:
                process.kill()
                process.wait()


def slides(folder, count):
    """Images of as many sizes."""
    (folder / "slides").mkdir()
    sizes = [(100 + 37 * i % 250, 90 + 53 * i % 230) for i in range(count)]
    assert len(set(sizes)) == count
    paths = [folder / "slides" / f"{i:02d}.npy" for i in range(count)]
    for path, size in zip(paths, sizes, strict=True):
        np.save(path, picture(*size))
    return paths


def lines_of(folder):
    """The images that the processes say are done, in the order of the files."""
    texts = [path.read_text() for path in sorted(folder.glob("printed_*"))]
    return [line for text in texts for line in re.findall(r"(\d\d)\.npy -> ", text)]


CASES = [(10, 2, 1), *(pytest.param(40, 4, kills, marks=pytest.mark.campaign) for kills in (0, 2))]


@pytest.mark.parametrize("count, workers, kills", CASES)
def test_images_shared_by_processes(count, workers, kills, tmp_path):
    paths = slides(tmp_path, count)
    one = command("Segmenter", *paths, "--out", tmp_path / "out", "--memory", "3MiB", "--device", "cpu")
    with started([one] * workers, tmp_path) as processes:
        for kill in range(kills):
            while len(lines_of(tmp_path)) < (kill + 1) * count // (kills + 2):
                time.sleep(0.005)
            processes[kill].send_signal(signal.SIGKILL)
        codes = [process.wait(300) for process in processes]
    assert codes == [-signal.SIGKILL] * kills + [0] * (workers - kills), (tmp_path / "printed_1").read_text()
    printed = lines_of(tmp_path)
    assert len(printed) == len(set(printed))
    assert len(printed) >= count - kills  # a process may be killed before it says so
    network = Segmenter().eval()
    for path in paths:
        array = zarr.open_group(f"{tmp_path}/out/{path.stem}.ome.zarr", mode="r")["0"][:]
        assert np.array_equal(array, plain(network, np.load(path))), path
    assert f"{count} images: {count} done" in (tmp_path / f"printed_{workers - 1}").read_text()
    assert {path.suffix for path in (tmp_path / "out" / ".job").iterdir()} == {".done", ".json"}


def mesh(count, folder, *arguments):
    """Processes that share the tiles of each image, as torchrun starts them."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    ranks = {"RANK": range(count), "LOCAL_RANK": range(count), "WORLD_SIZE": [count] * count}
    address = {"MASTER_ADDR": ["localhost"] * count, "MASTER_PORT": [port] * count}
    one = command("scores", *arguments, "--device", "cpu", "--mesh")
    return started([one] * count, folder, **ranks, **address)


def by_one_process(folder, path, memory):
    """Level 0 of the result of one process."""
    assert fxstream.predict(scores(), path, folder / "one", memory=memory).done
    return zarr.open_group(f"{folder}/one/{path.stem}.ome.zarr", mode="r")["0"][:]


def test_ranks_share_the_tiles_of_an_image(tmp_path):
    for name, size in (("first", (330, 290)), ("second", (200, 310))):
        np.save(tmp_path / f"{name}.npy", picture(*size))
    (tmp_path / "broken.npy").write_text("nonsense")
    paths = [tmp_path / f"{name}.npy" for name in ("first", "broken", "second")]
    with mesh(4, tmp_path, *paths, "--out", tmp_path / "out", "--memory", "1MiB") as processes:
        codes = [process.wait(300) for process in processes]
    printed = [(tmp_path / f"printed_{rank}").read_text() for rank in range(4)]
    assert codes == [1] * 4, printed
    assert printed[0].count(" -> ") == 2
    assert "3 images: 2 done (2 by this process), 1 failed" in printed[0]
    assert [text.count(".npy") for text in printed[1:]] == [0] * 3, printed
    for path in (paths[0], paths[2]):
        array = zarr.open_group(f"{tmp_path}/out/{path.stem}.ome.zarr", mode="r")["0"][:]
        assert np.array_equal(array, by_one_process(tmp_path, path, "1MiB"))
        np.testing.assert_allclose(array, plain(scores(), np.load(path)), rtol=1e-4, atol=1e-3)


@pytest.mark.campaign
def test_a_mesh_that_is_killed_at_ten_moments(tmp_path):
    """One rank, or all of them; started again each time. The result is that of a prediction in one go."""
    path, moments = tmp_path / "large.npy", random.Random(0)
    np.save(path, picture(5000, 4800))
    expected = by_one_process(tmp_path, path, "3MiB")
    arguments = path, "--out", tmp_path / "out", "--memory", "3MiB"
    work = tmp_path / "out" / ".job"
    tiles_before = []
    for kill in range(10):
        with mesh(4, tmp_path, *arguments) as processes:
            least = (tiles_before or [0])[-1] + 1
            while ticked(work) < least and all(process.poll() is None for process in processes):
                time.sleep(0.02)
            time.sleep(moments.uniform(0, 0.15))
            for process in processes if kill % 2 else [processes[moments.randrange(4)]]:
                process.send_signal(signal.SIGKILL)
            codes = [process.wait(120) for process in processes]
        assert 0 not in codes, (kill, codes)
        tiles_before.append(ticked(work))
    with mesh(4, tmp_path, *arguments) as processes:
        assert [process.wait(300) for process in processes] == [0] * 4
    assert tiles_before == sorted(tiles_before)
    array = zarr.open_group(f"{tmp_path}/out/large.ome.zarr", mode="r")["0"][:]
    assert np.array_equal(array, expected)
    print(tiles_before)


def ticked(work):
    """How many different boxes the journals of all ranks list."""
    journals = [path.read_text() for path in work.glob("*/*/journal*")]
    return len({line for text in journals for line in text.splitlines() if line.startswith('{"output"')})
