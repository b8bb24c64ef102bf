"""A fake GPU that a test may break; ``fake_gpu`` is the one that must stay whole."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from fakes import cudart
from fakes.bundles import add_fake_engines, fake_host
from fakes.machine import FakeMachine

from gtr_deploy.runtime.backends.tensorrt.backend import TensorRTBackend, open_tensorrt
from gtr_deploy.runtime.machine.cuda import Cuda


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> FakeMachine:
    machine = FakeMachine()
    cudart.install(monkeypatch, machine)
    return machine


@pytest.fixture
def cuda(machine: FakeMachine) -> Cuda:
    return Cuda()


@pytest.fixture
def opened(fake_gpu: FakeMachine, own_bundle: Path) -> Iterator[Callable[..., TensorRTBackend]]:
    """Opens the copied bundle with fake engines; closes at the end, and nothing may be left."""
    made: list[TensorRTBackend] = []

    def get(flavour: str = "tensorrt", cuda_graph: str = "auto", **engines) -> TensorRTBackend:
        bundle = add_fake_engines(own_bundle, flavour, **engines)
        made.append(open_tensorrt(bundle, flavour, cuda_graph=cuda_graph, machine=fake_host(fake_gpu)))
        return made[-1]

    yield get
    for backend in made:
        backend.close()
    gc.collect()
    assert fake_gpu.leaks() == []
    assert not fake_gpu.contexts
