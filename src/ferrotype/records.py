"""Typed fixed-size on-disk structures, laid out once and checked against the size the specification gives.

    @record(endian="<", size=16)
    class Header(Record):
        magic: Annotated[bytes, "8s"]
        count: Annotated[int, "I"]
        spare: Annotated[int, "I"]

    Header.unpack(data, offset)     a Header, or InvalidImage where the bytes are too short
    header.pack()                   16 bytes
    Header.SIZE                     16

Fields carry the codes of the ``struct`` module in their annotation, so that mypy sees plain ``int`` and ``bytes``
and the layout stands in one place.  ``b2 .. b128``, ``u8 .. u64`` and ``s8 .. s64`` are the usual ones.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Annotated, ClassVar, Self, TypeVar, dataclass_transform, get_args, get_type_hints

from ferrotype.errors import InvalidImage

u8 = Annotated[int, "B"]
u16 = Annotated[int, "H"]
u32 = Annotated[int, "I"]
u64 = Annotated[int, "Q"]
s8 = Annotated[int, "b"]
s16 = Annotated[int, "h"]
s32 = Annotated[int, "i"]
s64 = Annotated[int, "q"]
b2 = Annotated[bytes, "2s"]
b4 = Annotated[bytes, "4s"]
b8 = Annotated[bytes, "8s"]
b16 = Annotated[bytes, "16s"]


class Record:
    """Base of on-disk structures; decorate the subclass with ``@record``."""

    __slots__ = ()
    SIZE: ClassVar[int]
    _layout: ClassVar[struct.Struct]
    _names: ClassVar[tuple[str, ...]]

    @classmethod
    def unpack(cls, data: bytes | bytearray | memoryview, offset: int = 0) -> Self:
        """Read one structure.  Raises InvalidImage where ``data`` ends before it does."""
        if offset < 0 or len(data) - offset < cls.SIZE:
            raise InvalidImage(f"{cls.__name__} is cut short", offset=offset)
        return cls(*cls._layout.unpack_from(data, offset))

    def pack(self) -> bytes:
        """The structure as its ``SIZE`` bytes."""
        return self._layout.pack(*(getattr(self, name) for name in self._names))


R = TypeVar("R", bound=Record)


@dataclass_transform(frozen_default=True)
def record(*, endian: str, size: int) -> Callable[[type[R]], type[R]]:
    """Make a frozen dataclass of fixed layout; ``endian`` is ``<`` or ``>``, ``size`` what the specification says."""

    def decorate(cls: type[R]) -> type[R]:
        hints = get_type_hints(cls, include_extras=True)
        made = dataclass(frozen=True, slots=True)(cls)
        names = tuple(field.name for field in fields(made))  # type: ignore[arg-type]
        layout = struct.Struct(endian + "".join(get_args(hints[name])[1] for name in names))
        if layout.size != size:
            raise TypeError(f"{cls.__name__} is laid out in {layout.size} bytes, the specification says {size}")
        made._layout, made._names, made.SIZE = layout, names, size
        return made

    return decorate
