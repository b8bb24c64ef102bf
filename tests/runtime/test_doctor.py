"""gtr-run doctor: this machine, made-up machines, and machines on which hardly anything can be imported."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import replace
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest
from click.testing import Result
from commands import runner
from fakes.bundles import changed
from msgspec import structs

from gtr_deploy.runtime.backends import registry
from gtr_deploy.runtime.bundle.manifest import EngineGraph, EngineSet, StoredFile
from gtr_deploy.runtime.bundle.reader import Bundle
from gtr_deploy.runtime.bundle.source import WeightsFile
from gtr_deploy.runtime.commands import doctor as doctor_module
from gtr_deploy.runtime.commands.console import CommandGroup
from gtr_deploy.runtime.commands.doctor import can_run, diagnose, doctor
from gtr_deploy.runtime.errors import BackendError
from gtr_deploy.runtime.machine import examine as machine_module
from gtr_deploy.runtime.machine.cuda import NO_DRIVER
from gtr_deploy.runtime.machine.examine import Gpu, Machine, examine_machine, library_version

ADA = Gpu("NVIDIA L4", "8.9", 24 * 2**30, "13.0")
VERSIONS = {
    "onnxruntime": "1.31.1",
    "openvino": "2026.4.1",
    "tensorrt": "11.4.0.106",
    "tensorrt-rtx": "1.7.1.116",
    "cuda-bindings": "13.5.0",
    "polygraphy": "0.53.6",
    "numpy": "2.4.6",
}
EVERYTHING = Machine("linux-x86_64", ADA, "", VERSIONS, ("CUDAExecutionProvider", "CPUExecutionProvider"))
NOTHING = Machine("linux-x86_64", None, "no NVIDIA driver", dict.fromkeys(VERSIONS), ())


def _no_devices() -> list[Gpu]:
    raise BackendError("no NVIDIA driver\nand more")


def _lacking(*libraries: str) -> Machine:
    return replace(EVERYTHING, versions={**VERSIONS, **dict.fromkeys(libraries)})


def _with_engines(bundle: Bundle, **changes: object) -> Bundle:
    """``bundle`` with one more engine set, built on an L4; its engine files exist."""
    file = StoredFile.of(bundle.folder, "manifest.json")
    graphs = {kind: EngineGraph(file, *files.checksums, ({},), 1.0, None) for kind, files in bundle.graphs.items()}
    engines = EngineSet(
        flavour="tensorrt-rtx",
        version="1.7.1.116",
        compute_capabilities=("8.9", "12.0"),
        gpu=None,
        system="linux-x86_64",
        hardware_compatible=False,
        plans=("gtr",),
        max_batch=8,
        precision=bundle.precision,
        optimization_level=3,
        graphs=graphs,
    )
    return changed(bundle, engines=(*bundle.engine_sets, structs.replace(engines, **changes)))  # type: ignore[arg-type]


def _statuses(machine: Machine, bundle: Bundle | None = None) -> Mapping[str, tuple[str, str]]:
    return {finding.subject: (finding.status, finding.detail) for finding in diagnose(machine, bundle)}


@pytest.fixture(autouse=True)
def _torch_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    """The entry point as pyproject.toml has it, whenever the package was installed."""
    point = EntryPoint("torch", "gtr_deploy.export.reference.backend_row:TORCH", registry.ENTRY_POINTS)
    monkeypatch.setattr(registry, "entry_points", lambda group: [point])


@pytest.fixture
def bundle(digits_bundle: Path) -> Bundle:
    return Bundle.load(digits_bundle)


def _doctor(*arguments: str | Path) -> Result:
    group = CommandGroup(name="gtr-run", commands={"doctor": doctor})
    return runner().invoke(group, ["doctor", *map(str, arguments)], prog_name="gtr-run")


class TestMachine:
    def test_this_one(self) -> None:
        machine = examine_machine()
        assert machine.system.count("-") == 1
        assert machine.system == machine.system.lower()
        assert (machine.gpu is None) == bool(machine.gpu_problem)
        assert "\n" not in machine.gpu_problem
        assert set(machine.versions) == set(VERSIONS)
        assert machine.versions["numpy"]
        assert "CPUExecutionProvider" in machine.onnxruntime_providers
        assert "FP32" in machine.openvino_capabilities

    def test_versions_are_those_that_import(self) -> None:
        tensorrt_rtx = pytest.importorskip("tensorrt_rtx", reason="tensorrt-rtx is installed by make test")
        assert library_version("tensorrt-rtx") == tensorrt_rtx.__version__

    def test_installed_but_broken_is_a_problem(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def broken(name: str) -> None:
            raise OSError("libnvinfer.so.11: cannot open shared object file\nmore")

        monkeypatch.setattr(machine_module, "_import_quietly", broken)
        monkeypatch.setattr(machine_module, "_distribution_version", {"tensorrt-cu12": "10.13.3"}.get)
        machine = examine_machine()
        assert library_version("tensorrt") is None
        expected = "tensorrt 10.13.3 is installed but does not import: libnvinfer.so.11: cannot open shared object file"
        assert machine.problems == {"tensorrt": expected}
        assert set(machine.versions.values()) == {None}
        assert machine.onnxruntime_providers == machine.openvino_capabilities == ()
        assert _statuses(machine)["backend tensorrt"][1] == f"{expected}; pip install 'gtr-deploy[tensorrt]'"

    def test_a_librarys_warnings_are_not_shown(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, recwarn: pytest.WarningsRecorder
    ) -> None:
        (tmp_path / "tensorrt.py").write_text("import warnings\nwarnings.warn('old')\n__version__ = '11.4.0.106'\n")
        monkeypatch.syspath_prepend(tmp_path)
        monkeypatch.delitem(sys.modules, "tensorrt", raising=False)
        assert library_version("tensorrt") == "11.4.0.106"
        sys.modules.pop("tensorrt", None)
        assert not recwarn

    def test_a_left_over_folder_is_no_library(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        (tmp_path / "tensorrt").mkdir()
        monkeypatch.syspath_prepend(tmp_path)
        monkeypatch.delitem(sys.modules, "tensorrt", raising=False)
        assert library_version("tensorrt") is None
        monkeypatch.setattr(machine_module, "_distribution_version", {"tensorrt": "11.4.0.106"}.get)
        assert "tensorrt 11.4.0.106 is installed but does not import" in examine_machine().problems["tensorrt"]
        sys.modules.pop("tensorrt", None)

    @pytest.mark.parametrize(
        ("printed", "gpu"),
        [
            (
                "NVIDIA RTX 4000, Ada, 8.9, 20475 MiB, 580.65.06",
                Gpu("NVIDIA RTX 4000, Ada", "8.9", 20475 * 2**20, "580.65.06"),
            ),
            ("", None),
            ("No devices were found", None),
            ("NVIDIA L4, 8.9, [N/A], 580.65.06", None),
        ],
    )
    def test_without_cuda_bindings_nvidia_smi_is_asked(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, printed: str, gpu: Gpu | None
    ) -> None:
        program = tmp_path / "nvidia-smi"
        program.write_text(f"#!/bin/sh\necho '{printed}'\n")
        program.chmod(0o755)
        monkeypatch.setenv("PATH", str(tmp_path))
        monkeypatch.setattr("gtr_deploy.runtime.machine.cuda.list_devices", _no_devices)
        assert machine_module._find_gpu(has_cuda_bindings=False) == (
            gpu,
            "" if gpu else "nvidia-smi finds no GPU; no NVIDIA driver",
        )
        assert machine_module._find_gpu(has_cuda_bindings=True) == (None, "no NVIDIA driver")
        program.write_text("#!/bin/sh\nexit 9\n")
        assert machine_module._ask_nvidia_smi() == []
        program.unlink()
        assert machine_module._find_gpu(has_cuda_bindings=False) == (None, f"{NO_DRIVER}; no NVIDIA driver")

    def test_first_gpu_of_the_driver(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("gtr_deploy.runtime.machine.cuda.list_devices", lambda: [ADA])
        assert machine_module._find_gpu(has_cuda_bindings=True) == (ADA, "")
        monkeypatch.setattr("gtr_deploy.runtime.machine.cuda.list_devices", list)
        assert machine_module._find_gpu(has_cuda_bindings=True) == (None, "the driver shows no GPU")


class TestDiagnosis:
    def test_everything_runs(self) -> None:
        findings = diagnose(EVERYTHING, None)
        engines = ["tensorrt", "tensorrt-rtx"]
        assert can_run(findings) == ["onnxruntime cpu", "onnxruntime cuda", "openvino", *engines, "torch"]
        assert {finding.status for finding in findings} == {"ok", "info"}
        text = " ".join(finding.detail for finding in findings)
        assert "NVIDIA L4, compute capability 8.9, 24 GiB, driver 13.0" in text
        assert "gtr-export engine BUNDLE --engine tensorrt-rtx" in text

    def test_nothing_runs_but_torch_and_every_line_says_what_to_install(self) -> None:
        found = _statuses(NOTHING)
        assert found["gpu"] == ("missing", "no NVIDIA driver")
        assert found["onnxruntime"][1].endswith("pip install 'gtr-deploy[cpu]'")
        assert found["backend onnxruntime cpu"][1].endswith("pip install 'gtr-deploy[cpu]'")
        assert found["backend onnxruntime cuda"][1].endswith("pip install 'gtr-deploy[gpu]'")
        assert found["backend openvino"] == ("missing", "openvino is not installed; pip install 'gtr-deploy[openvino]'")
        assert found["backend tensorrt"] == (
            "missing",
            "tensorrt is not installed; pip install 'gtr-deploy[tensorrt]'",
        )
        assert found["backend tensorrt-rtx"][1].endswith("pip install 'gtr-deploy[tensorrt-rtx]'")
        assert can_run(diagnose(NOTHING, None)) == ["torch"]

    @pytest.mark.parametrize(
        ("machine", "subject", "words"),
        [
            (_lacking("cuda-bindings"), "tensorrt", ["cuda-bindings is not installed", "gtr-deploy[tensorrt]'"]),
            (
                replace(EVERYTHING, versions={**VERSIONS, "tensorrt": "10.9.0.34"}),
                "tensorrt",
                ["tensorrt 10.9.0.34 is too old, 10.12 is needed", "install 'gtr-deploy[tensorrt]'"],
            ),
            (replace(EVERYTHING, gpu=None, gpu_problem="no driver"), "tensorrt", ["no driver"]),
            (replace(EVERYTHING, gpu=None), "tensorrt", ["no GPU was found"]),
            (replace(EVERYTHING, gpu=None, gpu_problem="no driver"), "tensorrt-rtx", ["no driver", "can still build"]),
            (
                replace(EVERYTHING, gpu=Gpu("NVIDIA H100", "9.0", 80 * 2**30, "13.0")),
                "tensorrt-rtx",
                ["not on 9.0", "use tensorrt"],
            ),
            (
                replace(EVERYTHING, onnxruntime_providers=("CPUExecutionProvider",)),
                "onnxruntime cuda",
                ["no CUDA provider", "pip uninstall -y onnxruntime && pip install 'gtr-deploy[gpu]'"],
            ),
            (replace(EVERYTHING, gpu=None, gpu_problem="no driver"), "onnxruntime cuda", ["no driver"]),
            (
                replace(EVERYTHING, versions={**VERSIONS, "openvino": "2025.4.0"}),
                "openvino",
                ["openvino 2025.4.0 is too old, 2026.3 is needed", "install 'gtr-deploy[openvino]'"],
            ),
        ],
    )
    def test_reasons(self, machine: Machine, subject: str, words: list[str]) -> None:
        status, detail = _statuses(machine)[f"backend {subject}"]
        assert status == "missing"
        for word in words:
            assert word in detail

    def test_bundle_without_engines(self, bundle: Bundle) -> None:
        found = _statuses(EVERYTHING, bundle)
        assert "mar-digits, fp32" in found["bundle"][1]
        assert "engines: none" in found["bundle"][1]
        assert found["backend onnxruntime cpu"][0] == "ok"
        command = f"gtr-export engine {bundle.folder} --engine tensorrt"
        assert found["backend tensorrt"] == ("missing", f"the bundle has no tensorrt engines; {command}")
        assert found["backend tensorrt-rtx"][1].endswith(f"{command}-rtx")

    def test_engines_that_fit(self, bundle: Bundle) -> None:
        found = _statuses(EVERYTHING, _with_engines(bundle))
        assert "tensorrt-rtx-1.7.1.116-sm89-sm120" in found["bundle"][1]
        assert found["backend tensorrt-rtx"][0] == "ok"
        assert "tensorrt-rtx-1.7.1.116-sm89-sm120" in found["backend tensorrt-rtx"][1]

    @pytest.mark.parametrize(
        ("changes", "words"),
        [
            ({"version": "1.6.0.1"}, ["1.6.0.1", "1.7.1.116"]),
            ({"compute_capabilities": ("12.0",)}, ["12.0", "8.9"]),
            ({"precision": "int8"}, ["int8", "fp32"]),
        ],
    )
    def test_engines_that_do_not_fit(self, bundle: Bundle, changes: dict[str, object], words: list[str]) -> None:
        status, detail = _statuses(EVERYTHING, _with_engines(bundle, **changes))["backend tensorrt-rtx"]
        assert status == "missing"
        for word in [*words, f"gtr-export engine {bundle.folder} --engine tensorrt-rtx"]:
            assert word in detail

    def test_one_of_two_engine_sets_is_enough(self, bundle: Bundle) -> None:
        found = _statuses(EVERYTHING, _with_engines(_with_engines(bundle, version="1.6.0.1")))
        assert found["backend tensorrt-rtx"][0] == "ok"
        assert found["engines tensorrt-rtx-1.6.0.1-sm89-sm120"][0] == "info"
        assert found["engines tensorrt-rtx-1.7.1.116-sm89-sm120"] == ("ok", "run here")

    def test_lost_engine_file(self, bundle: Bundle) -> None:
        with_engines = _with_engines(bundle)
        engines = with_engines.engine_sets[0]
        lost = {
            kind: structs.replace(graph, engine=StoredFile("no.plan", 1, "0" * 64))
            for kind, graph in engines.graphs.items()
        }
        status, detail = _statuses(EVERYTHING, _with_engines(bundle, graphs=lost))["backend tensorrt-rtx"]
        assert status == "missing"
        assert "no.plan is missing" in detail

    def test_bf16_needs_more_than_the_cpu_provider(self, bundle: Bundle) -> None:
        found = _statuses(EVERYTHING, changed(bundle, precision="bf16"))
        assert "no bfloat16" in found["backend onnxruntime cpu"][1]
        assert "--precision fp16" in found["backend onnxruntime cpu"][1]
        assert found["backend onnxruntime cuda"][0] == "ok"

    def test_bf16_on_openvino(self, bundle: Bundle) -> None:
        found = _statuses(EVERYTHING, changed(bundle, precision="bf16"))
        status, detail = found["backend openvino"]
        assert (status, detail.endswith("bf16 bundles in float32, since this CPU has no bfloat16")) == ("ok", True)
        able = replace(EVERYTHING, openvino_capabilities=("FP32", "BF16", "INT8"))
        assert _statuses(able)["backend openvino"][1].endswith("bf16 bundles in bfloat16")
        assert "gtr-deploy[openvino]" in found["backend onnxruntime cpu"][1]

    def test_fp8_is_not_for_openvino(self, bundle: Bundle) -> None:
        status, detail = _statuses(EVERYTHING, changed(bundle, precision="fp8"))["backend openvino"]
        assert (status, "rounds to fp8 twice" in detail) == ("missing", True)

    def test_torch_needs_the_checkpoint(self, bundle: Bundle) -> None:
        other = replace(bundle, architecture=structs.replace(bundle.architecture, name="mar-b"))
        lost = structs.replace(
            bundle.manifest.source, checkpoint=WeightsFile("/no/such.pth", "0" * 64, "ema", "model_ema", "")
        )
        random = structs.replace(lost, checkpoint=None)
        assert _statuses(EVERYTHING, bundle)["backend torch"][0] == "ok"
        assert "is not known on this machine" in _statuses(EVERYTHING, changed(other, source=lost))["backend torch"][1]
        assert _statuses(EVERYTHING, changed(other, source=random))["backend torch"][0] == "ok"

    def test_torch_does_not_run_quantised_graphs(self, bundle: Bundle) -> None:
        found = _statuses(EVERYTHING, changed(bundle, precision="int8"))["backend torch"]
        assert found == ("missing", "the torch backend has no precision int8")

    def test_other_entry_points_are_named(self, monkeypatch: pytest.MonkeyPatch) -> None:
        points = [EntryPoint("mine", "toy.backend:ROW", registry.ENTRY_POINTS)]
        points += [
            EntryPoint(name, place, registry.ENTRY_POINTS)
            for name, place in (("lost", "no_such:ROW"), ("odd", "json:dumps"))
        ]
        monkeypatch.setattr(registry, "entry_points", lambda group: points)
        assert _statuses(EVERYTHING)["backend mine"] == ("ok", "a stranger's backend")
        status, detail = _statuses(EVERYTHING)["backend lost"]
        assert status == "missing"
        assert "ModuleNotFoundError" in detail
        assert _statuses(EVERYTHING)["backend odd"] == ("missing", "its entry point gives a function, not a BackendRow")


class TestCommand:
    def test_table(self, digits_bundle: Path) -> None:
        result = _doctor(digits_bundle)
        assert result.exit_code == 0, result.output
        assert "backend onnxruntime cpu" in result.stdout
        assert "can be run by: onnxruntime cpu" in result.stdout

    def test_json(self, digits_bundle: Path) -> None:
        result = _doctor(digits_bundle, "--json")
        report = json.loads(result.stdout)
        assert report["bundle"] == str(digits_bundle)
        assert "onnxruntime cpu" in report["can_run"]
        assert report["machine"]["versions"]["numpy"]
        assert {finding["status"] for finding in report["findings"]} <= {"ok", "missing", "info"}
        assert json.loads(_doctor("--json").stdout)["bundle"] is None

    @pytest.mark.parametrize("damage", ["", "graphs"])
    def test_exit_code_says_whether_anything_can_run_the_bundle(
        self, own_bundle: Path, monkeypatch: pytest.MonkeyPatch, damage: str
    ) -> None:
        monkeypatch.setattr(registry, "entry_points", lambda group: [])
        monkeypatch.setattr(doctor_module, "examine_machine", lambda: EVERYTHING if damage else NOTHING)
        if damage:
            (own_bundle / "graphs" / "decoder.onnx").write_bytes(b"")
        result = _doctor(own_bundle)
        assert result.exit_code == 1
        assert "nothing on this machine" in result.stdout
        assert ("has 0 bytes" in result.stdout) == bool(damage)
        assert _doctor().exit_code == 0

    def test_no_bundle_there(self, tmp_path: Path) -> None:
        result = _doctor(tmp_path / "no")
        assert result.exit_code == 1
        assert result.stderr.startswith("gtr-run: ")
        assert result.stderr.count("\n") == 1


def test_works_where_nothing_can_be_imported(digits_bundle: Path) -> None:
    refused = ("torch", "onnx", "onnxruntime", "openvino", "cuda", "tensorrt", "tensorrt_rtx", "polygraphy")
    program = f"""
import sys
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {refused!r}:
            raise ImportError(name + " must not be imported here")
sys.meta_path.insert(0, Refuse())
from gtr_deploy.runtime.commands.doctor import doctor
doctor([{str(digits_bundle)!r}, "--json"])
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 1, done.stderr
    assert done.stderr == ""
    report = json.loads(done.stdout)
    assert report["can_run"] == []
    assert report["machine"]["onnxruntime_providers"] == []
    assert [name for name, found in report["machine"]["versions"].items() if found] == ["numpy"]
