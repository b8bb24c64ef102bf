"""The manifest: what a bundle says about itself, as typed structures that msgspec reads strictly.

Everything unknown, missing, of another type or out of range is refused with one line that names the file, the field,
what was expected and what was found. Opens no other file than manifest.json; does not know which graphs a model has.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
from collections.abc import Iterator, Mapping
from io import BufferedReader
from pathlib import Path, PurePath
from typing import Annotated, Any, BinaryIO, Literal, TypeVar

import msgspec
from msgspec import UNSET, Meta, Raw, Struct, UnsetType, structs

from ..errors import BundleError, printable
from ..files import LFS_POINTER, atomic_path, leads_out, named, read_json_and_bytes, sha256
from ..models.graphs import PRECISIONS, TensorSpec
from ..sampling.shapes import Profile
from .fields import Count, Name, Sha256, Text
from .source import Source

MAX_BYTES = 4_000_000
"""Of a manifest; ImageNet's has 60,000."""

FORMAT = "gtr-deploy bundle"
SCHEMA = 3
MANIFEST = "manifest.json"

FLAVOURS = {"tensorrt": "TensorRT", "tensorrt-rtx": "TensorRT-RTX"}
"""Engine libraries and how people write them; in the order in which a runtime prefers them."""

_MOST_KEYS_TRIED = 100
AnyPath = TypeVar("AnyPath", bound=PurePath)
Batch = Annotated[int, Meta(ge=1, le=4096)]


class StoredFile(Struct, frozen=True, forbid_unknown_fields=True):
    """A file of the bundle: path relative to it, size in bytes, SHA-256."""

    file: Text
    bytes: Count
    sha256: Sha256

    @classmethod
    def of(cls, folder: Path, file: str) -> StoredFile:
        """Describes a file that exists."""
        path = folder / file
        return cls(file, path.stat().st_size, sha256(path))

    @contextlib.contextmanager
    def opened(self, folder: Path, checksums: bool = True) -> Iterator[BinaryIO]:
        """The file, open and at its beginning, once it is what the manifest says. One that a link leads to, out of the
        bundle, is always compared, whatever ``checksums`` says.

        Raises:
            BundleError: missing, outside the bundle, not a plain file, of another size or checksum.
        """
        path, linked = self.place(folder)
        try:
            if not path.is_file():  # a pipe would be waited for
                raise FileNotFoundError
            file = open(path, "rb", opener=_unwaiting)  # noqa: SIM115
        except (OSError, ValueError):
            raise BundleError(
                f"{path} is missing from the bundle; copy the bundle again or run gtr-export build"
            ) from None
        with file:
            try:
                self._measure(file, path, checksums or linked)
            except OSError as error:
                raise BundleError(f"{path} cannot be read: {error.strerror}") from None
            yield file

    def _measure(self, file: BufferedReader, path: Path, checksums: bool) -> None:
        size = os.fstat(file.fileno()).st_size
        if size != self.bytes:
            if file.read(len(LFS_POINTER)) == LFS_POINTER:
                raise BundleError(f"{path} is a Git LFS pointer, not the file; run git lfs pull in the bundle")
            raise BundleError(f"{path} has {size} bytes, the manifest says {self.bytes}; copy the bundle again")
        if checksums:
            self.compare(path, hashlib.file_digest(file, "sha256").hexdigest())
            file.seek(0)

    def compare(self, path: Path, found: str) -> None:
        """Raises:
        BundleError: the content of ``path`` has another SHA-256 than the manifest says.
        """
        if found != self.sha256:
            raise BundleError(
                f"{path} has sha256 {found[:12]}…, the manifest says {self.sha256[:12]}…; copy the bundle again"
            )

    def check(self, folder: Path, checksums: bool = True) -> Path:
        """The absolute path of the file, once it is what the manifest says.

        Raises:
            BundleError: see :meth:`opened`.
        """
        with self.opened(folder, checksums):
            return self.place(folder)[0]

    def place(self, folder: Path) -> tuple[Path, bool]:
        """Where it lies, and whether a link leads out of the folder to it.

        Raises:
            BundleError: its path is absolute, or climbs out.
        """
        path = named(folder, self.file)
        return path, leads_out(folder, path)


def _unwaiting(path: str, flags: int) -> int:
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0))  # a pipe that has just taken the file's place


class GraphFiles(Struct, frozen=True, forbid_unknown_fields=True):
    """One graph: the model file and, where the weights are large, its one data file."""

    model: StoredFile
    data: StoredFile | None

    @classmethod
    def of(cls, folder: Path, model: str) -> GraphFiles:
        """Describes a graph that exists in ``folder``; ``model`` is relative to it."""
        data = data_file(Path(model)).as_posix()
        return cls(StoredFile.of(folder, model), StoredFile.of(folder, data) if (folder / data).is_file() else None)

    @property
    def files(self) -> tuple[StoredFile, ...]:
        """The model file, then the data file where there is one."""
        return (self.model, self.data) if self.data else (self.model,)

    @property
    def bytes(self) -> int:
        """Size of both files."""
        return sum(stored.bytes for stored in self.files)

    @property
    def checksums(self) -> tuple[str, str | None]:
        """SHA-256 of the model file, and of the data file or None: what an engine of it records."""
        return self.model.sha256, self.data.sha256 if self.data else None


class GraphEntry(GraphFiles, frozen=True, forbid_unknown_fields=True):
    """A graph in the manifest.

    Attributes:
        cpu: files of the flavour that ONNX Runtime runs on CPUs, where an int8 bundle has one.
        inputs, outputs: the contract that it was exported with.
    """

    opset: Annotated[int, Meta(ge=1, le=100)]
    cpu: GraphFiles | None
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]


class EngineGraph(Struct, frozen=True, forbid_unknown_fields=True):
    """The engine of one graph.

    Attributes:
        engine: the serialized engine.
        onnx, data: SHA-256 of the ONNX file, and of its data file or None, that it was built from.
        profiles: axis letter to (smallest, best, largest), per optimization profile.
        seconds: what the build took.
        layers: layers per precision, from the engine inspector; None where the library cannot inspect without a GPU.
    """

    engine: StoredFile
    onnx: Sha256
    data: Sha256 | None
    profiles: Annotated[tuple[Profile, ...], Meta(min_length=1)]
    seconds: Annotated[float, Meta(ge=0, le=1e9)]
    layers: Mapping[Text, Count] | None

    def __post_init__(self) -> None:
        for profile in self.profiles:
            for letter, sizes in profile.items():
                if not 0 <= sizes[0] <= sizes[1] <= sizes[2] <= 1 << 40:
                    raise ValueError(f"profile {letter!r} {list(sizes)} is not smallest, best, largest")


class EngineSet(Struct, frozen=True, forbid_unknown_fields=True):
    """Engines of all graphs of a bundle, built together.

    Attributes:
        flavour: a key of ``FLAVOURS``.
        version: of the library, in full.
        compute_capabilities: such as ``("8.9", "12.0")``; what the engines may run on.
        gpu: the GPU model that they were built on; None for engines built ahead of time, which fit any GPU of a
            listed compute capability.
        system: such as ``linux-x86_64``.
        hardware_compatible: also runs on GPUs of compute capability 8.0 and later.
        plans: the plans whose shapes the profiles cover.
        max_batch: largest batch that the profiles cover.
        precision: the bundle's at that time.
        optimization_level: of the builder.
        graphs: by kind.
    """

    flavour: Name
    version: Name
    compute_capabilities: tuple[Annotated[str, Meta(pattern=r"^[0-9]{1,3}\.[0-9]{1,2}\Z")], ...]
    gpu: Text | None
    system: Text
    hardware_compatible: bool
    plans: tuple[Text, ...]
    max_batch: Batch
    precision: Name
    optimization_level: Annotated[int, Meta(ge=0, le=5)]
    graphs: Mapping[Name, EngineGraph]

    def __post_init__(self) -> None:
        _one_of("flavour", self.flavour, FLAVOURS)
        _one_of("precision", self.precision, PRECISIONS)

    @property
    def key(self) -> str:
        """Folder under ``engines/``: flavour, version, compute capabilities."""
        return engine_key(self.flavour, self.version, self.compute_capabilities)

    @property
    def bytes(self) -> int:
        """Size of all engines."""
        return sum(graph.engine.bytes for graph in self.graphs.values())


class Precision(Struct, frozen=True, forbid_unknown_fields=True):
    """``name`` is one of ``graphs.PRECISIONS``; the rest says in words what runs in it and what does not."""

    name: Name
    networks: Text
    float32: tuple[Text, ...]
    float16: tuple[Text, ...]

    def __post_init__(self) -> None:
        _one_of("precision", self.name, PRECISIONS)


class PlanDefaults(Struct, frozen=True, forbid_unknown_fields=True):
    """Settings that plans on this model start from; see :class:`~..sampling.plan.PlanSettings`."""

    cfg: Annotated[int, Meta(ge=0, le=100)] | Annotated[float, Meta(ge=0, le=100)] | UnsetType = UNSET
    cfg_schedule: Literal["linear", "constant"] | UnsetType = UNSET
    guidance_interval: tuple[Annotated[float, Meta(ge=0, le=1)], Annotated[float, Meta(ge=0, le=1)]] | UnsetType = UNSET
    max_timestep: Annotated[int, Meta(ge=0, le=999)] | UnsetType = UNSET
    temperature: Annotated[int, Meta(ge=0, le=10)] | Annotated[float, Meta(ge=0, le=10)] | UnsetType = UNSET

    @property
    def settings(self) -> dict[str, Any]:
        """Those that are set, by name."""
        return {name: value for name, value in structs.asdict(self).items() if value is not UNSET}


class Manifest(Struct, frozen=True, forbid_unknown_fields=True):
    """All of manifest.json; docs/bundle.md says what each field is for.

    Attributes:
        model, conditioning: sizes, and what one image may be asked to be, as the model's family writes them
            (``families.decode_model``).
        plan_defaults: settings that plans on this model start from.
        max_batch: the largest batch promised.
        tools: versions that built it.
        reports: by name.
    """

    format: Text
    schema: int
    model: Raw
    conditioning: Raw
    precision: Precision
    graphs: Mapping[Name, GraphEntry]
    engines: Annotated[tuple[EngineSet, ...], Meta(max_length=1000)]
    plan_defaults: PlanDefaults
    max_batch: Batch
    source: Source
    tools: Mapping[Text, Text]
    reports: Mapping[Name, StoredFile]

    @property
    def files(self) -> Iterator[StoredFile]:
        """All files that it lists."""
        for graph in self.graphs.values():
            yield from graph.files
            if graph.cpu:
                yield from graph.cpu.files
        for engines in self.engines:
            yield from (graph.engine for graph in engines.graphs.values())
        yield from self.reports.values()


def read_manifest(folder: Path) -> Manifest:
    """Reads ``folder / MANIFEST``.

    Raises:
        BundleError: it is not there, or not what this version understands; the line says what differs.
    """
    path = folder / MANIFEST
    if not path.is_file():
        if not folder.is_dir():
            raise BundleError(f"{folder} is not a folder; gtr-export build makes a bundle")
        raise BundleError(f"{folder} has no {MANIFEST}: not a bundle, or a build that did not finish")
    if path.stat().st_size > MAX_BYTES:
        raise BundleError(f"{path} has {path.stat().st_size} bytes, a manifest has at most {MAX_BYTES}")
    document, content = read_json_and_bytes(path)  # refuses what msgspec lets through: a key that stands twice
    if not isinstance(document, dict) or document.get("format") != FORMAT:
        raise BundleError(f"{path} is not the manifest of a {FORMAT}")
    if document.get("schema") != SCHEMA:
        raise BundleError(
            f"{path} has schema {shortened(document.get('schema'))}, this version reads schema {SCHEMA}; "
            "rebuild the bundle with gtr-export build, or install the matching gtr-deploy"
        )
    try:
        return msgspec.json.decode(content, type=Manifest)
    except msgspec.ValidationError as error:
        raise BundleError(f"{path}: {_explained(document, error)}") from None
    except (msgspec.DecodeError, RecursionError) as error:
        raise BundleError(f"{path} cannot be read: {error}") from None


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Writes ``folder / MANIFEST``, atomically."""
    with atomic_path(folder / MANIFEST) as temporary:
        temporary.write_bytes(msgspec.json.format(msgspec.json.encode(manifest), indent=2) + b"\n")


def data_file(model: AnyPath) -> AnyPath:
    """Where a graph's weights lie if they are not in the model file itself."""
    return model.with_name(model.name + ".data")


def graph_bytes(model: Path) -> int:
    """Size of a graph, weights in a data file included."""
    data = data_file(model)
    return model.stat().st_size + (data.stat().st_size if data.is_file() else 0)


def engine_key(flavour: str, version: str, compute_capabilities: tuple[str, ...]) -> str:
    """``tensorrt-rtx-1.7.1.116-sm89-sm120``; ``any`` for an empty list."""
    parts = [f"sm{capability.replace('.', '')}" for capability in compute_capabilities] or ["any"]
    return "-".join([flavour, version, *parts])


def shortened(value: Any) -> str:
    """A JSON value on one short line; of an object its keys."""
    text = json.dumps(list(value) if isinstance(value, dict) else value)
    return text if len(text) <= 80 else f"{text[:79]}…"


def _one_of(name: str, value: str, choices: Mapping[str, Any] | tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name} {shortened(value)} is not one of {', '.join(choices)}")


def _explained(document: Any, error: msgspec.ValidationError) -> str:
    """The error with the field's full name and the value that was found there. Spoils ``document``."""
    text, _, place = str(error).rpartition(" - at `$") if " - at `$" in str(error) else (str(error), "", "")
    value, where = document, ""
    with contextlib.suppress(LookupError, TypeError, AttributeError):  # a field's name may look like a place
        for name, index in re.findall(r"\.(\w+)|\[(\d+|\.{3})\]", place):
            key: Any = name or index
            if index == "...":
                # msgspec names no keys: it is the one whose entry is refused in the same way when it stands alone.
                for key, entry in list(value.items())[:_MOST_KEYS_TRIED]:
                    value.clear()
                    value[key] = entry
                    if _refused(document, str(error)):
                        break
            elif index:
                key = int(index)
            value = value[key]
            where += f"[{key}]" if isinstance(key, int) else f"{'.' * bool(where)}{key}"
    found = printable(f"{where or 'manifest'}: {text}, found {shortened(value)}", 200)
    return f"{found}; rebuild the bundle with gtr-export build"


def _refused(document: Any, message: str) -> bool:
    try:
        msgspec.json.decode(json.dumps(document), type=Manifest)
    except msgspec.DecodeError as error:
        return str(error) == message
    return False
