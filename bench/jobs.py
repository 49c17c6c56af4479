"""What is compared: jobs, and the commands by which ferrotype and its peers do them.

Commands are shell, with these names filled in:

    {ferrotype}  the command line            {source}  the disk of the job's day, named disk.img
    {at}         the tool's own folder       {out}     an empty folder for what is restored
    {password}   a file with a passphrase    {check}   compares a restored disk: {check} DAY FILE [--used]

ferrotype leaves out free space as it does by default, so its output is compared in what is in use, that of
programs that copy every sector in every byte.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Final


@dataclass(frozen=True, slots=True)
class Step:
    """How one program does a job."""

    name: str
    needs: str  # the program that must be installed
    run: str  # what is timed
    check: str  # succeeds where the result is right
    reset: str = ""  # before every run, in an emptied {at}
    once: str = ""  # before the first run, with the disk of day one; {at} is then as it left it before every run
    result: str = "{at}"  # its growth is what was stored


@dataclass(frozen=True, slots=True)
class Job:
    name: str
    day: str  # the disk that is there while it runs; '' for none
    ours: Step
    peers: tuple[Step, ...]
    keeps: bool = False  # {at} is not changed by a run, so it need not be put back


FERRO: Final = "{at}/disk.ferro"
BORG: Final = "BORG_BASE_DIR={at}/home BORG_UNKNOWN_UNENCRYPTED_REPO_ACCESS_IS_OK=yes borg"
RESTIC: Final = "RESTIC_PASSWORD=bench restic --quiet --cache-dir {at}/cache --repo {at}/repo"

BACKUP: Final = "{ferrotype} backup {source} " + FERRO + " --level 1 --json"
DD_ZSTD: Final = "dd if={source} bs=1M status=none | zstd -q -1 -T2 -o {at}/disk.zst"
QCOW2: Final = "qemu-img convert -c -W -m 16 -f raw -O qcow2 -o compression_type=zstd {source} {at}/disk.qcow2"
BORG_INIT: Final = BORG + " init -e none {at}/repo"
BORG_CREATE: Final = "cd $(dirname {source}) && " + BORG + " create -C zstd,1 {at}/repo::{day} disk.img"
RESTIC_INIT: Final = RESTIC + " init"
RESTIC_BACKUP: Final = RESTIC + " backup --compression auto {source}"


def _restores(day: str, password: bool = False) -> str:
    key = " --password-file {password}" if password else ""
    restore = "{ferrotype} restore " + FERRO + " {out}/disk.img --json" + key
    return f"{restore} >/dev/null && {{check}} {day} {{out}}/disk.img --used"


PLAIN: Final = Step("ferrotype", "", BACKUP, _restores("day1"))

FIRST: Final = Job(
    "first backup, level 1",
    "day1",
    PLAIN,
    (
        Step("dd, zstd -1 -T2", "zstd", DD_ZSTD, "zstd -dcq {at}/disk.zst | {check} day1 /dev/stdin"),
        Step(
            "qemu-img convert -c, zstd, -m 16 -W",
            "qemu-img",
            QCOW2,
            "qemu-img convert -f qcow2 -O raw {at}/disk.qcow2 {out}/disk.img && {check} day1 {out}/disk.img",
        ),
        Step(
            "borg create, zstd,1",
            "borg",
            BORG_CREATE.replace("{day}", "day1"),
            BORG + " extract --stdout {at}/repo::day1 | {check} day1 /dev/stdin",
            reset=BORG_INIT,
        ),
    ),
)

ENCRYPTED: Final = Job(
    "first backup, encrypted",
    "day1",
    Step(
        "ferrotype, encrypted", "", BACKUP + " --encrypt --password-file {password}", _restores("day1", password=True)
    ),
    (replace(PLAIN, name="ferrotype, not encrypted"),),
)

DAY_TWO: Final = Job(
    "day two",
    "day2",
    Step("ferrotype", "", BACKUP, _restores("day2"), once=BACKUP),
    (
        Step(
            "borg create, zstd,1",
            "borg",
            BORG_CREATE.replace("{day}", "day2"),
            BORG + " extract --stdout {at}/repo::day2 | {check} day2 /dev/stdin",
            once=BORG_INIT + " && " + BORG_CREATE.replace("{day}", "day1"),
        ),
        Step(
            "restic backup (encrypted)",
            "restic",
            RESTIC_BACKUP,
            RESTIC + " dump latest {source} | {check} day2 /dev/stdin",
            once=RESTIC_INIT + " && " + RESTIC_BACKUP,
            result="{at}/repo",
        ),
    ),
)

RESTORE: Final = Job(
    "restore to a new raw file",
    "",
    Step(
        "ferrotype",
        "",
        "{ferrotype} restore " + FERRO + " {out}/disk.img --json",
        "{check} day1 {out}/disk.img --used",
        once=BACKUP,
        result="{out}",
    ),
    (
        Step(
            "qemu-img convert, -m 16 -W",
            "qemu-img",
            "qemu-img convert -W -m 16 -f qcow2 -O raw {at}/disk.qcow2 {out}/disk.img",
            "{check} day1 {out}/disk.img",
            once=QCOW2,
            result="{out}",
        ),
        Step(
            "borg extract --sparse",
            "borg",
            "cd {out} && " + BORG + " extract --sparse {at}/repo::day1",
            "{check} day1 {out}/disk.img",
            once=BORG_INIT + " && " + BORG_CREATE.replace("{day}", "day1"),
            result="{out}",
        ),
    ),
    keeps=True,
)

# A verification is right when it also finds a byte that was changed in the middle of the file, and says so with 1.
_FLIP: Final = (
    "cp {file} {{out}}/damaged && at=$(( $(stat -c %s {file}) / 2 )) && byte=$(od -An -tu1 -j $at -N 1 {file}) "
    '&& printf "\\\\x$(printf %02x $(( byte ^ 255 )))" '
    "| dd of={{out}}/damaged bs=1 seek=$at conv=notrunc status=none "
    "&& {{{{ {verify} {{out}}/damaged; [ $? -eq 1 ]; }}}}"
)


def _finds_damage(file: str, verify: str) -> str:
    return _FLIP.format(file=file, verify=verify)


ZSTD_TEST: Final = Step(
    "zstd -t",
    "zstd",
    "zstd -tq {at}/disk.zst",
    _finds_damage("{at}/disk.zst", "zstd -tq"),
    once=DD_ZSTD,
)


def _verify(options: str) -> Step:
    name, command = f"ferrotype verify{options}", "{ferrotype} verify"
    return Step(name, "", f"{command} {FERRO}{options}", _finds_damage(FERRO, command), once=BACKUP)


VERIFY: Final = Job("verify what is stored", "", _verify(""), (ZSTD_TEST,), keeps=True)
VERIFY_DEEP: Final = Job("verify by decoding", "", _verify(" --deep"), (ZSTD_TEST,), keeps=True)

JOBS: Final = (FIRST, ENCRYPTED, DAY_TWO, RESTORE, VERIFY, VERIFY_DEEP)
