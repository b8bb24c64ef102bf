"""Writes checkpoints opcode by opcode and header by header, so that one thing at a time can be wrong in them."""

from __future__ import annotations

import io
import json
import struct
import warnings
import zipfile
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import torch

from gtr_deploy.export.build.checkpoints import random_mar
from gtr_deploy.runtime.models.architecture import Decoder
from gtr_deploy.runtime.models.mar import MarArchitecture

TINY = MarArchitecture(
    name="mar-tiny", grid=(4, 4), token_channels=4, classes=3, buffer=4, width=16, depth=1, heads=2, head_depth=1,
    head_width=16, decoder=Decoder(kind="patches", stride=1, patch=2),
)  # fmt: skip
KEY = "decoder_norm.weight"  # the tensor that cases spoil: 16 values
REBUILD = "torch._utils _rebuild_tensor_v2"
FLOATS = "torch FloatStorage"


# Opcodes of protocol 2


def text(value: str) -> bytes:
    data = value.encode("utf-8", "surrogatepass")
    return b"X" + struct.pack("<I", len(data)) + data


def whole(value: int) -> bytes:
    if -(2**31) <= value < 2**31:
        return b"J" + struct.pack("<i", value)
    data = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
    return b"\x8a" + bytes([len(data)]) + data


def several(*items: bytes) -> bytes:
    return b"(" + b"".join(items) + b"t"


def wholes(*values: int) -> bytes:
    return several(*map(whole, values))


def pairs(items: Mapping[str, bytes]) -> bytes:
    return b"}(" + b"".join(text(key) + value for key, value in items.items()) + b"u"


def named(name: str) -> bytes:
    return b"c" + name.replace(" ", "\n").encode() + b"\n"


def called(name: str, *arguments: bytes) -> bytes:
    return named(name) + several(*arguments) + b"R"


def whole_pickle(body: bytes) -> bytes:
    return b"\x80\x02" + body + b"."


HOOKS = called("collections OrderedDict")


def storage(
    key: bytes, values: bytes, kind: str = FLOATS, place: bytes = b"", last: bytes = b"", word: bytes = b""
) -> bytes:
    return several(word or text("storage"), named(kind), key, place or text("cpu"), values, last) + b"Q"


def tensor(held: bytes, offset: bytes, shape: bytes, strides: bytes, *rest: bytes) -> bytes:
    return called(REBUILD, held, offset, shape, strides, *(rest or (b"\x89", HOOKS)))


# Whole checkpoints


class Checkpoint:
    """A sound checkpoint of ``TINY``: opcodes of every entry, bytes of every storage; a case changes one of them."""

    def __init__(self, legacy: bool = False) -> None:
        self.legacy = legacy
        self.entries: dict[str, bytes] = {}
        self.storages: dict[str, bytes] = {}
        for number, (key, value) in enumerate(_weights().items()):
            self.storages[str(number)] = value.numpy().tobytes()
            self.entries[key] = self.of(str(number), tuple(value.shape), value.stride(), value.numel())
        self.listed: bytes | None = None
        self.version = whole(1001)

    def of(self, key: str, shape: tuple[int, ...], strides: tuple[int, ...], values: int, **other: Any) -> bytes:
        """Opcodes of a tensor: ``other`` may hold ``offset``, ``kind``."""
        held = self.held(key, whole(values), other.get("kind", FLOATS))
        return tensor(held, whole(other.get("offset", 0)), wholes(*shape), wholes(*strides))

    def held(self, key: str, values: bytes, kind: str = FLOATS, **other: bytes) -> bytes:
        return storage(text(key), values, kind, last=b"N" if self.legacy else b"", **other)

    def number(self, key: str = KEY) -> str:
        return str(list(self.entries).index(key))

    def body(self) -> bytes:
        return whole_pickle(pairs(self.entries))

    def write(self, path: Path) -> None:
        if self.legacy:
            listed = self.listed or b"](" + b"".join(map(text, self.storages)) + b"e"
            head = [whole(0x1950A86A20F9469CFC6C), self.version, b"}"]
            pickles = [*map(whole_pickle, head), self.body(), whole_pickle(listed)]
            data = [struct.pack("<q", len(value) // 4) + value for value in self.storages.values()]
            path.write_bytes(b"".join(pickles + data))
        else:
            path.write_bytes(archive(self.members()))

    def members(self) -> dict[str, bytes]:
        data = {f"a/data/{key}": value for key, value in self.storages.items()}
        return {"a/data.pkl": self.body(), "a/byteorder": b"little", **data, "a/version": b"3\n"}


@cache
def _weights() -> dict[str, torch.Tensor]:
    return random_mar(TINY, 0)


def archive(
    members: Mapping[str, bytes],
    method: Callable[[str], int] = lambda name: zipfile.ZIP_STORED,
    shift: int = 0,
    extra: tuple[str, bytes] | None = None,
) -> bytes:
    """A zip archive, every member's data 64 bytes aligned and ``shift`` further; ``extra`` is one more member."""
    out = io.BytesIO()
    with warnings.catch_warnings(), zipfile.ZipFile(out, "w") as file:
        warnings.simplefilter("ignore")
        for name, data in [*members.items(), *([extra] if extra else [])]:
            info = zipfile.ZipInfo(name)
            info.compress_type = method(name)
            pad = (shift - out.tell() - 34 - len(name.encode())) % 64
            info.extra = struct.pack("<2H", 0x4246, pad) + bytes(pad)
            file.writestr(info, data)
    return out.getvalue()


def patched(
    content: bytes, name: str, local: tuple[int, str, Any] | None = None, central: tuple[int, str, Any] | None = None
) -> bytes:
    """Changes a field of a member's header before its data, of its entry in the index, or both: (offset, format,
    value)."""
    with zipfile.ZipFile(io.BytesIO(content)) as file:
        at, start = file.getinfo(name).header_offset, file.start_dir
    entry = content.index(name.encode(), start) - 46
    changed = bytearray(content)
    for place, field in ((at, local), (entry, central)):
        if field is not None:
            struct.pack_into(field[1], changed, place + field[0], field[2])
    return bytes(changed)


def ended(content: bytes, offset: int, form: str, value: int) -> bytes:
    """Changes a field of the record at the archive's end."""
    changed = bytearray(content)
    struct.pack_into(form, changed, len(content) - 22 + offset, value)
    return bytes(changed)


def safetensors(header: bytes | Mapping[str, Any], data: bytes = b"", length: int | None = None) -> bytes:
    if not isinstance(header, bytes):
        header = json.dumps(header).encode()
    return struct.pack("<Q", len(header) if length is None else length) + header + data


def sound_safetensors(change: Callable[[dict[str, Any]], Any] = lambda header: None) -> tuple[dict[str, Any], bytes]:
    """Header and data of ``TINY``'s weights as float32."""
    header: dict[str, Any] = {}
    data = b""
    for key, value in _weights().items():
        more = value.numpy().tobytes()
        header[key] = {"dtype": "F32", "shape": list(value.shape), "data_offsets": [len(data), len(data) + len(more)]}
        data += more
    change(header)
    return header, data
