"""What the other end of standard output can show: how many columns, which characters. Knows nothing of what is said."""

from __future__ import annotations

import codecs
import contextlib
import io
import os
import shutil
import sys
import unicodedata
from typing import TextIO

_ASCII = "gtr_ascii"
"""ASCII under a name that click does not know: to a stream of plain ASCII it writes UTF-8, whatever the terminal is."""
_READABLE = "gtr-readable"
_INSTEAD = {
    "×": "x", "·": "-", "–": "-", "—": "-", "−": "-", "±": "+-", "→": "->", "≤": "<=", "≥": ">=", "ß": "ss", "ø": "o",
    "Ø": "O", "ł": "l", "Ł": "L", "æ": "ae", "Æ": "AE", "’": "'", "‘": "'", "“": '"', "”": '"', "•": "*",
}  # fmt: skip
_DRAWN = {
    range(0x2500, 0x2502): "-",
    range(0x2502, 0x2504): "|",
    range(0x2504, 0x2580): "-",
    range(0x2800, 0x2900): "*",
}
"""Lines, bars and spinners."""


def prepare() -> None:
    """From here on nothing that is printed can fail for its characters: those that a stream's encoding has not get
    readable replacements (``Käse`` is ``Kase`` in ASCII), and what has none is escaped."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            plain = codecs.lookup(stream.encoding).name == "ascii"
            stream.reconfigure(encoding=_ASCII if plain else None, errors=_READABLE)


def columns(stream: TextIO) -> int | None:
    """Of a terminal, or as $COLUMNS says; None in a pipe or a file, where lines are as long as they are."""
    if not stream.isatty() and not os.environ.get("COLUMNS"):
        return None
    return max(20, shutil.get_terminal_size().columns)


def wrapped(text: str, width: int | None, indent: str = "") -> str:
    """Lines of at most ``width`` columns, broken between words only: a path, a command or a number that is broken over
    two lines can be neither read nor copied, so one that does not fit runs over. ``indent`` begins all lines but the
    first."""
    from rich.cells import cell_len

    if width is None:
        return text
    lines: list[str] = []
    for paragraph in text.split("\n"):
        first, *words = paragraph.split(" ")
        lines.append(first)
        for word in words:
            if cell_len(lines[-1]) + 1 + cell_len(word) <= width:
                lines[-1] += f" {word}"
            else:
                lines.append(f"{indent}{word}")
    return "\n".join(lines)


def _readable(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    text = error.object[error.start : error.end]
    with contextlib.suppress(UnicodeError):  # a file's name where the locale knows no UTF-8
        text = text.encode("utf-8", "surrogateescape").decode("utf-8")
    return "".join(map(_replaced, text)), error.end


def _replaced(character: str) -> str:
    drawn = (text for block, text in _DRAWN.items() if ord(character) in block)
    found = _INSTEAD.get(character) or next(drawn, "")
    if not found:
        parts = unicodedata.normalize("NFKD", character)
        found = "".join(part for part in parts if not unicodedata.combining(part))
    return found if found.isascii() else character.encode("unicode_escape").decode("ascii")


def _codec(name: str) -> codecs.CodecInfo | None:
    if name != _ASCII:
        return None
    ascii = codecs.lookup("ascii")
    return codecs.CodecInfo(
        ascii.encode, ascii.decode, ascii.streamreader, ascii.streamwriter,
        ascii.incrementalencoder, ascii.incrementaldecoder, name=_ASCII,
    )  # fmt: skip


codecs.register_error(_READABLE, _readable)
codecs.register(_codec)
