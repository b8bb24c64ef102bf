"""gtr-run generate: images from a bundle, as PNGs that carry their own settings, each written as soon as it is made."""

from __future__ import annotations

import itertools
import re
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from ..errors import BundleError, GtrError, UsageError
from ..sampling.named import named_plan
from .backend_options import backend_options, load_pipeline
from .console import Reporter, echo, print_json
from .plan_options import plan_options
from .request_options import RequestOptions, request_options
from .stop import if_stopped

if TYPE_CHECKING:
    from ..backends.row import BackendOptions
    from ..bundle.reader import Bundle
    from ..pipeline import Pipeline
    from ..sampling.job import StepResult
    from .run_folder import Run
    from .stop import Stop

GRID_LIMIT = 400
"""Pictures of a contact sheet, which is drawn in memory."""

_TYPED = (ParameterSource.COMMANDLINE, ParameterSource.ENVIRONMENT)
_FILE = click.Path(path_type=Path, dir_okay=False)


class _Shard(click.ParamType):
    name = "I/N"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, int]:
        if isinstance(value, tuple):
            return value
        if not re.fullmatch(r"[0-9]{1,6}/[0-9]{1,6}", str(value)):
            self.fail(f"{value!r} is not a part such as 1/4, the first of four", param, ctx)
        first, _, second = str(value).partition("/")
        return int(first), int(second)


@click.command()
@click.argument("bundle", type=click.Path(path_type=Path))
@request_options
@click.option("--like", type=click.Path(path_type=Path, exists=True, dir_okay=False), help="PNG: make it again.")
@plan_options()
@click.option("--seed", type=click.IntRange(0, 2**63), default=0, show_default=True, help="Image n gets seed + n.")
@click.option("--batch-size", type=click.IntRange(1, 4096), help="Images per batch (the bundle's max_batch).")
@click.option("--out", type=click.Path(path_type=Path, file_okay=False), required=True, help="Folder for the PNGs.")
@click.option("--layout", type=click.Choice(("flat", "class")), default="flat", help="All in one folder, or one each.")
@click.option("--resume", is_flag=True, help="Go on with a run that was stopped: what is there is not made again.")
@click.option("--shard", type=_Shard(), default="1/1", help="Only every N-th image, from the I-th on.")
@click.option("--grid", type=_FILE, help=f"PNG: a contact sheet with captions, of {GRID_LIMIT} images at most.")
@click.option("--trace", type=_FILE, help="GIF: the grid filling in.")
@click.option("--save-latents", type=_FILE, help="NPZ: latents and seeds.")
@backend_options
@click.option("--json", "as_json", is_flag=True, help="One JSON document on standard output.")
def generate(
    bundle: Path,
    requests: RequestOptions,
    like: Path | None,
    plan: str,
    overrides: Mapping[str, Any],
    seed: int,
    batch_size: int | None,
    out: Path,
    layout: str,
    resume: bool,
    shard: tuple[int, int],
    grid: Path | None,
    trace: Path | None,
    save_latents: Path | None,
    engine: BackendOptions,
    as_json: bool,
) -> None:
    """Generate images and write them as PNGs that carry their own settings; latents as NPZ if BUNDLE has no decoder.

    Each image is written when its batch is finished. A run that was stopped (Ctrl-C ends it after the batch at hand)
    goes on with the same command and --resume. Nothing is written over: file names have the class, the plan with what
    differs from its preset, and the seed.
    """
    kinds = (grid, ".png", "--grid"), (trace, ".gif", "--trace"), (save_latents, ".npz", "--save-latents")
    for path, suffix, option in kinds:
        if path is not None and path.suffix.lower() != suffix:
            raise UsageError(f"{option} {path} does not end in {suffix}")
    from ..backends.choice import resolve_backend
    from ..bundle.reader import Bundle
    from ..files import sweep
    from .like import settings_of
    from .run_folder import Run
    from .stop import Stop

    context = click.get_current_context()
    opened, reporter = Bundle.load(bundle), Reporter(quiet=as_json)
    for path, option in ((grid, "--grid"), (trace, "--trace"), (like, "--like")):
        if path is not None:
            opened.check_decoder(option)
    backend = resolve_backend(opened, engine)[0].backend
    if like is not None:
        typed = [name for name in ("plan", "seed", "images") if context.get_parameter_source(name) in _TYPED]
        if others := [*requests.texts, *(f"--{name.replace('_', '-')}" for name in (*typed, *overrides))]:
            raise UsageError(f"--like {like} says what to make; leave out {', '.join(others)}")
        request, seed, resolved = settings_of(like, opened, backend, reporter)
        wanted, plan = [request], resolved.settings.name
    else:
        wanted = requests.parsed(opened.conditioner)
        resolved = named_plan(plan, opened.architecture, opened.plan_defaults, overrides)
    run = Run(opened, backend, resolved, wanted, requests.images, seed, out, layout, shard)
    if grid is not None and len(run.numbers) > GRID_LIMIT:
        raise UsageError(f"--grid shows at most {GRID_LIMIT} images, this run makes {len(run.numbers)}; leave it out")
    record = run.place(resume)
    size = batch_size or min(len(run.numbers), opened.max_batch)
    work = _Work(run, size, resume, trace, save_latents)
    with if_stopped("nothing was made yet; the same command starts again"):
        pipeline = context.with_resource(load_pipeline(opened, engine, reporter)) if work.batches else None
    run.begin(record)  # a bundle that does not load has left nothing
    for path in (grid, trace, save_latents):
        if path is not None:
            sweep(path.parent)
    if warning := _noise_ahead(opened, resolved.settings.max_timestep):
        reporter.say(warning)
    stop = Stop("stopping after this batch; once more stops at once", as_json)
    if pipeline is not None:
        work.make(pipeline, stop, reporter)
    what = "images" if opened.architecture.decoder.makes_pictures else "latents"
    there = f"{work.made + work.kept} of {len(run.numbers)} {what} are in {out}"
    if stop.signal:
        click.echo(f"stopped: {there}; the same command with --resume goes on", err=True)
        context.exit(stop.code)
    if grid is not None:
        with if_stopped(f"{there}; the same command with --resume draws {grid}"):
            _draw(run, grid, f"{opened.architecture.name} · plan {plan}")
    others = {"grid": grid, "trace": trace, "latents": save_latents}
    if as_json:
        print_json(
            {
                "model": opened.architecture.name,
                "precision": opened.precision,
                "backend": backend,
                "backend_why": work.backend_why,
                "plan": resolved.settings.to_json(),
                "seconds": work.seconds,
                "run": str(record),
                "kept": work.kept,
                "images": [run.listed(number) for number in run.numbers],
                **{name: str(path) if path else None for name, path in others.items()},
            }
        )
        return
    each = f" ({work.seconds / work.made:.2f} s each)" if work.made else ""
    kept = f", {work.kept} were there" if work.kept else ""
    echo(f"{work.made} {what} in {work.seconds:.1f} s{each}{kept} -> {out}")
    for name, path in others.items():
        if path is not None:
            echo(f"{name}: {path}")


class _Work:
    """The batches of a run that are not finished, to be made one after the other.

    Attributes:
        kept: images that were there.
        made: images written so far.
        seconds: that these took.
    """

    def __init__(self, run: Run, size: int, resume: bool, trace: Path | None, latents: Path | None) -> None:
        """Finds out what is there. A batch of which one image is missing is made whole, so that its numbers come out
        as they would have; so are those that a trace or the latents need."""
        self._run, self._size, self._resume, self._trace, self._latents = run, size, resume, trace, latents
        self.batches: list[range] = []
        self.kept = self.made = 0
        self.seconds = 0.0
        self.backend_why: str | None = None
        for batch in run.batches(size):
            there = sum(run.has(number) for number in batch) if resume else 0
            self.kept += there
            if there < len(batch) or latents or (trace and batch.start == run.numbers.start):
                self.batches.append(batch)

    def make(self, pipeline: Pipeline, stop: Stop, reporter: Reporter) -> None:
        """Makes and writes what is missing, until ``stop`` gets a signal.

        Raises:
            GtrError: an image cannot be written, or an engine fails; with what to do next.
        """
        from ..pictures.trace import TraceRecorder
        from .stop import StopNow

        run, plan, start = self._run, self._run.plan, time.perf_counter()
        self.backend_why = pipeline.backend_why
        recorder = TraceRecorder(pipeline.architecture, plan) if self._trace else None
        if self.kept and self._latents:
            reporter.say("--save-latents: images that are there are made once more, and not written")

        def observer(first: int):
            if pipeline.backend.whole_generations and (recorder is None or first):
                return None  # watching would cost time

            def seen(result: StepResult) -> None:
                if recorder is not None and not first:
                    recorder(result)
                bar.advance()

            return seen

        title = f"generate {sum(map(len, self.batches))} images, plan {plan.settings.name}"
        numbers = list(itertools.chain.from_iterable(self.batches))
        # Lists, so that the noise of the next batch can be drawn while a GPU works.
        asked, seeds = [run.request(number) for number in numbers], [run.seed_of(number) for number in numbers]
        try:
            with stop, reporter.bar(title, len(self.batches) * len(plan.steps), "AR steps") as bar, self._npz() as add:
                made = pipeline.stream(asked, seeds, plan, self._size, observer)
                for count, (batch, generation) in enumerate(zip(self.batches, made, strict=True), start=1):
                    made_of = generation.latents if generation.pictures is None else generation.pictures
                    self._write(batch, made_of)
                    if add is not None:
                        add(generation.latents)
                    bar.to(count * len(plan.steps))
                    if stop.signal:
                        raise StopNow
        except StopNow:
            return
        finally:
            self.seconds = time.perf_counter() - start
        if recorder is not None and self._trace is not None:
            with reporter.stage("draw the trace"):
                captions = [run.bundle.conditioner.caption(run.request(number)) for number in self.batches[0]]
                recorder.save(self._trace, pipeline.backend.decode, captions)

    def _write(self, batch: range, images: Iterable[Any]) -> None:
        for number, image in zip(batch, images, strict=True):
            if self._resume and self._run.has(number):
                continue
            try:
                self._run.save(number, image)
            except GtrError as error:
                there = f"{self.made + self.kept} of {len(self._run.numbers)} images are there"
                raise GtrError(f"{error}; {there}, the same command with --resume goes on") from None
            self.made += 1

    def _npz(self) -> AbstractContextManager[Callable[[Any], None] | None]:
        """What takes the latents; None where nobody asked for them."""
        if self._latents is None:
            return nullcontext()
        import numpy as np

        from .latents import latents_file

        run, architecture = self._run, self._run.bundle.architecture
        shape = (len(run.numbers), architecture.tokens, architecture.token_channels)
        seeds = np.array([run.seed_of(number) for number in run.numbers], np.uint64)
        labels = run.bundle.conditioner.stored([run.request(number) for number in run.numbers])
        return latents_file(self._latents, shape, {"seeds": seeds, **labels})


def _noise_ahead(bundle: Bundle, max_timestep: int) -> str | None:
    """A warning where ``gtr-export verify`` has found that the checkpoint does not bear what the plan keeps; what it
    found is in its report, and bundles without one get no warning."""
    try:
        found = bundle.read_report("parity")["respacing"]
        sensitive, bears = found["sensitive"] is True, int(found["timesteps"][1])
    except (BundleError, LookupError, TypeError, ValueError):
        return None
    if not sensitive or max_timestep <= bears:
        return None
    return (
        f"warning: timesteps up to {max_timestep} are kept, and gtr-export verify found that this checkpoint gives "
        f"noise above {bears}: --max-timestep {bears} avoids it"
    )


def _draw(run: Run, grid: Path, title: str) -> None:
    """The contact sheet, from the files: so it has those, too, that were there."""
    from ..files import atomic_path
    from ..pictures.sheet import contact_sheet

    caption, count = run.bundle.conditioner.caption, len(run.numbers)
    captions = [f"{caption(run.request(number))} · seed {run.seed_of(number)}" for number in run.numbers]
    rows = len(run.requests) > 1 and run.each > 1 and run.shard == (1, 1)
    sheet = contact_sheet(run.pixels(), captions, min(run.each if rows else min(count, 8), 16), title)
    with atomic_path(grid) as temporary:
        sheet.save(temporary)
