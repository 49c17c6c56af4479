"""The reader of ``tools/read_ferro.py`` and ferrotype must say the same of an image.

One was written from the specification alone, so where they differ the specification, or one of them, is wrong.  After
each test that passed, ``conftest`` holds every image the test left behind, and that is not damaged, against both.
"""

from __future__ import annotations

import contextlib
import importlib.util
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, Final

from ferrotype.block import read
from ferrotype.errors import FerrotypeError, KeyRefused
from ferrotype.extents import State
from ferrotype.objects.container import Container
from ferrotype.repository.keys import Secret
from ferrotype.repository.snapshots import Snapshot
from ferrotype.repository.source import SnapshotSource
from ferrotype.repository.store import Repository
from ferrotype.units import MiB

TOOL: Final = Path(__file__).resolve().parents[1] / "tools" / "read_ferro.py"
LARGEST: Final = 32 * MiB  # bytes of an image that is read whole twice


def load() -> ModuleType:
    """The tool as a module."""
    if "read_ferro" not in sys.modules:
        spec = importlib.util.spec_from_file_location("read_ferro", TOOL)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules["read_ferro"] = module
        spec.loader.exec_module(module)
        module.__dict__["LEAST_COSTS"][2] = (64, 64)  # small.QUICK
    return sys.modules["read_ferro"]


@dataclass(slots=True)
class Agreed:
    """What both readers said the same of."""

    images: int = 0
    snapshots: int = 0
    data: int = 0  # bytes


def agree(path: Path, secrets: Iterable[Secret | None], agreed: Agreed) -> bool:
    """Hold an image against both readers; False where ferrotype itself finds it damaged, or no secret opens it.

    Raises AssertionError, or what the tool raised, where they differ.
    """
    for secret in secrets:
        try:
            container = Container.open(path)
        except FerrotypeError:
            return False
        with contextlib.closing(container):
            try:
                repository = Repository.open(container, secret)
            except KeyRefused:
                continue
            except FerrotypeError:
                return False
            return _same(repository, path, secret, agreed)
    return False


def _same(repository: Repository, path: Path, secret: Secret | None, agreed: Agreed) -> bool:
    store = repository.store
    known = repository.snapshots()
    if repository.warnings or (isinstance(store, Container) and store.warnings):
        return False
    image = load().Image(str(path), secret and secret.value, secret.kind if secret else "passphrase")
    with contextlib.ExitStack() as stack:
        for file in image.store.files:
            stack.enter_context(file)
        return _same_snapshots(repository, known, image, agreed)


def _same_snapshots(repository: Repository, known: list[Snapshot], image: Any, agreed: Agreed) -> bool:
    records = image.snapshots()
    assert [record["id"] for record in records] == [snapshot.id for snapshot in known]
    for snapshot, record in zip(known, records, strict=True):
        for disk, other in zip(snapshot.disks, record["disks"], strict=True):
            source = SnapshotSource(repository, disk)
            try:
                agreed.data += _same_disk(source, image, other)
            except (FerrotypeError, load().Damaged):
                if _readable(source):
                    raise
                return False  # a test has damaged it, and both say so
        agreed.snapshots += 1
    agreed.images += 1
    return True


def _same_disk(source: SnapshotSource, image: Any, record: dict[str, Any]) -> int:
    """Bytes of data that both gave."""
    total = 0

    def compare(offset: int, data: bytes) -> None:
        nonlocal total
        assert data == read(source, offset, len(data)), f"{len(data)} bytes at {offset}"
        total += len(data)

    image.extract(record, compare)
    known = source.extents(0, source.size)
    assert total == known.length - known.total(State.ZERO), "one of the readers has left something out"
    return total


def _readable(source: SnapshotSource) -> bool:
    try:
        lows, highs = source.extents(0, source.size).runs(State.ZERO, present=False)
        for low, high in zip(lows.tolist(), highs.tolist(), strict=True):
            read(source, low, high - low)
    except FerrotypeError:
        return False
    return True
