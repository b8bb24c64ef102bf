"""The bundle: a folder that passes from the machine with the checkpoint to the machine that serves.

Strict reading, fail closed: unknown schema, missing or unknown fields, a path outside the folder, a file of another
size or checksum, or graphs with another contract than this version's are refused with one line. Opens no graph.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import BundleError
from ..files import inside, read_json, sha256, write_json
from ..models.architecture import Architecture
from ..models.conditioning import Conditioner
from ..models.families import decode_model, graph_specs
from ..models.graphs import PRECISIONS
from .engine_sets import EngineSet

FORMAT = "gtr-deploy bundle"
SCHEMA = 2
MANIFEST = "manifest.json"

_FIELDS = {
    "format": str,
    "schema": int,
    "model": dict,
    "conditioning": dict,
    "precision": dict,
    "graphs": dict,
    "engines": list,
    "plan_defaults": dict,
    "max_batch": int,
    "source": dict,
    "tools": dict,
    "reports": dict,
}


@dataclass(frozen=True)
class StoredFile:
    """A file of the bundle: path relative to it, size in bytes, SHA-256."""

    file: str
    bytes: int
    sha256: str

    @classmethod
    def of(cls, folder: Path, file: str) -> StoredFile:
        """Describes a file that exists."""
        path = folder / file
        return cls(file, path.stat().st_size, sha256(path))

    @classmethod
    def from_json(cls, value: Any, where: str) -> StoredFile:
        """Strict reading; ``where`` names the place in the manifest."""
        if not isinstance(value, dict) or set(value) != {"file", "bytes", "sha256"}:
            raise BundleError(f"{where} must have exactly file, bytes and sha256")
        file, size, digest = value["file"], value["bytes"], value["sha256"]
        if not isinstance(file, str) or isinstance(size, bool) or not isinstance(size, int) or size < 0:
            raise BundleError(f"{where}: file or bytes is not valid")
        if not isinstance(digest, str) or len(digest) != 64 or set(digest) - set("0123456789abcdef"):
            raise BundleError(f"{where}: sha256 {digest!r} is not 64 hexadecimal digits")
        return cls(file, size, digest)

    def to_json(self) -> dict[str, Any]:
        """For the manifest."""
        return {"file": self.file, "bytes": self.bytes, "sha256": self.sha256}

    def check(self, folder: Path, checksums: bool = True) -> Path:
        """The absolute path of the file, once it is what the manifest says.

        Raises:
            BundleError: missing, outside the bundle, of another size or checksum.
        """
        path = inside(folder, self.file)
        if not path.is_file():
            raise BundleError(f"{path} is missing from the bundle; copy the bundle again or run gtr-export build")
        size = path.stat().st_size
        if size != self.bytes:
            raise BundleError(f"{path} has {size} bytes, the manifest says {self.bytes}; copy the bundle again")
        if checksums and (found := sha256(path)) != self.sha256:
            raise BundleError(
                f"{path} has sha256 {found[:12]}…, the manifest says {self.sha256[:12]}…; copy the bundle again"
            )
        return path


def data_file(model: Path) -> Path:
    """Where a graph's weights lie if they are not in the model file itself."""
    return model.with_name(model.name + ".data")


def graph_bytes(model: Path) -> int:
    """Size of a graph, weights in a data file included."""
    data = data_file(model)
    return model.stat().st_size + (data.stat().st_size if data.is_file() else 0)


def stored_graph(folder: Path, model: str) -> dict[str, Any]:
    """``model`` and ``data`` of a manifest's entry, for a graph that exists in ``folder``."""
    data = data_file(folder / model)
    return {
        "model": StoredFile.of(folder, model).to_json(),
        "data": StoredFile.of(folder, data.relative_to(folder).as_posix()).to_json() if data.is_file() else None,
    }


@dataclass(frozen=True)
class GraphFiles:
    """One graph: the model file and, where the weights are large, its one data file.

    Attributes:
        cpu: the same of the flavour that ONNX Runtime runs on CPUs, where an int8 bundle has one.
    """

    opset: int
    model: StoredFile
    data: StoredFile | None
    cpu: tuple[StoredFile, StoredFile | None] | None = None

    @property
    def bytes(self) -> int:
        """Size of both files."""
        return self.model.bytes + (self.data.bytes if self.data else 0)


@dataclass(frozen=True)
class Bundle:
    """A bundle whose manifest has been read and found sound. Files are checked by :meth:`graph_paths`."""

    folder: Path
    architecture: Architecture
    conditioner: Conditioner
    precision: str
    graphs: Mapping[str, GraphFiles]
    plan_defaults: Mapping[str, Any]
    max_batch: int
    engine_sets: tuple[EngineSet, ...]
    manifest: Mapping[str, Any]

    @classmethod
    def load(cls, folder: Path) -> Bundle:
        """Reads the manifest, strictly.

        Raises:
            BundleError: it is not a bundle that this version understands; the line says what differs.
        """
        path = folder / MANIFEST
        if not path.is_file():
            if not folder.is_dir():
                raise BundleError(f"{folder} is not a folder; gtr-export build makes a bundle")
            raise BundleError(f"{folder} has no {MANIFEST}: not a bundle, or a build that did not finish")
        manifest = read_json(path)
        if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
            raise BundleError(f"{path} is not the manifest of a {FORMAT}")
        if manifest.get("schema") != SCHEMA:
            raise BundleError(
                f"{path} has schema {manifest.get('schema')!r}, this version reads schema {SCHEMA}; "
                "rebuild the bundle with gtr-export build, or install the matching gtr-deploy"
            )
        if set(manifest) != set(_FIELDS):
            differing = sorted(set(manifest) ^ set(_FIELDS))
            raise BundleError(f"{path}: missing or unknown fields: {', '.join(differing)}")
        for name, kind in _FIELDS.items():
            if not isinstance(manifest[name], kind) or isinstance(manifest[name], bool):
                raise BundleError(f"{path}: {name} is not a {kind.__name__}")
        try:
            architecture, conditioner = decode_model(manifest["model"], manifest["conditioning"])
        except ValueError as error:
            raise BundleError(f"{path}: model section: {error}") from None
        precision = manifest["precision"].get("name")
        if precision not in PRECISIONS:
            raise BundleError(f"{path}: precision {precision!r} is not one of {', '.join(PRECISIONS)}")
        if manifest["max_batch"] < 1:
            raise BundleError(f"{path}: max_batch {manifest['max_batch']} is not at least 1")
        graphs = _graphs(path, manifest["graphs"], architecture)
        engines = tuple(
            EngineSet.from_json(entry, f"{path}: engines[{index}]", graphs)
            for index, entry in enumerate(manifest["engines"])
        )
        defaults, batch = manifest["plan_defaults"], manifest["max_batch"]
        return cls(folder, architecture, conditioner, precision, graphs, defaults, batch, engines, manifest)

    def graph_paths(self, checksums: bool = True, target: str = "tensorrt") -> dict[str, Path]:
        """Graph kind to checked file; data files are checked, too.

        Args:
            checksums: compare SHA-256 with the manifest (sizes always are).
            target: ``cpu`` takes the flavour for ONNX Runtime on CPUs where there is one; else ``tensorrt``.

        Raises:
            BundleError: see :meth:`StoredFile.check`.
        """
        paths: dict[str, Path] = {}
        for kind, files in self.graphs.items():
            model, data = files.cpu if target == "cpu" and files.cpu else (files.model, files.data)
            paths[kind] = model.check(self.folder, checksums)
            if data is not None:
                data.check(self.folder, checksums)
        return paths

    def engine_paths(self, engines: EngineSet, checksums: bool = True) -> dict[str, Path]:
        """Graph kind to checked engine file.

        Raises:
            BundleError: see :meth:`StoredFile.check`.
        """
        return {kind: graph.engine.check(self.folder, checksums) for kind, graph in engines.graphs.items()}

    def with_engines(self, engines: EngineSet) -> Bundle:
        """Writes the manifest with these engines listed last, in place of older ones with the same key."""
        kept = [entry.to_json() for entry in self.engine_sets if entry.key != engines.key]
        write_json(self.folder / MANIFEST, {**self.manifest, "engines": [*kept, engines.to_json()]})
        return Bundle.load(self.folder)

    def write_report(self, name: str, value: Mapping[str, Any]) -> Path:
        """Writes ``reports/<name>.json`` and lists it in the manifest, both atomically."""
        relative = f"reports/{name}.json"
        write_json(self.folder / relative, value)
        reports = {**self.manifest["reports"], name: StoredFile.of(self.folder, relative).to_json()}
        write_json(self.folder / MANIFEST, {**self.manifest, "reports": reports})
        return self.folder / relative

    def read_report(self, name: str) -> Any:
        """A report that the manifest lists, or None.

        Raises:
            BundleError: it is listed but missing or changed.
        """
        entry = self.manifest["reports"].get(name)
        if entry is None:
            return None
        return read_json(StoredFile.from_json(entry, f"reports.{name}").check(self.folder))


def _graphs(path: Path, section: Mapping[str, Any], architecture: Architecture) -> dict[str, GraphFiles]:
    specs = graph_specs(architecture)
    if set(section) != set(specs):
        raise BundleError(f"{path}: graphs are {sorted(section)}, expected {sorted(specs)}")
    graphs: dict[str, GraphFiles] = {}
    for kind, spec in specs.items():
        entry, where = section[kind], f"{path}: graphs.{kind}"
        # Bundles from before int8 have no "cpu".
        if not isinstance(entry, dict) or set(entry) | {"cpu"} != {
            "opset",
            "model",
            "data",
            "cpu",
            "inputs",
            "outputs",
        }:
            raise BundleError(f"{where} must have exactly opset, model, data, cpu, inputs and outputs")
        if {key: entry[key] for key in ("inputs", "outputs")} != spec.to_json():
            raise BundleError(f"{where} has other inputs or outputs than this version's; rebuild with gtr-export build")
        if isinstance(entry["opset"], bool) or not isinstance(entry["opset"], int):
            raise BundleError(f"{where}: opset {entry['opset']!r} is not a whole number")
        cpu = entry.get("cpu")
        if cpu is not None and (not isinstance(cpu, dict) or set(cpu) != {"model", "data"}):
            raise BundleError(f"{where}.cpu must have exactly model and data")
        other = None if cpu is None else _files(cpu, f"{where}.cpu")
        graphs[kind] = GraphFiles(entry["opset"], *_files(entry, where), other)
    return graphs


def _files(entry: Mapping[str, Any], where: str) -> tuple[StoredFile, StoredFile | None]:
    data = None if entry["data"] is None else StoredFile.from_json(entry["data"], f"{where}.data")
    return StoredFile.from_json(entry["model"], f"{where}.model"), data
