"""An object store in memory: for tests, and for an index that had to be rebuilt."""

from __future__ import annotations

from collections.abc import Collection, Iterator

from ferrotype.errors import CorruptObject, ObjectExists, ObjectMissing
from ferrotype.objects import ObjectInfo, ObjectTraits, Parts, SpaceReport


class MemoryStore:
    """Objects in a dict."""

    def __init__(self) -> None:
        self.traits = ObjectTraits()
        self.objects: dict[str, bytes] = {}

    def put(self, name: str, parts: Parts, /) -> None:
        if name in self.objects:
            raise ObjectExists(name)
        self.objects[name] = b"".join(parts)

    def get(self, name: str, /, offset: int = 0, length: int | None = None) -> bytes:
        data = self._object(name)
        length = len(data) - offset if length is None else length
        if offset < 0 or length < 0 or offset + length > len(data):
            raise CorruptObject(name, f"it has {len(data)} bytes, {length} at {offset} were asked for")
        return data[offset : offset + length]

    def size(self, name: str, /) -> int:
        return len(self._object(name))

    def list(self, prefix: str, /) -> Iterator[ObjectInfo]:
        return iter([ObjectInfo(n, len(self.objects[n])) for n in sorted(self.objects) if n.startswith(prefix)])

    def delete(self, name: str, /) -> None:
        self._object(name)
        del self.objects[name]

    def flush(self) -> None:
        pass

    def check(self, name: str, /, *, from_medium: bool = False) -> None:  # noqa: ARG002
        self._object(name)

    def refresh(self) -> bool:
        return False

    def reclaim(self) -> SpaceReport:
        return SpaceReport(0, 0)

    def bring_forward(self, names: Collection[str], others: str, /) -> bool:  # noqa: ARG002  they have no places
        return True

    def close(self) -> None:
        pass

    def _object(self, name: str) -> bytes:
        try:
            return self.objects[name]
        except KeyError:
            raise ObjectMissing(name) from None
