"""What the files of a disk hold besides what is taken of them: internal snapshots, and newer images over this one.

And what they hold twice: tables that contradict each other.

Said by whoever carries the disk elsewhere, since the user may give up the files after that.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from ferrotype.formats.mapped import collisions
from ferrotype.job import Job

if TYPE_CHECKING:
    from ferrotype.engine.references import OpenDisk

__all__ = ["tell_of_beside"]

_CHAINED: Final = ("raw", "qcow2", "qcow", "qed", "vhd", "vhdx", "vmdk", "vdi")  # formats that others stand over
_NAMED: Final = 5


def tell_of_beside(disk: OpenDisk, job: Job, *, taken: bool = True) -> None:
    """Warn of what is the user's and is not taken with the disk, and note what is nobody's data.

    Nothing is said of a further disk of an image, which the user chose by its name.  Where the disk is not ``taken``
    but looked at, all are notes.
    """
    image, path = disk.image, disk.reference.path
    if image is None or disk.reference.snapshot not in (None, "latest"):
        return
    for sentence in collisions(disk.source):
        job.warn(f"{path}: {sentence}")
    say = job.warn if taken else job.note
    for sentence in image.besides:
        say(f"{path}: {sentence}")
    for sentence in image.remarks:
        job.note(f"{path}: {sentence}")
    if image.format in _CHAINED and "wrapped" not in image.facts and path.is_file():
        from ferrotype.formats.descendants import leaves_over  # most disks are no images

        if names := leaves_over(path):
            named = ", ".join(names[:_NAMED]) + (" ..." if len(names) > _NAMED else "")
            one = len(names) == 1
            say(
                f"{path}: {named if one else f'{len(names)} files beside it ({named})'} "
                f"{'says that it stands' if one else 'say that they stand'} over this file, whose state is older: "
                f"give {'that file' if one else 'one of them'} to take the disk as it is now"
            )
