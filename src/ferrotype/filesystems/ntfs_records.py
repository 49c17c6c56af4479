"""The structures NTFS is made of: boot sector, file records, attributes, run lists, index nodes, log restart pages.

    file record      0x00 "FILE" | update sequence array | header ... | first attribute at first_attribute_offset
                          | attribute | attribute | ... | 0xFFFFFFFF            up to first_free_byte
    attribute        0x00 header, 16 bytes | resident: 8 bytes, value        -> the bytes themselves
                                           | non-resident: 48 bytes, runs    -> clusters, and their sizes
    run list         (F << 4 | V) | V bytes: clusters | F bytes: signed distance from the last run's first cluster
                     F = 0: nothing is stored (sparse)         a zero byte ends the list
    fix-ups          the last two bytes of every 512 are replaced by one number when written; the array at
                     update_sequence_array_offset holds that number and then the bytes that were there

Microsoft, "Master File Table" (NTFS developer notes: MULTI_SECTOR_HEADER, FILE_RECORD_SEGMENT_HEADER,
ATTRIBUTE_RECORD_HEADER, ATTRIBUTE_LIST_ENTRY, FILE_NAME), whose field names are used here; for what that leaves out:
R. Russon, Y. Fledel, "NTFS Documentation" (Linux-NTFS project: Files, Attributes, Concepts).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Final

from ferrotype.errors import InvalidImage
from ferrotype.records import Record, b4, b8, record, s8, s16, s64, u8, u16, u32, u64

STANDARD_STRIDE: Final = 512  # bytes protected by one fix-up, whatever the sector size
SEGMENT: Final = (1 << 48) - 1  # the record number in a file reference; the upper 16 bits are its sequence number

# attribute type codes ("NTFS Documentation", Attributes)
ATTRIBUTE_LIST: Final = 0x20
FILE_NAME: Final = 0x30
VOLUME_NAME: Final = 0x60
VOLUME_INFORMATION: Final = 0x70
DATA: Final = 0x80
INDEX_ROOT: Final = 0x90
INDEX_ALLOCATION: Final = 0xA0
BITMAP: Final = 0xB0
END: Final = 0xFFFFFFFF

IN_USE: Final = 0x0001  # flags of a file record
DIRECTORY: Final = 0x0002
UNREADABLE: Final = 0x4000 | 0x00FF  # attribute flags: encrypted, or compressed by any method


@record(endian="<", size=512)
class BootSector(Record):
    """The first sector ("NTFS Documentation", Files, $Boot)."""

    jump: Annotated[bytes, "3s"]
    oem_id: b8
    bytes_per_sector: u16
    sectors_per_cluster: u8  # above 128: 2 ** (256 - n)
    unused: Annotated[bytes, "26s"]
    total_sectors: u64  # the backup boot sector is not among them
    mft_lcn: u64
    mft2_lcn: u64
    clusters_per_file_record_segment: s8  # below 0: 2 ** -n bytes
    unused_2: Annotated[bytes, "3s"]
    clusters_per_index_buffer: s8
    unused_3: Annotated[bytes, "3s"]
    serial_number: u64
    checksum: u32
    bootstrap: Annotated[bytes, "426s"]
    end_mark: u16


@record(endian="<", size=42)
class FileRecordSegmentHeader(Record):
    """Microsoft: FILE_RECORD_SEGMENT_HEADER."""

    signature: b4
    update_sequence_array_offset: u16
    update_sequence_array_size: u16
    log_sequence_number: u64
    sequence_number: u16
    reference_count: u16
    first_attribute_offset: u16
    flags: u16
    first_free_byte: u32
    bytes_available: u32
    base_file_record_segment: u64
    next_attribute_instance: u16


@record(endian="<", size=16)
class AttributeRecordHeader(Record):
    """Microsoft: ATTRIBUTE_RECORD_HEADER, what both forms share."""

    type_code: u32
    record_length: u32
    form_code: u8  # 0: resident
    name_length: u8  # in UTF-16 units
    name_offset: u16
    flags: u16
    instance: u16


@record(endian="<", size=8)
class ResidentForm(Record):
    """Microsoft: ATTRIBUTE_RECORD_HEADER.Form.Resident."""

    value_length: u32
    value_offset: u16
    reserved: u16


@record(endian="<", size=48)
class NonresidentForm(Record):
    """Microsoft: ATTRIBUTE_RECORD_HEADER.Form.Nonresident.  The sizes count only where lowest_vcn is 0."""

    lowest_vcn: s64
    highest_vcn: s64
    mapping_pairs_offset: u16
    compression_unit: u8
    reserved: Annotated[bytes, "5s"]
    allocated_length: s64
    file_size: s64
    valid_data_length: s64


@record(endian="<", size=26)
class AttributeListEntry(Record):
    """Microsoft: ATTRIBUTE_LIST_ENTRY."""

    type_code: u32
    record_length: u16
    name_length: u8
    name_offset: u8
    lowest_vcn: s64
    segment_reference: u64
    instance: u16


@record(endian="<", size=12)
class VolumeInformation(Record):
    """ "NTFS Documentation", Attributes, $VOLUME_INFORMATION."""

    reserved: u64
    major_version: u8
    minor_version: u8
    flags: u16


@record(endian="<", size=16)
class IndexRoot(Record):
    """ "NTFS Documentation", Attributes, $INDEX_ROOT; an IndexHeader follows."""

    attribute_type: u32
    collation_rule: u32
    bytes_per_index_buffer: u32
    blocks_per_index_buffer: u8
    reserved: Annotated[bytes, "3s"]


@record(endian="<", size=24)
class IndexBuffer(Record):
    """ "NTFS Documentation", Concepts, index record; an IndexHeader follows."""

    signature: b4
    update_sequence_array_offset: u16
    update_sequence_array_size: u16
    log_sequence_number: u64
    this_block: u64


@record(endian="<", size=16)
class IndexHeader(Record):
    """ "NTFS Documentation", Concepts, index header; offsets count from its own start."""

    first_index_entry: u32
    first_free_byte: u32
    bytes_available: u32
    flags: u8
    reserved: Annotated[bytes, "3s"]


@record(endian="<", size=16)
class IndexEntry(Record):
    """ "NTFS Documentation", Concepts, index entry; a FileName follows unless it is the end of its node."""

    file_reference: u64
    length: u16
    key_length: u16
    flags: u16  # 1: the last 8 bytes name a node of lower keys; 2: end of the node
    reserved: u16


@record(endian="<", size=66)
class FileName(Record):
    """Microsoft: FILE_NAME; the name follows in UTF-16."""

    parent_directory: u64
    reserved: Annotated[bytes, "56s"]
    file_name_length: u8
    flags: u8


@record(endian="<", size=30)
class RestartPageHeader(Record):
    """ "NTFS Documentation", Files, $LogFile: restart page."""

    signature: b4
    update_sequence_array_offset: u16
    update_sequence_array_size: u16
    chkdsk_lsn: u64
    system_page_size: u32
    log_page_size: u32
    restart_offset: u16
    minor_version: s16
    major_version: s16


@record(endian="<", size=48)
class RestartArea(Record):
    """ "NTFS Documentation", Files, $LogFile: restart area."""

    current_lsn: u64
    log_clients: u16
    client_free_list: u16
    client_in_use_list: u16  # 0xFFFF: nobody has the log open
    flags: u16
    seq_number_bits: u32
    restart_area_length: u16
    client_array_offset: u16
    file_size: u64
    last_lsn_data_length: u32
    record_header_length: u16
    log_page_data_offset: u16
    restart_open_log_count: u32
    reserved: u32


def utf16(data: bytes) -> str:
    """A name as stored; lone surrogates, which NTFS allows, stay what they are."""
    return data.decode("utf-16-le", "surrogatepass") if len(data) % 2 == 0 else ""


def fixed_up(raw: bytes, signature: bytes, what: str) -> bytes:
    """``raw`` with its fix-ups undone ("NTFS Documentation", Concepts, fixup).

    Raises InvalidImage where the signature is another, or a piece of 512 bytes was not written with the rest.
    """
    if len(raw) < STANDARD_STRIDE or raw[:4] != signature:
        raise InvalidImage(f"{what} does not begin with {signature.decode()}")
    at, count = int.from_bytes(raw[4:6], "little"), int.from_bytes(raw[6:8], "little")
    pieces = len(raw) // STANDARD_STRIDE
    if count != pieces + 1 or at % 2 or at < 8 or at + 2 * count > STANDARD_STRIDE - 2:
        raise InvalidImage(f"{what} has an impossible update sequence array", field="update_sequence_array")
    mark = raw[at : at + 2]
    fixed = bytearray(raw)
    for piece in range(pieces):
        end = (piece + 1) * STANDARD_STRIDE
        if raw[end - 2 : end] != mark:
            raise InvalidImage(f"{what} was only partly written")
        fixed[end - 2 : end] = raw[at + 2 + 2 * piece : at + 4 + 2 * piece]
    return bytes(fixed)


@dataclass(frozen=True, slots=True)
class Attribute:
    """One attribute of a file record: ``value`` if it is resident, else ``form`` and the run list in ``pairs``."""

    type_code: int
    name: str
    flags: int
    instance: int
    value: bytes | None
    form: NonresidentForm | None
    pairs: bytes

    @classmethod
    def parse(cls, body: bytes, what: str) -> Attribute:
        head = AttributeRecordHeader.unpack(body)
        name = body[head.name_offset : head.name_offset + 2 * head.name_length] if head.name_length else b""
        if len(name) != 2 * head.name_length:
            raise InvalidImage(f"{what}: the name of an attribute lies outside it", field="name_offset")
        value, form, pairs = None, None, b""
        if head.form_code == 0:
            resident = ResidentForm.unpack(body, head.SIZE)
            value = body[resident.value_offset : resident.value_offset + resident.value_length]
            if len(value) != resident.value_length:
                raise InvalidImage(f"{what}: the value of an attribute lies outside it", field="value_offset")
        elif head.form_code == 1:
            form = NonresidentForm.unpack(body, head.SIZE)
            pairs = body[form.mapping_pairs_offset :]
            if form.mapping_pairs_offset < head.SIZE + form.SIZE or not pairs:
                raise InvalidImage(f"{what}: a run list lies outside its attribute", field="mapping_pairs_offset")
        else:
            raise InvalidImage(f"{what}: an attribute is neither resident nor not", field="form_code")
        return cls(head.type_code, utf16(name), head.flags, head.instance, value, form, pairs)


@dataclass(frozen=True, slots=True)
class FileRecord:
    """A file record whose every attribute is inside it."""

    number: int
    header: FileRecordSegmentHeader
    attributes: tuple[Attribute, ...]

    @classmethod
    def parse(cls, raw: bytes, number: int) -> FileRecord:
        what = f"record {number} of $MFT"
        data = fixed_up(raw, b"FILE", what)
        header = FileRecordSegmentHeader.unpack(data)
        if not header.flags & IN_USE:
            raise InvalidImage(f"{what} is not in use")
        if header.first_free_byte > len(data) or header.first_attribute_offset < header.SIZE:
            raise InvalidImage(f"{what} is longer than its space", field="first_free_byte")
        return cls(number, header, tuple(_attributes(data, header, what)))

    def find(self, type_code: int, name: str) -> Attribute | None:
        """The first attribute of that type and name in this record."""
        return next((a for a in self.attributes if a.type_code == type_code and a.name == name), None)


def _attributes(data: bytes, header: FileRecordSegmentHeader, what: str) -> Iterator[Attribute]:
    at, end = header.first_attribute_offset, header.first_free_byte
    while at + 4 <= end:
        if int.from_bytes(data[at : at + 4], "little") == END:
            return
        length = AttributeRecordHeader.unpack(data, at).record_length
        if length < AttributeRecordHeader.SIZE + ResidentForm.SIZE or length % 8 or at + length > end:
            raise InvalidImage(f"{what}: an attribute has an impossible length", field="record_length")
        yield Attribute.parse(data[at : at + length], what)
        at += length
    raise InvalidImage(f"{what}: its attributes have no end")


def mapping_pairs(pairs: bytes, clusters: int, what: str) -> Iterator[tuple[int, int]]:
    """The runs of a run list: (clusters, first cluster), the latter -1 where nothing is stored."""
    at = lcn = 0
    while at < len(pairs) and pairs[at]:
        middle = at + 1 + (pairs[at] & 15)
        end = middle + (pairs[at] >> 4)
        length = int.from_bytes(pairs[at + 1 : middle], "little", signed=True)
        if middle - at > 9 or end - middle > 8 or end > len(pairs) or length <= 0:
            raise InvalidImage(f"{what}: its run list is damaged")
        if end == middle:
            yield length, -1
        else:
            lcn += int.from_bytes(pairs[middle:end], "little", signed=True)
            if lcn < 0 or lcn + length > clusters:
                raise InvalidImage(f"{what}: a run lies outside the volume ({length} clusters at {lcn})")
            yield length, lcn
        at = end
