"""The house rules that a machine can check: who imports whom, what the runtime does without, how long files are."""

from __future__ import annotations

import ast
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PARTS = ("export", "calibration", "runtime")
FORBIDDEN_AT_RUNTIME = ("torch", "onnx", "onnxscript", "onnx_ir", "safetensors", "gtr_deploy.export")


def _sources(part: str) -> list[Path]:
    return sorted((ROOT / part).rglob("*.py"))


def test_no_module_imports_itself_in_a_circle() -> None:
    """Contracts between rooms are import-linter's (`make lint`); this is about modules inside a room, too."""
    program = """
import sys
sys.path.insert(0, sys.argv[1])
import grimp
from graphlib import CycleError, TopologicalSorter
graph = grimp.build_graph("gtr_deploy", cache_dir=None)
imports = {module: graph.find_modules_directly_imported_by(module) for module in graph.modules}
assert len(imports) > 100, len(imports)
try:
    TopologicalSorter(imports).prepare()
except CycleError as error:
    sys.exit(" -> ".join(error.args[1]))
"""
    command = [sys.executable, "-P", "-c", program, str(ROOT / "typings")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr


def test_parts_are_imported_by_relative_names() -> None:
    for part in PARTS:
        for path in _sources(part):
            # The package's own name would work once installed, but hides the direction from a reader.
            tree = ast.parse(path.read_text(encoding="utf-8"))
            named = [
                node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and not node.level
            ]
            assert not [name for name in named if name.startswith("gtr_deploy")], path


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
    for part in (*PARTS, "tests", "examples", "benchmarks"):
        for path in _sources(part):
            lines = len(path.read_text(encoding="utf-8").splitlines())
            assert lines <= 400, f"{path.relative_to(ROOT)} has {lines} lines; look for the second thing in it"


def test_every_package_and_data_folder_is_in_the_wheel() -> None:
    """pyproject.toml lists them by hand; an editable install works without the entry, a wheel does not."""
    setup = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]
    code = {path.parent.relative_to(ROOT) for part in (*PARTS, "gtr_deploy") for path in _sources(part)}
    data = {path.relative_to(ROOT).parent for part in PARTS for path in (ROOT / part).rglob("data")}

    def name(folder: Path) -> str:
        return ".".join(folder.parts if folder.parts[0] == "gtr_deploy" else ("gtr_deploy", *folder.parts))

    assert {name(folder) for folder in code} == set(setup["packages"])
    assert {name(folder) for folder in data} == {p for p, globs in setup["package-data"].items() if "data/*" in globs}


def test_shipped_model_is_small_and_has_a_card() -> None:
    data = ROOT / "export" / "data"
    assert (data / "mar_digits.safetensors").stat().st_size <= 8_000_000
    card = (data / "mar_digits.md").read_text(encoding="utf-8")
    for word in ("CC BY 4.0", "seed", "Metrics"):
        assert word in card
