"""gtr-export doctor and models: what this machine has, what is missing, and the line that mends it."""

from __future__ import annotations

import os
import platform
import shutil
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from ..runtime.commands.doctor import Finding
from ..runtime.files import cache_dir
from ..runtime.models.families import family_of
from .zoo import MODELS, ModelEntry, WeightSource

#: package, what it is for, how to get it
_PACKAGES = (
    ("torch", "export and the reference", "pip install 'gtr-deploy[export]'"),
    ("onnx", "checking graphs", "pip install 'gtr-deploy[export]'"),
    ("onnxscript", "PyTorch's ONNX exporter", "pip install 'gtr-deploy[export]'"),
    ("safetensors", "reading .safetensors", "pip install 'gtr-deploy[export]'"),
    ("onnxruntime", "running bundles on the CPU, gtr-export verify", "pip install 'gtr-deploy[cpu]'"),
)


def examine() -> list[Finding]:
    """Looks at this machine; imports none of the heavy packages."""
    findings = [Finding("python", "info", f"{platform.python_version()} on {platform.system()} {platform.machine()}")]
    for name, purpose, remedy in _PACKAGES:
        found = _version(name)
        if name == "onnxruntime" and found is None:
            found = _version("onnxruntime-gpu")
        if found is None:
            findings.append(Finding(name, "missing", f"needed for {purpose}; {remedy}"))
        else:
            findings.append(Finding(name, "ok", f"{found} ({purpose})"))
    machine = f"{os.cpu_count()} CPUs"
    if hasattr(os, "sysconf"):  # not there on Windows
        machine += f", {os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / 2**30:.0f} GiB memory"
    findings.append(Finding("machine", "info", machine))
    folder = cache_dir()
    existing = next(parent for parent in (folder, *folder.absolute().parents) if parent.exists())
    free = shutil.disk_usage(existing).free / 2**30
    findings.append(Finding("cache", "info", f"{folder}, {free:.0f} GiB free ($GTR_DEPLOY_CACHE moves it)"))
    for name, entry in MODELS.items():
        places = [describe_source(source, cached) for source, cached in _sources(name, entry)]
        findings.append(Finding(name, "info", "; ".join(places) if places else "weights ship with the package"))
    return findings


def _sources(name: str, entry: ModelEntry) -> list[tuple[WeightSource, str]]:
    return [
        (source, cached)
        for source, cached in ((entry.checkpoint, f"{name}/checkpoint-last.pth"), (entry.vae, "vae/kl16.ckpt"))
        if source is not None
    ]


def describe_source(source: WeightSource, cached_name: str) -> str:
    """Where a published file lies on this machine, or that it would be downloaded."""
    for path in (cache_dir() / cached_name, Path(source.default_path)):
        if path.is_file():
            return f"{path}"
    return f"{cached_name} not here ({source.mebibytes} MiB to download)"


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def model_rows() -> list[dict[str, Any]]:
    """One row per model of the zoo, for ``gtr-export models``."""
    rows = []
    for name, entry in MODELS.items():
        a = entry.architecture
        rows.append(
            {
                "model": name,
                "parameters": family_of(a).parameters(a),
                "tokens": a.tokens,
                "width": a.width,
                "family": a.family,
                "head": f"{a.head_depth}x{a.head_width}",
                "image": f"{a.image_size[1]}x{a.image_size[0]}",
                "asked for": entry.model.conditioner.summary,
                "cfg": entry.plan_defaults["cfg"],
                "weights": "; ".join(describe_source(*pair) for pair in _sources(name, entry)) or "in the package",
            }
        )
    return rows
