"""Every error ferrotype raises on purpose.

    FerrotypeError
     ├─ UsageError                     the request makes no sense
     ├─ Refused                        it would have harmed something
     ├─ FormatError
     │   ├─ InvalidImage               damaged or hostile bytes
     │   │   └─ DamagedRange           of one range of a disk alone
     │   ├─ UnsupportedError           valid, but a feature we do not read
     │   └─ NotAllowed                 an image names another file, which the caller does not let it open
     ├─ IntegrityError                 stored bytes are not what was written
     │   ├─ CorruptObject
     │   ├─ CorruptChunk
     │   └─ MissingChunk
     ├─ KeyRefused                     wrong or missing key
     │   └─ KeyNotKnown                a key was given, and no slot opens with it
     ├─ DeviceError                    reading or writing failed
     │   ├─ ReadError
     │   └─ WriteError
     ├─ StoreError
     │   ├─ ObjectMissing
     │   ├─ ObjectExists
     │   └─ SnapshotForgotten          what was being read was forgotten meanwhile
     ├─ Locked                         another writer holds the image
     └─ Cancelled                      the user asked to stop

A message is one sentence that says what, where, and what to do next.  Facts a caller may branch on are
attributes.  Only the command line turns a class into an exit code.
"""

from __future__ import annotations

from typing import Self


class FerrotypeError(Exception):
    """Base of every error ferrotype raises on purpose."""

    def of(self, what: str) -> Self:
        """The same, with the name of the file or device that it is about before the sentence."""
        if what not in str(self):
            self.args = (f"{what}: {self}",)
        return self


class UsageError(FerrotypeError):
    """The request cannot mean anything: an unknown reference, options that exclude each other."""


class Refused(FerrotypeError):
    """Carrying on would have destroyed something, so nothing was done."""


class FormatError(FerrotypeError):
    """Bytes on disk that cannot be understood."""

    def __init__(self, message: str, *, offset: int | None = None, field: str | None = None) -> None:
        facts = [f"field {field}"] if field else []
        if offset is not None:
            facts.append(f"byte {offset}")
        super().__init__(f"{message} ({', '.join(facts)})" if facts else message)
        self.offset = offset
        self.field = field


class InvalidImage(FormatError):
    """The bytes contradict their specification: damaged, cut short, or made to do harm."""


class DamagedRange(InvalidImage):
    """What stands for one range of a disk cannot be opened; the rest of the disk may be whole."""

    def __init__(self, message: str, start: int, length: int, *, offset: int | None = None) -> None:
        super().__init__(message)
        self.start = start  # on the disk, bytes
        self.length = length
        self.why = message
        self.offset = offset


class UnsupportedError(FormatError):
    """The bytes are valid and use a feature that ferrotype does not read."""


class NotAllowed(FormatError):
    """An image names a file, device or address that the caller does not let it open."""


class IntegrityError(FerrotypeError):
    """Stored bytes are not the bytes that were written."""

    placed = False  # the sentence says which bytes of which disk cannot be given back

    def at(self, disk: str, start: int, length: int, image: str, *, exact: bool) -> Self:
        """The same, with the range of the disk that it costs (all of it where ``exact``), and what can be done."""
        if not self.placed:
            where = f"disk {disk}: {'' if exact else 'some of '}{length} bytes at {start} cannot be given back"
            advice = (
                f"`ferrotype verify {image}` names all that is hit, and `ferrotype salvage {image} OUT` makes an "
                "image of the rest, which can be restored"
            )
            self.args = (f"{where}: {self}; {advice}",)
            self.placed = True
        return self


class CorruptObject(IntegrityError):
    """A named object fails its own checksum, tag or name."""

    def __init__(self, name: str, why: str) -> None:
        super().__init__(f"{name} is damaged: {why}")
        self.name = name


class CorruptChunk(IntegrityError):
    """A stored chunk does not decode to the plaintext its id names."""

    def __init__(self, chunk_id: bytes, why: str) -> None:
        super().__init__(f"chunk {chunk_id.hex()[:16]} is damaged: {why}")
        self.chunk_id = chunk_id


class MissingChunk(IntegrityError):
    """A chunk that a snapshot needs stands in no pack."""

    def __init__(self, chunk_id: bytes) -> None:
        super().__init__(f"chunk {chunk_id.hex()[:16]} is missing from the image")
        self.chunk_id = chunk_id


class KeyRefused(FerrotypeError):
    """No key slot opens with the passphrase or key file that was given, or none was given."""


class KeyNotKnown(KeyRefused):
    """None of the key slots that there are opens with what was given."""


class DeviceError(FerrotypeError):
    """A device, file or store could not be read or written."""


class ReadError(DeviceError):
    """A byte range could not be read."""

    def __init__(self, what: str, start: int, length: int, why: str, *, gone: bool = False) -> None:
        super().__init__(f"{what}: reading {length} bytes at {start} failed: {why}")
        self.start = start
        self.length = length
        self.why = why
        self.gone = gone  # the device or server is not there any more: no other range can be read either


class WriteError(DeviceError):
    """A byte range could not be written."""


class StoreError(FerrotypeError):
    """An object store did not do what was asked."""


class ObjectMissing(StoreError):
    """There is no object of that name."""

    def __init__(self, name: str) -> None:
        super().__init__(f"object {name} is not in the store")
        self.name = name


class ObjectExists(StoreError):
    """An object of that name is there already; objects are never overwritten."""

    def __init__(self, name: str) -> None:
        super().__init__(f"object {name} exists already")
        self.name = name


class SnapshotForgotten(StoreError):
    """A snapshot was forgotten, and its chunks pruned, while it was read."""


class Locked(FerrotypeError):
    """Another process is using the image: it writes, or it reads what would be moved."""


class Cancelled(FerrotypeError):
    """The user asked to stop."""

    def __init__(self) -> None:
        super().__init__("stopped")
