"""Virtual disks: the raw disk of day one into each format and back, beside qemu-img and libewf; checksums.

Both programs read the same file and write to tmpfs.  Results are checked: qemu-img compares what ferrotype wrote with
the disk, and the raw disks that come back are the disk in every byte.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from programs import WHOLE, Step, Store, limit, right

_JUDGE: Final = "qemu-img compare -q -f {kind} -F raw {{at}}/disk.{suffix} {{source}}"


@dataclass(frozen=True, slots=True)
class Form:
    """A format, or one kind of it, as both programs are asked for it."""

    name: str
    suffix: str
    ours: str  # options of ferrotype convert
    kind: str  # qemu-img's name of the format
    theirs: str  # options of qemu-img convert
    to: float  # at most this part of qemu-img's time into the format
    back: float | None = 1.1  # and this out of it; None: not compared
    parallel: str = "-m 2 -W"  # what of it qemu-img allows
    pairs: int | None = None  # fewer are enough where qemu-img needs minutes

    @property
    def write(self) -> Step:
        run = f"{{ferrotype}} convert {{source}} {{at}}/disk.{self.suffix} {self.ours} --json"
        return Step("ferrotype", run, _JUDGE.format(kind=self.kind, suffix=self.suffix))

    @property
    def write_rival(self) -> Step:
        how = f"qemu-img convert {self.parallel} {self.theirs}".strip()
        run = f"{how} -f raw -O {self.kind} {{source}} {{at}}/disk.{self.suffix}"
        return Step(how, run, needs="qemu-img")

    @property
    def store(self) -> Store:
        """What qemu-img made, from which both read."""
        return Store(f"qemu {self.name}", self.write_rival.run)

    @property
    def read(self) -> Step:
        run = f"{{ferrotype}} convert {{at}}/disk.{self.suffix} {{out}}/disk.img --json"
        return Step("ferrotype", run, right(WHOLE, "day1"), store=self.store, result="{out}")

    @property
    def read_rival(self) -> Step:
        run = f"qemu-img convert -m 2 -W -f {self.kind} -O raw {{at}}/disk.{self.suffix} {{out}}/disk.img"
        return Step("qemu-img convert -m 2 -W", run, right(WHOLE, "day1"), "qemu-img", self.store, result="{out}")


FORMS: Final = (
    Form("raw", "raw", "", "raw", "", to=1.1, back=None),
    Form("qcow2", "qcow2", "", "qcow2", "", to=1.1),
    Form("qcow2, zstd", "qcow2", "-c -o compression_type=zstd", "qcow2", "-c -o compression_type=zstd", to=0.7),
    Form(
        "qcow2, zlib", "qcow2", "-c -o compression_type=zlib", "qcow2", "-c -o compression_type=zlib", to=0.2, pairs=1
    ),
    Form("vmdk", "vmdk", "", "vmdk", "", to=1.1),
    Form("vmdk, streamOptimized", "vmdk", "-c", "vmdk", "-o subformat=streamOptimized", to=0.2, parallel="", pairs=1),
    Form("vhdx", "vhdx", "", "vhdx", "", to=1.1),
    Form("vhd", "vhd", "", "vpc", "-o force_size=on", to=1.1),
    Form("vdi", "vdi", "", "vdi", "", to=1.1),
)

_EWF: Final = (
    "cd {at} && ewfacquire -u -q -t {at}/disk -f encase6 -d sha1 -c deflate:fast -b 64 -S 1.9GiB -C x -D x -e x "
    "-E x -N x {source} >/dev/null"
)
EWF: Final = Step(
    "ferrotype",
    "{ferrotype} convert {source} {at}/disk.E01 --json",
    "ewfverify -q {at}/disk.E01 >/dev/null",
)
EWF_RIVAL: Final = Step("ewfacquire, encase6, fast, MD5 and SHA-1", _EWF, needs="ewfacquire")
CHECKSUM: Final = Step("ferrotype", "{ferrotype} checksum {source} --json")
HASHING: Final = limit("reading and BLAKE3", "read+blake3")
