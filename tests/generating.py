"""What tests of `gtr-run generate` share: options that make it quick, and looks at the folder that it fills."""

from __future__ import annotations

import hashlib
from pathlib import Path

from click.testing import Result

BACKEND = ("--threads", "1", "--backend", "onnxruntime")
FEW_STEPS = (
    "--stage-steps", "2,1,1", "--generation-diffusion", "3", "--reconstruction-diffusion", "3", "--fts-diffusion", "4",
)  # fmt: skip
SHORT = ("--plan", "gtr-fast", *FEW_STEPS, *BACKEND)


def tree(out: Path) -> dict[str, str]:
    files = [path for path in sorted(out.rglob("*")) if path.is_file()]
    return {path.relative_to(out).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def pictures(out: Path) -> list[Path]:
    return sorted(out.rglob("[!.]*.png"))


def one_line(result: Result, code: int, *words: str) -> None:
    assert result.exit_code == code, result.output
    assert result.stderr.count("\n") == 1, result.stderr
    for word in words:
        assert word in result.stderr


def ok(result: Result) -> Result:
    assert result.exit_code == 0, result.output
    return result
