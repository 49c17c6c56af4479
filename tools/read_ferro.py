#!/usr/bin/env python3
"""Read ferrotype images (*.ferro) without ferrotype: list snapshots, extract disks.

    read_ferro.py laptop.ferro                          the snapshots and their disks
    read_ferro.py laptop.ferro latest out.img           the only disk of the newest snapshot, as a raw image
    read_ferro.py laptop.ferro 3f9a52 out.img sda       the disk sda of the snapshot whose id starts like that

Written from the specification, docs/format.md (whose parts stand in brackets), and sharing no code with the program
that writes images, so that they outlive it.  Every byte is proven by its keyed hash on the way out.  Python 3.10 and
    pip install blake3 xxhash msgpack zstandard cryptography
An encrypted image wants --password-file, --key-file or the passphrase in FERROTYPE_PASSWORD, or asks for it.
"""

import argparse
import base64
import bisect
import datetime as dt
import getpass
import hmac
import json
import os
import re
import struct
import sys

import blake3
import msgpack
import xxhash
import zstandard
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.kdf.argon2 import Argon2id

BLOCK, RECORDS_AT, RECORD_HEADER = 4096, 12288, 128
OBJECT, CATALOG, FILLER, OPTIONAL = 1, 2, 3, 0x80
ZERO_ID, PAGE_IDS = bytes(32), 1024
EPOCH = dt.datetime.fromisoformat("1970-01-01T00:00:00+00:00")
LEAST_COSTS = {1: (64, 64), 2: (1 << 14, 1 << 16)}  # version of a key slot: KiB of memory, and KiB times passes


class Damaged(Exception):
    """What was read is not what was written."""


def need(condition, what):
    if not condition:
        raise Damaged(what)


def say(what):
    print(f"read_ferro: {what}", file=sys.stderr)


def check(data):  # XXH3-128, canonical form (1)
    return xxhash.xxh3_128(data).digest()


def padded(length):  # bytes a record with such a payload takes up
    return -(-(RECORD_HEADER + length) // BLOCK) * BLOCK


class Container:
    """Named objects in one file or several (2)."""

    def __init__(self, path):
        self.files = [open(path, "rb")]
        self.objects = {}  # name -> (volume, offset, length, sequence)
        head = self.read(0, 0, 80)
        need(len(head) == 80 and head[:8] == b"\x89FERRO\r\n", "this is no ferrotype image")
        version, flags, volume = struct.unpack_from("<HHI", head, 8)
        need(version == 1 and not flags, "a version of the image file that this program does not know")
        need(head[64:80] == check(head[:64]), "the volume header is damaged; `ferrotype salvage` may help")
        need(volume == 0, "this is not the first volume of a split image")
        self.uuid = head[16:32]
        if struct.unpack_from("<Q", head, 32)[0]:
            while os.path.exists(name := f"{path}.{len(self.files):03d}"):
                self.files.append(open(name, "rb"))
                head = self.read(len(self.files) - 1, 0, 80)
                number = struct.unpack_from("<I", head, 12)[0]
                need(head[16:32] == self.uuid and number == len(self.files) - 1, name + " belongs to another image")
        self.sizes = [os.fstat(file.fileno()).st_size for file in self.files]
        self.load()

    def read(self, volume, offset, length):
        return os.pread(self.files[volume].fileno(), length, offset)

    def header(self, volume, offset):
        """(kind, sequence, length, payload check, name) of a whole record header (2.2), or None."""
        data = self.read(volume, offset, RECORD_HEADER)
        if data[:8] != b"FERROREC" or data[16:32] != self.uuid or data[112:] != check(data[:112]):
            return None
        kind, sequence, length = struct.unpack("<8xH22xQQ80x", data)
        return kind, sequence, length, data[48:64], data[64:112].rstrip(b"\0").decode("ascii", "replace")

    def chain(self, volume, offset, sequence):
        """Objects of the catalog there and of those it adds to (2.3), and where its record ends."""
        steps, wanted, end = [], [volume, offset, sequence], None
        while wanted is not None:
            volume, offset, sequence = wanted
            need(volume < len(self.files), "a volume of the image is missing")
            header = self.header(volume, offset)
            need(header is not None and header[:2] == (CATALOG, sequence), "a catalog is missing")
            need(offset + header[2] <= self.sizes[volume], "a catalog is cut short")
            payload = self.read(volume, offset + RECORD_HEADER, header[2])
            need(check(payload) == header[3], "a catalog is damaged")
            previous, added, removed = msgpack.unpackb(payload)[:3]
            need(previous is None or previous[2] < sequence, "catalogs in a circle")
            steps.append((added, removed))
            end = end or (volume, offset + padded(header[2]))
            wanted, objects = previous, {}
        for added, removed in reversed(steps):
            for name in removed:
                objects.pop(name, None)
            for name, *place in (entry[:5] for entry in added):
                need(place[1] + RECORD_HEADER + place[2] <= self.sizes[place[0]], "the image is cut short")
                objects[name] = tuple(place)
        return objects, end

    def load(self):
        """Opening (2.5)."""
        newest, start, blocks = -1, (0, RECORDS_AT), (self.read(0, at, 80) for at in (4096, 8192))
        whole = [b for b in blocks if b[:8] == b"FERROANC" and b[16:32] == self.uuid and b[64:] == check(b[:64])]
        anchors = sorted((struct.unpack("<8xQ16xQQI28x", block) for block in whole), reverse=True)
        for _, sequence, offset, volume in anchors:
            try:
                if newest < 0:
                    (self.objects, start), newest = self.chain(volume, offset, sequence), sequence
            except Damaged as error:
                say(f"{error}; looking further")
        found = list(self.scan(*start))
        catalogs = [f for f in found if f[0] == CATALOG]
        for _, sequence, _, volume, offset, _ in sorted(catalogs, key=lambda item: -item[1]):
            try:
                if sequence > newest:
                    self.objects, newest = self.chain(volume, offset, sequence)[0], sequence
            except Damaged as error:
                say(f"{error}; looking further")
        durable = max([newest, *(a[1] for a in anchors), *(c[1] for c in catalogs)])
        for kind, sequence, length, volume, offset, name in sorted(found, key=lambda item: item[1]):
            if kind == OBJECT and sequence > newest and (newest < 0 or sequence <= durable):
                self.objects[name] = (volume, offset, length, sequence)
        if newest < durable:  # an older state: what was deleted since may have been overwritten
            for name, (volume, offset, length, sequence) in list(self.objects.items()):
                header = self.header(volume, offset)
                if header is None or (header[4], header[2], header[1]) != (name, length, sequence):
                    del self.objects[name]

    def scan(self, first, offset):
        """(kind, sequence, length, volume, offset, name) of the whole records from a place to the end."""
        for volume in range(first, len(self.files)):
            while offset < self.sizes[volume]:
                header = self.header(volume, offset)
                if header is None:
                    offset += BLOCK
                    continue
                kind, sequence, length, payload_check, name = header
                need(kind <= FILLER or kind >= OPTIONAL, "a kind of record that this program does not know")
                end = offset + padded(length)
                inside = offset + RECORD_HEADER + length <= self.sizes[volume]
                if inside and (kind == FILLER or self.proven(volume, offset, length, payload_check)):
                    yield kind, sequence, length, volume, offset, name
                    offset = end
                else:
                    offset = end if self.header(volume, end) else offset + BLOCK
            offset = RECORDS_AT

    def proven(self, volume, offset, length, payload_check):
        digest = xxhash.xxh3_128()
        for at in range(0, length, 1 << 22):
            digest.update(self.read(volume, offset + RECORD_HEADER + at, min(1 << 22, length - at)))
        return digest.digest() == payload_check

    def names(self, kind):
        return sorted(name for name in self.objects if name.startswith(kind + "/"))

    def get(self, name, offset=0, length=None):
        need(name in self.objects, name + " is missing")
        volume, at, size, _ = self.objects[name]
        length = size - offset if length is None else length
        need(offset >= 0 and length >= 0 and offset + length <= size, f"{name} is too short")
        data = self.read(volume, at + RECORD_HEADER + offset, length)
        need(len(data) == length, "the image ends inside " + name)
        return data


def decrypt(key, nonce, sealed, bound):
    try:
        return AESGCM(key).decrypt(nonce, sealed, bound)
    except (InvalidTag, ValueError):
        raise Damaged("a tag is wrong") from None


def unlock(slots, secret, kind, image):
    """The master key, from the first slot that the passphrase or key file opens (3.2)."""
    for name, slot in slots:
        try:
            if slot["kind"] == kind and name == "key/" + slot["id"]:
                return unlocked(slot, secret, image)
        except (Damaged, KeyError, TypeError, ValueError):
            continue
    raise Damaged(f"the {kind} opens none of the key slots")


def unlocked(slot, secret, image):
    version, cost = slot.get("version", 1), {"memory": 65536, "passes": 3, "lanes": 4, **slot.get("cost", {})}
    memory, passes, lanes = cost["memory"], cost["passes"], cost["lanes"]
    need(version in (1, 2) and len(cost) == 3, "a key slot of a newer version")
    need(passes > 0 and 0 < lanes <= 64 and 8 * lanes <= memory <= 1 << 18, "a key slot has impossible costs")
    least_memory, least_work = LEAST_COSTS[version]
    need(memory >= least_memory and least_work <= memory * passes <= 1 << 21, "a key slot has impossible costs")
    fields = [
        base64.b64decode(slot.get(name, ""), validate=True) for name in ("salt", "nonce", "locked", "commitment")
    ]
    need([len(field) for field in fields] == [16, 12, 48, 32 * (version - 1)], "a key slot is damaged")
    salt, nonce, locked, commitment = fields
    key = Argon2id(salt=salt, length=32, iterations=passes, lanes=lanes, memory_cost=memory).derive(secret)
    bound = f"ferrotype key slot v{version} {slot['id']} {memory} {passes} {lanes}"
    if version == 2:
        need(slot["image"] == image, "a key slot of another image")
        committed, key = (
            blake3.blake3(key, derive_key_context="ferrotype image v1 2026-11 key slot " + use).digest()
            for use in ("commitment", "encryption")
        )
        need(hmac.compare_digest(commitment, committed), "a key slot of another secret")
        bound += f" {image} {slot['kind']} {clock(slot)} {slot['label']}"
    return decrypt(key, nonce, locked, bound.encode())


class Image:
    """Snapshots of disks (3 to 8)."""

    def __init__(self, path, secret=None, kind="passphrase"):
        """``secret``: the bytes of the passphrase or key file, or a function that asks for them."""
        self.store = Container(path)
        config = json.loads(self.store.get("config"))
        need(config.get("version", 1) == 1 and not config.get("features"), "a newer version of the format")
        self.encrypted = config["encryption"] != "none"
        if self.encrypted:
            slots = [(name, json.loads(self.store.get(name))) for name in self.store.names("key")]
            master = unlock(slots, secret() if callable(secret) else secret, kind, config["id"])
        else:
            master = base64.b64decode(config["master"])
        contexts = ("chunk ids", "object names", "data")
        self.id_key, self.object_key, self.data_key = (
            blake3.blake3(master, derive_key_context="ferrotype image v1 2026-11 " + use).digest() for use in contexts
        )
        self.segments, self.tables = None, {}

    def object_id(self, kind, plain):
        return blake3.blake3(kind.encode() + b"\0" + plain, key=self.object_key).digest(length=16)

    def open(self, frame_id, frame):
        """The plaintext of a frame (4); whoever asks compares it with its id."""
        need(len(frame) >= 8, "a frame is cut short")
        codec, flags, reserved, length = struct.unpack_from("<BBHI", frame)
        need(codec <= 1 and not flags and not reserved and length <= 16 << 20, "a frame has a wrong head")
        payload = frame[8:]
        if self.encrypted:
            key = blake3.blake3(frame_id, key=self.data_key).digest()
            payload = decrypt(key, payload[:12], payload[12:], frame[:8])
        try:
            if codec == 1:
                need(zstandard.frame_content_size(payload) in (-1, length), "a frame has a wrong length")
                payload = zstandard.ZstdDecompressor().decompress(payload, max_output_size=length)
        except zstandard.ZstdError as error:
            raise Damaged(f"a frame cannot be decompressed: {error}") from None
        need(len(payload) == length, "a frame has a wrong length")
        return payload

    def load_index(self):
        """Entries of all whole segments (6); tables of the packs that none of them lists (5)."""
        self.segments = []  # (packs, entries of 44 bytes in order)
        for name in self.store.names("index"):
            try:
                self.segments.append(self.segment(name))
            except (Damaged, ValueError) as error:
                say(f"{name}: {error}; its packs' own tables are used")
        listed = {pack for packs, _ in self.segments for pack in packs}
        for pack in self.store.names("pack"):
            try:
                if pack not in listed:
                    self.read_table(pack)
            except (Damaged, ValueError) as error:
                say(f"{pack}: {error}")

    def segment(self, name):
        head = self.store.get(name, 0, 48)
        magic, version, count, directory_length, salt, spare = struct.unpack("<4sIQQ16sQ", head)
        need(magic == b"FIDX" and version == 1 and directory_length <= 1 << 30, "its header is wrong")
        segment_id, sealed = bytes.fromhex(name[6:]), self.store.get(name, 48, directory_length)
        plain, at, piece = b"", 0, 0
        while at < len(sealed):
            length = int.from_bytes(sealed[at : at + 4], "little")
            plain += self.open(segment_id + struct.pack("<I", piece), sealed[at + 4 : at + 4 + length])
            at, piece = at + 4 + length, piece + 1
        unsized = struct.pack("<4sIQQ16sQ", magic, version, count, 0, salt, spare)
        need(self.object_id("index", unsized + plain) == segment_id, "its directory does not match its name")
        packs, _, hashes, lengths = msgpack.unpackb(plain, max_array_len=1 << 31)[:4]
        need(all(pack in self.store.objects for pack in packs), "it lists packs that are not there")
        entries, at = [], 48 + directory_length
        for number, length in enumerate(lengths):
            page_hash = hashes[16 * number : 16 * number + 16]
            entries.append(self.open(page_hash, self.store.get(name, at, length)))
            need(self.object_id("index", entries[-1]) == page_hash, "a page is damaged")
            at += length
        need(sum(map(len, entries)) == 44 * count, "it has a wrong number of entries")
        return packs, b"".join(entries)

    def read_table(self, pack):
        magic, version, table_length, count, salt = struct.unpack("<4sIII16s", self.store.get(pack, 0, 32))
        need(magic == b"FPCK" and version == 1 and count <= 1 << 18, "its header is wrong")
        pack_id, at = bytes.fromhex(pack[5:]), 32 + table_length
        plain = self.open(pack_id, self.store.get(pack, 32, table_length))
        need(self.object_id("pack", salt + plain) == pack_id, "its table does not match its name")
        for chunk_id, length in struct.iter_unpack("<32sI", plain):
            self.tables[chunk_id] = (pack, at, length)
            at += length

    def find(self, chunk_id):  # (pack, offset, length)
        if self.segments is None:
            self.load_index()
        for packs, entries in self.segments:
            count = len(entries) // 44
            at = 44 * bisect.bisect_left(range(count), chunk_id[:8], key=lambda i: entries[44 * i : 44 * i + 8])
            while entries[at : at + 8] == chunk_id[:8]:
                if entries[at : at + 32] == chunk_id:
                    pack, offset, length = struct.unpack_from("<III", entries, at + 32)
                    return packs[pack], offset, length
                at += 44
        need(chunk_id in self.tables, "a chunk is missing")
        return self.tables[chunk_id]

    def chunk(self, chunk_id):  # its proven plaintext
        plain = self.open(chunk_id, self.store.get(*self.find(chunk_id)))
        need(blake3.blake3(plain, key=self.id_key).digest() == chunk_id, "a chunk's content does not match its id")
        return plain

    def snapshots(self):
        """Records of all whole snapshots, oldest first; ``id`` is filled in (8)."""
        found = []
        for name in self.store.names("snapshot"):
            try:
                plain = self.open(bytes.fromhex(name[9:]), self.store.get(name))
                need(self.object_id("snapshot", plain).hex() == name[9:], "its record does not match its name")
                record = json.loads(plain)
                need(record.get("version", 1) == 1, "its record is of a newer version")
                found.append({**record, "id": name[9:]})
            except (Damaged, ValueError) as error:
                say(f"{name}: {error}")
        return in_order(found)

    def cells(self, page_id, level, first, cells):
        """(cell, chunk id) of what is not zeros below a page (7)."""
        if page_id == ZERO_ID:
            return
        page, span = self.chunk(page_id), PAGE_IDS**level
        need(len(page) == 32 * PAGE_IDS, "a page of a chunk map has a wrong size")
        for slot in range(PAGE_IDS):
            at, child = first + slot * span, page[32 * slot : 32 * slot + 32]
            if child == ZERO_ID or at >= cells:
                continue
            if level:
                yield from self.cells(child, level - 1, at, cells)
            else:
                yield at, child

    def extract(self, disk, write):
        """Call ``write(offset, data)`` for everything of a disk that is not zeros, in the order of the disk."""
        size, at = disk["chunk_size"], 0
        for region in disk["regions"]:
            start, length = region["start"], region["length"]
            need(start == at and length > 0, "regions do not touch")
            count, level, at = -(-length // size), 0, start + length
            while PAGE_IDS ** (level + 1) < count:
                level += 1
            for cell, chunk_id in self.cells(bytes.fromhex(region["map"]), level, 0, count):
                due = min(size, length - cell * size)
                plain = self.chunk(chunk_id)
                need(len(plain) >= due, "a chunk is shorter than its place")
                write(start + cell * size, plain[:due])
        need(at == disk["size"], "regions do not cover the disk")


def clock(record):  # microseconds since 1970
    text = re.sub(r"\.(\d+)", lambda found: "." + found[1][:6].ljust(6, "0"), record["created"].upper())
    when = dt.datetime.fromisoformat(re.sub("Z$", "+00:00", text))
    return (when - EPOCH) // dt.timedelta(microseconds=1)


def in_order(records):
    """Snapshots as they were committed, oldest first (8.1)."""
    known, orders = {record["id"]: record for record in records}, {}
    for record in records:
        line = [record]
        while line[-1].get("order") is None and line[-1].get("parent") in known.keys() - orders.keys():
            line.append(known[line[-1]["parent"]])
        for one in reversed(line):
            least = orders.get(one.get("parent"), -(2**62)) + 1
            orders[one["id"]] = max(clock(one), least) if one.get("order") is None else one["order"]
    return sorted(records, key=lambda record: (orders[record["id"]], clock(record), record["id"]))


def choose(snapshots, wanted, disk):
    chosen = [s for s in snapshots if wanted == "latest" or s["id"].startswith(wanted) or s["name"] == wanted]
    disks = [d for s in chosen[-1:] for d in s["disks"] if disk in (None, d["name"])]
    need(len(disks) == 1, "no snapshot, or not exactly one disk, is meant; list the image")
    return disks[0]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("image")
    for name in ("snapshot", "out", "disk"):
        parser.add_argument(name, nargs="?")
    parser.add_argument("--password-file")
    parser.add_argument("--key-file")
    options = parser.parse_args()
    kind, secret = "passphrase", os.environb.get(b"FERROTYPE_PASSWORD")
    if options.key_file:
        kind, secret = "keyfile", open(options.key_file, "rb").read()
    elif options.password_file:
        secret = open(options.password_file, "rb").read().split(b"\n")[0].rstrip(b"\r")
    try:
        image = Image(options.image, secret or (lambda: os.fsencode(getpass.getpass())), kind)
        if options.out is None:
            for record in image.snapshots():
                disks = ", ".join(f"{d['name']} ({d['size']} bytes)" for d in record["disks"])
                print(record["id"][:16], record["created"], record["name"], disks)
            return
        disk = choose(image.snapshots(), options.snapshot, options.disk)
        with open(options.out, "xb") as out:
            out.truncate(disk["size"])
            image.extract(disk, lambda offset, data: os.pwrite(out.fileno(), data, offset))
    except (Damaged, OSError, KeyError) as error:
        sys.exit(f"read_ferro: {error}")


if __name__ == "__main__":
    main()
