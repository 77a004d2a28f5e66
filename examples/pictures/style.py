"""What the drawings share: colours, and how a picture is written."""

from pathlib import Path

from matplotlib.figure import Figure
from PIL import Image

FOLDER = Path(__file__).parent
GREY, ORANGE, GREEN = "#7a8ba3", "#d9622b", "#3b7a57"


def save(figure: Figure, name: str) -> None:
    """Write the picture with a palette, which is a third of the bytes."""
    figure.savefig(FOLDER / name, dpi=110)
    Image.open(FOLDER / name).convert("RGB").quantize(64).save(FOLDER / name, optimize=True)
