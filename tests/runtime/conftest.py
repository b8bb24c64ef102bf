"""A fake GPU that a test may break; ``fake_gpu`` is the one that must stay whole."""

from __future__ import annotations

import pytest
from fakes import cudart
from fakes.machine import FakeMachine

from gtr_deploy.runtime.machine.cuda import Cuda


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> FakeMachine:
    machine = FakeMachine()
    cudart.install(monkeypatch, machine)
    return machine


@pytest.fixture
def cuda(machine: FakeMachine) -> Cuda:
    return Cuda()
