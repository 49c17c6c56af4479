"""What stands in the files of the benchmark disk: files of this machine, logs, a database, incompressible media.

Everything is drawn from one seeded generator, so one source tree and one seed give the same bytes on every run.
"""

from __future__ import annotations

import os
import random
import re
import shutil
import stat
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

MiB: Final = 1 << 20
PAGE: Final = 8192  # bytes; what common databases use
SMALL: Final = 8192  # bytes; a folder whose files average less than this is one of small files
LARGEST: Final = 64 * MiB  # one larger file would decide how compressible the whole disk is

# Names that Windows refuses, and so would chkdsk.
_NOT_WINDOWS: Final = re.compile(r'[<>:"\\|?*\x00-\x1f]|[. ](/|$)')
_HOSTS: Final = tuple(f"node{i:02d}" for i in range(16))
_PARTS: Final = ("kernel", "auth", "mailer", "ingest", "billing", "sync", "scheduler", "gateway")
_WORDS: Final = tuple(
    re.findall(
        r"\w+",
        "accepted rejected delivered queued expired renewed opened closed flushed merged skipped retried lost found "
        "slow late done waiting for lease token batch shard row key page peer disk file user job route certificate",
    )
)


@dataclass(frozen=True, slots=True)
class Item:
    """A file or a symbolic link of the source tree, by its path in it."""

    path: str
    size: int
    link: bool


class Stock:
    """The files of a tree, dealt out folder by folder in shuffled order, each file once."""

    def __init__(self, tree: Path, rng: random.Random) -> None:
        self.tree = tree
        folders = [items for items in _folders(tree) if items]
        rng.shuffle(folders)
        self._of_small = [f for f in folders if _bytes(f) < SMALL * len(f)]
        self._of_large = [f for f in folders if _bytes(f) >= SMALL * len(f)]

    def draw(self, size: int, files: int, *, windows: bool = False) -> list[Item]:
        """About ``size`` bytes: first folders of small files until there are ``files`` of them, then larger ones.

        With ``windows`` no links and no names that Windows refuses.  Fewer bytes where the tree has no more.
        """
        largest = min(LARGEST, size // 16)
        drawn: list[Item] = []
        total = 0
        for folders, enough in ((self._of_small, files), (self._of_large, None)):
            while folders and total < size and (enough is None or len(drawn) < enough):
                folder = folders.pop()
                while folder and total < size:
                    item = folder.pop()
                    if item.size <= largest and not (windows and (item.link or _NOT_WINDOWS.search(item.path))):
                        drawn.append(item)
                        total += item.size
                if folder:
                    folders.append(folder)
        return drawn


def _folders(tree: Path) -> Iterator[list[Item]]:
    device = tree.stat().st_dev
    for base, folders, names in os.walk(tree):
        folders[:] = sorted(f for f in folders if os.lstat(os.path.join(base, f)).st_dev == device)
        items = []
        for name in sorted(names):
            path = os.path.join(base, name)
            facts = os.lstat(path)
            link = stat.S_ISLNK(facts.st_mode)
            if path.isprintable() and (link or stat.S_ISREG(facts.st_mode)):
                items.append(Item(os.path.relpath(path, tree), 0 if link else facts.st_size, link))
        yield items


def _bytes(items: list[Item]) -> int:
    return sum(item.size for item in items)


def copy(tree: Path, items: list[Item], to: Path, *, posix: bool = True) -> None:
    """Copies of ``items`` below ``to``; modes and links only where the file system is a ``posix`` one."""
    for item in items:
        source, target = tree / item.path, to / item.path
        target.parent.mkdir(parents=True, exist_ok=True)
        if item.link:
            target.symlink_to(source.readlink())
        elif posix:
            shutil.copy2(source, target)
        else:
            shutil.copyfile(source, target)


def media(path: Path, size: int, rng: random.Random) -> None:
    """A file that does not compress, as photographs, films and archives."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as out:
        while size > 0:
            out.write(rng.randbytes(min(size, MiB)))
            size -= MiB


def log(path: Path, size: int, rng: random.Random, day: int) -> None:
    """``size`` more bytes of log lines, from the start of ``day`` days after 2023-11-14 on."""
    path.parent.mkdir(parents=True, exist_ok=True)
    now = 1_700_000_000.0 + day * 86_400
    with path.open("ab") as out:
        while size > 0:
            now += rng.expovariate(2.0)
            stamp = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(now))
            took = rng.expovariate(0.05)
            words = " ".join(rng.choices(_WORDS, k=rng.randrange(4, 12)))
            line = (
                f"{stamp}.{int(now * 1000) % 1000:03d}Z {rng.choice(_HOSTS)} {rng.choice(_PARTS)}"
                f"[{rng.randrange(400, 440)}]: {words} id={rng.getrandbits(40):010x} took={took:.2f}ms\n"
            ).encode()
            out.write(line)
            size -= len(line)


def page(number: int, rng: random.Random) -> bytes:
    """A database page: a header, rows that fill about half of it, zeros."""
    rows = "".join(
        f"{rng.getrandbits(48):012x};{rng.choice(_WORDS)};{rng.choice(_HOSTS)};{rng.randrange(10**7)}\n"
        for _ in range(rng.randrange(60, 150))
    ).encode()
    return (b"DBPAGE\0\1" + number.to_bytes(8, "little") + rows)[:PAGE].ljust(PAGE, b"\0")


def database(path: Path, size: int, rng: random.Random) -> None:
    """A file of ``size // PAGE`` pages."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as out:
        for number in range(size // PAGE):
            out.write(page(number, rng))


def touch_database(path: Path, pages: int, rng: random.Random) -> None:
    """At most ``pages`` pages, anywhere in the file, written anew in place."""
    count = path.stat().st_size // PAGE
    with path.open("r+b") as out:
        for number in sorted(rng.sample(range(count), min(pages, count // 4))):
            out.seek(number * PAGE)
            out.write(page(number, rng))


def update(path: Path, rng: random.Random) -> int:
    """A package update: a new file takes the place of the old one, a tenth of it new.  The bytes written."""
    body = path.read_bytes()
    at = rng.randrange(max(1, len(body) // 2))
    new = body[:at] + rng.randbytes(len(body) // 10) + body[at:]
    beside = path.with_name(path.name + ".new")
    beside.write_bytes(new)
    beside.replace(path)
    return len(new)


def files_below(folder: Path, smallest: int, largest: int) -> list[Path]:
    """Plain files between two sizes, in a settled order."""
    found = []
    for path in sorted(folder.rglob("*")):
        facts = path.lstat()
        if stat.S_ISREG(facts.st_mode) and smallest <= facts.st_size <= largest:
            found.append(path)
    return found
