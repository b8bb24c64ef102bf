"""The command-line options that choose the backend, shared by every command that runs a bundle."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import click

from ..backends.protocol import CUDA_GRAPH_MODES
from ..backends.registry import backend_names
from ..backends.row import PROVIDERS, BackendOptions
from ..bundle.reader import Bundle
from .console import Reporter
from .option_groups import with_options

if TYPE_CHECKING:
    from ..pipeline import Pipeline


class BackendName(click.ParamType):
    """A row of the table of backends, looked up when it is needed: entry points are somebody else's code."""

    name = "backend"

    def __init__(self, auto: bool = True) -> None:
        self._first = 0 if auto else 1

    def get_metavar(self, *_: Any, **__: Any) -> str:
        return f"[{'|'.join(backend_names()[self._first :])}]"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        if value not in (known := backend_names()[self._first :]):
            self.fail(f"{value!r} is not one of {', '.join(map(repr, known))}.", param, ctx)
        return value


#: (option, type, default, help)
_OPTIONS: tuple[tuple[str, Any, Any, str], ...] = (
    ("--backend", BackendName(), "auto", "Engine library."),
    ("--provider", click.Choice(PROVIDERS), "auto", "Where onnxruntime and torch compute."),
    ("--device", click.IntRange(0, 255), 0, "Index of the GPU."),
    (
        "--cuda-graph",
        click.Choice(CUDA_GRAPH_MODES),
        "auto",
        "What is captured as a CUDA graph; onnxruntime and torch only tell off from the rest, openvino has none.",
    ),
    ("--threads", click.IntRange(1, 1024), None, "Threads of one engine call on the CPU."),
)


def backend_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Adds ``--backend`` and its companions; the command gets ``engine``, a :class:`BackendOptions`."""

    options = {
        option.removeprefix("--").replace("-", "_"): click.option(
            option, type=kind, default=default, show_default=default is not None, help=text
        )
        for option, kind, default, text in _OPTIONS
    }
    return with_options(command, options, lambda values: {"engine": BackendOptions(**values)})


def load_pipeline(bundle: Bundle, engine: BackendOptions, reporter: Reporter) -> Pipeline:
    """Opens the bundle, and says which backend was chosen and why if the user left it open. The caller closes it.

    Raises:
        BundleError, BackendError, UsageError: see :meth:`Pipeline.load`.
    """
    from ..machine.cpu import usable_cpus
    from ..pipeline import Pipeline
    from .watch import watch_calls

    if engine.threads is not None and engine.threads > (most := usable_cpus()):
        reporter.say(f"--threads {engine.threads}: this process may use {most} processors, so {most} threads")
        engine = replace(engine, threads=most)
    with reporter.stage(f"load {bundle.folder}"):
        pipeline = Pipeline.load(
            bundle, engine.backend, engine.threads, True, engine.provider, engine.device, engine.cuda_graph
        )
    watch_calls(pipeline.backend)
    if pipeline.backend_why:
        reporter.say(f"backend {pipeline.backend.name}: {pipeline.backend_why}")
    return pipeline
