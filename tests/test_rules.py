"""The house rules that a machine can check: who imports whom, what the runtime does without, how long files are."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
#: A part may import itself and the parts after it.
DIRECTION = ("export", "calibration", "runtime")
FORBIDDEN_AT_RUNTIME = ("torch", "onnx", "onnxscript", "onnx_ir", "safetensors", "gtr_deploy.export")


def _sources(part: str) -> list[Path]:
    return sorted((ROOT / part).rglob("*.py"))


def _imports(path: Path, part: str) -> set[str]:
    """Top-level names imported anywhere in a file; relative imports that leave the part appear as that part's name."""
    depth = len(path.relative_to(ROOT / part).parts)
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level in (0, depth + 1):
            found.add((node.module or "").split(".")[0])
    return found


@pytest.mark.parametrize("part", [part for part in DIRECTION if (ROOT / part).is_dir()])
def test_dependencies_point_one_way(part: str) -> None:
    earlier = set(DIRECTION[: DIRECTION.index(part)])
    for path in _sources(part):
        assert not _imports(path, part) & earlier, path
        # The package's own name would work once installed, but hides the direction; parts use relative imports.
        assert "gtr_deploy" not in _imports(path, part), path


def test_direction_is_really_seen() -> None:
    assert "runtime" in _imports(ROOT / "export" / "build" / "build.py", "export")
    assert "runtime" in _imports(ROOT / "export" / "graphs" / "backbone.py", "export")


def test_runtime_source_never_names_torch_or_onnx() -> None:
    for path in _sources("runtime"):
        assert not _imports(path, "runtime") & set(FORBIDDEN_AT_RUNTIME), path


def test_gtr_run_works_where_torch_and_onnx_cannot_be_imported(digits_bundle: Path, tmp_path: Path) -> None:
    program = f"""
import sys
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name in {FORBIDDEN_AT_RUNTIME!r} or name.split(".")[0] in {FORBIDDEN_AT_RUNTIME!r}:
            raise ImportError(name + " must not be imported here")
sys.meta_path.insert(0, Refuse())
from gtr_deploy.runtime.cli import main
try:
    main(["generate", {str(digits_bundle)!r}, "--classes", "3", "--plan", "gtr-fast", "--out", {str(tmp_path)!r},
          "--grid", {str(tmp_path / "grid.png")!r}])
except SystemExit as stop:
    assert not stop.code, stop.code
loaded = sorted(set(sys.modules) & set({FORBIDDEN_AT_RUNTIME!r}))
assert not loaded, loaded
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "grid.png").is_file()


@pytest.mark.parametrize("module", ["gtr_deploy.runtime.cli", "gtr_deploy.export.cli", "gtr_deploy.export.build.build"])
def test_commands_start_without_heavy_imports(module: str) -> None:
    program = f"import sys, {module}; print(sorted({{'torch', 'onnx', 'onnxruntime'}} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.strip() == "[]"


def test_files_are_short() -> None:
    for part in (*DIRECTION, "tests", "examples", "benchmarks"):
        for path in _sources(part):
            lines = len(path.read_text(encoding="utf-8").splitlines())
            assert lines <= 400, f"{path.relative_to(ROOT)} has {lines} lines; look for the second thing in it"


def test_shipped_model_is_small_and_has_a_card() -> None:
    data = ROOT / "export" / "data"
    assert (data / "mar_digits.safetensors").stat().st_size <= 8_000_000
    card = (data / "mar_digits.md").read_text(encoding="utf-8")
    for word in ("CC BY 4.0", "seed", "Metrics"):
        assert word in card
