"""Aged file systems of 4 TB: made by their own mkfs, and their maps of what is used then filled by hand.

The allocation bitmap, or both FATs, get 1.5 million runs of used and as many of free clusters, whose lengths differ
as much as on real disks (log-normal); counters and checksums are made right.  No file owns the clusters.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

SIZE: Final = 4_000_000_000_000  # bytes of a volume; FAT32 with sectors of 4 KiB, which lets it be as large
RUNS: Final = 1_500_000  # free runs
USED: Final = 0.6  # of the clusters
_WINDOW: Final = 1 << 23  # clusters filled at a time
_SEED: Final = 20
_MKFS: Final = {
    # without uninit_bg every group's bitmap is written; metadata_csum is added afterwards
    "ext4": "mkfs.ext4 -q -F -T largefile4 -O ^metadata_csum,^uninit_bg -E nodiscard {path} "
    "&& tune2fs -O metadata_csum {path}",
    "ntfs": "mkfs.ntfs -f -F -q -s 512 -p 0 -H 255 -S 63 {path}",
    "exfat": "mkfs.exfat {path}",
    "fat32": "mkfs.vfat -F 32 -S 4096 -s 16 {path}",
}


def make(folder: Path, kind: str, size: int = SIZE, runs: int = RUNS) -> Path:
    """An aged volume of that kind in ``folder``, made anew."""
    path = folder / f"{kind}.img"
    path.with_suffix(".domain").unlink(missing_ok=True)
    with path.open("wb") as file:
        file.truncate(size // 4096 * 4096)
    shell(_MKFS[kind].format(path=path))
    {"ext4": _age_ext4, "ntfs": _age_ntfs, "exfat": _age_exfat, "fat32": _age_fat32}[kind](path, runs)
    return path


class _Pattern:
    """Which of a number of clusters are in use, by runs whose lengths are log-normal."""

    def __init__(self, clusters: int, runs: int) -> None:
        import numpy as np

        random = np.random.default_rng(_SEED)
        lengths = np.exp(random.normal(0, 1.5, 2 * runs))
        lengths[1::2] *= (1 - USED) / USED  # used and free in turn
        lengths = np.maximum(lengths * (clusters / lengths.sum()), 1).astype(np.int64)
        self._edges = np.cumsum(lengths)

    def window(self, first: int, count: int) -> NDArray[np.uint8]:
        """One byte a cluster: 1 where it is used.  What lies behind the last run is used."""
        import numpy as np

        low, high = np.searchsorted(self._edges, (first, first + count), "right")
        states = np.zeros(count, np.uint8)
        inside = self._edges[low:high] - first
        states[inside[inside < count]] = 1
        states[0] ^= (low + 1) % 2
        out: NDArray[np.uint8] = np.bitwise_xor.accumulate(states)
        return out


def _age_bitmap(file: Any, at: int, clusters: int, runs: int) -> None:
    """Add used runs to one bitmap that lies in one piece from byte ``at`` on."""
    import numpy as np

    pattern = _Pattern(clusters, runs)
    for first in range(0, clusters, _WINDOW):
        count = min(_WINDOW, clusters - first)
        packed = np.packbits(pattern.window(first, count), bitorder="little")
        file.seek(at + first // 8)
        packed |= np.frombuffer(file.read(len(packed)), np.uint8)
        file.seek(at + first // 8)
        file.write(packed.tobytes())


def _age_ntfs(path: Path, runs: int) -> None:
    from ferrotype.block.file import FileSource
    from ferrotype.filesystems.ntfs import Ntfs

    with FileSource(path) as source:
        volume = Ntfs(source)
        bitmap = volume._mft.content(volume._mft.record(6), 0x80)
        assert bitmap is not None
        assert len(bitmap.lcns) == 1, "mkntfs lays $Bitmap out in one piece"
        at = bitmap.lcns[0] * volume.facts.block_size
        clusters = volume._geometry.clusters
    with path.open("r+b") as file:
        _age_bitmap(file, at, clusters, runs)


def _age_exfat(path: Path, runs: int) -> None:
    from ferrotype.block.file import FileSource
    from ferrotype.filesystems.exfat import ExFat

    with FileSource(path) as source:
        volume = ExFat(source)
        ((at, _),) = volume._bitmap
        clusters = volume._clusters
    with path.open("r+b") as file:
        _age_bitmap(file, at, clusters, runs)


def _age_fat32(path: Path, runs: int) -> None:
    import numpy as np

    from ferrotype.block.file import FileSource
    from ferrotype.filesystems.fat import Fat

    with FileSource(path) as source:
        layout = Fat(source)._layout
    pattern, free = _Pattern(layout.clusters, runs), 0
    with path.open("r+b") as file:
        for first in range(0, layout.clusters, _WINDOW):
            count = min(_WINDOW, layout.clusters - first)
            used = pattern.window(first, count)
            file.seek(layout.fat_start + (first + 2) * 4)
            entries = np.frombuffer(file.read(count * 4), "<u4").copy()
            # a file in each run: every cluster leads to the next, the last one ends it
            following = np.arange(first + 3, first + 3 + count, dtype=np.uint32)
            following[:-1][used[1:] == 0] = 0x0FFFFFFF
            following[-1] = 0x0FFFFFFF
            new = (entries == 0) & (used == 1)
            entries[new] = following[new]
            free += int((entries == 0).sum())
            for table in range(layout.fats):
                file.seek(layout.fat_start + table * layout.fat_size + (first + 2) * 4)
                file.write(entries.tobytes())
        file.seek(layout.sector + 488)  # FSInfo: FSI_Free_Count, FSI_Nxt_Free
        file.write(np.array([free, 0xFFFFFFFF], "<u4").tobytes())


_DESCRIPTOR: Final = {
    "bitmap": ("<u4", 0x00),
    "free": ("<u2", 0x0C),
    "bitmap_csum": ("<u2", 0x18),
    "csum": ("<u2", 0x1E),
    "bitmap_hi": ("<u4", 0x20),
    "free_hi": ("<u2", 0x2C),
    "bitmap_csum_hi": ("<u2", 0x38),
}


def _age_ext4(path: Path, runs: int) -> None:
    """Bitmaps, counts and checksums of every group (ext4 documentation, "Block Group Descriptors", "Checksums")."""
    import numpy as np

    from ferrotype.filesystems.ext_checksums import CRC32C, LARGE, crc, row

    with path.open("r+b") as file:
        file.seek(1024)
        superblock = bytearray(file.read(1024))
        low, high = (int.from_bytes(superblock[at : at + 4], "little") for at in (0x04, 0x150))
        blocks, per_group, size = low | high << 32, 32768, 4096
        groups = -(-blocks // per_group)
        seed = crc(CRC32C, LARGE, row(bytes(superblock[0x68:0x78])))
        file.seek(size)
        table = np.frombuffer(file.read(groups * 64), np.uint8).reshape(-1, 64).copy()
        names, (formats, offsets) = list(_DESCRIPTOR), zip(*_DESCRIPTOR.values(), strict=True)
        fields = table.view(
            np.dtype({"names": names, "formats": formats, "offsets": offsets, "itemsize": 64})
        ).ravel()
        places = fields["bitmap"].astype(np.int64) | fields["bitmap_hi"].astype(np.int64) << 32
        pattern, step = _Pattern(blocks, runs), _WINDOW // per_group
        for first in range(0, groups, step):
            some = slice(first, min(first + step, groups))
            count = some.stop - first
            packed = np.packbits(pattern.window(first * per_group, count * per_group), bitorder="little").reshape(
                -1, size
            )
            for packed_row, place in zip(packed, places[some].tolist(), strict=True):
                file.seek(place * size)
                packed_row |= np.frombuffer(file.read(size), np.uint8)
                file.seek(place * size)
                file.write(packed_row.tobytes())
            padding = groups * per_group - blocks if some.stop == groups else 0
            free = (np.unpackbits(packed, axis=1) == 0).sum(1)  # padding is in use, as mkfs left it
            assert not padding or (np.unpackbits(packed[-1], bitorder="little")[-padding:] == 1).all()
            sums = crc(CRC32C, seed, packed)
            fields["free"][some], fields["free_hi"][some] = free & 0xFFFF, free >> 16
            fields["bitmap_csum"][some], fields["bitmap_csum_hi"][some] = sums & 0xFFFF, sums >> 16
        fields["csum"] = 0
        numbers = np.arange(groups, dtype="<u4").view(np.uint8).reshape(-1, 4)
        fields["csum"] = crc(CRC32C, seed, np.hstack([numbers, table])) & 0xFFFF
        file.seek(size)
        file.write(table.tobytes())
        total = int(fields["free"].sum(dtype=np.int64) + (fields["free_hi"].sum(dtype=np.int64) << 16))
        superblock[0x0C:0x10] = (total & 0xFFFFFFFF).to_bytes(4, "little")
        superblock[0x158:0x15C] = (total >> 32).to_bytes(4, "little")
        superblock[0x3FC:] = int(crc(CRC32C, LARGE, row(bytes(superblock[:0x3FC])))[0]).to_bytes(4, "little")
        file.seek(1024)
        file.write(superblock)


def shell(command: str) -> None:
    import subprocess

    environment = os.environ | {"PATH": os.environ.get("PATH", "") + ":/usr/sbin:/sbin"}
    done = subprocess.run(["sh", "-c", command], capture_output=True, text=True, check=False, env=environment)
    if done.returncode:
        raise SystemExit(f"{command}\nexit {done.returncode}: {(done.stderr or done.stdout)[-800:]}")
