"""Predictions by Ray's workers: each image once, also where one of them is killed."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("ray")
zarr = pytest.importorskip("zarr")
pytestmark = [pytest.mark.campaign, pytest.mark.skipif(os.name != "posix", reason="needs SIGKILL")]
ROOT = Path(__file__).parents[2]
SEGMENTERS = ROOT / "tests" / "prediction"


def pids(folder):
    """The processes that are at work, by the leases."""
    found = []
    for lease in folder.glob(".job/*/*/lease"):
        try:
            found.append(json.loads(lease.read_text())["pid"])
        except (OSError, ValueError, KeyError):
            continue
    return found


@pytest.mark.parametrize("kills", [0, 1])
def test_a_fleet(kills, tmp_path):
    sys.path.append(str(SEGMENTERS))
    from segmenters import Segmenter, picture, plain

    paths = [tmp_path / f"{i:02d}.npy" for i in range(12)]
    for i, path in enumerate(paths):
        np.save(path, picture(300 + 7 * i, 320 - 5 * i))
    command = [sys.executable, ROOT / "examples" / "fleet.py", f"{SEGMENTERS}/segmenters.py:Segmenter"]
    command += [tmp_path / "out", *paths, "--memory", "1MiB"]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path]), "OMP_NUM_THREADS": "1"}
    with (tmp_path / "printed").open("w") as file:
        process = subprocess.Popen(list(map(str, command)), stdout=file, stderr=file, env=environment)
        try:
            while kills and process.poll() is None:
                for pid in pids(tmp_path / "out")[:1]:
                    os.kill(pid, signal.SIGKILL)
                    kills = 0
                time.sleep(0.01)
            assert process.wait(300) == 0, (tmp_path / "printed").read_text()
        finally:
            process.terminate()
            process.wait(60)
    assert "12 images: 12 done" in (tmp_path / "printed").read_text()
    for path in paths:
        array = zarr.open_group(f"{tmp_path}/out/{path.stem}.ome.zarr", mode="r")["0"][:]
        assert np.array_equal(array, plain(Segmenter().eval(), np.load(path)))
