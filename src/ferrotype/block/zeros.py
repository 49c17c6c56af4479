"""Looking for zeros in memory, at its own speed."""

from __future__ import annotations

from typing import Final

import numpy as np

__all__ = ["zero_cells"]

_SAMPLE: Final = 4096 // 8  # one 64-bit word of each 4 KiB is looked at before a whole cell is


def zero_cells(view: memoryview, size: int) -> list[bool]:
    """Which cells of ``size`` bytes, a multiple of 8, are all zeros; the last one may be shorter."""
    whole = len(view) // size
    words = np.frombuffer(view[: whole * size], np.uint64).reshape(whole, size // 8)
    likely = np.logical_not(words[:, ::_SAMPLE].any(axis=1))
    zero: list[bool] = likely.tolist()
    for number in np.flatnonzero(likely).tolist():
        zero[number] = not bool(words[number].any())
    if len(view) % size:
        zero.append(bytes(view[whole * size :]).count(0) == len(view) % size)
    return zero
