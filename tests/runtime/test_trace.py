"""Animated traces, drawn from steps made by hand and looked at pixel by pixel."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from jobs import ARCHITECTURES
from PIL import Image

from gtr_deploy.runtime.errors import GtrError
from gtr_deploy.runtime.pictures import trace as module
from gtr_deploy.runtime.pictures.trace import REFINED_COLOUR, STAGE_COLOURS, UNKNOWN_GREYS, TraceRecorder
from gtr_deploy.runtime.sampling.job import StepResult
from gtr_deploy.runtime.sampling.orders import generation_orders
from gtr_deploy.runtime.sampling.plan import SamplingPlan, preset, resolve

DIGITS = ARCHITECTURES["mar-digits"]
#: A colour that nothing else on a sheet or a trace has: the tokens of test images are this or darker, never grey.
TOKEN = (10, 60, 20)


def unpatchify(latents: np.ndarray) -> np.ndarray:
    """Latents [n, 64, 16] in 0..1 to pixels [n, 32, 32, 3]: 8x8 patches of 4x4 pixels, tinted."""
    grey = latents.reshape(-1, 8, 8, 4, 4).transpose(0, 1, 3, 2, 4).reshape(-1, 32, 32, 1)
    return (grey * np.array(TOKEN)).astype(np.uint8)


def fill(recorder: Callable[[StepResult], None], plan: SamplingPlan, batch: int, value: float = 1.0) -> np.ndarray:
    """Walks through a plan as the sampler does, with one shared latents array; gives the orders."""
    stages = len(plan.settings.stage_steps)
    orders = generation_orders(plan.settings.order, DIGITS.grid, stages, plan.settings.parity, range(batch))
    latents = np.zeros((batch, DIGITS.tokens, DIGITS.token_channels), dtype=np.float32)
    for step in plan.steps:
        predicted = orders[:, step.known : step.known + step.predicted]
        refined = np.zeros(predicted.shape, dtype=bool)
        refined[:, : step.refined] = True
        np.put_along_axis(latents, predicted[:, :, None], np.float32(value), axis=1)
        recorder(StepResult(step, predicted, refined, latents))
    latents[:] = np.nan
    return orders


def trace(name: str = "gtr", batch: int = 2) -> tuple[SamplingPlan, TraceRecorder, np.ndarray]:
    plan = resolve(preset(name, DIGITS), DIGITS)
    recorder = TraceRecorder(DIGITS, plan)
    return plan, recorder, fill(recorder, plan, batch)


def has_colour(image: Image.Image, colour: tuple[int, int, int], tolerance: int = 0) -> int:
    distance = np.abs(np.asarray(image.convert("RGB")).astype(int) - colour).max(axis=2)
    return int((distance <= tolerance).sum())


def cell_corner(frame: Image.Image, final: Image.Image) -> tuple[int, int, int]:
    """Left, top and token size of the first cell, found by its pixels in the finished frame."""
    rows, columns = np.nonzero((np.asarray(final) == TOKEN).all(axis=2))
    left, top = int(columns.min()), int(rows[columns == columns.min()].min())
    run = (np.asarray(final)[top, left:] == TOKEN).all(axis=1)
    size = int(np.argmin(run)) if not run.all() else len(run)
    return left, top, size // DIGITS.grid[1]


@pytest.mark.parametrize("batch", [1, 2, 5])
@pytest.mark.parametrize("name", ["gtr", "gtr-fast", "halton"])
def test_a_frame_per_step_and_a_last_one(tmp_path: Path, name: str, batch: int) -> None:
    plan, recorder, _ = trace(name, batch)
    captions = [f"{index} · seed {index}" for index in range(batch)]
    frames = recorder.render(unpatchify, captions)
    assert len(frames) == len(plan.steps) + 1
    assert len({frame.size for frame in frames}) == 1

    recorder.save(tmp_path / "trace.gif", unpatchify, captions)
    with Image.open(tmp_path / "trace.gif") as animation:
        assert animation.format == "GIF"
        assert animation.size == frames[0].size
        assert getattr(animation, "n_frames", 0) == len(frames)
        assert animation.info["loop"] == 0
        durations = []
        for index, frame in enumerate(frames):
            animation.seek(index)
            durations.append(animation.info["duration"])
            difference = np.abs(np.asarray(animation.convert("RGB")).astype(int) - np.asarray(frame))
            # 256 colours: some are a little off, most by nothing that can be seen.
            assert difference.mean() < 2
    assert durations[-1] == 1500
    assert len(set(durations[:-1])) == 1
    assert 120 <= durations[0] <= 400
    assert [file.name for file in tmp_path.iterdir()] == ["trace.gif"]


def test_unknown_tokens_are_grey_and_known_ones_are_not() -> None:
    plan, recorder, orders = trace(batch=1)
    *frames, final = recorder.render(unpatchify)
    left, top, size = cell_corner(frames[0], final)
    assert size * 8 >= 160
    for step, frame in zip(plan.steps, frames, strict=True):
        pixels = np.asarray(frame)
        known = orders[0, : step.known + step.predicted].tolist()
        for position in range(DIGITS.tokens):
            row, column = divmod(position, 8)
            token = pixels[top + row * size : top + (row + 1) * size, left + column * size : left + (column + 1) * size]
            if position in known:
                assert (token[size // 2, size // 2] == TOKEN).all()
            else:
                assert (token.max(axis=2) == token.min(axis=2)).all()
                assert set(np.unique(token)) == set(UNKNOWN_GREYS)


def test_outlines_have_the_colour_of_their_stage() -> None:
    plan, recorder, orders = trace(batch=1)
    *frames, final = recorder.render(unpatchify)
    left, top, size = cell_corner(frames[0], final)
    for step, frame in zip(plan.steps, frames, strict=True):
        pixels = np.asarray(frame)
        made = orders[0, step.known : step.known + step.predicted].tolist()
        for index, position in enumerate(orders[0, : step.known + step.predicted].tolist()):
            row, column = divmod(position, 8)
            y, x = top + row * size, left + column * size
            corners = [pixels[y, x], pixels[y + size - 1, x + size - 1]]
            if position not in made:
                expected = TOKEN
            elif index - step.known < step.refined:
                expected = REFINED_COLOUR
            else:
                expected = STAGE_COLOURS[step.stage]
            assert all((corner == expected).all() for corner in corners)


def test_refined_tokens_stand_out_in_the_gif(tmp_path: Path) -> None:
    plan, recorder, _ = trace()
    recorder.save(tmp_path / "trace.gif", unpatchify)
    counts = []
    with Image.open(tmp_path / "trace.gif") as animation:
        for index in range(len(plan.steps) + 1):
            animation.seek(index)
            counts.append(has_colour(animation, REFINED_COLOUR, tolerance=6))
    legend = counts[-1]
    assert legend > 0
    assert all((count > legend) == (step.refined > 0) for count, step in zip(counts, plan.steps, strict=False))


def test_the_finished_frame_has_no_marks() -> None:
    plan, recorder, _ = trace(batch=3)
    *frames, final = recorder.render(unpatchify)
    assert has_colour(final, TOKEN) == 3 * (cell_corner(frames[0], final)[2] * 8) ** 2
    left, top, size = cell_corner(frames[0], final)
    assert (np.asarray(final)[top : top + 8 * size, left : left + 8 * size] == TOKEN).all()
    assert has_colour(frames[0], TOKEN) < has_colour(final, TOKEN)
    assert plan.steps[-1].refined


def test_a_trace_without_refinement_does_not_mention_it() -> None:
    _, recorder, _ = trace("mar", batch=1)
    assert not any(has_colour(frame, REFINED_COLOUR) for frame in recorder.render(unpatchify))


@pytest.mark.parametrize("rule", ["all", "none", "fts"])
def test_the_line_above_names_the_diffusion_steps(rule: str) -> None:
    settings = replace(preset("gtr", DIGITS), fts=rule)
    plan = resolve(settings, DIGITS)
    expected = {"all": "50 diffusion steps", "none": "20 diffusion steps", "fts": "20 diffusion steps (50 refined)"}
    line = module._progress(plan, plan.steps[-1])
    assert line == f"gtr · AR step 24/24 · stage 3/3 · 64/64 tokens · {expected[rule]}"
    assert module._progress(plan, None) == "gtr · finished · 64 tokens in 24 AR steps"


def test_every_frame_is_decoded_once_and_only_what_is_shown() -> None:
    plan, recorder, _ = trace(batch=11)
    seen: list[np.ndarray] = []

    def decode(latents: np.ndarray) -> np.ndarray:
        seen.append(latents)
        return unpatchify(latents)

    frames = recorder.render(decode, [str(index) for index in range(11)], limit=3)
    assert len(seen) == len(plan.steps)
    assert {latents.shape for latents in seen} == {(3, 64, 16)}
    assert seen[0].all()
    known = [int((latents[0] != 0).any(axis=1).sum()) for latents in seen[1:]]
    assert known == [step.known + step.predicted for step in plan.steps[:-1]]
    assert recorder.render(unpatchify)[0].size != frames[0].size


def test_a_recorder_takes_one_batch() -> None:
    plan, recorder, _ = trace()
    with pytest.raises(ValueError, match=r"AR step 1 does not follow 24 recorded: one recorder per batch"):
        fill(recorder, plan, 2)


def test_an_incomplete_recording() -> None:
    plan = resolve(preset("gtr", DIGITS), DIGITS)
    with pytest.raises(ValueError, match="0 of 24 AR steps are recorded"):
        TraceRecorder(DIGITS, plan).render(unpatchify)


def test_arguments_that_do_not_fit() -> None:
    _, recorder, _ = trace()
    with pytest.raises(ValueError, match="1 captions for 2 images"):
        recorder.render(unpatchify, ["one"])
    with pytest.raises(ValueError, match="limit must be at least 1, not 0"):
        recorder.render(unpatchify, limit=0)
    with pytest.raises(ValueError, match=r"decoded images are \[2, 16, 32, 3\], not \[2, 32, 32, 3\]"):
        recorder.render(lambda latents: unpatchify(latents)[:, ::2])


def test_stages_beyond_the_colours_start_over(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "STAGE_COLOURS", STAGE_COLOURS[:3])
    plan = resolve(replace(preset("gtr", DIGITS), stage_steps=(1, 1, 1, 1)), DIGITS)
    recorder = TraceRecorder(DIGITS, plan)
    fill(recorder, plan, 1)
    frames = recorder.render(unpatchify)
    # The fourth stage has the first one's colour; the frame of the third stage shows it in bar and legend only.
    assert has_colour(frames[3], STAGE_COLOURS[0]) > 2 * has_colour(frames[2], STAGE_COLOURS[0])
    assert not any(has_colour(frame, STAGE_COLOURS[3]) for frame in frames)


def test_a_failing_write_leaves_the_old_trace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, recorder, _ = trace()
    path = tmp_path / "trace.gif"
    recorder.save(path, unpatchify)
    old = path.read_bytes()

    def full(self: Image.Image, file: Path, **options: object) -> None:
        file.write_bytes(b"half of it")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", full)
    with pytest.raises(GtrError, match=r"^cannot write .*trace\.gif: No space left on device"):
        recorder.save(path, unpatchify)
    assert path.read_bytes() == old
    assert [file.name for file in tmp_path.iterdir()] == ["trace.gif"]
