"""The zip archive that torch.save writes, checked before torch maps it into memory.

torch takes the bytes at a member's offset for weights, whatever the archive says of them, and finds members in its own
way; here everything that another reader could see differently is refused. Does not know what the members mean.
"""

from __future__ import annotations

import io
import struct
import zipfile
from pathlib import Path
from typing import NamedTuple
from zipfile import BadZipFile, ZipInfo

from ...runtime.errors import printable

LONGEST_SMALL = 4_000_000
"""Bytes of the archive's index, and of a member that holds no weights: those are read as a whole."""

_END, _LOCATOR, _END64 = 22, 20, 56  # lengths of the records at the archive's end
_STREAMED, _UTF8 = 0x8, 0x800  # the flags that torch sets: sizes stand behind the data, names are UTF-8


class Member(NamedTuple):
    """Where a member's bytes lie in the file."""

    offset: int
    bytes: int


class _Careful(io.FileIO):
    """Reads no more at once than an honest archive needs."""

    def read(self, size: int | None = -1, /) -> bytes:
        if size is not None and size > LONGEST_SMALL:
            raise BadZipFile(f"its index has more than {LONGEST_SMALL} bytes")
        return super().read(LONGEST_SMALL if size is None or size < 0 else size) or b""


def check_archive(path: Path) -> dict[str, Member]:
    """The members by name, without the folder that torch.save puts all in.

    Raises:
        BadZipFile: a member is compressed, encrypted, not where it is said to be, or not the only one of its name.
        OSError, ValueError, NotImplementedError, struct.error: a damaged archive.
    """
    with _Careful(path) as file, zipfile.ZipFile(file) as archive:
        members = archive.infolist()
        _check_end(file, archive.start_dir, len(members))
        root = members[0].filename.partition("/")[0] if members else ""
        found: dict[str, Member] = {}
        names: set[str] = set()
        before = 0
        for info in sorted(members, key=lambda info: info.header_offset):
            name = info.filename.removeprefix(root + "/")
            shown = printable(name)
            if info.filename.lower() in names:  # torch looks names up without regard to case
                raise BadZipFile(f"two members are called {shown}")
            names.add(info.filename.lower())
            member = _check_member(file, info, shown)
            if info.header_offset < before or member.offset + member.bytes > archive.start_dir:
                raise BadZipFile(f"member {shown} overlaps another or lies beyond the file")
            if member.bytes > LONGEST_SMALL and not name.startswith("data/"):
                raise BadZipFile(f"member {shown} has {member.bytes} bytes, not at most {LONGEST_SMALL}")
            before = member.offset + member.bytes
            found[name] = member
        return found


def _check_end(file: io.FileIO, directory: int, count: int) -> None:
    """The records at the end name the very directory that was read: zipfile and torch look for it differently."""
    size = file.seek(0, io.SEEK_END)
    file.seek(max(0, size - _END - _LOCATOR - _END64))
    tail = file.read(_END + _LOCATOR + _END64)
    if tail[-_END:][:4] != b"PK\x05\x06":
        raise BadZipFile("something follows the archive's end")
    counted, _, said = struct.unpack("<H2I", tail[-_END:][10:20])
    locator = tail[-_END - _LOCATOR : -_END]
    if locator[:4] == b"PK\x06\x07":
        if struct.unpack("<Q", locator[8:16])[0] != size - len(tail) or tail[:4] != b"PK\x06\x06":
            raise BadZipFile("its zip64 record is not where it is said to be")
        counted, _, said = struct.unpack("<3Q", tail[32:_END64])
    if (counted, said) != (count, directory):
        raise BadZipFile(f"its end names {counted} members from {said} on, there are {count} from {directory} on")


def _check_member(file: io.FileIO, info: ZipInfo, name: str) -> Member:
    """A plainly stored member, described alike in the index and before its data."""
    if info.compress_type != zipfile.ZIP_STORED or info.compress_size != info.file_size:
        raise BadZipFile(f"member {name} is compressed")
    if info.flag_bits & ~(_STREAMED | _UTF8):
        raise BadZipFile(f"member {name} is encrypted or otherwise special")
    file.seek(info.header_offset)
    header = file.read(30)
    mark, _, flags, method, _, _, _, stored, plain, name_bytes, extra = struct.unpack("<4s5H3I2H", header)
    written = file.read(name_bytes).decode("utf-8" if flags & _UTF8 else "cp437")
    sizes = {info.file_size, 0xFFFFFFFF, *([0] if flags & _STREAMED else [])}
    same = (mark, flags, method, written) == (b"PK\x03\x04", info.flag_bits, info.compress_type, info.orig_filename)
    if not same or info.orig_filename != info.filename or not {stored, plain} <= sizes:
        raise BadZipFile(f"member {name} is described in two ways")
    return Member(info.header_offset + len(header) + name_bytes + extra, info.file_size)
