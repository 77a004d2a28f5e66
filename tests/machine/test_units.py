"""Amounts of memory as text."""

import pytest

import fxstream
from fxstream.machine.units import bytes_text, macs_text, parse_bytes


def test_memory_texts():
    texts = {"8GiB": 2**33, "1.5KiB": 1536, "1kB": 1000, "512": 512, "2.5 MB": 2_500_000, "1e3": 1000}
    assert {text: parse_bytes(text) for text in texts} == texts
    for text in ("", "GiB", "-1GB", "0", "8 gallons"):
        with pytest.raises(fxstream.InputError, match=r"cannot parse .* as a size"):
            parse_bytes(text)


def test_bytes_as_text():
    texts = {0: "0 B", 1023: "1023 B", 1024: "1.00 KiB", 10 * 1024: "10.0 KiB", 100 * 1024: "100 KiB"}
    texts |= {2**20: "1.00 MiB", 2**30: "1.00 GiB", 5 * 2**40: "5120 GiB"}
    assert {count: bytes_text(count) for count in texts} == texts


@pytest.mark.parametrize("count", [1025, 2**20 + 1, 11 * 2**20 + 1, 10**9, 123456789, 2**40 - 1])
def test_an_amount_that_must_suffice_suffices(count):
    assert count <= parse_bytes(bytes_text(count, up=True)) <= 1.011 * count


def test_multiply_accumulates_as_text():
    texts = {0: "0", 999: "999", 1500: "1.50 k", 25_300_000: "25.3 M", 4.1e9: "4.10 G", 2.5e15: "2500 T"}
    assert {count: macs_text(count) for count in texts} == texts
