"""Containers as they are: no home, no name, and an engine library that would report home."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from gtr_deploy.runtime import files
from gtr_deploy.runtime.errors import UsageError


def test_no_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def none() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv(files.CACHE_VARIABLE, raising=False)
    monkeypatch.setattr(Path, "home", none)
    monkeypatch.setattr(files.tempfile, "gettempdir", lambda: str(tmp_path))
    folder = files.cache_dir()
    assert folder.parent == tmp_path
    assert folder.stat().st_mode & 0o777 == 0o700
    assert files.cache_dir() == folder
    folder.rmdir()
    (tmp_path / "elsewhere").mkdir()
    folder.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UsageError, match="is not yours; set GTR_DEPLOY_CACHE"):
        files.cache_dir()


def test_onnxruntime_keeps_nothing_below_home(digits_bundle: Path, tmp_path: Path) -> None:
    home = tmp_path / "home"
    home.mkdir()
    environment = {key: value for key, value in os.environ.items() if not key.startswith("ORT_")}
    command = [sys.executable, "-m", "gtr_deploy.runtime.cli", "generate", str(digits_bundle), "--classes", "3",
               "--plan", "gtr-fast", "--backend", "onnxruntime", "--out", str(tmp_path / "out")]  # fmt: skip
    subprocess.run(command, check=True, capture_output=True, env={**environment, "HOME": str(home)})
    assert [path for path in home.rglob("*") if "onnxruntime" in str(path)] == []


def test_more_threads_than_processors(run_cli, digits_bundle: Path, tmp_path: Path) -> None:
    result = run_cli("generate", digits_bundle, "--classes", "3", "--plan", "gtr-fast", "--threads", "1000",
                     "--out", tmp_path)  # fmt: skip
    assert result.exit_code == 0
    assert "--threads 1000: this process may use" in result.stderr
