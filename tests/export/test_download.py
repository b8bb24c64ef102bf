"""Downloads against a server on this machine that behaves badly on request."""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from gtr_deploy.export.build import download as module
from gtr_deploy.export.build.download import MEBIBYTE, download, find_or_download
from gtr_deploy.export.zoo import WeightSource
from gtr_deploy.runtime.errors import GtrError
from gtr_deploy.runtime.files import cache_dir

CONTENT = bytes(range(256)) * 2048  # 512 KiB


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
    name_total: bool = True
    redirect: bool = False
    drop: int = 0  # close so many connections without an answer
    ranges: list[str | None] = field(default_factory=list)
    clients: list[str | None] = field(default_factory=list)


class Handler(BaseHTTPRequestHandler):
    behaviour: Behaviour

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def do_GET(self) -> None:
        b = self.behaviour
        if b.redirect and self.path != "/elsewhere":
            self.send_response(302)
            self.send_header("Location", "/elsewhere")
            self.end_headers()
            return
        asked = self.headers.get("Range")
        b.ranges.append(asked)
        b.clients.append(self.headers.get("User-Agent"))
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
                if b.name_total:
                    self.send_header("Content-Range", f"bytes */{total}")
                self.end_headers()
                return
            self.send_response(206)
            first = 0 if b.wrong_range else start
            self.send_header("Content-Range", f"bytes {first}-{total - 1}/{total if b.name_total else '*'}")
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


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[SimpleNamespace]:
    monkeypatch.setenv("no_proxy", "*")
    behaviour = Behaviour()
    handler = type("OneHandler", (Handler,), {"behaviour": behaviour})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as http:
        thread = threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
        thread.start()
        yield SimpleNamespace(behaviour=behaviour, url=f"http://127.0.0.1:{http.server_address[1]}/file")
        http.shutdown()
        thread.join()


@pytest.fixture
def target(tmp_path: Path) -> Path:
    return tmp_path / "mar-x" / "checkpoint-last.pth"


def ignore(done: int, total: int) -> None:
    pass


def fetch(server: SimpleNamespace, target: Path, mebibytes: int = 0, **options: Any) -> Path:
    return download(server.url, target, mebibytes, options.pop("progress", ignore), 5, backoff=0.001, **options)


def failure(server: SimpleNamespace, target: Path, mebibytes: int = 0, **options: Any) -> str:
    with pytest.raises(GtrError) as caught:
        fetch(server, target, mebibytes, **options)
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
        calls: list[tuple[int, int]] = []
        assert fetch(server, target, progress=lambda *numbers: calls.append(numbers)) == target
        assert target.read_bytes() == CONTENT
        assert sorted(path.name for path in target.parent.iterdir()) == [target.name, f"{target.name}.lock"]
        assert calls[0] == (0, len(CONTENT))
        assert calls[-1] == (len(CONTENT), len(CONTENT))
        assert calls == sorted(calls)
        assert server.behaviour.clients == ["gtr-deploy"]

    def test_resumes_after_cuts(self, server: SimpleNamespace, target: Path) -> None:
        server.behaviour.cut_after = [1000, 500]
        fetch(server, target)
        assert target.read_bytes() == CONTENT
        assert server.behaviour.ranges == [None, "bytes=1000-", "bytes=1500-"]

    def test_resumes_an_earlier_run_through_a_redirect(self, server: SimpleNamespace, target: Path) -> None:
        leave_part(target, CONTENT[:777])
        server.behaviour.redirect = True
        fetch(server, target)
        assert target.read_bytes() == CONTENT
        assert server.behaviour.ranges == ["bytes=777-"]

    def test_resumes_where_the_server_hides_the_total(self, server: SimpleNamespace, target: Path) -> None:
        leave_part(target, CONTENT[:777])
        server.behaviour.name_total = False
        calls: list[tuple[int, int]] = []
        fetch(server, target, progress=lambda *numbers: calls.append(numbers))
        assert calls[0] == (777, len(CONTENT))
        assert target.read_bytes() == CONTENT

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

    def test_part_that_is_longer_than_the_file(self, server: SimpleNamespace, target: Path) -> None:
        leave_part(target, b"x" * (len(CONTENT) + 1))
        fetch(server, target)
        assert target.read_bytes() == CONTENT

    def test_part_that_is_longer_than_any_such_file(self, server: SimpleNamespace, target: Path) -> None:
        leave_part(target, b"x" * (MEBIBYTE + 1))
        fetch(server, target)
        assert target.read_bytes() == CONTENT
        assert server.behaviour.ranges == [None]

    def test_without_content_length(self, server: SimpleNamespace, target: Path) -> None:
        server.behaviour.length = False
        server.behaviour.content = CONTENT * 3
        calls: list[tuple[int, int]] = []
        fetch(server, target, 1, progress=lambda *numbers: calls.append(numbers))
        assert target.read_bytes() == CONTENT * 3
        assert calls[0] == (0, MEBIBYTE)
        assert calls[-1] == (3 * len(CONTENT), 3 * len(CONTENT))

    def test_busy_server_and_dropped_connections(self, server: SimpleNamespace, target: Path) -> None:
        server.behaviour.drop = 1
        server.behaviour.refuse = [503]
        fetch(server, target)
        assert target.read_bytes() == CONTENT

    def test_file_that_is_already_there(self, server: SimpleNamespace, target: Path) -> None:
        target.parent.mkdir()
        target.write_bytes(b"weights")
        assert fetch(server, target).read_bytes() == b"weights"
        assert server.behaviour.ranges == []


class TestFailures:
    def test_cut_for_good_says_how_far_it_came(self, server: SimpleNamespace, target: Path) -> None:
        server.behaviour.content = CONTENT * 4
        server.behaviour.cut_after = [MEBIBYTE // 4] * 4
        message = failure(server, target, 2)
        assert "mar-x/checkpoint-last.pth stopped at 1.0 of 2 MiB (the connection closed early)" in message
        assert "run again" in message
        assert part_of(target).stat().st_size == MEBIBYTE
        fetch(server, target, 2)
        assert target.read_bytes() == CONTENT * 4

    def test_cut_without_content_length(self, server: SimpleNamespace, target: Path) -> None:
        server.behaviour.length = False
        server.behaviour.content = CONTENT * 4
        server.behaviour.cut_after = [1000]
        assert "stopped at 0.0 of 2 MiB" in failure(server, target, 2, retries=0)
        fetch(server, target, 2)
        assert target.read_bytes() == CONTENT * 4

    def test_broken_chunks(self, server: SimpleNamespace, target: Path) -> None:
        server.behaviour.chunked = True
        assert "stopped at" in failure(server, target, retries=0)

    def test_wrong_size_by_content_length(self, server: SimpleNamespace, target: Path) -> None:
        leave_part(target, CONTENT[:777])
        message = failure(server, target, 7)
        assert "the server's file has 0.5 MiB, the published one 7 MiB" in message
        assert "--checkpoint" in message
        assert "--vae" in message
        assert "--random-weights" in message
        assert not part_of(target).exists()
        assert len(server.behaviour.ranges) == 1

    def test_endless_answer_without_content_length(self, server: SimpleNamespace, target: Path) -> None:
        server.behaviour.length = False
        server.behaviour.content = CONTENT * 9
        assert "the published one 1 MiB" in failure(server, target, 1)
        assert not part_of(target).exists()

    def test_part_of_another_file_and_a_server_that_hides_the_total(
        self, server: SimpleNamespace, target: Path
    ) -> None:
        leave_part(target, b"x" * len(CONTENT))
        server.behaviour.name_total = False
        fetch(server, target)
        assert target.read_bytes() == CONTENT

    def test_web_page(self, server: SimpleNamespace, target: Path) -> None:
        server.behaviour.kind = "text/html; charset=utf-8"
        assert "the server answered with a web page instead of the file" in failure(server, target)
        assert not part_of(target).exists()

    @pytest.mark.parametrize("status", [404, 403, 416])
    def test_refusals_are_not_repeated(self, server: SimpleNamespace, target: Path, status: int) -> None:
        server.behaviour.refuse = [status] * 4
        assert f"cannot download mar-x/checkpoint-last.pth (HTTP {status} " in failure(server, target)
        assert len(server.behaviour.ranges) == 1

    def test_no_server(self, server: SimpleNamespace, target: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(module.time, "sleep", lambda _: pytest.fail("waited for a network that is not there"))
        nobody = SimpleNamespace(url="http://127.0.0.1:9/file")
        assert failure(nobody, target) == (
            "cannot download mar-x/checkpoint-last.pth (Connection refused); "
            "give files with --checkpoint and --vae, or try the pipeline with --random-weights"
        )

    def test_read_timeout(self, server: SimpleNamespace, target: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def stall(*_: Any) -> bytes:
            raise TimeoutError("timed out")

        monkeypatch.setattr(module.http.client.HTTPResponse, "read1", stall)
        assert "(timed out)" in failure(server, target)
        assert len(server.behaviour.ranges) == 4

    def test_two_at_once(self, server: SimpleNamespace, target: Path) -> None:
        messages: list[str] = []

        def second(done: int, total: int) -> None:
            if not messages:
                messages.append(failure(server, target))

        fetch(server, target, progress=second)
        assert messages == [f"another process is downloading {target}; wait until it ends, then run again"]
        assert target.read_bytes() == CONTENT

    def test_full_disk_beforehand(self, server: SimpleNamespace, target: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(module.shutil, "disk_usage", lambda _: SimpleNamespace(free=MEBIBYTE))
        assert "has 1.0 MiB free, the download needs 7.0 MiB" in failure(server, target, 7)
        assert server.behaviour.ranges == []

    @pytest.mark.parametrize(
        ("number", "words"), [(errno.ENOSPC, "no space left for"), (errno.EIO, "Input/output error")]
    )
    def test_disk_that_fails_on_the_way(
        self, server: SimpleNamespace, target: Path, monkeypatch: pytest.MonkeyPatch, number: int, words: str
    ) -> None:
        def fail(_: int) -> None:
            raise OSError(number, os.strerror(number))

        monkeypatch.setattr(module.os, "fsync", fail)
        assert words in failure(server, target)

    def test_folder_that_cannot_be_made(self, server: SimpleNamespace, tmp_path: Path) -> None:
        (tmp_path / "file").touch()
        assert "set GTR_DEPLOY_CACHE" in failure(server, tmp_path / "file" / "mar-x" / "a.pth")


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
            path = find_or_download(self.source(server.url), "mar-x/a.pth", ignore)
            assert path == tmp_path / "cache" / "mar-x" / "a.pth"
            assert path.read_bytes() == CONTENT
        assert len(server.behaviour.ranges) == 1

    def test_original_projects_folder(self, tmp_path: Path) -> None:
        path = tmp_path / "here" / self.source().default_path
        path.parent.mkdir(parents=True)
        path.write_bytes(b"weights")
        assert find_or_download(self.source(), "mar-x/a.pth", ignore).resolve() == path

    def test_wrong_size_is_refused(self, tmp_path: Path) -> None:
        path = tmp_path / "here" / self.source().default_path
        path.parent.mkdir(parents=True)
        path.write_bytes(b"x" * (MEBIBYTE // 2))
        with pytest.raises(GtrError, match=r"a\.pth has 0\.5 MiB, the published file has 2 MiB; delete it"):
            find_or_download(self.source(mebibytes=2), "mar-x/a.pth", ignore)

    def test_cache_folder(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        assert cache_dir() == tmp_path / "cache"
        monkeypatch.setenv("HOME", str(tmp_path))
        monkeypatch.setenv("GTR_DEPLOY_CACHE", "~/elsewhere")
        assert cache_dir() == tmp_path / "elsewhere"
        monkeypatch.delenv("GTR_DEPLOY_CACHE")
        assert cache_dir() == tmp_path / ".cache" / "gtr-deploy"
