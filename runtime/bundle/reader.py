"""The bundle: a folder that passes from the machine with the checkpoint to the machine that serves.

Strict reading, fail closed: what the manifest's structures refuse (manifest.py), a path outside the folder, a file of
another size or checksum, or graphs with another contract than this version's. Opens no graph.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from msgspec import structs

from ..errors import BundleError
from ..files import read_json, write_json
from ..models.architecture import Architecture
from ..models.conditioning import Conditioner
from ..models.families import decode_model, graph_specs
from ..models.graphs import signature
from .manifest import (
    MANIFEST,
    EngineSet,
    GraphEntry,
    Manifest,
    StoredFile,
    read_manifest,
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
            raise BundleError(f"{path}: model: {error}") from None
        specs = graph_specs(architecture)
        listed = {
            "graphs": manifest.graphs,
            **{f"engines[{i}].graphs": e.graphs for i, e in enumerate(manifest.engines)},
        }
        for where, graphs in listed.items():
            if set(graphs) != set(specs):
                raise BundleError(f"{path}: {where} are {sorted(graphs)}, expected {sorted(specs)}")
        for kind, spec in specs.items():
            entry = manifest.graphs[kind]
            found, expected = (signature(graph.inputs, graph.outputs) for graph in (entry, spec))
            if found != expected:
                raise BundleError(
                    f"{path}: graphs.{kind} has other inputs or outputs than this version's: {found}, "
                    f"expected {expected}; rebuild with gtr-export build"
                )
        return cls(folder, manifest, architecture, conditioner)

    @property
    def precision(self) -> str:
        """One of ``graphs.PRECISIONS``."""
        return self.manifest.precision.name

    @property
    def graphs(self) -> Mapping[str, GraphEntry]:
        """By kind."""
        return self.manifest.graphs

    @property
    def plan_defaults(self) -> Mapping[str, Any]:
        """Settings that plans on this model start from."""
        return self.manifest.plan_defaults

    @property
    def max_batch(self) -> int:
        """The largest batch promised."""
        return self.manifest.max_batch

    @property
    def engine_sets(self) -> tuple[EngineSet, ...]:
        """Oldest first."""
        return self.manifest.engines

    def graph_paths(self, checksums: bool = True, target: str = "tensorrt") -> dict[str, Path]:
        """Graph kind to checked file; data files are checked, too.

        Args:
            checksums: compare SHA-256 with the manifest (sizes always are).
            target: ``cpu`` takes the flavour for ONNX Runtime on CPUs where there is one; else ``tensorrt``.

        Raises:
            BundleError: see :meth:`StoredFile.check`.
        """
        paths: dict[str, Path] = {}
        for kind, entry in self.graphs.items():
            own = entry.cpu if target == "cpu" and entry.cpu else entry
            paths[kind], *_ = [stored.check(self.folder, checksums) for stored in own.files]
        return paths

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

    def write_report(self, name: str, value: Mapping[str, Any]) -> Path:
        """Writes ``reports/<name>.json`` and lists it in the manifest, both atomically."""
        relative = f"reports/{name}.json"
        write_json(self.folder / relative, value)
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
        write_manifest(self.folder, manifest)
        return replace(self, manifest=manifest)
