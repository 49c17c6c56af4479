"""The repository's configuration: the object ``config``, JSON in the clear."""

from __future__ import annotations

import os
from base64 import b64decode, b64encode
from datetime import UTC, datetime
from typing import Annotated, Final, Literal

import msgspec

from ferrotype.errors import InvalidImage, UnsupportedError
from ferrotype.repository.keys import MASTER_SIZE
from ferrotype.units import KiB, MiB

NAME: Final = "config"
DEFAULT_CHUNK: Final = 128 * KiB  # docs/format.md has the figures it was chosen by
_LARGEST_DEFAULT: Final = MiB
_MOST_CELLS: Final = 1 << 27  # of new disks, before chunks are made larger: maps and index take 100 bytes for each
_UNSAID: Final = 128 * KiB  # what a configuration means that says nothing of it
DEFAULT_PACK: Final = 16 * MiB
DEFAULT_LEVEL: Final = 1


class Config(msgspec.Struct, frozen=True, kw_only=True):
    """What holds for the whole repository, from its creation on."""

    version: int = 1
    id: str
    created: Annotated[datetime, msgspec.Meta(tz=True)]
    encryption: Literal["none", "aes-256-gcm"]
    master: str | None = None  # base64; in the clear where nothing is encrypted, so that ids are still keyed
    chunk_size: int = _UNSAID  # bytes; for new disks
    pack_size: int = DEFAULT_PACK  # bytes a pack is filled to
    features: tuple[str, ...] = ()  # a reader that does not know one of them must refuse

    @property
    def encrypted(self) -> bool:
        return self.encryption != "none"

    @property
    def clear_master(self) -> bytes:
        """The master key of an image that is not encrypted."""
        try:
            master = b64decode(self.master or "", validate=True)
        except ValueError:
            master = b""
        if len(master) != MASTER_SIZE:
            raise InvalidImage("the configuration holds no key", field="master")
        return master


class _Stamp(msgspec.Struct):
    """What tells whether the rest can be read."""

    version: int = 1
    features: tuple[str, ...] = ()
    encryption: str = "none"


def default_chunk(disk_bytes: int) -> int:
    """The chunk size of a new image for disks of so many bytes: 128 KiB up to 16 TiB, 256 up to 32, and so on."""
    size = DEFAULT_CHUNK
    while size < _LARGEST_DEFAULT and disk_bytes > size * _MOST_CELLS:
        size *= 2
    return size


def new_config(*, master: bytes | None, chunk_size: int, pack_size: int, image: str | None = None) -> Config:
    """A fresh configuration: ``master`` where the image is not encrypted, ``image`` where its id is known."""
    return Config(
        id=image or os.urandom(16).hex(),
        created=datetime.now(UTC).replace(microsecond=0),
        encryption="aes-256-gcm" if master is None else "none",
        master=None if master is None else b64encode(master).decode("ascii"),
        chunk_size=chunk_size,
        pack_size=pack_size,
    )


def encode_config(config: Config) -> bytes:
    return msgspec.json.encode(config)


def decode_config(data: bytes) -> Config:
    """Raises InvalidImage or UnsupportedError."""
    try:
        stamp = msgspec.json.decode(data, type=_Stamp)  # first: a newer version may have other fields
        if stamp.version != 1 or stamp.features or stamp.encryption not in ("none", "aes-256-gcm"):
            what = ", ".join(map(str, stamp.features)) or "no features"
            raise UnsupportedError(
                f"the repository is of version {stamp.version} with {what} and encryption {stamp.encryption!r}; "
                "use a newer ferrotype"
            )
        config = msgspec.json.decode(data, type=Config)
    except (msgspec.DecodeError, ValueError, RecursionError) as error:
        raise InvalidImage(f"the configuration is damaged: {error}") from error
    if not (4 * KiB <= config.chunk_size <= 16 * MiB and MiB <= config.pack_size <= 1024 * MiB):
        raise InvalidImage("the configuration has impossible sizes", field="chunk_size")
    return config
