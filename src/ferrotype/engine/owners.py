"""Who owns a stretch of a disk: whether a file system found there may give its free space away.

A file system may stand where it does because it owns the bytes, or because nobody erased it when something else took
them.  Its free space is then somebody's data.  So it is believed only where nothing else claims the same bytes:

    the whole disk       a RAID member, an LVM or ZFS device, a file system without a table, though there is a table
    the table's entry    its type says that a container stands there: LDM, LVM, RAID, LUKS, VMFS, ZFS ...
    another table        a hybrid MBR whose entries are not those of the GPT; a table of the partition's own, as the
                         disk of a virtual machine has it; a label of Sun, BSD, Solaris ...
    its own length       a file system that is longer than its partition

In doubt everything is kept: that costs room, and the other mistake costs a disk.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from ferrotype.block import Source
from ferrotype.errors import DeviceError, FormatError
from ferrotype.filesystems.registry import standing
from ferrotype.volumes import Partition, Table
from ferrotype.volumes.labels import labels
from ferrotype.volumes.scan import scan

__all__ = ["container_type", "doubt", "owner_of_disk", "table_of"]

_MBR: Final[dict[str, str]] = {
    "15": "hidden logical partitions",
    "1f": "hidden logical partitions",
    "39": "Plan 9",
    "41": "a boot loader",
    "42": "a Windows dynamic disk",
    "63": "System V slices",
    "64": "NetWare volumes",
    "65": "NetWare volumes",
    "69": "NetWare volumes",
    "81": "Minix and its own partitions",
    "8e": "LVM",
    "91": "hidden logical partitions",
    "9b": "hidden logical partitions",
    "9f": "BSD/OS",
    "a5": "a BSD disk label",
    "a6": "a BSD disk label",
    "a9": "a BSD disk label",
    "b7": "BSD/OS",
    "bf": "Solaris slices or ZFS",
    "da": "data that are no file system",
    "e8": "LUKS",
    "fb": "VMFS",
    "fc": "what VMware swaps out or dumps",
    "fd": "Linux RAID",
    "fe": "LVM",
}
"""Types of MBR entries that say "container", as the list of partition identifiers of Andries Brouwer has them."""

_GPT: Final[dict[str, str]] = {
    "AF9B60A0-1431-4F62-BC68-3311714A69AD": "a Windows dynamic disk",
    "5808C8AA-7E8F-42E0-85D2-E1E90434CFB3": "the database of a Windows dynamic disk",
    "E75CAF8F-F680-4CEE-AFA3-B001E56EFC2D": "Storage Spaces",
    "558D43C5-A1AC-43C0-AAC8-D1472B2923D1": "Storage Replica",
    "E6D6D379-F507-44C2-A23C-238F2A3DF928": "LVM",
    "A19D880F-05FC-4D3B-A006-743F0F84911E": "Linux RAID",
    "CA7D7CCB-63ED-4C53-861C-1742536059CC": "LUKS",
    "7FFEC5C9-2D00-49B7-8941-3EA10A5586B7": "plain dm-crypt",
    "8C8F8EFF-AC95-4770-814A-21994F2DBC8F": "VeraCrypt",
    "AA31E02A-400F-11DB-9590-000C2911D1B8": "VMFS",
    "9D275380-40AD-11DB-BF97-000C2911D1B8": "VMware's reserve",
    "381CFCCC-7288-11E0-92EE-000C2911D0B2": "vSAN",
    "6A898CC3-1DD2-11B2-99A6-080020736631": "ZFS",
    "6A85CF4D-1DD2-11B2-99A6-080020736631": "Solaris",
    "6A8B642B-1DD2-11B2-99A6-080020736631": "Solaris",
    "6A8EF2E9-1DD2-11B2-99A6-080020736631": "Solaris",
    "6A90BA39-1DD2-11B2-99A6-080020736631": "Solaris",
    "516E7CBA-6ECF-11D6-8FF8-00022D09712B": "ZFS",
    "516E7CB8-6ECF-11D6-8FF8-00022D09712B": "Vinum",
    "516E7CB4-6ECF-11D6-8FF8-00022D09712B": "a BSD disk label",
    "516E7CB6-6ECF-11D6-8FF8-00022D09712B": "UFS",
    "824CC7A0-36A8-11E3-890A-952519AD3F61": "an OpenBSD disk label",
    "49F48D5A-B10E-11DC-B99B-0019D1879648": "UFS",
    "49F48D82-B10E-11DC-B99B-0019D1879648": "a NetBSD log-structured file system",
    "9D087404-1CA5-11DC-8817-01301BB8A9F5": "a DragonFly disk label",
    "3D48CE54-1D16-11DC-8696-01301BB8A9F5": "a DragonFly disk label",
    "9D94CE7C-1CA5-11DC-8817-01301BB8A9F5": "UFS",
    "9DD4478F-1CA5-11DC-8817-01301BB8A9F5": "Vinum",
    "DBD5211B-1CA5-11DC-8817-01301BB8A9F5": "a DragonFly concatenated disk",
    "61DC63AC-6E38-11DC-8513-01301BB8A9F5": "HAMMER",
    "5CBB9AD1-862D-11DC-A94D-01301BB8A9F5": "HAMMER2",
    "85D5E45A-237C-11E1-B4B3-E89A8F7FC3A7": "a MidnightBSD disk label",
    "0394EF8B-237E-11E1-B4B3-E89A8F7FC3A7": "UFS",
    "85D5E45C-237C-11E1-B4B3-E89A8F7FC3A7": "Vinum",
    "85D5E45D-237C-11E1-B4B3-E89A8F7FC3A7": "ZFS",
    "55465300-0000-11AA-AA11-00306543ECAC": "UFS",
    "21686148-6449-6E6F-744E-656564454649": "a boot loader",
    "9E1A2D38-C612-4316-AA26-8B49521E5A8B": "a boot loader",
    "FE3A2A5D-4F32-41A7-B725-ACCC3285A309": "a kernel of ChromeOS",
    "49F48DAA-B10E-11DC-B99B-0019D1879648": "NetBSD RAID",
    "2DB519C4-B10F-11DC-B99B-0019D1879648": "a NetBSD concatenated disk",
    "2DB519EC-B10F-11DC-B99B-0019D1879648": "a NetBSD encrypted disk",
    "52414944-0000-11AA-AA11-00306543ECAC": "Apple RAID",
    "52414944-5F4F-11AA-AA11-00306543ECAC": "Apple RAID",
    "53746F72-6167-11AA-AA11-00306543ECAC": "Core Storage",
    "7C3457EF-0000-11AA-AA11-00306543ECAC": "an APFS container",
    "4FBD7E29-9D25-41B8-AFD0-062C0CEFF05D": "Ceph",
    "4FBD7E29-9D25-41B8-AFD0-5EC00CEFF05D": "Ceph",
    "45B0969E-9B03-4F30-B4C6-B4B80CEFF106": "Ceph",
    "45B0969E-9B03-4F30-B4C6-5EC00CEFF106": "Ceph",
    "CAFECAFE-9B03-4F30-B4C6-B4B80CEFF106": "Ceph",
    "30CD0809-C2B2-499C-8879-2D6B78529876": "Ceph",
    "5CE17FCE-4087-4169-B7FF-056CC58473F9": "Ceph",
    "37AFFC90-EF7D-4E96-91C3-2D7AE055B174": "GPFS",
}
"""The same for GPT, from the documents of each system and UAPI's Discoverable Partitions Specification."""


def owner_of_disk(source: Source, table: Table) -> str | None:
    """What claims a whole disk although it has a partition table, in words; None where nothing does."""
    whole = standing(source)
    if whole:
        return f"the whole disk has the signature of {' and '.join(whole)} besides its partition table"
    if others := labels(source):
        return f"the disk has a partition table of {' and '.join(others)} besides the one that is read"
    for partition in table.partitions:
        if table.kind == "mbr" and partition.type == "42":
            return f"partition {partition.index} says that this is a Windows dynamic disk"
    return None


def container_type(table: Table | None, partition: Partition) -> str | None:
    """What kind of container a partition holds by its type, in words; None for all other types."""
    if table is None:
        return None
    return {"mbr": _MBR, "gpt": _GPT}.get(table.kind, {}).get(partition.type)


def doubt(table: Table | None, partition: Partition, view: Source, size: int) -> str | None:
    """Why a file system of ``size`` bytes may not give away space of its partition, in words; None where it may.

    ``view`` is the partition itself, of which the places where tables stand are read.
    """
    if (container := container_type(table, partition)) is not None:
        return f"its type says that it holds {container}, so the file system in it may be a leftover"
    if size > partition.size:
        return f"the file system has {size} bytes and its partition {partition.size}"
    if table is not None and any(_crossed(table, partition)):
        return "the hybrid MBR has an entry there that is none of the GPT's, so the file system may be a leftover"
    if (inner := table_of(view)) is not None:
        return f"{inner} stands there as well, so the file system may be a leftover"
    return None


def table_of(view: Source) -> str | None:
    """The partition table that a partition has of its own, as somebody's disk, in words; None where there is none."""
    if others := labels(view):
        return f"a partition table of {' and '.join(others)}"
    try:
        table = scan(view)
    except FormatError:
        return "a damaged partition table"
    except DeviceError:
        return None  # what cannot be read is told by those who copy it
    if table is None or not (table.partitions or table.warnings):
        return None
    return f"a partition table ({table.kind.upper()})"


def _crossed(table: Table, partition: Partition) -> Iterator[bool]:
    return (start < partition.end and partition.start < start + length for start, length in table.rivals)
