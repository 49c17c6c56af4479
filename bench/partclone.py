"""partclone, whose unit is a partition, on a whole disk: one compressed file for each.

partclone.py save DISK DISKS_DIR FOLDER
partclone.py load DISK DISKS_DIR FOLDER COPY    COPY becomes the disk; its partition tables come from DISK
"""

from __future__ import annotations

import sys
from pathlib import Path

from make_disk import SECTOR, loop
from measure import shell

from disks import Manifest, MiB, Partition


def program(part: Partition) -> str:
    return "partclone.fat32" if part.filesystem == "vfat" else f"partclone.{part.filesystem}"


def save(disk: Path, manifest: Manifest, folder: Path) -> None:
    for part in manifest.partitions:
        with loop(disk, part) as device:
            command = f"{program(part)} -c -q -s {device} -L {folder}/log -o -"
            shell(f"{command} | zstd -q -1 -T2 -o {folder}/{part.name}.zst")
    (folder / "log").unlink()


def load(disk: Path, manifest: Manifest, folder: Path, copy: Path) -> None:
    with disk.open("rb") as source, copy.open("wb") as target:
        for at in (0, manifest.disk_size - MiB):  # the GPT and its copy; all else outside of partitions is zeros
            source.seek(at)
            target.seek(at)
            target.write(source.read(MiB))
        for part in manifest.partitions:  # partclone drops the copy of the boot sector in the last one of an NTFS
            at = part.start + part.size - SECTOR
            source.seek(at)
            target.seek(at)
            target.write(source.read(SECTOR))
    for part in manifest.partitions:
        with loop(copy, part) as device:
            command = f"{program(part)} -r -q -s - -o {device} -L {folder}/log"
            shell(f"zstd -dcq {folder}/{part.name}.zst | {command}")


def main() -> None:
    disk, folder = Path(sys.argv[2]), Path(sys.argv[4])
    manifest = Manifest.load(Path(sys.argv[3]))
    if sys.argv[1] == "save":
        save(disk, manifest, folder)
    else:
        load(disk, manifest, folder, Path(sys.argv[5]))


if __name__ == "__main__":
    main()
