"""Every TensorRT name that the code uses exists in TensorRT 11.4 and 10.16 and in TensorRT-RTX, without any of them.

The vendor's real Python bindings import as soon as something with the libraries' names can be linked: small stubs,
built here. They answer "is there such a name", never "does it work".
"""

from __future__ import annotations

import ast
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
BINDINGS = Path(sys.prefix) / "bindings"
COMPILER = shutil.which("cc") or shutil.which("gcc")
RTX = "TensorRT-RTX"
LIBRARIES = ("TensorRT 11", "TensorRT 10", RTX)
#: Variable (a leading underscore counts as none) -> class of what it holds, in files that mention ``trt``.
VARIABLES = {
    "builder": "Builder",
    "network": "INetworkDefinition",
    "config": "IBuilderConfig",
    "parser": "OnnxParser",
    "parser_error": "ParserError",
    "profile": "IOptimizationProfile",
    "serialized": "IHostMemory",
    "inspector": "EngineInspector",
    "runtime": "Runtime",
    "engine": "ICudaEngine",
    "context": "IExecutionContext",
    "runtime_config": "IRuntimeConfig",
    "timing_cache": "ITimingCache",
}
#: What the code may use without asking although only TensorRT-RTX has it, and why that is right.
RTX_ONLY = {
    "ComputeCapability": "engines built ahead of time for GPUs that are not here",
    "IBuilderConfig.set_compute_capability": "the same",
    "IBuilderConfig.num_compute_capabilities": "the same",
    "BuilderFlag.REQUIRE_USER_ALLOCATION": "its engines cannot be captured otherwise; TensorRT's always can",
    "CudaGraphStrategy": "graph capture inside the library",
    "IRuntimeConfig.cuda_graph_strategy": "the same",
    "IExecutionContext.is_stream_capturable": "asked before a capture, which kernels compiled at run time can forbid",
    "DynamicShapesKernelSpecializationStrategy": "kernels for new shapes are compiled at run time",
    "IRuntimeConfig.dynamic_shapes_kernel_specialization_strategy": "the same",
    "IRuntimeCache": "keeps those kernels between processes",
    "IRuntimeConfig.create_runtime_cache": "the same",
    "IRuntimeConfig.set_runtime_cache": "the same",
    "IRuntimeConfig.get_runtime_cache": "the same",
    "Runtime.get_engine_validity": "TensorRT has no preflight",
    "Runtime.engine_header_size": "the same",
    "EngineValidity": "the same",
}
#: Fewer uses than this mean that the code moved away from the naming convention, not that it is right.
FEWEST_USES = 60

_STUB = "".join(
    f"void *{name}(void) {{ return 0; }}\n"
    for name in (
        "createInferBuilder_INTERNAL",
        "createInferRefitter_INTERNAL",
        "createInferRuntime_INTERNAL",
        "createNvOnnxParserRefitter_INTERNAL",
        "createNvOnnxParser_INTERNAL",
        "getBuilderPluginRegistry",
        "getNvOnnxParserVersion",
        "getPluginRegistry",
        "initLibNvInferPlugins",
    )
)
_DUMP = """
import importlib, json, sys
def names(thing, depth):
    members = {name: getattr(thing, name, None) for name in dir(thing) if not name.startswith("_")}
    return {n: names(v, depth - 1) if isinstance(v, type) and depth > 1 else None for n, v in members.items()}
module = importlib.import_module(sys.argv[1])
json.dump({"version": module.__version__, "names": names(module, 3)}, sys.stdout)
"""

Names = Mapping[str, Any]


@dataclass(frozen=True)
class Use:
    """One mention of a name in the source: ``chain`` starts below ``trt``; ``guards`` are asked for first."""

    chain: tuple[str, ...]
    place: str
    guards: tuple[tuple[str, ...], ...] = ()

    def __str__(self) -> str:
        return f"{self.place}: {'.'.join(self.chain)}"


def collect(source: str, file: str) -> list[Use]:
    """All uses in one file; none if it never mentions ``trt``."""
    tree = ast.parse(source)
    attributes = [node for node in ast.walk(tree) if isinstance(node, ast.Attribute)]
    if not any(isinstance(node, ast.Name) and node.id == "trt" for node in ast.walk(tree)):
        return []
    variables = _variables(tree)
    uses = [Use(c, f"{file}:{node.lineno}") for node in attributes if (c := _chain(node, variables))]
    asked = list(_asked(tree, file, variables))
    # A guard holds for its whole file: the answer may be kept in a variable.
    guards = {guard for use in asked for guard in use.guards}
    uses = [replace(use, guards=tuple(g for g in guards if use.chain[: len(g)] == g)) for use in uses]
    return uses + asked


def _variables(tree: ast.AST) -> dict[str, str]:
    """``VARIABLES`` without those that hold our own: who imports our ``Engine`` calls one of them ``engine``."""
    own = {
        alias.name.lower()
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and node.level
        for alias in node.names
    }
    return {name: kind for name, kind in VARIABLES.items() if name.replace("_", "") not in own}


def _asked(tree: ast.AST, file: str, variables: Mapping[str, str]) -> Iterator[Use]:
    """hasattr(x, "name") and getattr(x, "name", default), which are guards, and getattr(x, "name"), which is none."""
    for node in ast.walk(tree):
        if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Name)):
            continue
        if node.func.id not in ("hasattr", "getattr") or len(node.args) < 2:
            continue
        name = node.args[1]
        if isinstance(name, ast.Constant) and isinstance(name.value, str):
            chain = _chain(ast.Attribute(node.args[0], name.value), variables)
            if chain:
                guard = node.func.id == "hasattr" or len(node.args) == 3
                yield Use(chain, f"{file}:{node.lineno}", (chain,) if guard else ())


def _parts(node: ast.expr) -> list[str]:
    """``self._engine.num_io_tensors`` as a list; empty if it does not start at a name."""
    parts: list[str] = []
    while isinstance(node, ast.Attribute):
        parts.insert(0, node.attr)
        node = node.value
    return [node.id, *parts] if isinstance(node, ast.Name) else []


def _chain(node: ast.Attribute, variables: Mapping[str, str]) -> tuple[str, ...]:
    """What ``node`` names below ``trt``; empty if nothing."""
    parts = _parts(node)
    if parts[:1] == ["self"]:
        parts = parts[1:]
    if len(parts) < 2:
        return ()
    if parts[0].lstrip("_") == "trt":
        return tuple(parts[1:])
    owner = variables.get(parts[0].lstrip("_"))
    # What an attribute of an object holds is not known here, so that one step is all that can be checked.
    return (owner, parts[1]) if owner else ()


def lacks(names: Names, chain: tuple[str, ...]) -> bool:
    """Whether a library has no such name. Below an enum member or a function there is nothing to check."""
    level: Names | None = names
    for name in chain:
        if level is None:
            return False
        if name not in level:
            # Dunder names are not listed; every class has those that Python itself uses.
            return not name.startswith("__")
        level = level[name]
    return False


def problems(uses: list[Use], libraries: Mapping[str, Names]) -> list[str]:
    """One line for each use that some library does not have and that nothing excuses."""
    found = []
    for use in uses:
        missing = [library for library, names in libraries.items() if lacks(names, use.chain)]
        if len(missing) < len(libraries):
            excused = any(".".join(use.chain[:length]) in RTX_ONLY for length in range(1, len(use.chain) + 1))
            missing = [
                library
                for library in missing
                if not (excused and library != RTX)
                and not any(lacks(libraries[library], guard) for guard in use.guards)
            ]
        if missing:
            found.append(f"{use} is not in {', '.join(missing)}")
    return found


def sources() -> list[Path]:
    """Every file that could use TensorRT."""
    return sorted(path for part in ("runtime", "export") for path in (ROOT / part).rglob("*.py"))


def _dump(module: str, **environment: str) -> dict[str, Any]:
    command = [sys.executable, "-c", _DUMP, module]
    variables = {**os.environ, **environment}
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False, env=variables)
    assert done.returncode == 0, f"{module} does not import: {done.stderr}"
    return json.loads(done.stdout)


def _with_stubs(major: int, folder: Path) -> dict[str, Any]:
    """What TensorRT ``major`` offers to Python."""
    bindings = BINDINGS / str(major)
    assert bindings.is_dir(), f"{bindings} is not there; make .venv/.test installs TensorRT's bindings"
    folder.mkdir()
    (folder / "stub.c").write_text(_STUB, encoding="utf-8")
    for name in ("nvinfer", "nvonnxparser", "nvinfer_plugin"):
        library = f"lib{name}.so.{major}"
        options = ["-shared", "-fPIC", f"-Wl,-soname,{library}", "-o", str(folder / library), str(folder / "stub.c")]
        subprocess.run([str(COMPILER), *options], check=True, timeout=60)
    return _dump("tensorrt_bindings", PYTHONPATH=str(bindings), LD_LIBRARY_PATH=str(folder))


@pytest.fixture(scope="module")
def libraries(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Names]:
    """Library to its names."""
    if sys.platform != "linux":
        pytest.skip("TensorRT's bindings are for Linux")
    if COMPILER is None:
        pytest.skip("no C compiler (cc or gcc) to build the stub libraries with")
    folder = tmp_path_factory.mktemp("stubs")
    dumps = [_with_stubs(11, folder / "11"), _with_stubs(10, folder / "10"), _dump("tensorrt_rtx")]
    assert [dump["version"].split(".")[0] for dump in dumps] == ["11", "10", "1"]
    return dict(zip(LIBRARIES, (dump["names"] for dump in dumps), strict=True))


def test_code_uses_only_what_exists(libraries: dict[str, Names]) -> None:
    uses = [use for path in sources() for use in collect(path.read_text(encoding="utf-8"), path.name)]
    assert not problems(uses, libraries)
    assert len({use.chain for use in uses}) >= FEWEST_USES, sorted({".".join(use.chain) for use in uses})


def test_allow_list_holds_only_what_tensorrt_rtx_alone_has(libraries: dict[str, Names]) -> None:
    for name in RTX_ONLY:
        found = [library for library, names in libraries.items() if not lacks(names, tuple(name.split(".")))]
        assert found == [RTX], f"{name} is in {found}"


def test_naming_convention_names_real_classes(libraries: dict[str, Names]) -> None:
    for names in libraries.values():
        assert all(names.get(kind) for kind in VARIABLES.values())


_GOOD = """
import tensorrt as trt
logger = trt.Logger(trt.Logger.WARNING)
builder = trt.Builder(logger)
network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
config = builder.create_builder_config()
config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, 1 << 30)
if hasattr(trt.NetworkDefinitionCreationFlag, "EXPLICIT_BATCH"):
    flag = trt.NetworkDefinitionCreationFlag.EXPLICIT_BATCH
assert hasattr(trt, "BuilderFlag"), "a guard excuses what it asks for, not all that belongs to it"
if hasattr(engine, "device_memory_size"):
    size = engine.device_memory_size
old = getattr(builder, "platform_has_fast_fp16", None)
class Monitor(trt.IProgressMonitor):
    def __init__(self):
        trt.IProgressMonitor.__init__(self)
        self._engine.num_io_tensors
config.set_compute_capability(trt.ComputeCapability.SM89, 0)
other.whatever()
"""


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ("", ""),
        ("trt.BuilderFlag.FP16", "BuilderFlag.FP16 is not in TensorRT 11, TensorRT-RTX"),
        ("trt.Nonsense", "Nonsense is not in TensorRT 11, TensorRT 10, TensorRT-RTX"),
        ("config.int8_calibrator = 1", "IBuilderConfig.int8_calibrator is not in TensorRT 11, TensorRT-RTX"),
        ("self._engine.nonsense.more()", "ICudaEngine.nonsense is not in"),
        ("self._trt.TensorIOMode.NONSENSE", "TensorIOMode.NONSENSE is not in"),
        ("x.append(context.execute_v9(1)).y", "IExecutionContext.execute_v9 is not in"),
        ("network.add_attention_v2()", "INetworkDefinition.add_attention_v2 is not in TensorRT 10"),
        ("hasattr(parser, 'nonsense')", "OnnxParser.nonsense is not in TensorRT 11, TensorRT 10, TensorRT-RTX"),
        ("trt.ComputeCapability.SM1", "ComputeCapability.SM1 is not in"),
        ("runtime.load_weights_async", "Runtime.load_weights_async is not in"),
        ("getattr(builder, 'platform_has_tf32')", "Builder.platform_has_tf32 is not in TensorRT 11, TensorRT-RTX"),
    ],
)
def test_wrong_names_are_caught(libraries: dict[str, Names], line: str, problem: str) -> None:
    found = problems(collect(f"{_GOOD}{line}\n", "code.py"), libraries)
    if problem:
        assert found
        assert all(problem in text for text in found), found
        assert all(text.startswith("code.py:") for text in found)
    else:
        assert not found


def test_what_is_ours_is_left_alone() -> None:
    ours = "from .tensorrt_engine import Engine\nengine.nonsense\ncontext.nonsense\ntrt.Runtime\n"
    assert {use.chain for use in collect(ours, "code.py")} == {("IExecutionContext", "nonsense"), ("Runtime",)}
    assert collect("config.nonsense\nengine.nonsense\n", "code.py") == []
    assert {use.chain for use in collect(_GOOD, "code.py")} >= {
        ("Logger", "WARNING"),
        ("ICudaEngine", "num_io_tensors"),
    }
