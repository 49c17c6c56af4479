"""NTFS: which clusters a volume uses, read from its $Bitmap, and whether that can be trusted.

    sector 0       boot sector: sizes, and where $MFT and its mirror begin
    $MFT           file records; record 0 describes $MFT itself, so the rest is found through it
                     0 $MFT   1 $MFTMirr   2 $LogFile   3 $Volume   5 root folder   6 $Bitmap
    $MFTMirr       copies of records 0 to 3
    $Bitmap        one bit a cluster, the lowest bit first
    last sector    backup boot sector, behind the last cluster and in no bitmap

A volume is unclean, and its bitmap not to be trusted, if $Volume says so, if $LogFile still holds changes, or if
Windows sleeps on it (hibernation, fast startup) and will go on with what it holds in memory.

Microsoft, "Master File Table" (NTFS developer notes); R. Russon, Y. Fledel, "NTFS Documentation" (Linux-NTFS
project: Files, $Boot to $Bitmap; Concepts, index nodes).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

import numpy as np

from ferrotype.block import Source, read, read_exactly
from ferrotype.errors import DeviceError, InvalidImage, UnsupportedError
from ferrotype.extents import BitmapRuns, ExtentMap, Offsets, State, merge
from ferrotype.filesystems import Claims, Facts
from ferrotype.filesystems.copies import copy_at, require_copy
from ferrotype.filesystems.ntfs_claims import claims
from ferrotype.filesystems.ntfs_files import files_at
from ferrotype.filesystems.ntfs_mft import MAX_RECORD, OEM_ID, Content, Geometry, MasterFileTable
from ferrotype.filesystems.ntfs_records import (
    DATA,
    INDEX_ALLOCATION,
    INDEX_ROOT,
    SEGMENT,
    UNREADABLE,
    VOLUME_INFORMATION,
    VOLUME_NAME,
    BootSector,
    FileName,
    FileRecord,
    IndexBuffer,
    IndexEntry,
    IndexHeader,
    IndexRoot,
    RestartArea,
    RestartPageHeader,
    VolumeInformation,
    fixed_up,
    utf16,
)
from ferrotype.filesystems.remains import Ranges
from ferrotype.units import KiB

_LOGFILE, _VOLUME, _ROOT, _BITMAP = 2, 3, 5, 6  # record numbers

_NODE_BUDGET: Final = 64  # index nodes looked at for one name; a lookup needs as many as the tree is deep

_WINDOW: Final = 256 * KiB  # bytes of $Bitmap taken at once: even alternating bits cost about 100 MiB then
_FREE_RUNS: Final = 1 << 21  # free runs listed; what lies behind them counts as used, to keep memory under 400 MiB

_DIRTY: Final = 0x0001  # $VOLUME_INFORMATION: chkdsk must run
_CHKDSK_UNDERWAY: Final = 0x4000  # it ran and did not finish
_VOLUME_IS_CLEAN: Final = 0x0002  # flag of a restart area
_NO_CLIENT: Final = 0xFFFF
_MAX_LOG_PAGE: Final = 64 * KiB  # bytes; the second restart page is not looked for further on

_SWAP_FILES: Final = ("PAGEFILE.SYS", "HIBERFIL.SYS", "SWAPFILE.SYS")
_HIBERFILE_HEADER: Final = 4096  # bytes; shorter: another system's hibernation holds this volume
_ASCII_UPPER: Final = {i: i - 32 for i in range(ord("a"), ord("z") + 1)}
_STANDARD_INFORMATION: Final = 0x10
_UNIX_EPOCH: Final = 11_644_473_600  # seconds from 1601 to 1970
_VSS_HEADER: Final = 0x1E00  # byte of the volume
_VSS_IDENTIFIER: Final = bytes.fromhex("6b87083876c1484eb7ae04046e6cc752")


class Ntfs:
    """An opened NTFS volume."""

    def __init__(self, source: Source) -> None:
        boot = BootSector.unpack(read_exactly(source, 0, BootSector.SIZE, "the boot sector"))
        self._source, self._boot = source, boot
        self._geometry = Geometry.of(boot, source.size)
        self._mft = MasterFileTable(source, self._geometry)
        volume = self._mft.record(_VOLUME)
        info = self._volume_information(volume)
        self.facts = Facts(
            kind="ntfs",
            label=self._label(volume),
            uuid=f"{self._geometry.serial_number:016X}",
            block_size=self._geometry.cluster_size,
            size=self._geometry.size,
            unclean=self._unclean(info.flags),
            written=self._written(),
            besides=self._shadow_copies(),
        )

    def _written(self) -> int | None:
        """When the root folder, or $MFT, was changed last ("$STANDARD_INFORMATION": times in 100 ns since 1601)."""
        times = []
        for number in (0, _ROOT):
            try:
                found = self._mft.record(number).find(_STANDARD_INFORMATION, "")
            except (InvalidImage, DeviceError):
                continue
            if found is not None and found.value is not None and len(found.value) >= 24:
                times += [int.from_bytes(found.value[at : at + 8], "little") for at in (0, 8, 16)]
        return max(times) // 10_000_000 - _UNIX_EPOCH if times else None

    def _shadow_copies(self) -> str | None:
        """Windows' shadow copies save what is overwritten; what was deleted since stands in free clusters.

        Their volume header, byte 0x1E00: identifier, version, type, ..., at 48 the offset of the catalog, 0 without
        one (libvshadow, "Volume Shadow Snapshot format", section 3).
        """
        try:
            header = read(self._source, _VSS_HEADER, 56)
        except DeviceError:
            return None
        if header[:16] != _VSS_IDENTIFIER or not any(header[48:56]):
            return None
        return "shadow copies (earlier versions of files), a part of which stands in its free space"

    # ------------------------------------------------------------------ the map

    def allocation(self) -> ExtentMap:
        """FREE exactly where $Bitmap holds a zero.

        Raises InvalidImage where it calls its own clusters free, and where copies tell of another layout.
        """
        require_copy(self._source, self._boot.total_sectors * self._boot.bytes_per_sector, self._is_alike)
        self._mft.renew()
        bitmap = self._mft.content(self._mft.record(_BITMAP), DATA)
        clusters = self._geometry.clusters
        if bitmap is None or bitmap.flags & UNREADABLE or bitmap.valid * 8 < clusters or -1 in bitmap.lcns:
            raise InvalidImage("$Bitmap does not cover the volume")
        starts, ends = _free_runs(bitmap, clusters)
        for name, content in (("$MFT", self._mft.data), ("$Bitmap", bitmap)):
            if _overlap(starts, ends, *_runs(content)):
                raise InvalidImage(f"$Bitmap says that clusters of {name} are free")
        if len(starts) and starts[0] == 0:
            raise InvalidImage("$Bitmap says that the boot sector is free")
        return self._free(starts, ends)

    def _is_alike(self, sector: bytes) -> bool:
        """Whether the last sector lays a volume out as this one, or is no boot sector while $MFTMirr is there.

        Windows NT 3.51 and NT 4 kept the backup in the middle, and programs that resize leave it to chkdsk.
        """
        if sector[3:11] != OEM_ID:
            mirror = copy_at(self._source, self._geometry.mirror_lcn * self._geometry.cluster_size)
            return mirror is None or mirror[:4] in (b"FILE", b"BAAD")
        return _layout_of(BootSector.unpack(sector)) == _layout_of(self._boot)

    def swap_files(self) -> ExtentMap:
        """FREE where the clusters of Windows' paging and hibernation files lie; a damaged one is not offered."""
        found = self._free(np.zeros(0, np.int64), np.zeros(0, np.int64))
        self._mft.renew()
        for name in _SWAP_FILES:
            try:
                for record in self._in_root(name):
                    content = self._mft.content(record, DATA)
                    if content is not None and not self._collides(content):
                        found = merge(found, self._free(*_runs(content)))
            except InvalidImage:
                continue  # nothing is promised of what cannot be read
        return found

    def files_at(self, starts: Offsets, ends: Offsets, /) -> tuple[str, ...]:
        """See FileSystem.  A cluster belongs to its file as a whole, and so does the file's record in $MFT.

        Another stream than the main one stands as ``folder/file:stream``, NTFS's own files as ``<$Bitmap>``.  Where
        records of $MFT cannot be read, the folders tell whose they were.
        """
        return files_at(self._source, self._geometry, self._mft, Ranges(starts, ends))

    def claims(self) -> Iterator[Claims]:
        """See FileSystem, and ``ntfs_claims``."""
        return claims(self._source, self._geometry, self._mft)

    def _free(self, starts: Offsets, ends: Offsets) -> ExtentMap:
        unit = self._geometry.cluster_size
        return ExtentMap.from_runs(0, self._source.size, starts * unit, ends * unit, State.FREE)

    def _collides(self, content: Content) -> bool:
        """Whether clusters are claimed twice, by this file or by it and $MFT: then they are not its own."""
        starts, ends = _runs(content)
        return bool(np.any(starts[1:] < ends[:-1])) or _overlap(starts, ends, *_runs(self._mft.data))

    # ------------------------------------------------------------------ facts

    def _volume_information(self, volume: FileRecord) -> VolumeInformation:
        found = volume.find(VOLUME_INFORMATION, "")
        if found is None or found.value is None:
            raise InvalidImage("$Volume does not say which version of NTFS this is")
        info = VolumeInformation.unpack(found.value)
        if not (1, 1) <= (info.major_version, info.minor_version) <= (3, 1):
            raise UnsupportedError(f"NTFS version {info.major_version}.{info.minor_version} is not known")
        return info

    def _label(self, volume: FileRecord) -> str | None:
        found = volume.find(VOLUME_NAME, "")
        if found is None or not found.value:
            return None
        return found.value.decode("utf-16-le", "replace").split("\0")[0].rstrip() or None

    def _unclean(self, flags: int) -> str | None:
        if flags & (_DIRTY | _CHKDSK_UNDERWAY):
            return "it is marked as in need of chkdsk"
        found = self._hibernated() or self._log_open()
        return f"part of its $MFT is damaged: {self._mft.damaged}" if self._mft.damaged else found

    def _hibernated(self) -> str | None:
        """Why hiberfil.sys forbids to trust the volume.  Windows marks it by the first four bytes."""
        try:
            for record in self._in_root("HIBERFIL.SYS"):
                content = self._mft.content(record, DATA)
                if content is None or content.flags & UNREADABLE:
                    return "its hiberfil.sys cannot be read"
                mark = content.read(0, 4)
                if mark.lower() in (b"hibr", b"rstr", b"link"):
                    return "Windows is hibernated on it, by hibernation or by fast startup"
                if content.size < _HIBERFILE_HEADER and mark.lower() != b"wake":
                    return "a Windows on another volume is hibernated and has it mounted"
        except (InvalidImage, DeviceError) as error:
            return f"it cannot be told whether Windows is hibernated on it: {error}"
        return None

    def _log_open(self) -> str | None:
        """Why $LogFile forbids to trust the volume: the newer of two restart pages tells ("$LogFile")."""
        try:
            log = self._mft.content(self._mft.record(_LOGFILE), DATA)
            pages = [] if log is None else list(_restart_pages(log))
            if log is not None and not pages and _log_empty(log):
                return None
        except (InvalidImage, DeviceError) as error:
            return f"its $LogFile cannot be read: {error}"
        if not pages:
            return "its $LogFile is damaged"
        header, area = max(
            pages, key=lambda page: page[1].current_lsn if page[0].signature == b"RSTR" else page[0].chkdsk_lsn
        )
        version = header.major_version, header.minor_version
        if version == (2, 0):
            return "Windows holds changes of it in memory, for fast startup or because it was cut off"
        if version != (1, 1):
            return f"its $LogFile has the unknown version {version[0]}.{version[1]}"
        in_use = header.signature == b"RSTR" and area.client_in_use_list != _NO_CLIENT
        if in_use and not area.flags & _VOLUME_IS_CLEAN:
            return "its $LogFile was not closed"
        return None

    # ------------------------------------------------------------------ the root folder

    def _in_root(self, name: str) -> list[FileRecord]:
        """The files in the root folder of that upper-case ASCII name, whatever the case they are written in."""
        root = self._mft.record(_ROOT)
        head = self._mft.content(root, INDEX_ROOT, "$I30")
        blocks = self._mft.content(root, INDEX_ALLOCATION, "$I30")
        if head is None:
            raise InvalidImage("the root folder has no index")
        data = head.read(0, self._geometry.record_size)
        size = IndexRoot.unpack(data).bytes_per_index_buffer
        if not 512 <= size <= MAX_RECORD or size & (size - 1):
            raise InvalidImage("the root folder has an impossible index", field="bytes_per_index_buffer")
        # A node's number counts clusters, or pieces of 512 bytes where a cluster is larger than a node.
        unit = self._geometry.cluster_size if self._geometry.cluster_size <= size else 512
        nodes, seen, found = [data[IndexRoot.SIZE :]], set[int](), dict[int, FileRecord]()
        while nodes:
            references, children = _look_up(nodes.pop(), name)
            for reference in references:
                record = self._mft.record(reference & SEGMENT)
                if reference >> 48 in (0, record.header.sequence_number):
                    found[record.number] = record
            for child in children:
                if blocks is None or child in seen or len(seen) >= _NODE_BUDGET:
                    raise InvalidImage("the index of the root folder runs in circles")
                seen.add(child)
                node = fixed_up(blocks.read(child * unit, size), b"INDX", "the index of the root folder")
                if IndexBuffer.unpack(node).this_block != child:
                    raise InvalidImage("the index of the root folder is damaged", field="this_block")
                nodes.append(node[IndexBuffer.SIZE :])
        return list(found.values())


def _layout_of(boot: BootSector) -> tuple[int, ...]:
    """All that where clusters and $MFT lie depends on."""
    return (
        boot.bytes_per_sector,
        boot.sectors_per_cluster,
        boot.total_sectors,
        boot.mft_lcn,
        boot.clusters_per_file_record_segment,
    )


def _look_up(node: bytes, name: str) -> tuple[list[int], list[int]]:
    """File references of a name in one index node, and the nodes below in which there may be more."""
    header = IndexHeader.unpack(node)
    at, end = header.first_index_entry, min(header.first_free_byte, len(node))
    references, children, before = list[int](), list[int](), ""
    while at + IndexEntry.SIZE <= end:
        entry = IndexEntry.unpack(node, at)
        if entry.length < IndexEntry.SIZE + 8 * (entry.flags & 1) or at + entry.length > end:
            break
        last = bool(entry.flags & 2)
        key = "" if last else _key(node[at + IndexEntry.SIZE : at + entry.length])
        if entry.flags & 1 and before <= name and (last or name <= key):
            children.append(int.from_bytes(node[at + entry.length - 8 : at + entry.length], "little"))
        if last or key > name:
            return references, children
        if key == name:
            references.append(entry.file_reference)
        at, before = at + entry.length, key
    raise InvalidImage("a node of the root folder's index is damaged")


def _key(data: bytes) -> str:
    """The name in an index entry, in upper case as far as ASCII goes: other letters never fold into ASCII."""
    length = 2 * FileName.unpack(data).file_name_length
    return utf16(data[FileName.SIZE : FileName.SIZE + length]).translate(_ASCII_UPPER)


def _free_runs(bitmap: Content, clusters: int) -> tuple[Offsets, Offsets]:
    """Starts and ends (in clusters) of the free runs, at most about ``_FREE_RUNS`` from the front."""
    starts, ends = [np.zeros(0, np.int64)], [np.zeros(0, np.int64)]
    count = 0
    for first in range(0, clusters, _WINDOW * 8):
        bits = min(_WINDOW * 8, clusters - first)
        window = np.frombuffer(bitmap.read(first // 8, (bits + 7) // 8), np.uint8)
        free = BitmapRuns()
        free.add(~window, bits)
        low, high = free.finish()
        starts.append(low + first)
        ends.append(high + first)
        count += len(low)
        if count > _FREE_RUNS:
            break
    return np.concatenate(starts), np.concatenate(ends)


def _runs(content: Content) -> tuple[Offsets, Offsets]:
    """Starts and ends of a content's clusters on the volume, ascending."""
    lcns = np.array(content.lcns, np.int64)
    vcns = np.array(content.vcns, np.int64)
    ends = lcns + (vcns[1:] - vcns[:-1])
    order = np.argsort(lcns, kind="stable")
    order = order[lcns[order] >= 0]
    return lcns[order], ends[order]


def _overlap(starts: Offsets, ends: Offsets, others: Offsets, other_ends: Offsets) -> bool:
    """Whether any of the others touches one of the runs, which ascend and do not overlap."""
    if not len(starts):
        return False
    at = np.searchsorted(ends, others, "right")  # the first run that ends behind the start of the other
    inside = at < len(starts)
    return bool(np.any(starts[at[inside]] < other_ends[inside]))


def _restart_pages(log: Content) -> Iterator[tuple[RestartPageHeader, RestartArea]]:
    """The restart pages of $LogFile that can be believed: one at 0, one a page further on, whatever a page has."""
    at = 0
    while at <= _MAX_LOG_PAGE:
        raw = log.read(at, max(RestartPageHeader.SIZE, 512))
        if raw[:4] == b"RCRD":
            return  # log records: no restart page follows
        if raw[:4] in (b"RSTR", b"CHKD"):
            page = _restart_page(log, at, RestartPageHeader.unpack(raw))
            if page is not None:
                yield page
        at = at * 2 or 512


def _restart_page(log: Content, at: int, header: RestartPageHeader) -> tuple[RestartPageHeader, RestartArea] | None:
    size = header.system_page_size
    if not 512 <= size <= _MAX_LOG_PAGE or size & (size - 1) or at not in (0, size):
        return None
    raw = log.read(at, size)
    try:
        # chkdsk writes its mark without fix-ups
        page = fixed_up(raw, b"RSTR", "a restart page") if header.signature == b"RSTR" else raw
        return header, RestartArea.unpack(page, header.restart_offset)
    except InvalidImage:
        return None


def _log_empty(log: Content) -> bool:
    """Whether the log was emptied, as mkntfs and chkdsk leave it: nothing but ones where restart pages may lie."""
    data = log.read(0, 2 * _MAX_LOG_PAGE)
    return bool(data) and data.count(0xFF) == len(data)


def probe(source: Source) -> bool:
    """Whether the boot sector says NTFS."""
    return source.size >= BootSector.SIZE and read(source, 0, BootSector.SIZE)[3:11] == OEM_ID


def open(source: Source) -> Ntfs:
    """The NTFS volume that begins at byte 0.  Raises InvalidImage or UnsupportedError."""
    return Ntfs(source)
