"""gtr-export as a person types it."""

from __future__ import annotations

import http.server
import json
import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from click.testing import Result
from commands import one_line_error

from gtr_deploy.export import doctor
from gtr_deploy.export.build import sources
from gtr_deploy.export.zoo import MODELS, WeightSource
from gtr_deploy.runtime.bundle.reader import Bundle

Cli = Callable[..., Result]
DATA = Path(__file__).parents[1] / "data"


def test_build_says_what_comes_next(export_cli: Cli, own_bundle: Path) -> None:
    result = export_cli("build", "--model", "mar-digits", "--out", own_bundle)
    assert "is up to date" in result.stdout
    assert f"next: gtr-export verify {own_bundle}" in result.stdout
    report = json.loads(export_cli("build", "--model", "mar-digits", "--out", own_bundle, "--json").stdout)
    assert set(report["stages"].values()) == {"cached"}
    result = export_cli("build", "--model", "mar-digits", "--out", own_bundle, "--max-batch", 2)
    assert "peak memory" in result.stdout


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ([], ["--model"]),
        (["--model", "mar-xl"], ["--model", "mar-xl"]),
        (["--model", "mar-b", "--precision", "int4"], ["--precision"]),
        (["--model", "mar-b", "--max-batch", "0"], ["--max-batch"]),
        (["--model", "mar-b", "--max-batch", "5000"], ["--max-batch"]),
        (["--model", "mar-b", "--checkpoint", "none.pth"], ["--checkpoint none.pth is not a file"]),
        (["--model", "mar-b", "--vae", "none.ckpt", "--random-weights"], ["--vae none.ckpt is not a file"]),
        (["--model", "mar-b", "--checkpoint", "x", "--random-weights"], ["contradict"]),
        (["--model", "mar-digits", "--vae", "x"], ["mar-digits has no VAE"]),
    ],
)
def test_bad_arguments(
    export_cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: list[str], words: list[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    one_line_error(export_cli("build", *options), 2, *words)
    assert not (tmp_path / "bundles").exists() or not any((tmp_path / "bundles").glob("mar*"))


def test_wrong_model_for_the_file(export_cli: Cli, tmp_path: Path) -> None:
    options = ["--checkpoint", DATA / "mar_tiny_checkpoint-last.pth", "--out", tmp_path / "b"]
    result = export_cli("build", "--model", "mar-digits", *options)
    one_line_error(
        result, 1, "wrong: fake_latent is 1x64, not 1x128 and ", "without --model: gtr-export build --checkpoint"
    )
    assert not (tmp_path / "b").exists()
    options[1] = MODELS["mar-digits"].shipped
    one_line_error(export_cli("build", "--model", "mar-b", "--no-decoder", *options), 1, "looks like mar-digits")


def test_without_network(export_cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    nowhere = WeightSource("http://127.0.0.1:9/checkpoint-last.pth", "pretrained/none.pth", 1)
    entry = MODELS["mar-b"]
    monkeypatch.setitem(MODELS, "mar-b", type(entry)(entry.model, nowhere, nowhere))
    one_line_error(export_cli("build", "--model", "mar-b"), 1, "--checkpoint", "--vae", "--random-weights")
    assert not list((tmp_path / "bundles").glob("mar-b*"))


@pytest.fixture
def server(tmp_path: Path) -> Iterator[str]:
    """Serves the package's own weights as if they were a published checkpoint."""
    shipped = MODELS["mar-digits"].shipped
    assert shipped is not None
    content = shipped.read_bytes()

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, format: str, *args: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{running.server_port}"
        running.shutdown()


def test_model_alone_is_enough_with_a_network(
    export_cli: Cli, server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    entry = MODELS["mar-digits"]
    assert entry.shipped is not None
    size = round(entry.shipped.stat().st_size / 2**20)
    source = WeightSource(f"{server}/checkpoint-last.pth", "pretrained/none.pth", size)
    monkeypatch.setitem(MODELS, "mar-digits", type(entry)(entry.model, source))
    result = export_cli("build", "--model", "mar-digits")
    assert result.exit_code == 0, result.output
    bundle = Bundle.load(tmp_path / "bundles" / "mar-digits-fp32")
    assert bundle.manifest.source.checkpoint.path.endswith("mar-digits/checkpoint-last.pth")
    assert "weights: state dict of " in result.stderr


def test_inspect(export_cli: Cli, own_bundle: Path, tmp_path: Path) -> None:
    result = export_cli("inspect", own_bundle)
    assert result.exit_code == 0
    assert "tokens[B,V,16]" in result.stdout
    assert "none yet; gtr-export verify" in result.stdout
    assert json.loads(export_cli("inspect", own_bundle, "--json").stdout)["schema"] == 3
    Bundle.load(own_bundle).write_report("parity", {})
    (own_bundle / "reports" / "parity.json").write_text("changed")
    assert "the manifest says" in export_cli("inspect", own_bundle).stdout
    one_line_error(export_cli("inspect", tmp_path / "none"), 1, "is not a folder")


def test_inspect_of_random_weights(export_cli: Cli, own_bundle: Path) -> None:
    manifest = json.loads((own_bundle / "manifest.json").read_text())
    manifest["source"].update(checkpoint=None, random_weights=0)
    (own_bundle / "manifest.json").write_text(json.dumps(manifest))
    assert "random (seed 0)" in export_cli("inspect", own_bundle).stdout


def test_models(export_cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    rows = {row["model"]: row for row in json.loads(export_cli("models", "--json").stdout)}
    assert rows["mar-h"]["parameters"] == 942_403_104
    assert rows["mar-b"]["parameters"] == 207_924_768
    assert "7191 MiB to download" in rows["mar-h"]["weights"]
    assert rows["mar-digits"]["weights"] == "in the package"
    path = tmp_path / "pretrained_models" / "vae" / "kl16.ckpt"
    path.parent.mkdir(parents=True)
    path.write_bytes(b"")
    assert "pretrained_models/vae/kl16.ckpt" in export_cli("models").stdout


def test_doctor(export_cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    result = export_cli("doctor")
    assert result.exit_code == 0, result.output
    assert "onnxruntime" in result.stdout
    monkeypatch.setattr(doctor, "_version", lambda name: None)
    result = export_cli("doctor", "--json")
    assert result.exit_code == 1
    missing = [f for f in json.loads(result.stdout) if f["status"] == "missing"]
    assert {f["subject"] for f in missing} == {"torch", "onnx", "onnxscript", "safetensors", "onnxruntime"}
    assert all("pip install 'gtr-deploy[" in f["detail"] for f in missing)


def test_doctor_works_where_the_memory_cannot_be_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "sysconf")  # as on Windows
    (machine,) = [finding.detail for finding in doctor.examine() if finding.subject == "machine"]
    assert machine == f"{os.cpu_count()} CPUs"


def test_doctor_finds_packages_by_their_installed_name() -> None:
    assert doctor._version("click")
    assert doctor._version("no-such-package-anywhere") is None


def test_export_without_torch_is_one_line(export_cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    for name in [name for name in sys.modules if name.startswith(("gtr_deploy.export.graphs.onnx_export", "onnx_ir"))]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "gtr_deploy.export.graphs.onnx_export", None)
    result = export_cli("build", "--model", "mar-digits", "--out", tmp_path / "b")
    one_line_error(result, 1, "pip install 'gtr-deploy[export]'")


def test_no_published_weights(monkeypatch: pytest.MonkeyPatch, export_cli: Cli, tmp_path: Path) -> None:
    entry = MODELS["mar-digits"]
    monkeypatch.setitem(MODELS, "mar-digits", type(entry)(entry.model))
    result = export_cli("build", "--model", "mar-digits", "--out", tmp_path / "b")
    one_line_error(result, 1, "has no published weights; give a file with --checkpoint")
    assert sources.RANDOM_SEED == 0
