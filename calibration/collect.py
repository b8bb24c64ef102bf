"""Runs the real sampler and watches what enters every quantisable layer, over all AR steps and diffusion timesteps.

ONNX Runtime runs copies of the graphs whose watched tensors are outputs too; each call's values go into running
statistics and are dropped. So memory depends on the batch, not on the number of images. After each batch the statistics
are stored, and a run that was killed goes on where it was.
"""

from __future__ import annotations

import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from ..runtime.backends.onnxruntime.backend import OnnxRuntimeBackend
from ..runtime.backends.protocol import GraphCall
from ..runtime.bundle.graph_file import GraphFile
from ..runtime.bundle.manifest import graph_bytes
from ..runtime.bundle.staged import stage_key
from ..runtime.commands.console import Reporter
from ..runtime.commands.timing import peak_memory
from ..runtime.errors import BackendError, GtrError, UsageError
from ..runtime.files import atomic_path, sha256
from ..runtime.models.architecture import Architecture
from ..runtime.models.conditioning import Arrays
from ..runtime.sampling.chains import Floats, Integers
from ..runtime.sampling.job import generation_job
from ..runtime.sampling.loop import BackboneOutput, generate_on_host
from ..runtime.sampling.noise import SeededNoise
from ..runtime.sampling.plan import SamplingPlan
from .data import CalibrationImages
from .layers import QUANTISED_KINDS, quantisable, read_graph
from .ranges import BINS, SAMPLES, Statistics

BATCH = 4
"""Images per batch. All watched tensors of one call are in memory together: 1 GB for mar-b's backbone at 4 images."""

STAGE_VERSIONS = {"sampler": 1, "plan": 1, "noise": 1, "statistics": 1, "ranges": 2, "quantise": 1}
"""Raise a number when calibrations must be made again because something computes otherwise: the first three when the
trajectories of one plan and seed change (runtime/sampling), ``statistics`` for what is recorded along them,
``ranges`` for what is chosen from that (ranges.py, sensitivity.py, probes.py), ``quantise`` for the graphs that are
written (layers.py, quantize.py). The last two let a stopped run go on with its statistics."""


@dataclass(frozen=True)
class Collected:
    """What a calibration run has seen.

    Attributes:
        all: layer name to the statistics of what enters it; layers with the same input share them.
        resumed: images that an interrupted run had done.
        grown: bytes by which the process's peak memory rose while the batches ran.
    """

    all: dict[str, Statistics]
    resumed: int
    grown: int


class Collector:
    """Call hook that takes the statistics of what enters quantisable layers.

    Attributes:
        watched: graph kind to tensor to statistics.
        layers: graph kind to layer name to the tensor that enters it.
    """

    def __init__(self, graphs: Mapping[str, Path]) -> None:
        """``graphs``: graph kind to float graph."""
        self.watched: dict[str, dict[str, Statistics]] = {}
        self.layers: dict[str, dict[str, str]] = {}
        self.graphs: dict[str, Path | GraphFile] = {}
        self._ar_step = -1
        self._names: dict[str, list[str]] = {}
        for kind, path in graphs.items():
            self.graphs[kind] = self._watching(kind, path) if kind in QUANTISED_KINDS else path

    def _watching(self, kind: str, path: Path) -> GraphFile:
        """A copy of the graph with the watched tensors as further outputs; in memory, so that the bundle stays."""
        model = read_graph(path)
        self.layers[kind] = {layer.name: layer.activation for layer in quantisable(model)}
        tensors = list(dict.fromkeys(self.layers[kind].values()))
        self.watched[kind] = {tensor: Statistics() for tensor in tensors}
        inputs = {value.name for value in model.graph.input}
        for tensor in tensors:
            if tensor not in inputs:
                model.graph.output.append(onnx.helper.make_tensor_value_info(tensor, onnx.TensorProto.FLOAT, None))
        self._names[kind] = [value.name for value in model.graph.output]
        return GraphFile(path, model.SerializeToString())

    def __call__(self, call: GraphCall) -> None:
        if call.kind == "backbone":
            self._ar_step = self._ar_step + 1 if call.inputs["visible"].shape[1] else 0
        if call.kind not in self.watched:
            return
        found = {**call.inputs, **dict(zip(self._names[call.kind], call.outputs, strict=True))}
        for tensor, statistics in self.watched[call.kind].items():
            try:
                statistics.add(found[tensor])
            except BackendError as error:
                where = f"AR step {self._ar_step + 1}, {call.kind}, tensor {tensor}"
                raise BackendError(f"{where}: {error}; run gtr-export verify on the bundle") from None


class _Shown(OnnxRuntimeBackend):
    """Goes on from given latents [B, L, C], where there are some, instead of from what it has sampled."""

    latents: Floats | None = None

    def backbone(
        self, tokens: Floats, visible: Integers, predict: Integers, context: Integers, conditioning: Arrays
    ) -> BackboneOutput:
        if self.latents is not None:
            tokens = np.take_along_axis(self.latents, visible[:, :, None], axis=1)
        return super().backbone(tokens, visible, predict, context, conditioning)


def collect(
    architecture: Architecture,
    graphs: Mapping[str, Path],
    plan: SamplingPlan,
    images: CalibrationImages,
    reporter: Reporter,
    checkpoint: Path | None = None,
    batch_size: int = BATCH,
    threads: int | None = None,
) -> Collected:
    """Runs the sampler over the images.

    Args:
        graphs: graph kind to float graph.
        plan: resolved for the model.
        checkpoint: NPZ that is written after every batch and resumed from; a finished one is simply read.
        batch_size: images per batch.
        threads: of one call.

    Raises:
        UsageError: a senseless batch size, or graphs that are quantised already.
        BackendError: a graph does not run, or a watched value is not finite.
    """
    if batch_size < 1:
        raise UsageError(f"calibration batch size {batch_size} is not at least 1")
    wanted = {kind: graphs[kind] for kind in graphs if kind in (*QUANTISED_KINDS, "detail_score")}
    collector = Collector(wanted)
    backend = _Shown(collector.graphs, threads)
    backend.hook = collector
    identity = _identity(wanted, plan, images, batch_size)
    done = _resume(checkpoint, identity, collector) if checkpoint else 0
    resumed, start = done, peak_memory()
    count, calls = len(images.seeds), len(plan.steps)
    title = f"calibrate over {count} images, plan {plan.settings.name}"
    if resumed:
        reporter.say(f"{title}: {resumed} images are done already")
    with reporter.bar(title, count * calls, "AR steps") as bar:
        bar.to(done * calls)
        while done < count:
            part = slice(done, min(done + batch_size, count))
            batch = images.part(part)
            noise = SeededNoise(batch.seeds, architecture.token_channels)
            job = generation_job(plan, architecture, batch.conditioning, batch.seeds, noise)
            backend.latents = batch.latents
            generate_on_host(backend, job, lambda result: bar.advance(len(result.predicted)))
            done = part.stop
            if checkpoint:
                _store(checkpoint, identity, done, collector)
    grown = max(0, peak_memory() - start)
    reporter.say(f"{title}: peak memory rose by {grown / 2**20:.0f} MiB")
    seen = {
        name: collector.watched[kind][tensor]
        for kind in collector.layers
        for name, tensor in collector.layers[kind].items()
    }
    return Collected(seen, resumed, grown)


def _identity(graphs: Mapping[str, Path], plan: SamplingPlan, images: CalibrationImages, batch_size: int) -> str:
    """Hash of everything that the statistics depend on."""
    return stage_key(
        graphs={kind: [sha256(path), graph_bytes(path)] for kind, path in graphs.items()},
        plan=plan.settings.to_json(),
        images=images.identity,
        batch_size=batch_size,
        statistics=[BINS, SAMPLES],
        versions=[STAGE_VERSIONS[name] for name in ("sampler", "plan", "noise", "statistics")],
    )


def _store(path: Path, identity: str, done: int, collector: Collector) -> None:
    arrays: dict[str, Any] = {"identity": np.array(identity), "done": np.array(done)}
    for kind, tensors in collector.watched.items():
        for index, seen in enumerate(tensors.values()):
            arrays[f"{kind}.{index}.numbers"] = seen.numbers()
            arrays[f"{kind}.{index}.bins"] = seen.bins
            arrays[f"{kind}.{index}.channels"] = seen.channels
    with atomic_path(path) as temporary:
        np.savez_compressed(temporary, **arrays)


def _resume(path: Path, identity: str, collector: Collector) -> int:
    """Fills the collector's statistics; images done, 0 where the file is another run's, damaged or missing."""
    try:
        with np.load(path, allow_pickle=False) as stored:
            if str(stored["identity"]) != identity:
                return 0
            found = {
                kind: {
                    tensor: Statistics.of(*(stored[f"{kind}.{i}.{part}"] for part in ("numbers", "bins", "channels")))
                    for i, tensor in enumerate(tensors)
                }
                for kind, tensors in collector.watched.items()
            }
            done = int(stored["done"])
    except (OSError, ValueError, KeyError, EOFError, GtrError, zipfile.BadZipFile):
        return 0  # a damaged record only means that the images run again
    collector.watched.update(found)
    return done
