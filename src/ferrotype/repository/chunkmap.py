"""The chunk map of a region: which chunk stands at which offset, as a tree of pages.

    level 1            root page: ids of the pages below                 (1,024 ids of 32 bytes)
                      /         |         \\
    level 0       page 0     page 1  ...                                 ids of chunks, in order of the disk

A page is stored as a chunk and named by its id, so two snapshots share every page that did not change.  The zero id
stands for zeros at each level: a chunk of zeros, or a whole subtree of them, takes no space.  The number of levels
follows from the number of cells, so it is not stored.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Final, Protocol

import numpy as np
from numpy.typing import NDArray

from ferrotype.errors import CorruptChunk, DeviceError, FerrotypeError, IntegrityError, StoreError
from ferrotype.repository.sealing import ID_SIZE, ZERO_ID, ChunkId

PAGE_IDS: Final = 1024
PAGE_SIZE: Final = PAGE_IDS * ID_SIZE
_KEPT_PAGES: Final = 64  # pages of each level a reader keeps


@dataclass(frozen=True, slots=True)
class MapPage:
    """One page of a map: the cells it covers, and the ids on it (of chunks at level 0, of pages above)."""

    page_id: ChunkId
    level: int
    first: int
    count: int
    ids: NDArray[np.void] | None
    error: FerrotypeError | None


class PageReader(Protocol):
    def __call__(self, chunk_id: ChunkId, /) -> bytes: ...


def levels_for(cells: int) -> int:
    """Levels above the bottom that a map of ``cells`` cells has."""
    levels = 0
    while cells > PAGE_IDS:
        cells = -(-cells // PAGE_IDS)
        levels += 1
    return levels


class MapBuilder:
    """Builds a map from cells given in ascending order; what is not given is zeros."""

    def __init__(self, cells: int, store_page: Callable[[bytes], ChunkId]) -> None:
        self._levels = levels_for(cells)
        self._store_page = store_page
        self._pages = [bytearray(PAGE_SIZE) for _ in range(self._levels + 1)]
        self._numbers = [0] * (self._levels + 1)

    def put(self, first: int, ids: bytes | memoryview) -> None:
        """The ids of the cells from ``first`` on."""
        cell, view = first, memoryview(ids)
        while view:
            page, slot = divmod(cell, PAGE_IDS)
            self._turn_to(0, page)
            count = min(PAGE_IDS - slot, len(view) // ID_SIZE)
            self._pages[0][slot * ID_SIZE : (slot + count) * ID_SIZE] = view[: count * ID_SIZE]
            cell, view = cell + count, view[count * ID_SIZE :]

    def finish(self) -> ChunkId:
        """Store what is open; the id of the root page."""
        for level in range(self._levels):
            self._close(level)
        return self._stored(self._levels)

    def _turn_to(self, level: int, number: int) -> None:
        if number != self._numbers[level]:
            self._close(level)
            self._numbers[level] = number

    def _close(self, level: int) -> None:
        parent, slot = divmod(self._numbers[level], PAGE_IDS)
        self._turn_to(level + 1, parent)
        self._pages[level + 1][slot * ID_SIZE : (slot + 1) * ID_SIZE] = self._stored(level)
        self._pages[level] = bytearray(PAGE_SIZE)

    def _stored(self, level: int) -> ChunkId:
        page = bytes(self._pages[level])
        return self._store_page(page) if page.count(0) < PAGE_SIZE else ZERO_ID


class ChunkMap:
    """A stored map, read page by page."""

    def __init__(self, root: ChunkId, cells: int, read_page: PageReader) -> None:
        self.root = root
        self.cells = cells
        self._levels = levels_for(cells)
        self._read_page = read_page
        self._kept: OrderedDict[tuple[int, int], bytes] = OrderedDict()

    def ids(self, first: int, count: int) -> NDArray[np.void]:
        """The ids of ``count`` cells from ``first`` on, as an array of 32-byte items."""
        out = bytearray()
        cell, end = first, first + count
        while cell < end:
            page, slot = divmod(cell, PAGE_IDS)
            n = min(PAGE_IDS - slot, end - cell)
            content = self._page(0, page)
            out += bytes(n * ID_SIZE) if content is None else content[slot * ID_SIZE : (slot + n) * ID_SIZE]
            cell += n
        return np.frombuffer(bytes(out), f"V{ID_SIZE}")

    def pages(self, first: int = 0, count: int | None = None) -> Iterator[tuple[int, NDArray[np.void]]]:
        """First cell and ids of each bottom page that is not all zeros and touches the cells asked for.

        Zero subtrees are stepped over whole, so the cost follows the data, not the size of the disk.
        """
        end = self.cells if count is None else first + count
        for number in self._data_pages(self._levels, 0, first // PAGE_IDS, -(-end // PAGE_IDS)):
            content = self._page(0, number)
            if content is not None:
                base = number * PAGE_IDS
                low, high = max(first, base), min(end, base + PAGE_IDS, self.cells)
                yield low, np.frombuffer(content, f"V{ID_SIZE}")[low - base : high - base]

    def walk(self, skip: Callable[[ChunkId], bool], known: ChunkMap | None = None) -> Iterator[MapPage]:
        """Every page of the tree, parents first.  A page whose id ``skip`` accepts is left out with all below, and
        so is one that ``known`` has in the same place.

        A page that cannot be read comes with ``ids`` None and the error.
        """
        yield from self._walk(self._levels, 0, skip, known)

    def _walk(
        self, level: int, number: int, skip: Callable[[ChunkId], bool], known: ChunkMap | None
    ) -> Iterator[MapPage]:
        page_id = self._page_id(level, number)
        if page_id == ZERO_ID or skip(page_id) or (known is not None and known.has(level, number, page_id)):
            return
        span = PAGE_IDS**level
        first = number * span * PAGE_IDS
        count = min(span * PAGE_IDS, self.cells - first)
        try:
            content = self._page(level, number)
        except (IntegrityError, DeviceError, StoreError) as error:
            yield MapPage(page_id, level, first, count, None, error)
            return
        if content is None:
            return
        yield MapPage(page_id, level, first, count, np.frombuffer(content, f"V{ID_SIZE}"), None)
        if level:
            for child in self._children(level, number):
                yield from self._walk(level - 1, child, skip, known)

    def has(self, level: int, number: int, page_id: ChunkId) -> bool:
        """Whether that page stands in that place; False where its parents cannot be read."""
        if level > self._levels or number * PAGE_IDS ** (level + 1) >= self.cells:
            return False
        try:
            return self._page_id(level, number) == page_id
        except (IntegrityError, DeviceError, StoreError):
            return False

    def _data_pages(self, level: int, number: int, first: int, end: int) -> Iterator[int]:
        """Numbers of bottom pages in [first, end) under a page that are not zero."""
        span = PAGE_IDS**level
        if number * span >= end or (number + 1) * span <= first:
            return
        if level == 0:
            yield number
            return
        for child in self._children(level, number):
            yield from self._data_pages(level - 1, child, first, end)

    def _children(self, level: int, number: int) -> list[int]:
        content = self._page(level, number)
        if content is None:
            return []
        used = np.frombuffer(content, np.uint64).reshape(PAGE_IDS, -1).any(axis=1)
        return (np.flatnonzero(used) + number * PAGE_IDS).tolist()

    def _page_id(self, level: int, number: int) -> ChunkId:
        if level == self._levels:
            return self.root
        parent, slot = divmod(number, PAGE_IDS)
        content = self._page(level + 1, parent)
        return ZERO_ID if content is None else ChunkId(content[slot * ID_SIZE : (slot + 1) * ID_SIZE])

    def _page(self, level: int, number: int) -> bytes | None:
        """Content of a page, or None where it is all zeros."""
        key = (level, number)
        try:
            content = self._kept[key]
            self._kept.move_to_end(key)
            return content
        except KeyError:
            pass
        page_id = self._page_id(level, number)
        if page_id == ZERO_ID:
            return None
        content = self._read_page(page_id)
        if len(content) != PAGE_SIZE:
            raise CorruptChunk(page_id, f"it is no map page: {len(content)} bytes")
        self._kept[key] = content
        while len(self._kept) > _KEPT_PAGES:
            try:
                self._kept.popitem(last=False)
            except KeyError:  # another thread was quicker
                break
        return content
