"""A bundle as the Hugging Face cache lays it out: every file is a relative link to a blob called by its digest."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import onnx

from gtr_deploy.runtime.bundle.manifest import GraphFiles
from gtr_deploy.runtime.files import sha256


def in_a_cache(bundle: Path, cache: Path, data_files: bool = True) -> Path:
    """The snapshot of a copy of ``bundle``; its two networks with their weights in data files."""
    work, snapshot, blobs = cache / "work", cache / "snapshots" / "0123abc", cache / "blobs"
    shutil.copytree(bundle, work)
    manifest = json.loads((work / "manifest.json").read_text())
    for kind in ("backbone", "diffusion_step") if data_files else ():
        file = f"graphs/{kind}.onnx"
        onnx.save(
            onnx.load(str(work / file)), str(work / file), save_as_external_data=True, location=f"{kind}.onnx.data"
        )
        stored = GraphFiles.of(work, file)
        assert stored.data is not None
        for name, one in (("model", stored.model), ("data", stored.data)):
            manifest["graphs"][kind][name] = {"file": one.file, "bytes": one.bytes, "sha256": one.sha256}
    (work / "manifest.json").write_text(json.dumps(manifest))
    blobs.mkdir()
    for path in sorted(path for path in work.rglob("*") if path.is_file()):
        blob, link = blobs / sha256(path), snapshot / path.relative_to(work)
        shutil.copyfile(path, blob)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(os.path.relpath(blob, link.parent))
    shutil.rmtree(work)
    return snapshot
