"""Manifests as an attacker would change them, knowing their structure: one line each from every command, soon.

``GTR_FUZZ_EXAMPLES`` asks for more than the 2,000 of `make hostile`; other seeds come with ``--hypothesis-seed``.
"""

from __future__ import annotations

import copy
import json
import os
import re
import resource
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result
from commands import runner
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from gtr_deploy.export.cli import main as gtr_export
from gtr_deploy.runtime.cli import main as gtr_run

pytestmark = pytest.mark.hostile

EXAMPLES = int(os.environ.get("GTR_FUZZ_EXAMPLES", "2000"))
SHARES = 4  # tests that the examples are dealt out to, so that two processes can work
SECONDS, GROWTH_KB = 20, 1_000_000

DEEP: Any = None
for _ in range(300):
    DEEP = [DEEP]
JUNK: list[Any] = [
    None, True, False, 0, 1, -1, 2, 7, 20, 300, 4096, 5000, 2**16, 2**31, 2**53, 2**63, 2**64, 10**12, 10**15, 10**400,
    0.5, -0.0, 1e-300, 1e308, float("nan"), float("inf"), "", " ", "x", "9", "fp16", "int8", "mar", "raster", "..",
    "../../x", "/etc/passwd", "/proc/self/pagemap", "/dev/zero", "graphs", "graphs/decoder.onnx", "a\0b", "\ud800",
    "\x1b]0;pwned\x07", "\x1b[2J", "a\nb", "\u202edcba", "\uff19", "a" * 5000, [], [1], [[]], ["x"] * 3, [0] * 2000, {},
    {"a": 1}, {"\x1b[2J": 1}, {"": None}, DEEP, [1, 2, 3], [10**30] * 2,
]  # fmt: skip
TINY = ["--plan", "gtr-fast", "--stage-steps", "1,1,1", "--generation-diffusion", "2", "--threads", "1"]
FEW = ("--calibration-images", "1", "--compared-images", "1", "--calibration-plan", "gtr-fast", "--threads", "1")
NO_GPU = ("--compute-capability", "8.9", "--plans", "gtr-fast", "--max-batch", "1", "--optimization-level", "0")
SELDOM = 5
TINY += ["--reconstruction-diffusion", "2", "--fts-diffusion", "3"]


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The way to every value of a JSON document but the whole."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, entry in items:
        yield (*path, key)
        yield from places(entry, (*path, key))


def put(document: Any, path: tuple[Any, ...], change: Callable[[Any, Any], None]) -> None:
    """Changes ``container[key]`` at the end of the path, where an earlier change has left it."""
    for key in path[:-1]:
        try:
            document = document[key]
        except (LookupError, TypeError):
            return
    if isinstance(document, dict | list):
        change(document, path[-1])


def is_number(document: Any, path: tuple[Any, ...]) -> bool:
    """Whether a number stands there."""
    for key in path:
        document = document[key]
    return type(document) in (int, float)


def mutated(manifest: Any, changes: list[tuple[int, str, Any, int]]) -> Any:
    """The manifest with the changes: where (an index into its places), how, by what, and a second place."""
    manifest = copy.deepcopy(manifest)
    for where, how, junk, other in changes:
        known = list(places(manifest))
        if how == "nudge":  # numbers that may well be in range
            known = [path for path in known if path[-1] not in ("bytes", "schema") and is_number(manifest, path)]
        if not known:
            continue
        path, second, junk = known[where % len(known)], known[other % len(known)], copy.deepcopy(junk)

        def change(container: Any, key: Any, how=how, junk=junk, second=second, other=other) -> None:
            there = key in container if isinstance(container, dict) else key < len(container)
            if how == "add" and isinstance(container, dict):
                container[junk if isinstance(junk, str) else "extra"] = junk
            elif not there:
                return
            elif how == "delete":
                del container[key]
            elif how == "wrap":
                container[key] = [container[key]]
            elif how == "nudge":
                number = container[key]
                container[key] = [number + 1, number - 1, number * 2, number // 2, number / 2][other % 5]
            elif how == "rename" and isinstance(container, dict):
                container[str(junk)] = container.pop(key)
            elif how == "swap":
                found: list[Any] = []
                put(manifest, second, lambda c, k: found.append(c[k]) if k in c or isinstance(c, list) else None)
                container[key] = copy.deepcopy(found[0]) if found else junk
            else:
                container[key] = junk

        put(manifest, path, change)
    return manifest


CHANGES = st.lists(
    st.tuples(
        st.integers(0, 10_000),
        st.sampled_from(["put", "put", "nudge", "nudge", "delete", "wrap", "rename", "swap", "add"]),
        st.sampled_from(JUNK) | st.integers() | st.text(max_size=30) | st.floats(),
        st.integers(0, 10_000),
    ),
    min_size=1,
    max_size=3,
)


def well_behaved(result: Result) -> bool:
    """Whether the command did its work; it may refuse in one short line, and nothing else."""
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    assert result.exit_code in (0, 1, 2)
    said = result.stdout + result.stderr
    assert all(character.isprintable() or character == "\n" for character in said), ascii(said)
    if result.exit_code and "rung reached: " not in result.stdout:  # verify, which then says what failed in a table
        line = re.sub(r"/\S+", "/…", result.stderr.splitlines()[-1])  # paths are the machine's
        assert line.startswith("gtr-")
        assert "unforeseen" not in line, line
        assert len(line) <= 300, line
    return result.exit_code == 0


def run(group: Any, *arguments: str | Path) -> Result:
    """One command in this process; an alarm ends it after 20 seconds."""
    signal.alarm(SECONDS)
    try:
        return runner().invoke(group, [str(argument) for argument in arguments], prog_name=group.name)
    finally:
        signal.alarm(0)


def strictly(text: str) -> Any:
    """JSON as other readers take it: without NaN."""
    return json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))


@pytest.fixture(scope="module")
def victim(digits_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle whose manifest is changed again and again; its graphs are never written to."""
    return Path(shutil.copytree(digits_bundle, tmp_path_factory.mktemp("hostile") / "bundle"))


def all_commands(victim: Path, out: Path, index: int) -> None:
    """The quick commands on every manifest; of the others one that refuses it, too, or does its work with it. Those
    that take seconds do so with few of the manifests that are accepted."""
    accepted = well_behaved(run(gtr_run, "plan", victim))
    shown = run(gtr_export, "inspect", victim, "--json")
    if well_behaved(shown):
        strictly(shown.stdout)
    generate = (gtr_run, "generate", victim, "--classes", "3", "--out", out / str(index), *TINY)
    fast: list[tuple[Any, ...]] = [
        (*generate, "--provider", "cpu"),
        (*generate, "--backend", "openvino"),
        (*generate, "--backend", "torch"),
        (gtr_export, "inspect", victim),
        (gtr_run, "doctor", victim),
        (gtr_run, "bench", victim, "--batch-size", "1", "--repeat", "1", *TINY),
        (gtr_run, "compare", victim, "--classes", "3", "--grid", out / "grid.png", *TINY),
        (gtr_run, "evaluate", victim, "--images", "10", *TINY),
    ]
    slow: list[tuple[Any, ...]] = [
        (gtr_export, "verify", victim, "--images", "1", "--plans", "gtr-fast"),
        (gtr_export, "calibrate", victim, "--out", out / "int8", *FEW),
        (gtr_export, "sensitivity", victim, *FEW[:2], *FEW[-2:]),
        (gtr_export, "engine", victim, "--engine", "tensorrt-rtx", *NO_GPU),
    ]
    commands, turn = fast + slow, index
    if accepted:
        commands, turn = (slow, index // SELDOM) if index % SELDOM == 0 else (fast, index)
    finished = well_behaved(run(*commands[turn % len(commands)]))
    assert accepted or not finished


@pytest.mark.parametrize("share", range(SHARES))
def test_mutated_manifests(victim: Path, tmp_path: Path, share: int) -> None:
    manifest = json.loads((victim / "manifest.json").read_text())
    before, count = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, 0

    @settings(
        max_examples=EXAMPLES // SHARES, deadline=None, derandomize=True, database=None,
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    @given(CHANGES, st.integers(share * 10**6, share * 10**6 + 10**6))
    @example([(share, "put", 10**400, 0)], share)
    def all_are_well_behaved(changes: list[tuple[int, str, Any, int]], _: int) -> None:
        nonlocal count
        count += 1
        (victim / "manifest.json").write_text(json.dumps(mutated(manifest, changes)))
        all_commands(victim, tmp_path, count)

    try:
        all_are_well_behaved()
    finally:
        (victim / "manifest.json").write_text(json.dumps(manifest))
    assert count >= EXAMPLES // SHARES
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < GROWTH_KB


TORN = st.text(max_size=20) | st.sampled_from(["[" * 3000, "{", "1e999", "NaN"])


@settings(max_examples=200, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
@given(
    st.integers(0, 20_000),
    st.integers(0, 60),
    st.text(max_size=20) | st.sampled_from(["[" * 3000, "{", "1e999", "NaN"]),
)
def test_torn_text(victim: Path, tmp_path: Path, at: int, cut: int, text: str) -> None:
    whole = (victim / "manifest.json").read_text()
    at %= len(whole)
    try:
        (victim / "manifest.json").write_text(whole[:at] + text + whole[at + cut :], errors="surrogatepass")
        all_commands(victim, tmp_path, at)
    finally:
        (victim / "manifest.json").write_text(whole)


def test_a_manifest_of_megabytes(victim: Path) -> None:
    whole = (victim / "manifest.json").read_text()
    try:
        (victim / "manifest.json").write_text(
            whole.replace('"tools": {', '"tools": {"s": [' + "[]," * 10**7 + "1],", 1)
        )
        result = run(gtr_run, "plan", victim)
        assert not well_behaved(result)
        assert "a manifest has at most" in result.stderr
    finally:
        (victim / "manifest.json").write_text(whole)
