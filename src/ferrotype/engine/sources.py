"""Opening what is backed up, with what the machine knows of it."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path

from ferrotype.block.inventory import Disk, disks, lies_on, same_storage, uses
from ferrotype.engine.prepare import NamedSource
from ferrotype.engine.references import Access, OpenDisk, open_disk, parse
from ferrotype.errors import Refused, UsageError
from ferrotype.job import Job


def named_source(text: str, image: Path, access: Access, stack: ExitStack, job: Job) -> NamedSource:
    """The disk a reference names, kept open by ``stack``.

    Raises Refused where it is the image itself; warns where it holds the image, which then grows while it is read.
    """
    reference = parse(text)
    if reference.address is None and not reference.path.exists():
        raise UsageError(f"{reference.path} does not exist")
    is_device = reference.address is None and reference.path.is_block_device()
    if reference.address is None and same_storage(reference.path, image):
        raise Refused(f"{image} is the source itself; name another file for the image")
    if is_device:
        if lies_on(image, reference.path):
            job.warn(f"{image} lies on {reference.path}, which is being backed up: keep it on another disk")
        mounted = [use for use in uses(reference.path) if " mounted at " in use]
        if mounted:
            job.warn(f"{'; '.join(mounted)}: what is written meanwhile may be caught half-way")
    disk = stack.enter_context(open_disk(text, access, job))
    if any(same_storage(file, image) for file in disk.files):
        raise Refused(f"{image} is part of the source itself; name another file for the image")
    known = _hardware(reference.path) if is_device and reference.partition is None else None
    model = (known.model or "") if known else disk.record.model if disk.record else ""
    return NamedSource(
        disk.source, disk_name(disk), as_text(reference.text), model, (known.serial or "") if known else ""
    )


def disk_name(disk: OpenDisk) -> str:
    """How a snapshot calls the disk."""
    if disk.record is not None:
        return as_text(disk.record.name)
    partition = disk.reference.partition
    return as_text(disk.reference.path.name + (f"#{partition}" if partition else ""))


def as_text(name: str) -> str:
    """A name of the file system or the command line, without the bytes that are no UTF-8."""
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "replace")


def _hardware(path: Path) -> Disk | None:
    real = path.resolve()
    return next((disk for disk in disks() if Path(disk.path).resolve() == real), None)
