"""Numbers of bytes with units, read and written."""

from __future__ import annotations

import re

_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}
_UNITS |= {f"{name}I": 2 ** (10 * i) for i, name in enumerate("KMGT", start=1)}


def parse_bytes(text: str) -> float:
    """Reads a number of bytes, with or without a unit such as GiB or GB.

    Raises:
      ValueError: the text is not a number followed by a known unit.

    Examples:
      >>> parse_bytes("1.5GiB"), parse_bytes("80 GB"), parse_bytes("64")
      (1610612736.0, 80000000000.0, 64.0)
    """
    number = r"\s*((?:\d+\.?\d*|\.\d+)(?:e[+-]?\d+)?)"
    match = re.fullmatch(number + r"\s*([KMGT]?i?)B?\s*", text, re.I | re.A)
    unit = _UNITS.get(match[2].upper()) if match else None
    if match is None or unit is None:
        raise ValueError(
            f"{text!r} is not a number of bytes; write 1.5GiB or 800MB, for example."
        )
    return float(match[1]) * unit


def format_bytes(number: float) -> str:
    """Writes a number of bytes with a binary unit.

    Examples:
      >>> format_bytes(1.5 * 2**30), format_bytes(2**20), format_bytes(12)
      ('1.5 GiB', '1.0 MiB', '12 B')
    """
    for unit in ("TiB", "GiB", "MiB", "KiB"):
        size = parse_bytes(f"1{unit}")
        if number >= size:
            return f"{number / size:,.1f} {unit}"
    return f"{number:g} B"
