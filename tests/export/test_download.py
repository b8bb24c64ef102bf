"""Downloads by the real curl from a server on this machine that behaves badly on request."""

from __future__ import annotations

import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from gtr_deploy.export.build import download as module
from gtr_deploy.export.build.download import find_or_download
from gtr_deploy.export.zoo import MEBIBYTE, WeightSource
from gtr_deploy.runtime.commands.console import Reporter
from gtr_deploy.runtime.errors import GtrError
from gtr_deploy.runtime.files import cache_dir

CONTENT = bytes(range(256)) * 2048  # 512 KiB
CURL = shutil.which("curl")

pytestmark = pytest.mark.skipif(CURL is None, reason="downloads are curl's work, and it is not installed")


@dataclass
class Behaviour:
    """What the server does with the next requests; ``ranges`` collects their Range headers."""

    content: bytes = CONTENT
    cut_after: list[int] = field(default_factory=list)  # per request: close after so many bytes; then no more cuts
    refuse: list[int] = field(default_factory=list)  # per request: answer with this status; then no more
    ignore_range: bool = False
    wrong_range: bool = False
    kind: str = "application/octet-stream"
    length: bool = True
    chunked: bool = False
    redirect: str = ""
    drop: int = 0  # close so many connections without an answer
    stall: threading.Event | None = None  # after cut_after bytes wait for it, then close
    ranges: list[str | None] = field(default_factory=list)


class Handler(BaseHTTPRequestHandler):
    behaviour: Behaviour

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def do_GET(self) -> None:
        b = self.behaviour
        if b.redirect and self.path != "/elsewhere":
            self.send_response(302)
            self.send_header("Location", b.redirect)
            self.end_headers()
            return
        asked = self.headers.get("Range")
        b.ranges.append(asked)
        if b.drop:
            b.drop -= 1
            return
        if b.refuse:
            self.send_error(b.refuse.pop(0))
            return
        start, total = 0, len(b.content)
        if asked and not b.ignore_range:
            start = int(asked.removeprefix("bytes=").removesuffix("-"))
            if start >= total:
                self.send_response(416)
                self.send_header("Content-Range", f"bytes */{total}")
                self.end_headers()
                return
            self.send_response(206)
            first = 0 if b.wrong_range else start
            self.send_header("Content-Range", f"bytes {first}-{total - 1}/{total}")
        else:
            self.send_response(200)
        body = b.content[start:]
        self.send_header("Content-Type", b.kind)
        if b.chunked:
            self.send_header("Transfer-Encoding", "chunked")
        elif b.length:
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if b.chunked:
            # One whole chunk, then the start of another that never comes.
            self.wfile.write(b"%x\r\n%s\r\n%x\r\nabc" % (len(body) // 2, body[: len(body) // 2], len(body)))
            return
        self.wfile.write(body[: b.cut_after.pop(0)] if b.cut_after else body)
        if b.stall:
            self.wfile.flush()
            b.stall.wait(20)


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[SimpleNamespace]:
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.setattr(module, "PAUSES", (0, 0, 0))
    behaviour = Behaviour()
    handler = type("OneHandler", (Handler,), {"behaviour": behaviour})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as http:
        thread = threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
        thread.start()
        yield SimpleNamespace(behaviour=behaviour, url=f"http://127.0.0.1:{http.server_address[1]}/file")
        http.shutdown()
        thread.join()


@pytest.fixture
def target(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("GTR_DEPLOY_CACHE", str(tmp_path))
    return tmp_path / "mar-x" / "checkpoint-last.pth"


def fetch(server: SimpleNamespace, target: Path, mebibytes: int = 0) -> Path:
    source = WeightSource(server.url, "pretrained_models/no/such/file", mebibytes)
    return find_or_download(source, f"{target.parent.name}/{target.name}", Reporter())


def failure(server: SimpleNamespace, target: Path, mebibytes: int = 0) -> str:
    with pytest.raises(GtrError) as caught:
        fetch(server, target, mebibytes)
    assert "\n" not in str(caught.value)
    assert not target.exists()
    return str(caught.value)


def part_of(target: Path) -> Path:
    return target.with_name(target.name + ".part")


def leave_part(target: Path, content: bytes) -> None:
    target.parent.mkdir()
    part_of(target).write_bytes(content)


class TestDownload:
    def test_plain(self, server: SimpleNamespace, target: Path) -> None:
        assert fetch(server, target) == target
        assert target.read_bytes() == CONTENT
        assert sorted(path.name for path in target.parent.iterdir()) == [target.name, f"{target.name}.lock"]

    def test_resumes_after_cuts(self, server: SimpleNamespace, target: Path) -> None:
        server.behaviour.cut_after = [1000, 500]
        fetch(server, target)
        assert target.read_bytes() == CONTENT
        assert server.behaviour.ranges == [None, "bytes=1000-", "bytes=1500-"]

    def test_resumes_an_earlier_run_through_a_redirect(self, server: SimpleNamespace, target: Path) -> None:
        leave_part(target, CONTENT[:777])
        server.behaviour.redirect = "/elsewhere"
        fetch(server, target)
        assert target.read_bytes() == CONTENT
        assert server.behaviour.ranges == ["bytes=777-"]

    def test_server_that_ignores_ranges(self, server: SimpleNamespace, target: Path) -> None:
        leave_part(target, b"something else")
        server.behaviour.ignore_range = True
        fetch(server, target)
        assert target.read_bytes() == CONTENT

    def test_server_that_sends_another_range(self, server: SimpleNamespace, target: Path) -> None:
        leave_part(target, CONTENT[:777])
        server.behaviour.wrong_range = True
        fetch(server, target)
        assert target.read_bytes() == CONTENT
        assert server.behaviour.ranges == ["bytes=777-", None]

    def test_part_that_is_already_whole(self, server: SimpleNamespace, target: Path) -> None:
        leave_part(target, CONTENT)
        fetch(server, target)
        assert target.read_bytes() == CONTENT
        assert server.behaviour.ranges == [f"bytes={len(CONTENT)}-"]

    def test_part_that_is_longer_than_any_such_file(self, server: SimpleNamespace, target: Path) -> None:
        leave_part(target, b"x" * (MEBIBYTE + 1))
        fetch(server, target)
        assert target.read_bytes() == CONTENT
        assert server.behaviour.ranges == [None]

    def test_without_content_length(self, server: SimpleNamespace, target: Path) -> None:
        server.behaviour.length = False
        server.behaviour.content = CONTENT * 3
        fetch(server, target, 1)
        assert target.read_bytes() == CONTENT * 3

    def test_busy_server_and_dropped_connections(self, server: SimpleNamespace, target: Path) -> None:
        server.behaviour.drop = 1
        server.behaviour.refuse = [503]
        fetch(server, target)
        assert target.read_bytes() == CONTENT

    def test_shows_how_far_it_is(
        self, server: SimpleNamespace, target: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        leave_part(target, CONTENT * 4)  # 2 of 4 MiB
        server.behaviour.content = CONTENT * 8
        fetch(server, target, 4)
        assert "download mar-x/checkpoint-last.pth: 2/4 MiB" in capsys.readouterr().err


class TestFailures:
    def test_cut_for_good_says_how_far_it_came(self, server: SimpleNamespace, target: Path) -> None:
        server.behaviour.content = CONTENT * 4
        server.behaviour.cut_after = [MEBIBYTE // 4] * 4
        message = failure(server, target, 2)
        assert "mar-x/checkpoint-last.pth stopped at 1.0 of 2 MiB (transfer closed with " in message
        assert "run again" in message
        assert part_of(target).stat().st_size == MEBIBYTE
        fetch(server, target, 2)
        assert target.read_bytes() == CONTENT * 4

    def test_broken_chunks(self, server: SimpleNamespace, target: Path) -> None:
        server.behaviour.chunked = True
        assert "stopped at" in failure(server, target)

    def test_wrong_size(self, server: SimpleNamespace, target: Path) -> None:
        leave_part(target, CONTENT[:777])
        message = failure(server, target, 7)
        assert "the server's file has 0.5 MiB, the published one 7 MiB" in message
        assert "--checkpoint" in message
        assert "--vae" in message
        assert "--random-weights" in message
        assert not part_of(target).exists()
        assert len(server.behaviour.ranges) == 1

    def test_wrong_size_and_a_part_that_is_longer(self, server: SimpleNamespace, target: Path) -> None:
        leave_part(target, b"x" * MEBIBYTE)
        assert "the server's file has 0.5 MiB, the published one 7 MiB" in failure(server, target, 7)
        assert not part_of(target).exists()
        assert server.behaviour.ranges == [f"bytes={MEBIBYTE}-", None]

    @pytest.mark.parametrize("length", [True, False])
    def test_larger_file(self, server: SimpleNamespace, target: Path, length: bool) -> None:
        server.behaviour.length = length
        server.behaviour.content = CONTENT * 2000
        assert "the server's file has more, the published one 1 MiB" in failure(server, target, 1)
        assert not part_of(target).exists()

    def test_web_page(self, server: SimpleNamespace, target: Path) -> None:
        server.behaviour.kind = "text/html; charset=utf-8"
        assert "the server answered with a web page instead of the file" in failure(server, target)
        assert not part_of(target).exists()

    def test_web_page_in_place_of_the_rest(self, server: SimpleNamespace, target: Path) -> None:
        leave_part(target, CONTENT[:777])
        server.behaviour.kind, server.behaviour.ignore_range = "text/html", True
        assert "the server answered with a web page instead of the file" in failure(server, target)
        assert part_of(target).read_bytes() == CONTENT[:777]

    @pytest.mark.parametrize("status", [404, 403, 416])
    def test_refusals_are_not_repeated(self, server: SimpleNamespace, target: Path, status: int) -> None:
        server.behaviour.refuse = [status] * 4
        message = failure(server, target)
        assert message.startswith("cannot download mar-x/checkpoint-last.pth (The requested URL returned error: ")
        assert str(status) in message
        assert len(server.behaviour.ranges) == 1

    def test_redirect_to_a_file_of_this_machine(self, server: SimpleNamespace, target: Path) -> None:
        server.behaviour.redirect = Path(__file__).as_uri()
        assert "cannot download" in failure(server, target)
        assert not part_of(target).exists()

    def test_no_server(self, server: SimpleNamespace, target: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(module, "PAUSES", (99, 99, 99))
        nobody = SimpleNamespace(url="http://127.0.0.1:9/file")
        message = failure(nobody, target)
        assert message.startswith("cannot download mar-x/checkpoint-last.pth (Failed to connect to 127.0.0.1")
        assert message.endswith("; give files with --checkpoint and --vae, or try the pipeline with --random-weights")

    def test_no_server_any_more(self, server: SimpleNamespace, target: Path) -> None:
        leave_part(target, CONTENT)
        nobody = SimpleNamespace(url="http://127.0.0.1:9/file")
        assert "stopped at 0.5 of 1 MiB (Failed to connect" in failure(nobody, target, 1)
        assert part_of(target).read_bytes() == CONTENT

    def test_stall(self, server: SimpleNamespace, target: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(module, "STALL_SECONDS", 1)
        monkeypatch.setattr(module, "PAUSES", ())
        server.behaviour.stall, server.behaviour.cut_after = threading.Event(), [1000]
        assert "stopped at 0.0 of 0 MiB (Operation too slow" in failure(server, target)
        server.behaviour.stall.set()
        assert part_of(target).stat().st_size == 1000

    def test_two_at_once(self, server: SimpleNamespace, target: Path) -> None:
        server.behaviour.stall, server.behaviour.cut_after = threading.Event(), [1000]
        first = threading.Thread(target=fetch, args=(server, target))
        first.start()
        while not part_of(target).exists():
            time.sleep(0.01)
        expected = f"another process is downloading {target}; wait until it ends, then run again"
        assert failure(server, target) == expected
        server.behaviour.stall.set()
        first.join()
        assert target.read_bytes() == CONTENT

    def test_ctrl_c_ends_curl_and_says_that_nothing_is_lost(self, server: SimpleNamespace, target: Path) -> None:
        server.behaviour.stall, server.behaviour.cut_after = threading.Event(), [MEBIBYTE // 4]
        program = f"""
from gtr_deploy.export.build.download import find_or_download
from gtr_deploy.export.zoo import WeightSource
from gtr_deploy.runtime.commands.console import Reporter
find_or_download(WeightSource({server.url!r}, "no/such/file", 1), "mar-x/checkpoint-last.pth", Reporter())
"""
        process = subprocess.Popen([sys.executable, "-c", program], stderr=subprocess.PIPE, text=True)
        while not (part_of(target).exists() and part_of(target).stat().st_size):
            time.sleep(0.01)
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=10)
        assert "0.2 of 1 MiB are here; the same command goes on from there" in said
        commands = (path.read_bytes() for path in Path("/proc").glob("[0-9]*/cmdline") if path.exists())
        assert not [command for command in commands if str(part_of(target)).encode() in command]
        server.behaviour.stall.set()
        fetch(server, target)
        assert target.read_bytes() == CONTENT

    def test_no_curl(self, server: SimpleNamespace, target: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("PATH", str(target))
        way_out = f"get {server.url} and put it at {target}, or give files with --checkpoint and --vae"
        assert failure(server, target).startswith(f"downloads need curl; install it, or {way_out}")

    def test_full_disk_beforehand(self, server: SimpleNamespace, target: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(module.shutil, "disk_usage", lambda _: SimpleNamespace(free=MEBIBYTE))
        assert "has 1.0 MiB free, the download needs 7.0 MiB" in failure(server, target, 7)
        assert server.behaviour.ranges == []

    def test_disk_that_fails_on_the_way(self, server: SimpleNamespace, target: Path) -> None:
        target.parent.mkdir()
        part_of(target).symlink_to("/dev/full")
        message = failure(server, target)
        assert message.startswith(f"cannot write {part_of(target)} (")
        assert "make room, or set GTR_DEPLOY_CACHE" in message

    def test_folder_that_cannot_be_made(self, server: SimpleNamespace, target: Path) -> None:
        target.parent.touch()
        assert "set GTR_DEPLOY_CACHE" in failure(server, target)


class TestFindOrDownload:
    @pytest.fixture(autouse=True)
    def folders(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        (tmp_path / "here").mkdir()
        monkeypatch.chdir(tmp_path / "here")
        monkeypatch.setenv("GTR_DEPLOY_CACHE", str(tmp_path / "cache"))

    def source(self, url: str = "http://127.0.0.1:9/", mebibytes: int = 0) -> WeightSource:
        return WeightSource(url, "pretrained_models/mar/mar_x/a.pth", mebibytes)

    def test_downloads_into_the_cache_once(self, server: SimpleNamespace, tmp_path: Path) -> None:
        for _ in range(2):
            path = find_or_download(self.source(server.url), "mar-x/a.pth", Reporter())
            assert path == tmp_path / "cache" / "mar-x" / "a.pth"
            assert path.read_bytes() == CONTENT
        assert len(server.behaviour.ranges) == 1

    def test_original_projects_folder(self, tmp_path: Path) -> None:
        path = tmp_path / "here" / self.source().default_path
        path.parent.mkdir(parents=True)
        path.write_bytes(b"weights")
        assert find_or_download(self.source(), "mar-x/a.pth", Reporter()).resolve() == path

    def test_wrong_size_is_refused(self, tmp_path: Path) -> None:
        path = tmp_path / "here" / self.source().default_path
        path.parent.mkdir(parents=True)
        path.write_bytes(b"x" * (MEBIBYTE // 2))
        with pytest.raises(GtrError, match=r"a\.pth has 0\.5 MiB, the published file has 2 MiB; delete it"):
            find_or_download(self.source(mebibytes=2), "mar-x/a.pth", Reporter())

    def test_cache_folder(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        assert cache_dir() == tmp_path / "cache"
        monkeypatch.setenv("HOME", str(tmp_path))
        monkeypatch.setenv("GTR_DEPLOY_CACHE", "~/elsewhere")
        assert cache_dir() == tmp_path / "elsewhere"
        monkeypatch.delenv("GTR_DEPLOY_CACHE")
        assert cache_dir() == tmp_path / ".cache" / "gtr-deploy"
