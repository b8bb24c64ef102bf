"""The animated trace of a generation. Knows what an observer of the sampler sees; is handed what decodes latents."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from ..models.architecture import Architecture
from ..sampling.chains import Floats, Integers
from ..sampling.job import StepResult
from ..sampling.plan import ARStep, SamplingPlan
from .drawing import (
    BACKGROUND,
    GAP,
    MARGIN,
    TEXT,
    Colour,
    Grid,
    Pixels,
    check_captions,
    check_pixels,
    enlarge,
    faded,
    indexed_by,
    load_font,
    one_line,
    shared_palette,
    write_line,
)
from .png import write_picture

Marks = NDArray[np.bool_]
Decode = Callable[[Floats], Pixels]
"""Latents float32 [n, L, C] to pixels uint8 [n, H, W, 3]."""

#: Outlines of the tokens made in stage 1, 2, ...; with the accent of refined tokens they are the colours of Okabe and
#: Ito, which people of any colour vision can tell apart. More stages start over.
STAGE_COLOURS: tuple[Colour, ...] = ((0, 114, 178), (0, 158, 115), (240, 228, 66), (204, 121, 167), (86, 180, 233))
REFINED_COLOUR: Colour = (213, 94, 0)
UNKNOWN_GREYS = (138, 149)
"""The two greys of the checker pattern over tokens that are not made yet."""

_MARK_COLOURS = (REFINED_COLOUR, *((grey, grey, grey) for grey in UNKNOWN_GREYS), *STAGE_COLOURS)
_TRACE_CELL = 160
_TRACE_COLUMNS = 4
_LEGEND_GAP = 34
_HEADER_FONT = 14
_HEADER_HEIGHT = 66


@dataclass(frozen=True)
class _Recorded:
    """One AR step of one batch: positions [B, P], refined [B, P], the tokens made [B, P, C]."""

    step: ARStep
    predicted: Integers
    refined: Marks
    tokens: Floats


class TraceRecorder:
    """An observer that keeps one batch's AR steps and draws them.

    A token never changes once it is made, so a step keeps copies of its own tokens only, and the whole recording is as
    large as the batch's latents.
    """

    def __init__(self, architecture: Architecture, plan: SamplingPlan) -> None:
        self._architecture, self._plan = architecture, plan
        self._steps: list[_Recorded] = []

    def __call__(self, result: StepResult) -> None:
        """Copies what the step made; ValueError unless it is the plan's next one: one recorder per batch."""
        index, number = len(self._steps), result.step.index + 1
        if index == len(self._plan.steps) or result.step != self._plan.steps[index]:
            raise ValueError(f"AR step {number} does not follow {index} recorded: one recorder per batch")
        tokens = np.take_along_axis(result.latents, result.predicted[:, :, None], axis=1)
        self._steps.append(_Recorded(result.step, result.predicted.copy(), result.refined.copy(), tokens))

    def render(self, decode: Decode, captions: Sequence[str] | None = None, limit: int = 8) -> list[Image.Image]:
        """One frame per AR step and a last one of the finished images without marks, all of one size.

        Args:
            captions: one line per image of the batch.
            limit: images drawn, the first of the batch.

        Raises:
            ValueError: the recording is not complete, or captions or pixels do not fit it.
        """
        final, *others = self._frames(decode, captions, limit)
        return [*others, final]

    def save(self, path: Path, decode: Decode, captions: Sequence[str] | None = None, limit: int = 8) -> None:
        """Writes the frames of :meth:`render` as an animated GIF that loops; the old file stays if that fails.

        Raises:
            GtrError: the file cannot be written.
            ValueError: see :meth:`render`.
        """
        frames = self._frames(decode, captions, limit)
        final = next(frames)
        # One palette for all frames, from the finished images: nothing flickers, and frames are held at a byte a pixel.
        palette = shared_palette(final, _MARK_COLOURS)
        indexed = [indexed_by(palette, frame) for frame in frames]
        # GIF counts hundredths of a second; short plans go slower, so that they can be followed.
        duration = max(120, min(400, 4000 // len(indexed))) // 10 * 10
        durations = [duration] * len(indexed) + [1500]

        rest = [*indexed[1:], indexed_by(palette, final)]
        moving = {"save_all": True, "append_images": rest, "duration": durations, "loop": 0, "optimize": False}
        write_picture(path, lambda file: indexed[0].save(file, format="GIF", **moving))

    def _frames(self, decode: Decode, captions: Sequence[str] | None, limit: int) -> Iterator[Image.Image]:
        """The finished frame first, because the palette comes from it, then the AR steps."""
        total = len(self._plan.steps)
        if len(self._steps) != total:
            raise ValueError(f"{len(self._steps)} of {total} AR steps are recorded; sample a whole batch first")
        if limit < 1:
            raise ValueError(f"limit must be at least 1, not {limit}")
        batch = len(self._steps[0].predicted)
        if captions is not None:
            check_captions(captions, batch)
            captions = captions[:limit]
        shown, architecture = min(batch, limit), self._architecture
        latents = np.zeros((shown, architecture.tokens, architecture.token_channels), dtype=np.float32)
        for recorded in self._steps:
            _put(latents, recorded.predicted[:shown], recorded.tokens[:shown])
        finished = self._decoded(decode, latents)
        layout = _Layout.of(architecture, self._plan, finished, captions or [])
        yield layout.frame(None, [enlarge(image, layout.factor) for image in finished], captions or [])

        latents[:] = 0
        known = np.zeros(latents.shape[:2], dtype=bool)
        for recorded in self._steps:
            predicted, refined = recorded.predicted[:shown], recorded.refined[:shown]
            _put(latents, predicted, recorded.tokens[:shown])
            np.put_along_axis(known, predicted, True, axis=1)
            last = recorded.step.index == total - 1
            images = finished if last else self._decoded(decode, latents)
            cells = [
                layout.marked(recorded.step, image, *marks)
                for image, *marks in zip(images, known, predicted, refined, strict=True)
            ]
            yield layout.frame(recorded.step, cells, captions or [])

    def _decoded(self, decode: Decode, latents: Floats) -> Pixels:
        # A copy, because the recording goes on in the same array.
        images = decode(latents.copy())
        check_pixels(images)
        expected = (len(latents), *self._architecture.image_size, 3)
        if images.shape != expected:
            raise ValueError(f"decoded images are {list(images.shape)}, not {list(expected)}")
        return images


def _put(latents: Floats, positions: Integers, tokens: Floats) -> None:
    np.put_along_axis(latents, positions[:, :, None], tokens, axis=1)


@dataclass(frozen=True)
class _Layout:
    """Where everything of a trace's frames goes: a line of text, the progress bar with its legend, the cells."""

    architecture: Architecture
    plan: SamplingPlan
    factor: int
    grid: Grid
    width: int

    @classmethod
    def of(cls, architecture: Architecture, plan: SamplingPlan, images: Pixels, captions: Sequence[str]) -> _Layout:
        font = load_font(_HEADER_FONT)
        header = math.ceil(max(font.getlength(one_line(_progress(plan, step))) for step in (None, *plan.steps)))
        header = max(header, math.ceil(sum(font.getlength(name) + _LEGEND_GAP for name, _ in _legend(plan))))
        columns = len(images) if len(images) <= _TRACE_COLUMNS else min(_TRACE_COLUMNS, -(-len(images) // 2))
        image = min(images.shape[1:3])
        # A few small images are enlarged further, as far as the line above them is wide anyway.
        room = (header + GAP) // columns - GAP
        factor = max(math.ceil(_TRACE_CELL / image), room // images.shape[2])
        grid = Grid.of(images, captions, columns, factor)
        return cls(architecture, plan, factor, grid, max(header, grid.width))

    def frame(self, step: ARStep | None, cells: Sequence[Image.Image], captions: Sequence[str]) -> Image.Image:
        """A whole frame; no step stands for the finished images."""
        font = load_font(_HEADER_FONT)
        top = MARGIN + _HEADER_HEIGHT
        canvas = Image.new("RGB", (self.width + 2 * MARGIN, top + self.grid.height + MARGIN), BACKGROUND)
        write_line(canvas, (MARGIN, MARGIN - 3), _progress(self.plan, step), font, self.width)
        pen = ImageDraw.Draw(canvas)
        bar_top, bar_bottom = MARGIN + 21, MARGIN + 28
        known = self.architecture.tokens if step is None else step.known + step.predicted
        for entry in self.plan.steps:
            colour = _stage_colour(entry.stage)
            ends = (entry.known, entry.known + entry.predicted)
            left, right = (MARGIN + count * self.width // self.architecture.tokens for count in ends)
            done = entry.known < known
            pen.rectangle((left, bar_top, right - 1, bar_bottom), fill=colour if done else faded(colour))
        x, y = float(MARGIN), MARGIN + 36
        for name, colour in _legend(self.plan):
            pen.rectangle((x, y + 3, x + 9, y + 12), outline=colour, width=3)
            pen.text((x + 15, y), name, fill=TEXT, font=font)
            x += font.getlength(name) + _LEGEND_GAP
        self.grid.draw(canvas, (MARGIN + (self.width - self.grid.width) // 2, top), cells, captions)
        return canvas

    def marked(self, step: ARStep, image: Pixels, known: Marks, predicted: Integers, refined: Marks) -> Image.Image:
        """One image [H, W, 3] of an AR step: unknown tokens [L] in grey, tokens made now [P] in an outline."""
        rows, columns = self.architecture.grid
        pixels = np.asarray(enlarge(image, self.factor))
        height, width = pixels.shape[0] // rows, pixels.shape[1] // columns
        square = max(2, width // 4)
        y, x = np.indices(pixels.shape[:2]) // square
        grey = np.where((y + x) % 2, *UNKNOWN_GREYS).astype(np.uint8)
        hidden = np.repeat(np.repeat(~known.reshape(rows, columns), height, axis=0), width, axis=1)
        cell = Image.fromarray(np.where(hidden[:, :, None], grey[:, :, None], pixels))
        pen = ImageDraw.Draw(cell)
        thickness = max(2, width // 10)
        for position, extra in zip(predicted.tolist(), refined.tolist(), strict=True):
            row, column = divmod(position, columns)
            pen.rectangle(
                (column * width, row * height, (column + 1) * width - 1, (row + 1) * height - 1),
                outline=REFINED_COLOUR if extra else _stage_colour(step.stage),
                width=thickness + extra,
            )
        return cell


def _stage_colour(stage: int) -> Colour:
    return STAGE_COLOURS[stage % len(STAGE_COLOURS)]


def _progress(plan: SamplingPlan, step: ARStep | None) -> str:
    """The line above the images."""
    name, total, stages = plan.settings.name, len(plan.steps), len(plan.settings.stage_steps)
    tokens = plan.steps[-1].known + plan.steps[-1].predicted
    if step is None:
        return f"{name} · finished · {tokens} tokens in {total} AR steps"
    all_refined = step.refined == step.predicted
    diffusion = f"{step.refined_diffusion_steps if all_refined else step.diffusion_steps} diffusion steps"
    if step.refined and not all_refined:
        diffusion += f" ({step.refined_diffusion_steps} refined)"
    position = f"AR step {step.index + 1}/{total} · stage {step.stage + 1}/{stages}"
    return f"{name} · {position} · {step.known + step.predicted}/{tokens} tokens · {diffusion}"


def _legend(plan: SamplingPlan) -> list[tuple[str, Colour]]:
    stages = range(len(plan.settings.stage_steps))
    entries = [(f"stage {stage + 1}", _stage_colour(stage)) for stage in stages]
    if any(step.refined for step in plan.steps):
        entries.append(("refined", REFINED_COLOUR))
    return entries
