"""How the programs that people use today do the jobs; the names in commands are those of programs.py."""

from __future__ import annotations

from dataclasses import replace
from typing import Final

from programs import TOUCH, USED, WHOLE, Step, Store, aged, finds_damage, right

# ---------------------------------------------------------------------- streams

_DD: Final = "dd if={source} bs=1M status=none"
_ZSTD: Final = _DD + " | zstd -q -1 -T2 -o {at}/disk.zst"
_ZST: Final = Store("zstd", _ZSTD)

DD_ZSTD: Final = Step("dd, zstd -1 -T2", _ZSTD, "zstd -dcq {at}/disk.zst | {check} day1 /dev/stdin", "zstd")
DD_LZ4: Final = Step(
    "dd, lz4 -1", _DD + " | lz4 -q -1 - {at}/disk.lz4", "lz4 -dcq {at}/disk.lz4 | {check} day1 /dev/stdin", "lz4"
)
ZSTD_TEST: Final = Step(
    "zstd -t", "zstd -tq {at}/disk.zst", finds_damage("{at}/disk.zst", "zstd -tq {out}/damaged"), "zstd", _ZST
)

# ---------------------------------------------------------------------- qemu-img

_QEMU: Final = "qemu-img convert -c -W -m 16 -f raw -O qcow2 -o compression_type=zstd {source} {at}/disk.qcow2"
_UNQEMU: Final = "qemu-img convert -W -m 16 -f qcow2 -O raw {at}/%s {out}/disk.img"
_QCOW2: Final = Store("qcow2", _QEMU)
_REBASE: Final = (
    "qemu-img create -q -f qcow2 -b {source} -F raw {at}/day2.qcow2 "
    "&& qemu-img rebase -q -f qcow2 -b {at}/disk.qcow2 -F qcow2 {at}/day2.qcow2"
)

QEMU: Final = Step(
    "qemu-img convert -c, zstd, -m 16 -W", _QEMU, f"{_UNQEMU % 'disk.qcow2'} && {right(WHOLE, 'day1')}", "qemu-img"
)
REBASE: Final = Step(
    "qemu-img rebase on the qcow2 of day one",
    _REBASE,
    f"{_UNQEMU % 'day2.qcow2'} && {right(WHOLE, 'day2')}",
    "qemu-img",
    _QCOW2,
)
UNQEMU: Final = Step(
    "qemu-img convert, -m 16 -W",
    _UNQEMU % "disk.qcow2",
    right(WHOLE, "day1"),
    "qemu-img",
    _QCOW2,
    result="{out}",
)

# ---------------------------------------------------------------------- borg

_BORG: Final = (
    "BORG_BASE_DIR={at}/home BORG_UNKNOWN_UNENCRYPTED_REPO_ACCESS_IS_OK=yes BORG_RELOCATED_REPO_ACCESS_IS_OK=yes borg"
)
_BORG_INIT: Final = _BORG + " init -e none {at}/repo"
_BORG_CREATE: Final = "cd $(dirname {source}) && " + _BORG + " create -C %s {at}/repo::%s disk.img"
_BORG_VERIFY: Final = _BORG + " check --verify-data {at}/repo"
_BORG_REPO: Final = Store("borg", f"{_BORG_INIT} && {_BORG_CREATE % ('zstd,1', 'first')}")


def _borg_create(compression: str, archive: str, day: str) -> Step:
    check = f"{_BORG} extract --stdout {{at}}/repo::{archive} | {{check}} {day} /dev/stdin"
    return Step(
        f"borg create, {compression}", _BORG_CREATE % (compression, archive), check, "borg", result="{at}/repo"
    )


BORG: Final = replace(_borg_create("zstd,1", "first", "day1"), reset=_BORG_INIT)
BORG_LZ4: Final = replace(_borg_create("lz4", "first", "day1"), reset=_BORG_INIT)
UNBORG: Final = Step(
    "borg extract --sparse",
    f"cd {{out}} && {_BORG} extract --sparse {{at}}/repo::first",
    right(WHOLE, "day1"),
    "borg",
    _BORG_REPO,
    result="{out}",
)
BORG_CHECK: Final = Step(
    "borg check --verify-data",
    _BORG_VERIFY,
    finds_damage(
        "{at}", _BORG_VERIFY.replace("{at}", "{out}/damaged"), "$(ls -S {out}/damaged/repo/data/0/* | head -n 1)"
    ),
    "borg",
    _BORG_REPO,
)


def next_borg(day: str) -> Step:
    return replace(_borg_create("zstd,1", "next", day), store=_BORG_REPO, reset=TOUCH)


# ---------------------------------------------------------------------- restic

_RESTIC: Final = "RESTIC_PASSWORD=bench restic --quiet --cache-dir {at}/cache --repo {at}/repo"
_RESTIC_INIT: Final = _RESTIC + " init"
_RESTIC_BACKUP: Final = _RESTIC + " backup --compression auto {source}"
_RESTIC_REPO: Final = Store("restic", f"{_RESTIC_INIT} && {_RESTIC_BACKUP}")


def _restic_backup(day: str) -> Step:
    check = f"{_RESTIC} dump latest {{source}} | {{check}} {day} /dev/stdin"
    return Step("restic backup (encrypted)", _RESTIC_BACKUP, check, "restic", result="{at}/repo")


RESTIC: Final = replace(_restic_backup("day1"), reset=_RESTIC_INIT)
UNRESTIC: Final = Step(
    "restic restore",
    _RESTIC + " restore latest --target {out}",
    "{check} day1 $(find {out} -name disk.img)",
    "restic",
    _RESTIC_REPO,
    result="{out}",
)


def next_restic(day: str) -> Step:
    return replace(_restic_backup(day), store=_RESTIC_REPO, reset=TOUCH)


# ---------------------------------------------------------------------- partclone

_PARTCLONE: Final = "{python} {bench}/partclone.py %s {source} {disks} {at}"

PARTCLONE: Final = Step(
    "partclone of each partition, zstd -1 -T2",
    _PARTCLONE % "save",
    f"{_PARTCLONE % 'load'} {{out}}/disk.img && {right(USED, 'day1')}",
    "partclone.ext4",
)


def scan(kind: str) -> Step:
    """Until the bitmap is read, and no further; see maps.py."""
    command = f"{{python}} {{bench}}/maps.py scan {{at}}/{kind}.img {kind}"
    return Step(f"partclone.{kind}", command, "", f"partclone.{kind}", aged(kind), says=True)
