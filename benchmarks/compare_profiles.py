"""Profiles as part of the suite: run, stored beside the results, and shown as a table."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from compare_summary import table
from profile_generation import full_report, heading, plot_profile
from profile_parts import HOST

from gtr_deploy.runtime import Bundle
from gtr_deploy.runtime.commands.console import Reporter
from gtr_deploy.runtime.files import read_json, write_json

OPERATORS = 5
"""How many operator types of each graph the table names."""


def run_profiles(
    wanted: Sequence[tuple[Path, str, int | None]], folder: Path, plots: Path, threads: int, reporter: Reporter
) -> None:
    """Profiles bundles on ONNX Runtime.

    Args:
        wanted: bundle folder, preset, AR steps (None for all).
        folder: gets ``profile-<model>-<precision>-<plan>.json``.
        plots: gets ``performance-profile.png`` of the first.
    """
    for index, (source, plan, ar_steps) in enumerate(wanted):
        bundle = Bundle.load(source)
        value, found, operators = full_report(bundle, plan, "onnxruntime", threads, 1, ar_steps, reporter)
        write_json(folder / f"profile-{value['model']}-{value['precision']}-{plan}.json", value)
        if index == 0:
            plots.mkdir(parents=True, exist_ok=True)
            path = plots / "performance-profile.png"
            plot_profile(path, heading(value), found, operators, value["ar_steps"])


def profiles_table(folder: Path) -> str:
    """One row per stored profile: shares of the parts, and the operators that take most."""
    rows = []
    for path in sorted(folder.glob("profile-*.json")):
        value: dict[str, Any] = read_json(path)
        parts, seconds = value["parts"], value["seconds"]
        outside = sum(parts[part] for part in HOST if part != "backend host")
        cells = [f"{parts['backbone'] / seconds:.1%}", f"{parts['head'] / seconds:.1%}"]
        cells += [f"{parts['backend host'] / seconds:.2%}", f"{outside / seconds:.2%}"]
        name = f"{value['model']} {value['precision']} `{value['plan']}`, {len(value['ar_steps'])} AR steps"
        rows.append([name, *cells, *(_operators(value, part) for part in ("backbone", "head"))])
    columns = ["", "backbone", "head", "backend's own host code", "sampler", "in the backbone", "in the head"]
    return table(columns, rows) if rows else "No profile was run."


def _operators(value: dict[str, Any], part: str) -> str:
    found = [entry for entry in value["operators"] if entry["part"] == part][:OPERATORS]
    return ", ".join(f"{entry['name']} {entry['share']:.0%}" for entry in found)
