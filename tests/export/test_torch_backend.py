"""The torch backend on the CPU: what ONNX Runtime computes, on fresh and on kept buffers. CUDA: tests/gpu."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from golden import load_case, relative_error, torch_backend
from jobs import sample

from gtr_deploy.export.networks import Networks
from gtr_deploy.export.reference import torch_backend as module
from gtr_deploy.export.reference.torch_backend import TorchBackend, open_backend
from gtr_deploy.runtime.backends.onnxruntime.backend import OnnxRuntimeBackend
from gtr_deploy.runtime.backends.protocol import Backend
from gtr_deploy.runtime.bundle.reader import Bundle
from gtr_deploy.runtime.errors import BackendError, GtrError
from gtr_deploy.runtime.models.graphs import IMAGE_TOLERANCES
from gtr_deploy.runtime.pipeline import Pipeline
from gtr_deploy.runtime.sampling.chains import Floats

no_cuda_here = pytest.mark.skipif(torch.cuda.is_available(), reason="torch has CUDA here")


def _latents(bundle: Bundle, backend: Backend, labels: list[int], plan: str = "gtr-fast") -> Floats:
    return (
        Pipeline(bundle.architecture, bundle.conditioner, backend, dict(bundle.plan_defaults))
        .generate(labels, plan=plan)
        .latents
    )


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_equals_onnx_runtime(build_digits: Callable[[str], Path], precision: str) -> None:
    bundle = Bundle.load(build_digits(precision))
    backend = open_backend(bundle, device="cpu")
    assert backend.name == "torch"
    assert backend.description == f"torch cpu {precision}"
    wanted = _latents(bundle, OnnxRuntimeBackend(bundle.graph_paths(), threads=1), [3, 8])
    assert relative_error(_latents(bundle, backend, [3, 8]), wanted) <= IMAGE_TOLERANCES[precision]
    sometimes = "gtr-fast:guidance-interval=0.1+0.5"
    found, wanted = (_latents(bundle, one, [3], sometimes) for one in (backend, keeping(backend._networks)))
    assert np.array_equal(found, wanted)
    wanted = _latents(bundle, OnnxRuntimeBackend(bundle.graph_paths(), threads=1), [3], sometimes)
    assert relative_error(found, wanted) <= IMAGE_TOLERANCES[precision]


def keeping(networks: Networks) -> TorchBackend:
    """Keeps the buffers of each shape of chain, as with CUDA graphs."""
    backend = TorchBackend(networks)
    backend._keep = True
    return backend


def test_kept_buffers_change_nothing(digits_bundle: Path) -> None:
    """What a CUDA graph replays, without the capture: one shape after the other, and again."""
    bundle = Bundle.load(digits_bundle)
    fresh = open_backend(bundle, device="cpu")
    kept = keeping(fresh._networks)
    for labels in ([3], [8, 2], [1], [8, 2]):
        assert np.array_equal(_latents(bundle, kept, labels), _latents(bundle, fresh, labels))
    # Chains of 50 to 20 steps, on one and on two images.
    assert len(kept._chains) > 4
    assert not fresh._chains


def test_kept_buffers_replay_the_original() -> None:
    case = load_case("mar_tiny_cfg_linear")
    kept = keeping(torch_backend("mar_tiny")._networks)
    for _ in range(2):
        seeds = [0] * len(case.labels)
        latents = sample(kept, case.plan, case.architecture, case.labels, seeds, case.noise, case.orders)
        assert relative_error(latents, case.latents) <= 1e-4


def test_results_are_the_callers(digits_bundle: Path) -> None:
    """x_0 of one chain does not change when the same buffers run the next."""
    bundle = Bundle.load(digits_bundle)
    kept = keeping(open_backend(bundle, device="cpu")._networks)
    seen: list[tuple[Floats, Floats]] = []
    inner = kept.denoise

    def denoise(condition, chain):
        x = inner(condition, chain)
        seen.append((x, x.copy()))
        return x

    kept.denoise = denoise  # type: ignore[method-assign]
    _latents(bundle, kept, [3])
    _latents(bundle, kept, [4])
    assert all(np.array_equal(x, copy) for x, copy in seen)


def test_oldest_buffers_go_first(digits_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_CHAINS", 3)
    bundle = Bundle.load(digits_bundle)
    fresh = open_backend(bundle, device="cpu")
    kept = keeping(fresh._networks)
    assert np.array_equal(_latents(bundle, kept, [3]), _latents(bundle, fresh, [3]))
    assert len(kept._chains) == 3


def test_cuda_graphs_mean_nothing_on_the_cpu(digits_bundle: Path) -> None:
    backend = open_backend(Bundle.load(digits_bundle), device="cpu", cuda_graphs=True, precision="bf16")
    assert backend.description == "torch cpu bf16"


class TestOpening:
    def test_weights_that_are_not_here(self, own_bundle: Path) -> None:
        manifest = json.loads((own_bundle / "manifest.json").read_text())
        manifest["source"]["checkpoint"]["sha256"] = "0" * 64
        (own_bundle / "manifest.json").write_text(json.dumps(manifest))
        with pytest.raises(GtrError, match=r"the bundle's weights: the checkpoint .* is not known here") as caught:
            open_backend(Bundle.load(own_bundle), device="cpu")
        assert "\n" not in str(caught.value)

    def test_precision_that_torch_does_not_run(self, digits_bundle: Path) -> None:
        with pytest.raises(GtrError, match="torch does not run precision int8, only fp32, fp16, bf16"):
            open_backend(Bundle.load(digits_bundle), precision="int8")

    @pytest.mark.parametrize("device", ["gpu", "meta", "cuda:x", ""])
    def test_device_that_is_none(self, digits_bundle: Path, device: str) -> None:
        with pytest.raises(BackendError, match="is not one of cpu, cuda, cuda:N"):
            open_backend(Bundle.load(digits_bundle), device=device)

    @no_cuda_here
    def test_cuda_that_is_not_there(self, digits_bundle: Path) -> None:
        with pytest.raises(BackendError, match="cannot use CUDA here") as caught:
            open_backend(Bundle.load(digits_bundle), device="cuda")
        assert "\n" not in str(caught.value)
        assert open_backend(Bundle.load(digits_bundle), device="auto").description == "torch cpu fp32"
