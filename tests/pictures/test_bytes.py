"""Numbers of bytes with units, read and written."""

import pytest

from dualpipe_jax.pictures import format_bytes, parse_bytes


@pytest.mark.parametrize(
    "text", ["", "GiB", "1.5.2", ".", "٣", "-3", "1 XB", "1,5", "nan", "4 i"]
)
def test_bytes_that_are_none(text):
    with pytest.raises(ValueError, match=r"is not a number of bytes; write 1\.5GiB"):
        parse_bytes(text)


@pytest.mark.parametrize(
    "number", [0, 1, 1023, 2**10, 2**20, 3.5 * 2**30, 2**40, 2**55]
)
def test_bytes_are_written_as_they_are_read(number):
    assert parse_bytes(format_bytes(number).replace(",", "")) == number
    assert parse_bytes("2.5 kB") == 2500 and parse_bytes("1e3") == 1000
