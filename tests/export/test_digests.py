"""Remembered checksums: computed once, never stale, and a damaged cache costs time only."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from gtr_deploy.export.build import digests
from gtr_deploy.export.build.digests import file_sha256
from gtr_deploy.runtime import files
from gtr_deploy.runtime.errors import GtrError

DIGEST = "b94d27b9934d3e08a52e52d7da7dabfac484efe37a5380ee9088f7ace2efcde9"


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("GTR_DEPLOY_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "sha256.json"


@pytest.fixture
def file(tmp_path: Path) -> Path:
    (tmp_path / "file").write_bytes(b"hello world")
    return tmp_path / "file"


def test_is_computed_once(cache: Path, file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert file_sha256(file) == DIGEST
    with monkeypatch.context() as patch:
        patch.setattr(digests.hashlib, "file_digest", lambda *_: pytest.fail("computed again"))
        patch.chdir(file.parent)
        assert file_sha256(Path("file")) == DIGEST
    assert sorted(path.name for path in cache.parent.iterdir()) == ["sha256.json"]


def test_changed_file(cache: Path, file: Path) -> None:
    file_sha256(file)
    file.write_bytes(b"hello there")
    os.utime(file, ns=(1, 1))
    assert file_sha256(file) != DIGEST
    assert len(json.loads(cache.read_text())) == 1


@pytest.mark.parametrize(
    "damage",
    [
        "",
        "{",
        "[]",
        "[" * 100_000,
        "\x00",
        '{"FILE": 3}',
        '{"FILE": {"size": SIZE, "mtime_ns": TIME, "sha256": 3}}',
    ],
)
def test_damaged_cache(cache: Path, file: Path, damage: str) -> None:
    cache.parent.mkdir()
    status = file.stat()
    replaced = {"FILE": str(file), "SIZE": str(status.st_size), "TIME": str(status.st_mtime_ns)}
    for word, value in replaced.items():
        damage = damage.replace(word, value)
    cache.write_text(damage)
    assert file_sha256(file) == DIGEST
    assert json.loads(cache.read_text())[str(file)]["sha256"] == DIGEST


def test_cache_that_cannot_be_written(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GTR_DEPLOY_CACHE", str(file / "below"))
    assert file_sha256(file) == DIGEST


def test_failure_half_way_leaves_nothing_behind(cache: Path, file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise OSError("disk")

    monkeypatch.setattr(files.os, "replace", fail)
    assert file_sha256(file) == DIGEST
    assert list(cache.parent.iterdir()) == []


@pytest.mark.usefixtures("cache")
def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(GtrError, match=r"cannot read .*No such file"):
        file_sha256(tmp_path / "nothing")
