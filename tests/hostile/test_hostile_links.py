"""Links in somebody else's bundle: what a digest does not vouch for is not read, and nothing is waited for."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import Result
from linked import in_a_cache

from gtr_deploy.runtime.bundle.links import plain_files
from gtr_deploy.runtime.bundle.reader import Bundle
from gtr_deploy.runtime.errors import BundleError

pytestmark = pytest.mark.hostile
Cli = Callable[..., Result]
GRAPH = "graphs/decoder.onnx"


def _pipe(place: Path) -> Path:
    os.mkfifo(place / "pipe")
    return place / "pipe"


def _circle(place: Path) -> Path:
    (place / "a").symlink_to(place / "b")
    (place / "b").symlink_to(place / "a")
    return place / "a"


TARGETS: dict[str, Callable[[Path], Path]] = {
    "passwd": lambda _: Path("/etc/passwd"),
    "zero": lambda _: Path("/dev/zero"),
    "own memory": lambda _: Path("/proc/self/mem"),
    "pipe": _pipe,
    "circle": _circle,
    "nowhere": lambda place: place / "none",
    "folder": lambda _: Path("/etc"),
}


@pytest.mark.parametrize("size", ["listed", "none", "its own"])
@pytest.mark.parametrize("target", TARGETS)
def test_links_to_what_is_no_graph(own_bundle: Path, tmp_path: Path, target: str, size: str, run_cli: Cli) -> None:
    """Whatever size the manifest gives, and where checksums are not asked for (doctor) as well."""
    leads_to = TARGETS[target](tmp_path)
    (own_bundle / GRAPH).unlink()
    (own_bundle / GRAPH).symlink_to(leads_to)
    manifest = json.loads((own_bundle / "manifest.json").read_text())
    if size != "listed":
        own = leads_to.stat().st_size if size == "its own" and leads_to.exists() else 0
        manifest["graphs"]["decoder"]["model"]["bytes"] = own
        (own_bundle / "manifest.json").write_text(json.dumps(manifest))
    for command in (["generate", own_bundle, "--classes", "3", "--out", tmp_path / "out"], ["doctor", own_bundle]):
        result = run_cli(*command)
        assert result.exit_code in (0 if command[0] == "doctor" else 1, 1)  # torch needs no graphs
        assert "root:" not in result.output
        assert "unforeseen" not in result.output
    for checksums in (True, False):
        with pytest.raises(BundleError, match=r"is missing|the manifest says|cannot be read"):
            Bundle.load(own_bundle).graph_files(checksums)


def test_a_folder_that_is_a_link(own_bundle: Path, tmp_path: Path) -> None:
    """Its files are followed, too, as far as digests vouch for them; nothing is written there."""
    shutil.move(own_bundle / "graphs", tmp_path / "elsewhere")
    (own_bundle / "graphs").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "reports").mkdir()
    (own_bundle / "reports").symlink_to(tmp_path / "reports")
    bundle = Bundle.load(own_bundle)
    assert bundle.graph_files(checksums=False)
    with pytest.raises(BundleError, match="leads outside"):
        bundle.write_report("parity", {})
    assert not os.listdir(tmp_path / "reports")
    (tmp_path / "elsewhere" / "decoder.onnx").write_bytes((tmp_path / "elsewhere" / "decoder.onnx").read_bytes()[::-1])
    with pytest.raises(BundleError, match="the manifest says"):
        bundle.graph_files(checksums=False)


def test_a_report_that_is_a_link(own_bundle: Path, tmp_path: Path) -> None:
    """Its place is taken, what it led to is left alone."""
    mine = tmp_path / "mine.json"
    mine.write_text("{}")
    (own_bundle / "reports").mkdir()
    (own_bundle / "reports" / "parity.json").symlink_to(mine)
    Bundle.load(own_bundle).write_report("parity", {"a": 1})
    assert mine.read_text() == "{}"
    assert not (own_bundle / "reports" / "parity.json").is_symlink()


@pytest.mark.parametrize("file", ["backbone.onnx", "backbone.onnx.data"])
def test_a_link_that_is_swapped_while_it_is_opened(digits_bundle: Path, tmp_path: Path, file: str) -> None:
    snapshot = in_a_cache(digits_bundle, tmp_path)
    graph = Bundle.load(snapshot).graph_files()["backbone"]
    link = snapshot / "graphs" / file
    other = tmp_path / "other"
    other.write_bytes(link.read_bytes()[:-1] + b"x")
    link.unlink()
    link.symlink_to(other)
    with pytest.raises(BundleError, match="was changed while"):
        graph.confirm()
    if file.endswith(".data"):
        with pytest.raises(BundleError, match="was changed while"), plain_files(graph):
            pass


def test_links_that_are_swapped_all_the_time(digits_bundle: Path, tmp_path: Path, run_cli: Cli) -> None:
    """Between a graph, a pipe and /dev/zero: each command ends, with pictures or with a line."""
    snapshot = in_a_cache(digits_bundle, tmp_path / "hub")
    link, good = snapshot / GRAPH, (snapshot / GRAPH).resolve()
    done = threading.Event()

    def swap() -> None:
        targets = [good, _pipe(tmp_path), Path("/dev/zero"), good]
        while not done.is_set():
            for number, target in enumerate(targets):
                new = tmp_path / f"link-{number}"
                new.symlink_to(target)
                os.replace(new, link)

    swapper = threading.Thread(target=swap)
    swapper.start()
    try:
        for _ in range(5):
            result = run_cli("doctor", snapshot)
            assert result.exit_code in (0, 1)
            assert "unforeseen" not in result.output
    finally:
        done.set()
        swapper.join()
    subprocess.run(["rm", "-r", str(tmp_path / "hub")], check=True)
