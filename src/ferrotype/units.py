"""Byte counts as people write them: binary units, spelled KiB to EiB."""

from __future__ import annotations

import re
from typing import Final

from ferrotype.errors import UsageError

KiB: Final = 1 << 10
MiB: Final = 1 << 20
GiB: Final = 1 << 30
TiB: Final = 1 << 40

_SUFFIXES: Final = "KMGTPE"
_SIZE: Final = re.compile(r"\s*(\d+(?:\.\d+)?)\s*(?:([KMGTPE])(i?B)?|B)?\s*", re.IGNORECASE)


def parse_size(text: str) -> int:
    """Bytes meant by ``text``: ``4096``, ``64KiB``, ``4G``, ``1.5 TiB``.  All units are binary.

    Raises UsageError for anything else, decimal units (``MB``) included, since they would be off by 5 to 15 %.
    """
    match = _SIZE.fullmatch(text)
    if match is None:
        raise UsageError(f"{text!r} is not a size; write it like 65536, 64KiB or 4GiB")
    number, unit, suffix = match.groups()
    if suffix is not None and suffix.lower() == "b":
        raise UsageError(f"{text!r} is a decimal unit; write {number}{unit}iB for binary units")
    factor = 1 << 10 * (_SUFFIXES.index(unit.upper()) + 1) if unit else 1
    value = float(number) * factor if "." in number else int(number) * factor
    if value != int(value):
        raise UsageError(f"{text!r} is not a whole number of bytes")
    return int(value)


def format_size(size: int) -> str:
    """``size`` bytes in three significant digits, binary units: ``0 B``, ``4.5 GiB``, ``931 GiB``."""
    if size < KiB:
        return f"{size} B"
    value = float(size)
    for suffix in _SUFFIXES:
        value /= KiB
        if value < 999.5 or suffix == _SUFFIXES[-1]:
            digits = 2 if value < 9.995 else 1 if value < 99.95 else 0
            text = f"{value:.{digits}f}"
            if digits:
                text = text.rstrip("0").rstrip(".")
            return f"{text} {suffix}iB"
    raise AssertionError("unreachable: the last suffix always returns")
