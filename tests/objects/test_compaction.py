"""Where compaction and holes may go."""

from __future__ import annotations

import pytest

from ferrotype.objects.compaction import gaps_between
from ferrotype.objects.layout import BLOCK, RECORDS_AT, CatalogEntry, Place


@pytest.mark.parametrize("rest", [0, 1, 127, 128, BLOCK - 1])
def test_a_gap_is_of_whole_blocks(rest: int) -> None:
    """A cut write leaves a volume that ends inside a block, and a filler needs a block of its own."""
    entry = CatalogEntry("pack/1", 0, RECORDS_AT, 100, 1)
    end = RECORDS_AT + entry.span
    assert gaps_between([entry], [end + rest, RECORDS_AT]) == []
    assert gaps_between([entry], [end + BLOCK + rest, RECORDS_AT]) == [(Place(0, end), BLOCK)]
