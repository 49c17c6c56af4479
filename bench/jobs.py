"""What is compared: the jobs, who takes part in each, and the goals; see README.md."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import image_jobs
import peers
import programs
from programs import FRAMES, IMAGE, TARGET, Step, limit


@dataclass(frozen=True, slots=True)
class Rival:
    """A program that takes turns with ferrotype, and what part of its wall time and bytes ferrotype may need at most.

    With a ``share`` it is no program but the machine's limit, of whose speed ferrotype should reach at least that.
    """

    step: Step
    wall: float | None = None
    stored: float | None = None
    share: float | None = None
    most_pairs: int | None = None  # where fewer are enough


@dataclass(frozen=True, slots=True)
class Bound:
    """At most this of ferrotype's own: ``wall`` and ``cpu`` in seconds, ``stored`` in bytes."""

    fact: str
    most: float
    of_used: float = 0  # and this part of the bytes in use


@dataclass(frozen=True, slots=True)
class Job:
    name: str
    day: str  # the disk that is there while it runs; '' for none
    ours: Step
    rivals: tuple[Rival, ...] = ()
    bounds: tuple[Bound, ...] = ()
    keeps: bool = False  # {at} is not changed by a run, so it need not be put back
    stores: bool = True  # what it stores is worth telling
    reads: bool = True  # it goes through all that is in use


READ_HASH: Final = "reading and BLAKE3"

FIRST: Final = Job(
    "first backup, level 1",
    "day1",
    programs.PLAIN,
    (
        Rival(peers.DD_ZSTD, wall=0.6, stored=1.0),
        Rival(peers.QEMU, wall=0.6, stored=1.0),
        Rival(peers.PARTCLONE, stored=1.0, most_pairs=1),
        Rival(peers.BORG, wall=0.45),
        Rival(peers.RESTIC, wall=0.2),
        Rival(programs.ONE_CORE, wall=1 / 1.8),
        Rival(limit("zstd level 1 and BLAKE3", "read+blake3+zstd"), share=0.8),
    ),
)
ENCRYPTED: Final = Job(
    "first backup, encrypted",
    "day1",
    programs.ENCRYPTED,
    (
        Rival(programs.UNENCRYPTED, wall=1.08),
        Rival(limit("zstd, BLAKE3 and AES-256-GCM", "read+blake3+zstd+aes"), share=0),
    ),
)
# Level -3 is the fastest that still packs the same bytes no worse than lz4 does: 2.22 against 2.17.
FAST: Final = Job(
    "first backup, lz4 class (level -3)",
    "day1",
    programs.FAST,
    (
        Rival(peers.DD_LZ4, wall=0.6),
        Rival(peers.BORG_LZ4, wall=0.6),
        Rival(limit("zstd level -3 and BLAKE3", "read+blake3+zstd --level=-3"), share=0),
    ),
)
UNCHANGED: Final = Job(
    "increment, nothing changed",
    "day1",
    programs.backup(" --level 1", store=IMAGE),
    (
        Rival(peers.next_borg("day1"), most_pairs=2),
        Rival(peers.next_restic("day1"), most_pairs=2),
        Rival(limit(READ_HASH, "read+blake3"), share=0.6),
    ),
    (Bound("stored", 64 << 10, of_used=1e-4),),
)
DAY_TWO: Final = Job(
    "increment, day two",
    "day2",
    programs.backup(" --level 1", "day2", store=IMAGE),
    (
        Rival(peers.next_borg("day2"), wall=0.2),
        Rival(peers.next_restic("day2"), wall=0.2, stored=0.8),
        Rival(peers.REBASE, wall=0.4),
        Rival(limit(READ_HASH, "read+blake3 --day day2"), share=0.6),
    ),
)
RESTORE: Final = Job(
    "restore to a new file",
    "",
    programs.RESTORED,
    (
        Rival(peers.UNQEMU, wall=0.6),
        Rival(peers.UNBORG, wall=0.4),
        Rival(peers.UNRESTIC, wall=0.4),
        Rival(
            limit("decompressing and writing", "frames+unzstd+write", "{at}/frames {out}/disk.img", FRAMES),
            share=0.75,
        ),
    ),
    keeps=True,
)
DELTA: Final = Job(
    "restore --delta, 2 % differ",
    "day2",
    programs.DELTA,
    (
        Rival(
            limit(READ_HASH, "read+blake3 --day day2", "{out}/disk.img --disks {disks}", reset=TARGET),
            share=0.6,
        ),
    ),
    keeps=True,
    stores=False,
)
VERIFY: Final = Job(
    "verify",
    "",
    programs.verify(),
    (
        Rival(peers.ZSTD_TEST, wall=0.2),
        Rival(peers.BORG_CHECK, wall=0.15),
        Rival(limit("reading and XXH3-128", "stored+xxh3", "{at}/disk.ferro", IMAGE), share=0),
    ),
    keeps=True,
    stores=False,
)
DEEP: Final = Job(
    "verify --deep",
    "",
    programs.verify(" --deep"),
    (
        Rival(peers.ZSTD_TEST, wall=0.5),
        Rival(limit("decompressing and BLAKE3", "frames+unzstd+blake3", "{at}/frames", FRAMES), share=0.75),
    ),
    keeps=True,
    stores=False,
)
# partclone needs minutes for the latter two
_SCANS: Final = {"ext4": None, "ntfs": None, "fat32": 1, "exfat": 1}
MAPS: Final = tuple(
    Job(
        f"allocation map, aged 4 TB {kind}",
        "",
        programs.allocation(kind),
        (Rival(peers.scan(kind), wall=1.0, most_pairs=pairs),),
        keeps=True,
        stores=False,
        reads=False,
    )
    for kind, pairs in _SCANS.items()
)
HELP: Final = Job("start-up: --help", "", programs.HELP, bounds=(Bound("cpu", 0.25),), stores=False, reads=False)
LIST: Final = Job(
    "start-up: list, 100 snapshots",
    "",
    programs.LIST,
    bounds=(Bound("cpu", 0.4),),
    keeps=True,
    stores=False,
    reads=False,
)

INTO: Final = tuple(
    Job(
        f"convert raw to {form.name}",
        "day1",
        form.write,
        (Rival(form.write_rival, wall=form.to, most_pairs=form.pairs),),
    )
    for form in image_jobs.FORMS
)
BACK: Final = tuple(
    Job(
        f"convert {form.name} to raw",
        "",
        form.read,
        (Rival(form.read_rival, wall=form.back),),
        keeps=True,
    )
    for form in image_jobs.FORMS
    if form.back is not None
)
E01: Final = Job("convert raw to E01", "day1", image_jobs.EWF, (Rival(image_jobs.EWF_RIVAL, wall=0.3, most_pairs=2),))
CHECKSUM: Final = Job(
    "checksum", "day1", image_jobs.CHECKSUM, (Rival(image_jobs.HASHING, share=0.7),), keeps=True, stores=False
)

BACKUPS: Final = (FIRST, ENCRYPTED, FAST, UNCHANGED, DAY_TWO, DELTA, RESTORE, VERIFY, DEEP, *MAPS, HELP, LIST)
IMAGES: Final = (*INTO, *BACK, E01, CHECKSUM)
JOBS: Final = (*BACKUPS, *IMAGES)
