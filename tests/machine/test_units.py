"""Amounts of memory as text."""

import numpy as np
import pytest
import torch

import fxstream
from fxstream.machine.device import budget_of, total_bytes
from fxstream.machine.units import bytes_text, macs_text, parse_bytes, parse_memory


def test_memory_texts():
    texts = {"8GiB": 2**33, "1.5KiB": 1536, "1kB": 1000, "512B": 512, "2.5 MB": 2_500_000, "1e6": 1_000_000}
    assert {text: parse_bytes(text) for text in texts} == texts
    for text in ("", "GiB", "-1GB", "0", "8 gallons"):
        with pytest.raises(fxstream.InputError, match=r"cannot parse .* as a size"):
            parse_bytes(text)

    with pytest.raises(fxstream.InputError, match="'50%' is a share"):
        parse_bytes("50%")


HALF = (0.5, "0.5", "50%", " 50 %", ".5", np.float32(0.5))


def test_a_memory_is_bytes_or_a_share():
    assert [parse_memory(memory) for memory in HALF] == [0.5] * len(HALF)
    assert all(isinstance(parse_memory(memory), float) for memory in (1.0, "1.0", "100%", "1e-2"))
    for eight in ("8GiB", "8 GiB", "8g", 2**33, float(2**33), np.int64(2**33), str(2**33)):
        assert parse_memory(eight) == 2**33
        assert isinstance(parse_memory(eight), int)
    assert parse_memory("1B") == 1


@pytest.mark.parametrize("memory", [8, "8", 8.0, 1, "200", 200])
def test_a_number_without_its_unit_is_an_error_that_suggests_one(memory):
    number = str(memory)
    with pytest.raises(fxstream.InputError, match=f"needs a unit: {number}GiB, or {number}MiB"):
        parse_memory(memory)
    with pytest.raises(fxstream.InputError, match="needs a unit"):
        fxstream.compile(torch.nn.Conv2d(3, 4, 3), memory=memory)


@pytest.mark.parametrize(
    "memory", [True, (), -1, 0, 0.0, float("nan"), float("inf"), "1.5.GiB", "8 gallons", None]
)
def test_what_is_no_memory(memory):
    with pytest.raises(fxstream.InputError, match="cannot parse"):
        parse_memory(memory)


def test_more_than_all():
    with pytest.raises(fxstream.InputError, match="'150%' is more than all"):
        parse_memory("150%")


def test_a_share_is_one_of_all_memory_of_the_device():
    cpu = torch.device("cpu")
    assert budget_of(parse_memory("50%"), cpu) == int(0.5 * total_bytes(cpu))
    assert budget_of(parse_memory("100%"), cpu) == total_bytes(cpu)
    assert budget_of(parse_memory("1B"), cpu) == 1


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
