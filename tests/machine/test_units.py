"""Amounts of memory as text."""

import pytest

import fxstream
from fxstream.machine.units import parse_bytes


def test_memory_texts():
    texts = {"8GiB": 2**33, "1.5KiB": 1536, "1kB": 1000, "512": 512, "2.5 MB": 2_500_000, "1e3": 1000}
    assert {text: parse_bytes(text) for text in texts} == texts
    for text in ("", "GiB", "-1GB", "0", "8 gallons"):
        with pytest.raises(fxstream.InputError, match="no amount of memory"):
            parse_bytes(text)
