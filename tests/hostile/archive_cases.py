"""Checkpoints whose container is hostile: zip archives, .safetensors headers, and files that are no files."""

from __future__ import annotations

import json
import os
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from checkpoint_files import KEY, Checkpoint, archive, ended, patched, safetensors, sound_safetensors

Write = Callable[[Path], object]
CASES: dict[str, tuple[Write, str | None]] = {}
"""Name to what writes the file, and a part of the refusal; None where the file is sound."""


# Archives


def _archive(name: str, words: str | None, make: Callable[[dict[str, bytes]], bytes]) -> None:
    CASES[f"archive-{name}"] = (lambda path: path.write_bytes(make(Checkpoint().members()))), words


def _patch(name: str, words: str, **fields: tuple[int, str, Any]) -> None:
    _archive(name, words, lambda members: patched(archive(members), "a/data/0", **fields))


def _only(member: str, method: int) -> Callable[[str], int]:
    return lambda name: method if name == member else zipfile.ZIP_STORED


_UNLIKE = "is not an archive as torch.save writes it"
_TWICE = "is described in two ways"
_DEFLATED, _STORED = zipfile.ZIP_DEFLATED, zipfile.ZIP_STORED
for method, label in ((_DEFLATED, "deflated"), (zipfile.ZIP_BZIP2, "bzip2"), (zipfile.ZIP_LZMA, "lzma")):
    _archive(label, "member data.pkl is compressed", lambda m, method=method: archive(m, lambda name: method))
_archive("one-storage-deflated", "member data/0 is compressed", lambda m: archive(m, _only("a/data/0", _DEFLATED)))
_archive("pickle-deflated", "member data.pkl is compressed", lambda m: archive(m, _only("a/data.pkl", _DEFLATED)))
_archive("bomb-in-the-pickle", "member data.pkl is compressed", lambda m: archive(
    {**m, "a/data.pkl": bytes(2 * 10**8)}, _only("a/data.pkl", _DEFLATED)))  # fmt: skip
_archive("bomb-in-a-storage", "member data/0 is compressed", lambda m: archive(
    {**m, "a/data/0": bytes(2 * 10**8)}, _only("a/data/0", _DEFLATED)))  # fmt: skip
_archive("bomb-in-the-version", "member version is compressed", lambda m: archive(
    {**m, "a/version": b"3" * 10**8}, _only("a/version", _DEFLATED)))  # fmt: skip
_archive("long-version", "member version has 5000000 bytes", lambda m: archive({**m, "a/version": b"3" * 5_000_000}))
_archive("version-of-words", "damaged", lambda m: archive({**m, "a/version": b"\x1b[31mthree"}))
_archive("byte-order-of-escapes", r"\x1b[31m", lambda m: archive({**m, "a/byteorder": b"\x1b[31mbig"}))
_archive("alignment-of-5000-digits", "damaged", lambda m: archive({**m, "a/.storage_alignment": b"9" * 5000}))
_archive("escapes-in-a-name", r"member data/\x1b[31m\n is compressed", lambda m: archive(
    {"a/data/\x1b[31m\n": b"a" * 999, **m}, lambda name: _DEFLATED))  # fmt: skip
_archive("name-of-60000-letters", "is compressed", lambda m: archive(
    {"a/" + "x" * 60_000: b"a" * 999, **m}, lambda name: _DEFLATED))  # fmt: skip
_archive("method-0-of-compressed-bytes", "member data/0 is compressed", lambda m: patched(
    archive(m, _only("a/data/0", _DEFLATED)), "a/data/0", (8, "<H", 0), (10, "<H", 0)))  # fmt: skip
_patch("encrypted", "is encrypted", local=(6, "<H", 1), central=(8, "<H", 1))
_patch("encrypted-in-the-index-only", "is encrypted", central=(8, "<H", 1))
_patch("strongly-encrypted", "is encrypted", local=(6, "<H", 0x41), central=(8, "<H", 0x41))
_patch("masked", "is encrypted", local=(6, "<H", 0x2000), central=(8, "<H", 0x2000))
_patch("deflated-before-the-data-only", _TWICE, local=(8, "<H", 8))
_patch("of-two-sizes", _TWICE, local=(18, "<I", 4))
_patch("of-two-plain-sizes", _TWICE, local=(22, "<I", 4))
_patch("of-two-flags", _TWICE, local=(6, "<H", 0x800))
_patch("of-two-names", _TWICE, local=(30, "8s", b"a/data/1"))
_patch("of-a-longer-name", _TWICE, local=(26, "<H", 12))
_patch("of-a-longer-extra-field", "overlaps another", local=(28, "<H", 60_000))
_patch("of-an-extra-field-into-the-next", "overlaps another", local=(28, "<H", 200))
_patch("without-a-header", _TWICE, local=(0, "4s", b"PK\x05\x06"))
_patch("from-another-s-header", _TWICE, central=(42, "<I", 0))
_patch("from-beyond", "damaged or not a checkpoint", central=(42, "<I", 0x7FFFFFF0))


def _grown(members: dict[str, bytes], size: int, both: bool) -> bytes:
    content = archive(members)
    for offset in (20, 24):
        content = patched(content, "a/data/0", central=(offset, "<I", size))
    for offset in (18, 22) if both else ():
        content = patched(content, "a/data/0", local=(offset, "<I", size))
    return content


_archive("larger-in-the-index", _TWICE, lambda m: _grown(m, 256, False))
_archive("member-into-the-next", "overlaps another", lambda m: _grown(m, 256, True))
_archive("member-larger-than-the-file", "overlaps another", lambda m: _grown(m, 0x7FFFFFFF, True))
_archive("member-smaller-than-its-storage", "the archive holds 4 bytes", lambda m: _grown(m, 4, True))


def _zip64(members: dict[str, bytes], index: int, locator: int = 0, count: int | None = None) -> bytes:
    """With a zip64 record, at the end, that says where the index is and of how many members."""
    content = archive(members)
    end = len(content) - 22
    counted, _, start = struct.unpack("<H2I", content[end + 10 : end + 20])
    fields = (44, 45, 45, 0, 0, counted, count or counted, end - start, index or start)
    record = b"PK\x06\x06" + struct.pack("<Q2H2I4Q", *fields)
    found = b"PK\x06\x07" + struct.pack("<IQI", 0, end + locator, 1)
    return content[:end] + record + found + content[end:]


_archive("zip64", None, lambda m: _zip64(m, 0))
_archive("zip64-record-elsewhere", "its zip64 record is not where", lambda m: _zip64(m, 0, locator=-1000))
_archive("zip64-record-beyond", "its zip64 record is not where", lambda m: _zip64(m, 0, locator=2**40))
_archive("zip64-index-elsewhere", _UNLIKE, lambda m: _zip64(m, 2**40))
_archive("zip64-index-a-little-before", _UNLIKE, lambda m: _zip64(m, 1000))
_archive("zip64-of-too-many", "its end names 1000000 members", lambda m: _zip64(m, 0, count=10**6))


def _sizes_of_zip64(members: dict[str, bytes]) -> bytes:
    """Sizes of 2**60 by a zip64 field, which stands where the padding was."""
    content = bytearray(archive(members))
    entry = content.index(b"a/data/3", len(content) - 6000) - 46
    name, extra = struct.unpack_from("<2H", content, entry + 28)
    struct.pack_into("<2I", content, entry + 20, 0xFFFFFFFF, 0xFFFFFFFF)
    struct.pack_into("<2H2Q2H", content, entry + 46 + name, 1, 16, 2**60, 2**60, 0x4246, extra - 24)
    return bytes(content)


_archive("member-of-2-to-the-60-bytes", _TWICE, _sizes_of_zip64)
_archive("end-of-too-few", "its end names 3 members", lambda m: ended(archive(m), 10, "<H", 3))
_archive("end-of-too-many", "its end names 60000 members", lambda m: ended(archive(m), 10, "<H", 60_000))
_archive("end-with-the-index-elsewhere", _UNLIKE, lambda m: ended(archive(m), 16, "<I", 100))
_archive("end-with-the-index-beyond", _UNLIKE, lambda m: ended(archive(m), 16, "<I", 0xFFFFFFF0))
_archive("end-with-an-index-of-4-GB", _UNLIKE, lambda m: ended(archive(m), 12, "<I", 0xFFFFFFF0))
_archive("end-with-a-shorter-index", _UNLIKE, lambda m: ended(archive(m), 12, "<I", 100))
_archive("bytes-before", _UNLIKE, lambda m: b"PK\x03\x04" + bytes(60) + archive(m))
_archive("bytes-after", "something follows the archive's end", lambda m: archive(m) + bytes(10))
_archive("comment", "something follows the archive's end", lambda m: ended(archive(m), 20, "<H", 5) + b"hello")
_archive("archive-after-it", _UNLIKE, lambda m: archive(m) + archive({"a/data.pkl": b""}))
_archive("end-alone", "is not a checkpoint", lambda m: archive({}))
_archive("name-twice", "two members are called data/0", lambda m: archive(m, extra=("a/data/0", bytes(64))))
_archive("name-twice-in-capitals", "two members are called", lambda m: archive(m, extra=("a/DATA/0", bytes(64))))
_archive("pickle-twice", "two members are called data.pkl", lambda m: archive(m, extra=("a/data.pkl", b"\x80\x02}.")))
_archive("name-with-a-zero", _TWICE, lambda m: archive(m).replace(b"a/data/0", b"a/data\x000"))
_archive("of-60000-members", "its index has more than 4000000 bytes", lambda m: archive(
    {**m, **{f"a/data/x{number}": b"" for number in range(60_000)}}))  # fmt: skip
_archive("without-a-pickle", "no data.pkl", lambda m: archive({"a/data/0": bytes(64)}))
_archive("without-a-folder", "damaged", lambda m: archive({name[2:]: data for name, data in m.items()}))
_archive("of-two-folders", "no data.pkl", lambda m: archive({"b/x": b"", **m}))
_archive("of-a-script", "a TorchScript archive", lambda m: archive({**m, "a/constants.pkl": b"\x80\x02}."}))
_archive("misaligned", "is not aligned", lambda m: archive(m, shift=1))
_archive("misaligned-by-a-half", "is not aligned", lambda m: archive(m, shift=2))
_archive("aligned-to-4", None, lambda m: archive(m, shift=4))
for kept in (10, 1000, 40_000):
    _archive(f"cut-at-{kept}", f"is cut short: {kept} bytes", lambda m, kept=kept: archive(m)[:kept])
_archive("cut-in-the-middle", _UNLIKE, lambda m: archive(m)[:20_000] + archive(m)[20_064:])


# .safetensors


def _safe(name: str, words: str | None, change: Callable[[dict[str, Any]], Any]) -> None:
    CASES[f"safetensors-{name}"] = (lambda path: path.write_bytes(safetensors(*sound_safetensors(change)))), words


def _raw(name: str, words: str, make: Callable[[bytes, bytes], bytes]) -> None:
    def write(path: Path) -> None:
        header, data = sound_safetensors()
        path.write_bytes(make(json.dumps(header).encode(), data))

    CASES[f"safetensors-{name}"] = write, words


def _field(name: str, value: Any) -> Callable[[dict[str, Any]], Any]:
    return lambda header: header[KEY].update({name: value})


def _moved(first: int, last: int) -> Callable[[dict[str, Any]], Any]:
    def change(header: dict[str, Any]) -> None:
        begin, end = header[KEY]["data_offsets"]
        header[KEY]["data_offsets"] = [begin + first, end + last]

    return change


_DAMAGED = "is a damaged .safetensors file"
_safe("sound", None, lambda header: None)
_safe("with-metadata", None, lambda header: header.update({"__metadata__": {"format": "pt\x1b[31m"}}))
_safe("metadata-of-numbers", _DAMAGED, lambda header: header.update({"__metadata__": {"format": 3}}))
_safe("metadata-of-metadata", _DAMAGED, lambda header: header.update({"__metadata__": {"a": {"a": "a"}}}))
_safe("overlapping", _DAMAGED, _moved(-64, -64))
_safe("hole", _DAMAGED, _moved(4, 0))
_safe("moved", _DAMAGED, _moved(4, 4))
_safe("beyond-the-file", _DAMAGED, _moved(10**9, 10**9))
_safe("backwards", _DAMAGED, _moved(64, -64))
_safe("negative-offsets", _DAMAGED, _field("data_offsets", [-64, 0]))
_safe("one-offset", _DAMAGED, _field("data_offsets", [0]))
_safe("offsets-of-floats", _DAMAGED, _field("data_offsets", [0.5, 64.5]))
_safe("offsets-of-2-to-the-64", _DAMAGED, _field("data_offsets", [2**64 - 64, 2**64]))
_safe("shape-of-2-to-the-126", _DAMAGED, _field("shape", [2**63, 2**63]))
_safe("shape-of-10000-axes", "wrong: decoder_norm.weight is 16x1x1", _field("shape", [16] + [1] * 10_000))
_safe("larger-than-its-bytes", _DAMAGED, _field("shape", [10**12]))
_safe("negative-shape", _DAMAGED, _field("shape", [-16]))
_safe("no-shape", _DAMAGED, lambda header: header[KEY].pop("shape"))
_safe("unknown-type", _DAMAGED, _field("dtype", "F32\x1b[31m"))
_safe("integers", "is torch.int32", _field("dtype", "I32"))
_safe("wider-type", _DAMAGED, _field("dtype", "F64"))
_safe("nan-in-the-header", _DAMAGED, _field("shape", [float("nan")]))
_safe("escapes", r"unexpected \x1b[2Jhello\n", lambda header: header.update({"\x1b[2Jhello\n": header.pop(KEY)}))
_safe("lone-surrogate", _DAMAGED, lambda header: header.update({"a\udc80": header.pop(KEY)}))
_safe("name-of-1-MB", "unexpected xxx", lambda header: header.update({"x" * 10**6: header.pop(KEY)}))
_raw("name-twice", "a name stands twice", lambda header, data: safetensors(
    header[:-1] + b"," + header[header.index(b'"' + KEY.encode()) :], data))  # fmt: skip
_raw("field-twice", _DAMAGED, lambda header, data: safetensors(
    header.replace(b'{"dtype"', b'{"dtype":"I8","dtype"'), data))  # fmt: skip
_raw("not-utf-8", _DAMAGED, lambda header, data: safetensors(header.replace(b"norm", b"\xff\xfe\xfd\xfc"), data))
_raw("not-json", _DAMAGED, lambda header, data: safetensors(header[:-1] + b" ", data))
_raw("nested-deep", _DAMAGED, lambda header, data: safetensors(b'{"a":' + b"[" * 10**6 + b"]" * 10**6 + b"}", data))
_raw("nested-in-metadata", _DAMAGED, lambda header, data: safetensors(
    b'{"__metadata__":' + b'{"a":' * 10**5 + b"1" + b"}" * 10**5 + b"}", data))  # fmt: skip
_raw("truncated", _DAMAGED, lambda header, data: safetensors(header, data[:-1]))
_raw("bytes-after", _DAMAGED, lambda header, data: safetensors(header, data + b"a"))
_raw("header-alone", _DAMAGED, lambda header, data: safetensors(header))
_raw("header-cut", _DAMAGED, lambda header, data: safetensors(header[:100], b"", len(header)))
_raw("empty-header", "does not hold the weights", lambda header, data: safetensors(b"{}"))
_raw("header-of-5-MB", "a header of 5000000 bytes", lambda header, data: safetensors(header.ljust(5_000_000), data))
_raw("header-of-1-GB", "a header of 1000000000 bytes", lambda header, data: safetensors(header, data, 10**9))
_raw("header-of-2-to-the-64", "a header of 1844674407370955161", lambda header, data: safetensors(
    header, data, 2**64 - 1))  # fmt: skip
_raw("header-of-nothing", _DAMAGED, lambda header, data: safetensors(header, data, 0))
_raw("header-is-a-list", "is not a checkpoint", lambda header, data: safetensors(b"[" + header + b"]", data))
_raw("header-after-a-space", "is not a checkpoint", lambda header, data: safetensors(b" " + header, data))
_ENTRY = b'"k%d":{"dtype":"F32","shape":[0],"data_offsets":[0,0]}'
for keys, refused in (
    (500_000, "a header of "),
    (20_001, "more than 20000 tensors"),
    (20_000, "does not hold the weights"),
):
    _raw(f"{keys}-keys", refused, lambda header, data, keys=keys: safetensors(
        b"{" + b",".join(_ENTRY % number for number in range(keys)) + b"}"))  # fmt: skip


# Files that are no checkpoints, and no files

CASES["file-pipe"] = os.mkfifo, "is not a plain file"
CASES["file-link-to-a-device"] = (lambda path: path.symlink_to("/dev/zero")), "is not a plain file"
CASES["file-link-to-a-process"] = (lambda path: path.symlink_to("/proc/self/pagemap")), "is empty (0 bytes)"
CASES["file-link-to-itself"] = (lambda path: path.symlink_to(path)), "cannot be read"
CASES["file-folder"] = os.mkdir, "is a folder"
CASES["file-missing"] = (lambda path: None), "does not exist"
CASES["file-of-zeros"] = (lambda path: path.write_bytes(bytes(1000))), "is not a checkpoint"
CASES["file-of-a-terabyte-of-nothing"] = (lambda path: (path.touch(), os.truncate(path, 10**12))), "is not a checkpoint"
CASES["file-of-text"] = (lambda path: path.write_text("\x1b[31m" * 100)), "is not a checkpoint"
