"""How ferrotype does its jobs, and how the machine does them where nothing but its libraries is at work.

Commands are shell, with these names filled in:

    {ferrotype}  the command line            {source}  the disk of the job's day, named disk.img
    {at}         the program's own folder    {out}     an empty folder for what is restored
    {password}   a file with a passphrase    {check}   compares a restored disk: {check} DAY FILE [--used]
    {disks}      the folder of the disks     {python} {bench}   the interpreter, and the folder of this file

ferrotype leaves out free space as it does by default, so its output is compared in what is in use, that of
programs that copy every sector in every byte.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final


@dataclass(frozen=True, slots=True)
class Store:
    """What a program made in its folder, from which runs start.  It is made once and kept."""

    name: str
    make: str
    day: str = "day1"  # the disk that must be there; '' for none
    fresh: bool = False  # made anew by every run of the benchmark


@dataclass(frozen=True, slots=True)
class Step:
    """How one program does a job."""

    name: str
    run: str  # what is timed
    check: str = ""  # succeeds where the result is right; '' where there is nothing to check
    needs: str = ""  # the program that must be installed
    store: Store | None = None  # stands in {at} before every run
    reset: str = ""  # before every run, after that
    result: str = "{at}"  # its growth is what was stored
    says: bool = False  # prints its own figures: only these count


# What restored disks must be: the same in every byte, and the same in what is in use.
WHOLE: Final = "{check} DAY {out}/disk.img"
USED: Final = WHOLE + " --used"

# ---------------------------------------------------------------------- ferrotype

_FERRO: Final = "{at}/disk.ferro"
_BACKUP: Final = f"{{ferrotype}} backup {{source}} {_FERRO} --json"
_RESTORE: Final = f"{{ferrotype}} restore {_FERRO} {{out}}/disk.img --json"
_WITH_KEY: Final = " --password-file {password}"
IMAGE: Final = Store("ferrotype", _BACKUP + " --level 1", fresh=True)
TOUCH: Final = "touch {source}"  # a new time of change, so that nobody takes the disk for unchanged unread


def right(check: str, day: str) -> str:
    return check.replace("DAY", day)


def backup(options: str, day: str = "day1", key: str = "", store: Store | None = None) -> Step:
    """Checked by a restore."""
    check = f"{_RESTORE}{key} >/dev/null && {right(USED, day)}"
    return Step("ferrotype", _BACKUP + options + key, check, store=store, reset=TOUCH)


def verify(options: str = "") -> Step:
    command = f"{{ferrotype}} verify{options} "
    return Step("ferrotype", command + _FERRO, finds_damage(_FERRO, command + "{out}/damaged"), store=IMAGE)


def finds_damage(whole: str, verify: str, file: str = "{out}/damaged") -> str:
    """Succeeds where ``verify`` says 1 once a byte in the middle of ``file`` was changed, in a copy of ``whole``."""
    return (
        f"cp -a {whole} {{out}}/damaged && file={file} && at=$(( $(stat -c %s $file) / 2 )) "
        "&& byte=$(od -An -tu1 -j $at -N 1 $file) "
        '&& printf "\\\\x$(printf %02x $(( byte ^ 255 )))" | dd of=$file bs=1 seek=$at conv=notrunc status=none '
        f"&& ( {verify}; [ $? -eq 1 ] )"
    )


PLAIN: Final = backup(" --level 1")
ENCRYPTED: Final = backup(" --level 1 --encrypt", key=_WITH_KEY)
ONE_CORE: Final = Step("itself on one core", "taskset -c 0 " + PLAIN.run, PLAIN.check)
UNENCRYPTED: Final = Step("itself, not encrypted", PLAIN.run, PLAIN.check)
FAST: Final = backup(" --level=-3")

RESTORED: Final = Step("ferrotype", _RESTORE, right(USED, "day1"), store=IMAGE, result="{out}")
# The target holds day two and gets day one.
TARGET: Final = "cp --sparse=always {source} {out}/disk.img"
DELTA: Final = Step("ferrotype", _RESTORE + " --delta --force", right(USED, "day1"), store=IMAGE, reset=TARGET)

_MANY: Final = Store(
    "many snapshots",
    'head -c 4M /dev/urandom > {out}/small.img && {python} -c "import ferrotype\n'
    f"for _ in range(100): ferrotype.backup('{{out}}/small.img', '{_FERRO}')\"",
    day="",
    fresh=True,
)
HELP: Final = Step("ferrotype", "{ferrotype} --help")
LIST: Final = Step(
    "ferrotype",
    f"{{ferrotype}} list {_FERRO}",
    f"{{ferrotype}} list --json {_FERRO} | grep -o '\"created\"' | wc -l | grep -qx 100",
    store=_MANY,
)


def aged(kind: str) -> Store:
    """A used file system of 4 TB, and partclone's opinion of it, which may take minutes; see maps.py."""
    maps = "{python} {bench}/maps.py"
    return Store(f"aged {kind}", f"{maps} make {{at}} {kind} && {maps} check {{at}} {kind}", day="")


def allocation(kind: str) -> Step:
    """A process that opens the volume and builds its map of extents, which must be that of partclone."""
    check = f"{{python}} {{bench}}/maps.py check {{at}} {kind}"
    return Step("ferrotype", f"{{python}} {{bench}}/maps.py map {{at}}/{kind}.img", check, store=aged(kind))


# ---------------------------------------------------------------------- the machine

LIMITS: Final = "{python} {bench}/limits.py"
FRAMES: Final = Store("frames", LIMITS + " read+zstd+write {source} {at}/frames --disks {disks}")


def limit(
    name: str, work: str, where: str = "{source} --disks {disks}", store: Store | None = None, reset: str = ""
) -> Step:
    """The libraries alone, on all cores; see limits.py."""
    return Step(name, f"{LIMITS} {work} {where}", store=store, reset=reset, says=True)
