"""Types of the manifest's fields: what is more than a JSON type about them."""

from __future__ import annotations

from typing import Annotated

from msgspec import Meta

Sha256 = Annotated[str, Meta(pattern=r"^[0-9a-f]{64}\Z")]
_NOT_PRINTED = r"\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069"
Text = Annotated[str, Meta(max_length=1000, pattern=rf"^[^{_NOT_PRINTED}]*\Z")]
"""What people read: nothing in it moves a terminal's cursor or turns its direction round."""
Name = Annotated[str, Meta(pattern=r"^[A-Za-z0-9_]+([.+-][A-Za-z0-9_]+)*\Z", max_length=100)]
"""What becomes part of a file's name."""
Count = Annotated[int, Meta(ge=0, le=1 << 50)]
