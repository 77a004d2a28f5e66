"""The small setting of this example: synthetic slides, a narrow network, a few epochs.

    python examples/slides/small.py [FOLDER] [more options of train.py]

Writes two dozen slides into FOLDER (by default a temporary one) and trains on them with `train.py`. Given a
FOLDER, it can be stopped and started again.
"""

import sys
import tempfile
from pathlib import Path

from make_slides import make_slides
from train import main

SETTING = {
    "size": 256,
    "spacing": 2,
    "width": 8,
    "epochs": 20,
    "batch": 4,
    "rate": 1e-3,
    "dropout": 0.2,
    "memory": "8MiB",
}

if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as temporary:
        given = sys.argv[1:]
        folder = Path(given.pop(0) if given and not given[0].startswith("-") else temporary)
        labels = make_slides(folder, count=24, size=640)
        setting = SETTING | {"folder": folder / "run", "cache": folder / "tissue"}
        main([str(labels), *(f"--{name}={value}" for name, value in setting.items()), *given])
