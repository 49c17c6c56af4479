"""What Linux offers beyond Python's ``os``: sizes of block devices, zeroing without writing, holes, aligned memory.

The one place with ioctl numbers and ctypes.  The zeroing calls share one answer:

    True       the range reads as zeros now
    False      this kernel, file system or device cannot do it that way; try the next
    OSError    it can, and it failed

Sources: linux/fs.h (BLK*), linux/loop.h (loop_info64), asm-generic/ioctl.h (the layout of a request number),
fallocate(2), lseek(2), renameat2(2), fcntl(2) (F_OFD_SETLK), statfs(2), linux/magic.h.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import mmap
import os
import resource
import struct
from array import array
from collections.abc import Callable
from functools import cache
from typing import TYPE_CHECKING, Annotated, Final

from ferrotype.records import Record, b8, record, u32, u64

if TYPE_CHECKING:
    from ferrotype.extents import Offsets

# ---------------------------------------------------------------------- ioctl request numbers

# Where an ioctl number says that it carries data differs on a few architectures (their asm/ioctl.h).
_OLD_LAYOUT: Final = os.uname().machine.startswith(("ppc", "mips", "sparc", "alpha"))
_NONE: Final = 1 << 29 if _OLD_LAYOUT else 0
_READ: Final = 2 << (29 if _OLD_LAYOUT else 30)
_BLOCK: Final = 0x12 << 8

BLKROGET: Final = _NONE | _BLOCK | 94
BLKRRPART: Final = _NONE | _BLOCK | 95
BLKFLSBUF: Final = _NONE | _BLOCK | 97
BLKSSZGET: Final = _NONE | _BLOCK | 104
BLKGETSIZE64: Final = _READ | ctypes.sizeof(ctypes.c_size_t) << 16 | _BLOCK | 114
BLKPBSZGET: Final = _NONE | _BLOCK | 123
BLKZEROOUT: Final = _NONE | _BLOCK | 127
LOOP_GET_STATUS64: Final = 0x4C05


@record(endian="=", size=232)
class LoopInfo64(Record):
    """struct loop_info64: what a loop device stands on."""

    lo_device: u64  # device of the file system that holds the backing file
    lo_inode: u64
    lo_rdevice: u64  # the backing device itself, where it is one
    lo_offset: u64
    lo_sizelimit: u64
    lo_number: u32
    lo_encrypt_type: u32
    lo_encrypt_key_size: u32
    lo_flags: u32
    lo_file_name: Annotated[bytes, "64s"]
    lo_crypt_name: Annotated[bytes, "64s"]
    lo_encrypt_key: Annotated[bytes, "32s"]
    lo_init_0: b8
    lo_init_1: b8


def _ask(fd: int, request: int, layout: str) -> int:
    answer = fcntl.ioctl(fd, request, bytes(struct.calcsize(layout)))
    value: int = struct.unpack(layout, answer)[0]
    return value


def device_size(fd: int) -> int:
    """Bytes of the block device."""
    return _ask(fd, BLKGETSIZE64, "=Q")


def logical_sector_size(fd: int) -> int:
    """The smallest unit (bytes) the device reads and writes."""
    return _ask(fd, BLKSSZGET, "=i")


def physical_sector_size(fd: int) -> int:
    """The unit (bytes) the device stores; a smaller write makes it read first."""
    return _ask(fd, BLKPBSZGET, "=I")


def is_read_only(fd: int) -> bool:
    """Whether the device is write-protected."""
    return _ask(fd, BLKROGET, "=i") != 0


def reread_partitions(fd: int) -> bool:
    """Have the kernel read the partition table again; False where it cannot (in use, or not a whole disk)."""
    try:
        fcntl.ioctl(fd, BLKRRPART, 0)
    except OSError:
        return False
    return True


def drop_buffers(fd: int) -> None:
    """Let the page cache forget all of a device, as far as this user may ask for that (BLKFLSBUF)."""
    with contextlib.suppress(OSError):
        fcntl.ioctl(fd, BLKFLSBUF, 0)


def loop_info(fd: int) -> LoopInfo64:
    """What the loop device stands on.  OSError where it is none, or stands on nothing."""
    return LoopInfo64.unpack(fcntl.ioctl(fd, LOOP_GET_STATUS64, bytes(LoopInfo64.SIZE)))


# ---------------------------------------------------------------------- zeroing, renaming, times of birth

_KEEP_SIZE: Final = 0x01
_PUNCH_HOLE: Final = 0x02
_ZERO_RANGE: Final = 0x10
_RENAME_NOREPLACE: Final = 1
_AT_FDCWD: Final = -100
_STATX_BTIME: Final = 0x800

_UNSUPPORTED: Final = frozenset({errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL, errno.ENOTTY, errno.ENODEV})


@cache
def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None, use_errno=True)


@cache
def _fallocate_call() -> Callable[[int, int, int, int], int]:
    libc = _libc()
    # off_t is 32 bits wide in the plain symbol of 32-bit glibc; musl has the plain name only, and always 64 bits.
    call = libc.fallocate64 if hasattr(libc, "fallocate64") else libc.fallocate
    call.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64]
    call.restype = ctypes.c_int
    typed: Callable[[int, int, int, int], int] = call
    return typed


def _fallocate(fd: int, mode: int, offset: int, length: int) -> bool:
    if length == 0:
        return True
    while _fallocate_call()(fd, mode, offset, length) != 0:
        code = ctypes.get_errno()
        if code in _UNSUPPORTED:
            return False
        if code != errno.EINTR:
            raise OSError(code, os.strerror(code))
    return True


def punch_hole(fd: int, offset: int, length: int) -> bool:
    """Make the range of a file or block device a hole; its storage is given back."""
    return _fallocate(fd, _PUNCH_HOLE | _KEEP_SIZE, offset, length)


def zero_range(fd: int, offset: int, length: int) -> bool:
    """Make the range of a file or block device read as zeros; its storage may stay allocated."""
    return _fallocate(fd, _ZERO_RANGE | _KEEP_SIZE, offset, length)


def zero_out(fd: int, offset: int, length: int) -> bool:
    """Make the range of a block device read as zeros (BLKZEROOUT); on sectors."""
    try:
        fcntl.ioctl(fd, BLKZEROOUT, struct.pack("=QQ", offset, length))
    except OSError as error:
        if error.errno in _UNSUPPORTED:
            return False
        raise
    return True


def born(path: str | os.PathLike[str]) -> int | None:
    """When a file was made, nanoseconds since 1970; None where the system or the file system does not say (statx)."""
    libc = _libc()
    if not hasattr(libc, "statx"):
        return None
    found = ctypes.create_string_buffer(256)
    if libc.statx(_AT_FDCWD, os.fsencode(path), 0, _STATX_BTIME, found) != 0:
        return None
    mask, seconds, nanoseconds = struct.unpack_from("=I76xqI", found)
    return seconds * 10**9 + nanoseconds if mask & _STATX_BTIME else None


def rename_new(old: str, new: str, *, folder: int) -> None:
    """Rename in an open folder; FileExistsError where ``new`` exists, atomically where the file system can."""
    call = getattr(_libc(), "renameat2", None)
    if call is not None:
        if call(folder, os.fsencode(old), folder, os.fsencode(new), _RENAME_NOREPLACE) == 0:
            return
        code = ctypes.get_errno()
        if code not in _UNSUPPORTED:
            raise OSError(code, os.strerror(code), new)
    with contextlib.suppress(FileNotFoundError):
        os.stat(new, dir_fd=folder, follow_symlinks=False)
        raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), new)
    os.rename(old, new, src_dir_fd=folder, dst_dir_fd=folder)


# ---------------------------------------------------------------------- locks and file systems

_FLOCK: Final = "@hhqqi0q"  # struct flock: l_type, l_whence, l_start, l_len, l_pid


def lock_byte(fd: int, offset: int, kind: int) -> bool:
    """Set the lock of an open file description on one byte: F_RDLCK, F_WRLCK or F_UNLCK; never waits.

    False where another open file description holds a lock that excludes it.  OSError where the kernel or the file
    system has no such locks.  It is released with the last descriptor of the description.
    """
    try:
        fcntl.fcntl(fd, fcntl.F_OFD_SETLK, struct.pack(_FLOCK, kind, os.SEEK_SET, offset, 1, 0))
    except OSError as error:
        if error.errno in (errno.EAGAIN, errno.EACCES):
            return False
        raise
    return True


def is_locked(fd: int, offset: int, length: int, *, shared: bool) -> bool:
    """Whether another open file description, or process, holds a lock on the range that would exclude ours.

    ``shared``: ours would be a shared one, which only a writer's excludes.  ``length`` 0: to the end.  Nothing is
    locked; False where there are no such locks.
    """
    wanted = fcntl.F_RDLCK if shared else fcntl.F_WRLCK
    try:
        answer = fcntl.fcntl(fd, fcntl.F_OFD_GETLK, struct.pack(_FLOCK, wanted, os.SEEK_SET, offset, length, 0))
    except OSError:
        return False
    kind: int = struct.unpack(_FLOCK, answer)[0]
    return kind != fcntl.F_UNLCK


def flock_holders(fd: int) -> list[int]:
    """The processes that have an flock on the open file, in the order of /proc/locks, which wait for none.

    Raises OSError where there is no such table.
    """
    status = os.fstat(fd)
    inode = f"{os.major(status.st_dev):02x}:{os.minor(status.st_dev):02x}:{status.st_ino}"
    with open("/proc/locks", encoding="ascii") as table:
        rows = [line.split() for line in table]
    return [int(row[4]) for row in rows if "->" not in row and "FLOCK" in row and inode in row]


def process_name(pid: int) -> str | None:
    """What a process is called; None where it is not there any more."""
    try:
        with open(f"/proc/{pid}/comm", encoding="utf-8", errors="replace") as name:
            return name.read().strip()
    except OSError:
        return None


def file_system_type(where: int | str | os.PathLike[str]) -> int:
    """The magic number of the file system that an open file or a path is on (statfs, ``f_type``)."""
    libc = _libc()
    answer = ctypes.create_string_buffer(512)  # larger than struct statfs is anywhere
    failed = libc.fstatfs(where, answer) if isinstance(where, int) else libc.statfs(os.fsencode(where), answer)
    if failed:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
    word = ctypes.c_uint32 if os.uname().machine.startswith("s390") else ctypes.c_ulong  # its first field
    return word.from_buffer(answer).value & 0xFFFFFFFF


# ---------------------------------------------------------------------- what storage is, and writing back to it

# statfs(2), linux/magic.h: file systems of this machine's own disks and memory.  A call on any other may wait for
# another machine, or for another process.
_LOCAL: Final = frozenset(
    {
        0xEF53,  # ext2, ext3, ext4
        0x58465342,  # XFS
        0x9123683E,  # btrfs
        0xCA451A4E,  # bcachefs
        0xF2F52010,  # F2FS
        0x2FC12FC1,  # ZFS
        0x4D44,  # FAT
        0x2011BAB0,  # exFAT
        0x5346544E,  # NTFS
        0x7366746E,  # NTFS3
        0x3153464A,  # JFS
        0x52654973,  # ReiserFS
        0x3434,  # NILFS2
        0x482B,  # HFS+
        0x9660,  # ISO 9660
        0x15013346,  # UDF
        0x73717368,  # SquashFS
        0xE0F5E1E2,  # EROFS
        0x01021994,  # tmpfs
        0x858458F6,  # ramfs
        0x794C7630,  # overlayfs
    }
)

_WAIT_BEFORE: Final = 1  # SYNC_FILE_RANGE_*
_START: Final = 2
_WAIT_AFTER: Final = 4


def is_local(fd: int) -> bool:
    """Whether an open file lies on a file system that is known to be this machine's own."""
    return file_system_type(fd) in _LOCAL


def write_back(fd: int, offset: int, length: int, *, wait: bool) -> bool:
    """Have the kernel store a range of a file now, and ``wait`` until it is; this is not yet durable.

    False where that cannot be asked for.  An OSError is one of storing, and no later call tells it again.
    """
    call = getattr(_libc(), "sync_file_range", None)
    if call is None:
        return False
    flags = _WAIT_BEFORE | _START | _WAIT_AFTER if wait else _START
    if call(fd, ctypes.c_int64(offset), ctypes.c_int64(length), ctypes.c_uint(flags)) == 0:
        return True
    code = ctypes.get_errno()
    if code in _UNSUPPORTED or code == errno.ESPIPE:
        return False
    raise OSError(code, os.strerror(code))


# ---------------------------------------------------------------------- holes, cache, memory

MAX_RUNS: Final = 4 << 20  # 64 MiB of run list; a more fragmented file counts as data from there on


# Where SEEK_DATA looks into the page cache: ext4, XFS, tmpfs.  On others what is not stored yet may count as a hole,
# as it did on ZFS (openzfs/zfs#15526); an overlay does not tell what it is over.
_EXACT: Final = frozenset({0xEF53, 0x58465342, 0x01021994})


def settle_holes(fd: int) -> None:
    """Have what was written to a file stored, where its holes would otherwise not be those of its content."""
    with contextlib.suppress(OSError):
        if file_system_type(fd) not in _EXACT:
            os.fdatasync(fd)


def data_runs(fd: int, offset: int, end: int) -> tuple[Offsets, Offsets]:
    """Starts and ends of what is stored of the range; the rest is holes.

    One pass, two calls a run; ``settle_holes`` comes first, once for an open file.  Where the file system knows
    nothing of holes, and behind ``MAX_RUNS`` runs, all is data.  Threads may share ``fd``: it moves the cursor of
    the descriptor, which nothing here reads.
    """
    import numpy as np

    starts, ends = array("q"), array("q")
    at = offset
    try:
        while at < end:
            start = os.lseek(fd, at, os.SEEK_DATA)
            if start >= end:
                break
            at = end if len(starts) == MAX_RUNS - 1 else min(os.lseek(fd, start, os.SEEK_HOLE), end)
            if at <= start:  # a file system that contradicts itself must not make this a loop without end
                at = end
            starts.append(start)
            ends.append(at)
    except OSError as error:
        if error.errno != errno.ENXIO:  # ENXIO: no data from here on
            return np.array([offset], np.int64), np.array([end], np.int64)
    return np.array(starts, np.int64), np.array(ends, np.int64)


def next_data(fd: int, offset: int) -> int:
    """Where the next stored byte at or behind ``offset`` may be; the size of the file where only a hole follows.

    ``offset`` itself where the file system knows nothing of holes.  Moves the cursor, which nothing here reads.
    """
    try:
        return os.lseek(fd, offset, os.SEEK_DATA)
    except OSError as error:
        return os.fstat(fd).st_size if error.errno == errno.ENXIO else offset


def allow_open_files(most: int) -> None:
    """Have this process open up to ``most`` files at once, as far as it may; most systems begin with 1024."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = most if hard == resource.RLIM_INFINITY else min(hard, most)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        with contextlib.suppress(OSError, ValueError):  # it was allowed, and then it goes as it is
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def drop_cache(fd: int, offset: int, length: int) -> None:
    """Let the page cache forget the range where it is clean; ``length`` 0 means to the end."""
    with contextlib.suppress(OSError):  # advice
        os.posix_fadvise(fd, offset, length, os.POSIX_FADV_DONTNEED)


def aligned_buffer(size: int) -> memoryview:
    """``size`` zeroed bytes that start on a page, fit for O_DIRECT; freed with the last view of them."""
    return memoryview(mmap.mmap(-1, max(size, 1), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS))[:size]
