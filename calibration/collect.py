"""Runs the real sampler and watches what enters every quantisable layer, over all AR steps and diffusion timesteps.

ONNX Runtime runs copies of the graphs whose watched tensors are outputs too; each call's values go into running
statistics and are dropped. So memory depends on the batch, not on the number of images. After each batch the statistics
are stored, and a run that was killed goes on where it was.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from ..runtime.backends.onnxruntime.backend import OnnxRuntimeBackend
from ..runtime.backends.protocol import Condition, DiffusionChain, Floats, Integers
from ..runtime.bundle.manifest import graph_bytes
from ..runtime.bundle.staged import stage_key
from ..runtime.commands.console import Reporter
from ..runtime.commands.timing import peak_memory
from ..runtime.errors import BackendError, GtrError, UsageError
from ..runtime.files import atomic_path, sha256
from ..runtime.models.architecture import Architecture
from ..runtime.sampling.loop import sample
from ..runtime.sampling.noise import SeededNoise
from ..runtime.sampling.plan import SamplingPlan
from .data import CalibrationImages
from .layers import QUANTISED_KINDS, quantisable, read_graph
from .ranges import BINS, SAMPLES, Statistics

BATCH = 4
"""Images per batch. All watched tensors of one call are in memory together: 1 GB for mar-b's backbone at 4 images."""

STAGE_VERSIONS = {"sampler": 1, "plan": 1, "noise": 1, "statistics": 1, "ranges": 1, "quantise": 1}
"""Raise a number when calibrations must be made again because something computes otherwise: the first three when the
trajectories of one plan and seed change (runtime/sampling), ``statistics`` for what is recorded along them,
``ranges`` for what is chosen from that (ranges.py, sensitivity.py, probes.py), ``quantise`` for the graphs that are
written (layers.py, quantize.py). The last two let a stopped run go on with its statistics."""

LayerStatistics = dict[str, Statistics]
"""Layer name to the statistics of what enters it; layers with the same input share them."""


@dataclass(frozen=True)
class Collected:
    """What a calibration run has seen.

    Attributes:
        statistics: graph kind to layer name to statistics.
        images: number of images.
        resumed: images that an interrupted run had done.
        grown: bytes by which the process's peak memory rose while the batches ran.
    """

    statistics: dict[str, LayerStatistics]
    images: int
    resumed: int
    grown: int

    @property
    def all(self) -> LayerStatistics:
        """Of both graphs; names do not collide, since the head's begin with ``head.``."""
        return {name: seen for layers in self.statistics.values() for name, seen in layers.items()}


class CollectingBackend(OnnxRuntimeBackend):
    """ONNX Runtime on the CPU, watching the inputs of quantisable layers.

    Attributes:
        ar_steps: indices of the AR steps to watch; all if None.
        forced: float32 [B, L, C] that every chain of reverse steps is said to end in, after it has run; None to keep
            what was sampled.
    """

    def __init__(
        self, graphs: Mapping[str, Path], threads: int | None = None, ar_steps: frozenset[int] | None = None
    ) -> None:
        self.watched: dict[str, dict[str, Statistics]] = {}
        self.layers: dict[str, dict[str, str]] = {}
        self.ar_steps, self.forced = ar_steps, None
        self._ar_step = -1
        self._predict: Integers = np.zeros((0, 0), dtype=np.int64)
        self._kinds = {path: kind for kind, path in graphs.items()}
        self.forced: Floats | None
        super().__init__(graphs, threads, "cpu")

    def _open(self, path: Path, cuda_graph: bool = False) -> Any:
        kind = self._kinds[path]
        if kind not in QUANTISED_KINDS:
            return super()._open(path, cuda_graph)
        model = read_graph(path)
        self.layers[kind] = {layer.name: layer.activation for layer in quantisable(model)}
        tensors = list(dict.fromkeys(self.layers[kind].values()))
        self.watched[kind] = {tensor: Statistics() for tensor in tensors}
        inputs = {value.name for value in model.graph.input}
        element = onnx.TensorProto.FLOAT
        for tensor in tensors:
            if tensor not in inputs:
                model.graph.output.append(onnx.helper.make_tensor_value_info(tensor, element, None))
        # From memory, so that nothing is written beside the bundle; its large weights stay in their file.
        options = self._runtime.SessionOptions()
        options.log_severity_level = 3
        options.intra_op_num_threads = self._options.intra_op_num_threads
        key = "session.model_external_initializers_file_folder_path"
        options.add_session_config_entry(key, str(path.parent.resolve()))
        try:
            return self._runtime.InferenceSession(
                model.SerializeToString(), options, providers=["CPUExecutionProvider"]
            )
        except Exception as error:  # ONNX Runtime's own exceptions share no base class
            raise BackendError(f"ONNX Runtime cannot load {path}: {str(error).splitlines()[0]}") from error

    def run(self, kind: str, inputs: Mapping[str, NDArray[Any]]) -> list[NDArray[Any]]:
        if kind not in self.watched:
            return super().run(kind, inputs)
        names = [output.name for output in self._sessions[kind].get_outputs()]
        own = len(names) - sum(name in self.watched[kind] for name in names)
        if self.ar_steps is not None and self._ar_step not in self.ar_steps:
            with self._one_line_errors(kind):
                return self._sessions[kind].run(names[:own], dict(inputs))
        results = super().run(kind, inputs)
        found = {**inputs, **dict(zip(names, results, strict=True))}
        for tensor, statistics in self.watched[kind].items():
            try:
                statistics.add(found[tensor])
            except BackendError as error:
                where = f"AR step {self._ar_step + 1}, {kind}, tensor {tensor}"
                raise BackendError(f"{where}: {error}; run gtr-export verify on the bundle") from None
        return results[:own]

    def condition(
        self, tokens: Floats, visible: Integers, predict: Integers, context: Integers, labels: Integers
    ) -> Condition:
        self._ar_step = self._ar_step + 1 if visible.shape[1] else 0
        self._predict = predict
        return super().condition(tokens, visible, predict, context, labels)

    def denoise(self, condition: Condition, chain: DiffusionChain) -> Floats:
        sampled = super().denoise(condition, chain)
        if self.forced is None:
            return sampled
        given = np.take_along_axis(self.forced, self._predict[:, :, None], axis=1)
        return given.reshape(-1, given.shape[-1])[chain.rows]


def collect(
    architecture: Architecture,
    graphs: Mapping[str, Path],
    plan: SamplingPlan,
    images: CalibrationImages,
    reporter: Reporter,
    checkpoint: Path | None = None,
    batch_size: int = BATCH,
    threads: int | None = None,
    ar_steps: frozenset[int] | None = None,
) -> Collected:
    """Runs the sampler over the images.

    Args:
        architecture: the model.
        graphs: graph kind to float graph.
        plan: resolved for the model.
        images: what to generate.
        reporter: gets the progress.
        checkpoint: NPZ that is written after every batch and resumed from; a finished one is simply read.
        batch_size: images per batch.
        threads: of one call.
        ar_steps: watch these AR steps only; for showing what that costs.

    Raises:
        UsageError: a senseless batch size or AR step, or graphs that are quantised already.
        BackendError: a graph does not run, or a watched value is not finite.
    """
    if batch_size < 1:
        raise UsageError(f"calibration batch size {batch_size} is not at least 1")
    if ar_steps is not None and not (ar_steps and ar_steps <= set(range(len(plan.steps)))):
        raise UsageError(f"AR steps {sorted(ar_steps)} are not in 0..{len(plan.steps) - 1}")
    wanted = {kind: graphs[kind] for kind in graphs if kind in (*QUANTISED_KINDS, "detail_score")}
    backend = CollectingBackend(wanted, threads, ar_steps)
    identity = _identity(wanted, plan, images, batch_size, ar_steps)
    done = _resume(checkpoint, identity, backend) if checkpoint else 0
    resumed, start = done, peak_memory()
    count, calls = len(images.labels), len(plan.steps)
    title = f"calibrate over {count} images, plan {plan.settings.name}"
    if resumed:
        reporter.say(f"{title}: {resumed} images are done already")
    with reporter.bar(title, count * calls, "AR steps") as bar:
        bar.to(done * calls)
        while done < count:
            part = slice(done, min(done + batch_size, count))
            seeds = list(images.seeds[part])
            backend.forced = None if images.latents is None else images.latents[part]
            sample(
                backend,
                plan,
                architecture,
                list(images.labels[part]),
                seeds,
                SeededNoise(seeds, architecture.token_channels),
                observer=lambda result: bar.advance(len(result.predicted)),
            )
            done = part.stop
            if checkpoint:
                _store(checkpoint, identity, done, backend)
    grown = max(0, peak_memory() - start)
    reporter.say(f"{title}: peak memory rose by {grown / 2**20:.0f} MiB")
    statistics = {
        kind: {name: backend.watched[kind][tensor] for name, tensor in layers.items()}
        for kind, layers in backend.layers.items()
    }
    return Collected(statistics, count, resumed, grown)


def _identity(
    graphs: Mapping[str, Path],
    plan: SamplingPlan,
    images: CalibrationImages,
    batch_size: int,
    ar_steps: frozenset[int] | None,
) -> str:
    """Hash of everything that the statistics depend on."""
    return stage_key(
        graphs={kind: [sha256(path), graph_bytes(path)] for kind, path in graphs.items()},
        plan=plan.settings.to_json(),
        images=images.identity,
        batch_size=batch_size,
        ar_steps=sorted(ar_steps) if ar_steps is not None else None,
        statistics=[BINS, SAMPLES],
        versions=[STAGE_VERSIONS[name] for name in ("sampler", "plan", "noise", "statistics")],
    )


def _store(path: Path, identity: str, done: int, backend: CollectingBackend) -> None:
    arrays: dict[str, Any] = {"identity": np.array(identity), "done": np.array(done)}
    for kind, tensors in backend.watched.items():
        for index, seen in enumerate(tensors.values()):
            arrays[f"{kind}.{index}.numbers"] = seen.numbers()
            arrays[f"{kind}.{index}.bins"] = seen.bins
            arrays[f"{kind}.{index}.channels"] = seen.channels
    with atomic_path(path) as temporary:
        np.savez_compressed(temporary, **arrays)


def _resume(path: Path, identity: str, backend: CollectingBackend) -> int:
    """Fills the backend's statistics; number of images done, 0 where the file is another run's, damaged or missing."""
    try:
        with np.load(path, allow_pickle=False) as stored:
            if str(stored["identity"]) != identity:
                return 0
            found = {
                kind: {
                    tensor: Statistics.of(*(stored[f"{kind}.{i}.{part}"] for part in ("numbers", "bins", "channels")))
                    for i, tensor in enumerate(tensors)
                }
                for kind, tensors in backend.watched.items()
            }
            done = int(stored["done"])
    except (OSError, ValueError, KeyError, EOFError, GtrError):
        return 0
    except Exception as error:  # zipfile's own errors; a damaged record only means that the images run again
        if type(error).__name__ == "BadZipFile":
            return 0
        raise
    backend.watched.update(found)
    return done
