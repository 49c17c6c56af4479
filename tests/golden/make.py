"""Make the golden images of the format that this checkout writes:  ``python -m tests.golden.make FOLDER [NAME...]``.

To be run once for each version of the format, before its first release; the images are then committed and never made
again.  What is on their disks follows from seeds, so ``truth.json`` needs no more than hashes.
"""

from __future__ import annotations

import hashlib
import json
import random
import sys
from base64 import b64encode
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from unittest.mock import patch

from ferrotype.engine.compact import compact
from ferrotype.engine.forget import forget
from ferrotype.engine.prune import prune
from ferrotype.job import NullJob
from ferrotype.objects import container as container_module
from ferrotype.objects.container import Container
from ferrotype.repository.keys import Secret
from ferrotype.repository.store import Repository
from ferrotype.repository.writer import open_writer
from ferrotype.units import KiB
from tests.repository.small import (
    CHUNK,
    QUICK,
    SECRET,
    add_disk,
    back_up,
    changed,
    create,
    disk_content,
    open_at,
    restored,
    snapshot_of,
    tiny,
)

KEY_FILE = Secret(bytes(range(256)), "keyfile")

Disks = dict[str, bytes]  # snapshot/disk -> content


def plain(path: Path) -> Disks:
    """Two disks, an increment, a forgotten snapshot whose space was given back."""
    one, two = disk_content(20, 1), disk_content(9, 2)[:-1000]
    with create(Container.create(path)) as repository:
        gone = back_up(repository, disk_content(12, 3), "gone")
        with open_writer(repository) as writer:
            both = [add_disk(writer, repository, one, "sda"), add_disk(writer, repository, two, "sdb")]
            writer.commit(snapshot_of(*both, name="both", day=1))
        forget(repository, [gone])
        prune(repository, NullJob())
        later = changed(one, 4)
        back_up(repository, later, "later", day=2, checkpoint=6)
    return {"both/sda": one, "both/sdb": two, "later/sda": later}


def encrypted(path: Path) -> Disks:
    """A passphrase, a key file, and a slot that was removed."""
    content = disk_content(15, 5)
    with create(Container.create(path), SECRET) as repository:
        back_up(repository, content, "first")
        repository.add_key(KEY_FILE, "on the stick", QUICK)
        removed = repository.add_key(Secret(b"another one"), "", QUICK)
        repository.remove_key(removed.id)
        later = changed(content, 6)
        back_up(repository, later, "second", day=1)
    return {"first/sda": content, "second/sda": later}


def committed_keys(path: Path) -> Disks:
    """Key slots of version 2, at the costs of every day."""
    content = disk_content(15, 15)
    with tiny(Repository.create(Container.create(path), SECRET, chunk_size=CHUNK)) as repository:
        back_up(repository, content, "first")
        repository.add_key(KEY_FILE, "on the stick, ünder the desk")
    return {"first/sda": content}


def split(path: Path) -> Disks:
    """Volumes of 96 KiB."""
    content = disk_content(50, 7)
    later = changed(content, 8, 0.2)
    with patch.object(container_module, "_LEAST_SPLIT", 64 * KiB):
        store = Container.create(path, split=96 * KiB)
    with create(store) as repository:
        back_up(repository, content, "first")
        back_up(repository, later, "second", day=1)
    return {"first/sda": content, "second/sda": later}


def compacted(path: Path) -> Disks:
    """Records that were moved, and a catalog written anew."""
    content = disk_content(30, 9)
    with create(Container.create(path)) as repository:
        gone = [back_up(repository, disk_content(20, seed), f"gone {seed}", day=seed) for seed in (10, 11)]
        back_up(repository, content, "kept", day=12)
        forget(repository, gone)
        prune(repository, NullJob())
        assert isinstance(repository.store, Container)
        compact(repository.store, NullJob())
    return {"kept/sda": content}


def cut(path: Path) -> Disks:
    """A backup that was cut: packs behind the last commit, half a record, and no anchor that knows of them."""
    content = disk_content(16, 12)
    create(Container.create(path)).close()
    with open_at(path, writable=True) as repository:
        back_up(repository, content, "whole")
        whole = path.read_bytes()
        back_up(repository, changed(content, 13, 0.9), "cut", day=1)
    grown = path.read_bytes()
    path.write_bytes(whole[: 12 * KiB] + grown[12 * KiB : len(whole) + 30 * KiB + 77])
    return {"whole/sda": content}


def large_map(path: Path) -> Disks:
    """A chunk map of two levels and an index of several pages, most of it in few bytes."""
    rng = random.Random(14)
    cells = [bytes(CHUNK)] * 3000
    for cell in range(100, 2900, 2):
        cells[cell] = rng.randbytes(8) + bytes(CHUNK - 8)
    content = b"".join(cells)
    with create(Container.create(path)) as repository:
        back_up(repository, content, "large")
    return {"large/sda": content}


MAKERS: dict[str, tuple[Callable[[Path], Disks], tuple[Secret, ...]]] = {
    "plain": (plain, ()),
    "encrypted": (encrypted, (SECRET, KEY_FILE)),
    "committed_keys": (committed_keys, (SECRET, KEY_FILE)),
    "split": (split, ()),
    "compacted": (compacted, ()),
    "cut": (cut, ()),
    "large_map": (large_map, ()),
}


def make(folder: Path, names: Sequence[str] = tuple(MAKERS)) -> None:
    """The images, and ``truth.json`` that says what is in them."""
    truth: dict[str, Any] = {}
    for name in names:
        maker, secrets = MAKERS[name]
        path = folder / f"{name}.ferro"
        disks = maker(path)
        with open_at(path, secrets[0] if secrets else None) as repository:
            ids = {snapshot.name: snapshot.id for snapshot in repository.snapshots()}
            _check(repository, disks)
        truth[name] = {
            "secrets": [{"kind": s.kind, "value": b64encode(s.value).decode()} for s in secrets],
            "snapshots": ids,
            "disks": {
                where: {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
                for where, data in disks.items()
            },
        }
    (folder / "truth.json").write_text(json.dumps(truth, indent=1) + "\n")


def _check(repository: Repository, disks: Disks) -> None:
    for snapshot in repository.snapshots():
        if len(snapshot.disks) == 1:
            assert restored(repository, snapshot) == disks[f"{snapshot.name}/sda"]


if __name__ == "__main__":
    make(Path(sys.argv[1]), sys.argv[2:] or tuple(MAKERS))
