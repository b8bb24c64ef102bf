"""Runs commands in children that are killed before their n-th change of the file system. Started by test_crash_points.

Everything is imported once, and what only computes is done once and remembered: children are forks, and what they do
to files is what is tested. Reads one JSON object per line, ``{"argv", "kill", "root"}``, and answers with ``{"status",
"points", "output"}``; status is negative for a child that a signal has ended. ``kill`` 0 never kills.
"""

from __future__ import annotations

import copy
import json
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import onnxruntime  # noqa: F401 - children find it imported
import PIL.PngImagePlugin  # noqa: F401
import torch

import gtr_deploy.calibration.collect as collecting
import gtr_deploy.calibration.quantised_bundle as quantised
import gtr_deploy.export.engines.builder as engines
import gtr_deploy.export.graphs.onnx_export as exporting
import gtr_deploy.export.networks as networks
import gtr_deploy.runtime.bundle.staged as staged
from gtr_deploy.export.build.sources import Weights
from gtr_deploy.export.cli import main as gtr_export
from gtr_deploy.export.engines.audit import Audit
from gtr_deploy.export.engines.graph import BuiltGraph
from gtr_deploy.runtime.cli import main as gtr_run
from gtr_deploy.runtime.machine import examine
from gtr_deploy.runtime.machine.examine import Machine

try:
    import tensorrt_rtx
except ImportError:
    tensorrt_rtx = None

CHANGES = ("os.rename", "os.link", "os.remove", "os.mkdir", "os.rmdir", "os.chmod", "os.truncate", "os.symlink")
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC


def changed_paths(event: str, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    """What an audit event is about to change; empty for one that only looks."""
    if event == "open":
        path, _, flags = arguments
        return (path,) if isinstance(flags, int) and flags & WRITING and isinstance(path, str | bytes) else ()
    if event not in CHANGES:
        return ()
    return arguments[:2] if event in ("os.rename", "os.link") else arguments[:1]


class Killer:
    """Counts the changes below a folder, and kills this process before one of them."""

    def __init__(self, root: str, kill: int, points: Path) -> None:
        self._root, self._kill, self._count = root, kill, 0
        self._points = os.open(points, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)

    def __call__(self, event: str, arguments: tuple[Any, ...]) -> None:
        for path in changed_paths(event, arguments):
            name = os.fsdecode(path) if isinstance(path, str | bytes | os.PathLike) else ""
            if not name or (not os.path.abspath(name).startswith(self._root) and os.path.isabs(name)):
                continue
            # Nothing changes where a folder is there already, or a file is not. (rmtree's names have no folder.)
            if os.path.isabs(name) and event == ("os.mkdir" if os.path.lexists(name) else "os.remove"):
                return
            self.point(f"{event} {name}")
            return

    def point(self, what: str) -> None:
        self._count += 1
        os.write(self._points, f"{what}\n".encode())
        if self._count == self._kill:
            os.kill(os.getpid(), signal.SIGKILL)


def run(argv: list[str], kill: int, root: str, scratch: Path) -> dict[str, Any]:
    points, output = scratch / "points", scratch / "output"
    child = os.fork()
    if child == 0:
        status = 99
        try:
            said = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
            os.dup2(said, 1)
            os.dup2(said, 2)
            killer = Killer(root, kill, points)
            exchange = staged._exchange
            staged._exchange = lambda *folders: killer.point(f"exchange {folders}") or exchange(*folders)
            sys.addaudithook(killer)
            command = gtr_run if argv[0] == "gtr-run" else gtr_export
            command(argv[1:], prog_name=argv[0])
        except SystemExit as stop:
            status = stop.code if isinstance(stop.code, int) else 0
        finally:
            os._exit(status)
    _, ended = os.waitpid(child, 0)
    return {
        "status": os.waitstatus_to_exitcode(ended),
        "points": points.read_text(encoding="utf-8").splitlines(),
        "output": output.read_text(encoding="utf-8", errors="replace"),
    }


def remembered(module: Any, name: str, key: Callable[..., Any], target: int | None = None) -> None:
    """Has a function compute once per key; what it wrote to its argument number ``target`` it then writes again."""
    real, known = getattr(module, name), {}

    def call(*arguments: Any, **options: Any) -> Any:
        found = key(*arguments)
        if found not in known:
            known[found] = real(*arguments, **options), None
            if target is not None:
                known[found] = known[found][0], arguments[target].read_bytes()
            return known[found][0]
        result, content = known[found]
        if target is not None:
            arguments[target].parent.mkdir(parents=True, exist_ok=True)
            arguments[target].unlink(missing_ok=True)
            arguments[target].write_bytes(content)
        return result

    setattr(module, name, call)


def remembered_statistics(real: Callable[..., Any]) -> Callable[..., Any]:
    """In place of a generation, what a calibration saw of the first one."""
    known: list[Any] = []

    def generate_on_host(networks: Any, job: Any, observer: Any) -> None:
        if not known:
            real(networks, job, observer)
            known.append(networks.hook.watched)
        networks.hook.watched = copy.deepcopy(known[0])

    return generate_on_host


def copied_export(ready: Path) -> Callable[..., None]:
    def export_graph(module: Any, spec: Any, precision: str, path: Path) -> None:
        path.write_bytes((ready / "graphs" / path.name).read_bytes())

    return export_graph


def fake_engine(onnx_file: Path, spec: Any, profiles: Any, target: Any, settings: Any, out: Path, _: Any) -> Any:
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(spec.kind, encoding="utf-8")
    return BuiltGraph(0.1, Audit({}, "as parsed"), ())


def main(ready: Path, scratch: Path) -> None:
    torch.set_num_threads(1)
    os.fsync = lambda _: None  # a killed process loses nothing that it has written
    versions = {"tensorrt": None, "tensorrt-rtx": getattr(tensorrt_rtx, "__version__", None), "onnxruntime": "x"}
    examine.examine_machine = lambda: Machine("linux-x86_64", None, "no driver", versions, ())
    networks.build_graph_module = lambda *_: None
    exporting.export_graph = copied_export(ready)
    engines.build_graph = fake_engine
    Weights.checkpoint = lambda _: {}
    remembered(quantised, "compared_images", lambda *_: 0)
    remembered(quantised, "layer_ranges", lambda found, *settings: settings)
    remembered(quantised, "choose_kept", lambda bench, *_: bench.flavour)
    remembered(quantised, "_measured", lambda bench, *_: bench.flavour)
    remembered(quantised, "quantise_graph", lambda source, target, ranges, flavour, keep: (target.name, flavour), 1)
    remembered(collecting, "OnnxRuntimeBackend", lambda *_: 0)
    collecting.generate_on_host = remembered_statistics(collecting.generate_on_host)
    # Both are in the report.
    collecting.peak_memory = lambda: 0
    quantised.time = SimpleNamespace(monotonic=lambda: 0.0)
    for line in sys.stdin:
        asked = json.loads(line)
        if asked.get("warm"):  # in this process, so that every child remembers
            try:
                gtr_export(asked["argv"], prog_name="gtr-export")
            except SystemExit as stop:
                print(json.dumps({"status": stop.code}), flush=True)
            continue
        print(json.dumps(run(asked["argv"], asked["kill"], asked["root"], scratch)), flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
