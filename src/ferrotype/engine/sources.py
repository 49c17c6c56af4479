"""Opening what is backed up, with what the machine knows of it."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path

from ferrotype.block.disks import Disk, hardware_of
from ferrotype.block.inventory import lies_on, same_storage
from ferrotype.block.sysfs import machine_id
from ferrotype.engine.beside import tell_of_beside
from ferrotype.engine.live import tell_of_use
from ferrotype.engine.prepare import NamedSource
from ferrotype.engine.references import Access, OpenDisk, open_disk, parse
from ferrotype.errors import Refused, UsageError
from ferrotype.job import Job
from ferrotype.linux import born


def named_source(text: str, image: Path, access: Access, stack: ExitStack, job: Job) -> NamedSource:
    """The disk a reference names, kept open by ``stack``.

    Raises Refused where it is the image itself; warns where it holds the image, which then grows while it is read.
    """
    reference = parse(text)
    if reference.address is None and not reference.path.exists():
        raise UsageError(f"{reference.path} does not exist")
    if reference.address is None and same_storage(reference.path, image):
        raise Refused(f"{image} is the source itself; name another file for the image")
    if reference.address is None and lies_on(image, reference.path):
        job.warn(f"{image} lies on {reference.path}, which is being backed up: keep it on another disk")
    disk = stack.enter_context(open_disk(text, access, job))
    if any(same_storage(file, image) for file in disk.files):
        raise Refused(f"{image} is part of the source itself; name another file for the image")
    tell_of_use(disk, job)
    tell_of_beside(disk, job)
    return known_by(disk)


def disk_name(disk: OpenDisk) -> str:
    """How a snapshot calls the disk."""
    if disk.record is not None:
        return as_text(disk.record.name)
    partition = disk.reference.partition
    return as_text(disk.reference.path.name + (f"#{partition}" if partition else ""))


def as_text(name: str) -> str:
    """A name of the file system or the command line, without the bytes that are no UTF-8."""
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "replace")


def known_by(disk: OpenDisk) -> NamedSource:
    """The disk, with all that tells it from its clones."""
    reference = disk.reference
    name, described = disk_name(disk), as_text(reference.text)
    if reference.address is not None:
        return NamedSource(disk.source, name, described, path=described, sector_size=disk.sector_size)
    inside = reference.text.removeprefix(str(reference.path))  # a snapshot, a disk of it, a partition
    real = reference.path.resolve()
    path, model, serial, file, number = str(real), "", "", "", 0
    if disk.format == "device":
        if (known := hardware_of(real)) is not None:
            hardware, number = known
            path = _lasting_path(hardware, number, real)
            model, serial = hardware.model or "", hardware.serial or ""
    else:
        if disk.record is not None:
            model, serial = disk.record.model, disk.record.serial
        if (since := born(real)) is not None:
            file = f"{real.stat().st_ino}@{since}{inside}"
    part = inside or (f"#{number}" if number else "")
    return NamedSource(
        disk.source,
        name,
        described,
        model,
        as_text(serial + part) if serial and disk.format == "device" else serial,
        whole=not part,
        machine=machine_id(),
        path=as_text(path + inside),
        file=as_text(file),
        sector_size=disk.sector_size,
    )


def _lasting_path(disk: Disk, number: int, real: Path) -> str:
    """A device's path, or what stays the same of it when it gets another one."""
    if disk.backing_file is not None:
        return disk.backing_file + (f"#{number}" if number else "")
    if real.name.startswith("dm-") and disk.model:
        return f"/dev/mapper/{disk.model}"
    return str(real)
