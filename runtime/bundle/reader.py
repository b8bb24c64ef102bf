"""The bundle: a folder that passes from the machine with the checkpoint to the machine that serves.

Strict reading, fail closed: what the manifest's structures refuse (manifest.py), a path outside the folder, a file of
another size or checksum, or graphs with another contract than this version's. Opens no graph.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Any

import msgspec
from msgspec import structs

from ..errors import BundleError, UsageError, printable
from ..files import inside, read_json, sweep, write_json
from ..models.architecture import Architecture
from ..models.conditioning import Conditioner
from ..models.families import decode_model, graph_specs
from ..models.graphs import contract_difference
from .graph_file import MAX_MODEL_BYTES, GraphFile, check_graph, stamp
from .manifest import (
    MANIFEST,
    EngineSet,
    GraphEntry,
    GraphFiles,
    Manifest,
    StoredFile,
    data_file,
    read_manifest,
    shortened,
    write_manifest,
)


@dataclass(frozen=True)
class Bundle:
    """A bundle whose manifest has been read and found sound. Files are checked by :meth:`graph_paths`."""

    folder: Path
    manifest: Manifest
    architecture: Architecture
    conditioner: Conditioner

    @classmethod
    def load(cls, folder: Path) -> Bundle:
        """Reads the manifest, strictly.

        Raises:
            BundleError: it is not a bundle that this version understands; the line says what differs.
        """
        path, manifest = folder / MANIFEST, read_manifest(folder)
        try:
            architecture, conditioner = decode_model(manifest.model, manifest.conditioning)
        except ValueError as error:
            raise BundleError(f"{path}: model: {printable(str(error), 200)}") from None
        specs = graph_specs(architecture)
        listed = {
            "graphs": manifest.graphs,
            **{f"engines[{i}].graphs": e.graphs for i, e in enumerate(manifest.engines)},
        }
        for where, graphs in listed.items():
            if set(graphs) != set(specs):
                raise BundleError(
                    f"{path}: {where} are {shortened(sorted(graphs))}, expected {', '.join(sorted(specs))}"
                )
        for kind, spec in specs.items():
            entry = manifest.graphs[kind]
            if difference := contract_difference((entry.inputs, entry.outputs), (spec.inputs, spec.outputs)):
                raise BundleError(
                    f"{path}: graphs.{kind} has other inputs or outputs than this version's: {difference}; "
                    "rebuild with gtr-export build"
                )
        return cls(folder, manifest, architecture, conditioner)

    @property
    def precision(self) -> str:
        """One of ``graphs.PRECISIONS``."""
        return self.manifest.precision.name

    def check_decoder(self, what: str) -> None:
        """Raises:
        UsageError: there is no decoder, which ``what`` needs.
        """
        if not self.architecture.decoder.makes_pictures:
            raise UsageError(f"{what} needs pictures, and {self.folder} has no decoder; build it without --no-decoder")

    @cached_property
    def digest(self) -> str:
        """SHA-256 of what the manifest says of pictures: the model, its requests and every graph. Engines built for a
        machine, reports and the time of a build do not change it."""
        manifest = self.manifest
        parts = [manifest.model, manifest.conditioning, manifest.precision, manifest.graphs]
        values = [json.loads(msgspec.json.encode(part)) for part in parts]
        return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()

    @property
    def graphs(self) -> Mapping[str, GraphEntry]:
        """By kind."""
        return self.manifest.graphs

    @property
    def plan_defaults(self) -> Mapping[str, Any]:
        """Settings that plans on this model start from."""
        return self.manifest.plan_defaults.settings

    @property
    def max_batch(self) -> int:
        """The largest batch promised."""
        return self.manifest.max_batch

    @property
    def engine_sets(self) -> tuple[EngineSet, ...]:
        """Oldest first."""
        return self.manifest.engines

    def graph_files(self, checksums: bool = True, target: str = "tensorrt") -> dict[str, GraphFile]:
        """Graph kind to graph: files compared with the manifest, and looked through.

        Args:
            checksums: compare SHA-256 with the manifest (sizes always are).
            target: ``cpu`` takes the flavour for ONNX Runtime on CPUs where there is one; else ``tensorrt``.

        Raises:
            BundleError: see :meth:`StoredFile.opened` and :func:`check_graph`.
        """
        return {
            kind: self._graph_file(entry, (entry.cpu if target == "cpu" else None) or entry, checksums)
            for kind, entry in self.graphs.items()
        }

    def graph_paths(self, checksums: bool = True, target: str = "tensorrt") -> dict[str, Path]:
        """The same, of each graph its path."""
        return {kind: graph.path for kind, graph in self.graph_files(checksums, target).items()}

    def _graph_file(self, entry: GraphEntry, files: GraphFiles, checksums: bool) -> GraphFile:
        (path, linked), data = files.model.place(self.folder), files.data
        if files.model.bytes > MAX_MODEL_BYTES:
            raise BundleError(f"{path} has {files.model.bytes} bytes; weights of that size lie in a data file")
        if data and data.file != data_file(PurePosixPath(files.model.file)).as_posix():
            raise BundleError(f"{path} has the data file {data.file!r} in the manifest, which is not called like it")
        with files.model.opened(self.folder, checksums=False) as file:
            stamps = [(path, stamp(os.fstat(file.fileno())), files.model.sha256 if checksums or linked else None)]
            model = file.read()
        if checksums or linked:
            files.model.compare(path, hashlib.sha256(model).hexdigest())
        try:
            name, size = (PurePosixPath(data.file).name, data.bytes) if data else (None, 0)
            precisions = check_graph(model, entry.inputs, entry.outputs, entry.opset, name, size)
        except BundleError as error:
            raise BundleError(f"{path}: {error}") from None
        linked = False
        if data:
            place, linked = data.place(self.folder)
            with data.opened(self.folder, checksums) as file:
                status = os.fstat(file.fileno())
                stamps.append((place, stamp(status), data.sha256 if checksums or linked else None))
        return GraphFile(path, model, tuple(stamps), entry.outputs, precisions, linked)

    def engine_paths(self, engines: EngineSet, checksums: bool = True) -> dict[str, Path]:
        """Graph kind to checked engine file.

        Raises:
            BundleError: see :meth:`StoredFile.check`.
        """
        return {kind: graph.engine.check(self.folder, checksums) for kind, graph in engines.graphs.items()}

    def with_engines(self, engines: EngineSet) -> Bundle:
        """Writes the manifest with these engines listed last, in place of older ones with the same key."""
        return self._written(engines=(*self._engines_but(engines.key), engines))

    def without_engines(self, key: str) -> Bundle:
        """Writes the manifest with the engines of this key no longer listed."""
        return self._written(engines=self._engines_but(key))

    def with_conditioner(self, conditioner: Conditioner) -> None:
        """Writes the manifest with another conditioner of the same arrays: other class names."""
        self._written(conditioning=msgspec.Raw(msgspec.json.encode(conditioner)))

    def write_report(self, name: str, value: Mapping[str, Any]) -> Path:
        """Writes ``reports/<name>.json`` and lists it in the manifest, both atomically."""
        relative = f"reports/{name}.json"
        write_json(inside(self.folder, "reports") / f"{name}.json", value)  # in the place of a link, not where it leads
        self._written(reports={**self.manifest.reports, name: StoredFile.of(self.folder, relative)})
        return self.folder / relative

    def read_report(self, name: str) -> Any:
        """A report that the manifest lists, or None.

        Raises:
            BundleError: it is listed but missing or changed.
        """
        stored = self.manifest.reports.get(name)
        return None if stored is None else read_json(stored.check(self.folder))

    def _engines_but(self, key: str) -> tuple[EngineSet, ...]:
        return tuple(engines for engines in self.engine_sets if engines.key != key)

    def _written(self, **changes: Any) -> Bundle:
        manifest = structs.replace(self.manifest, **changes)
        sweep(self.folder)
        write_manifest(self.folder, manifest)
        return replace(self, manifest=manifest)
