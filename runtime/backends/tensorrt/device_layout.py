"""Where every array of a generation lies on the device, fixed by the plan and the batch size before anything runs.

Three areas, each one allocation. *Tables* depend on the plan alone and are uploaded once. *Inputs* are what the host
gives for each generation (positions, conditioning, noise) and go up in one copy. *Work* is never seen by the host, but
for the finished latents. Knows NumPy and no CUDA.

Engines want every tensor aligned, also the slice of one reverse step. So the per-step tables have a padded stride; only
the tables that pass through the row graphs are dense.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ...models.architecture import Architecture
from ...models.families import family_of
from ...models.graphs import COEFFICIENTS
from ...sampling.chains import (
    ChainShape,
    Floats,
    Integers,
    chain_shape,
    chain_tables,
    device_draw,
    modulation_parts,
)
from ...sampling.job import GenerationJob
from ...sampling.plan import ARStep, SamplingPlan
from ...sampling.selection import SCORED_RULES, select
from ...sampling.shapes import step_shapes
from ..blocks import ALIGNMENT, Area, Block, padded


@dataclass(frozen=True)
class StepLayout:
    """The blocks of one AR step, by name, in the areas of inputs and tables. N = B P rows, in the order (image, token);
    M = B K of them have the longer chain and run alone for ``split.alone`` steps, then all run ``split.common``.

    Attributes:
        scored: the device ranks the tokens; otherwise the host gives ``rows``.
    """

    step: ARStep
    split: ChainShape
    scored: bool
    inputs: Mapping[str, Block]
    tables: Mapping[str, Block]


@dataclass(frozen=True)
class DeviceLayout:
    """All blocks of one plan at one batch size."""

    plan: SamplingPlan
    architecture: Architecture
    batch: int
    conditioning: Mapping[str, Block]
    steps: tuple[StepLayout, ...]
    work: Mapping[str, Block]
    inputs_size: int
    tables_size: int
    work_size: int

    def fill_tables(self, area: NDArray[np.uint8]) -> None:
        """Writes what depends on the plan alone."""
        settings = self.plan.settings
        for layout in self.steps:
            step, split = layout.step, layout.split
            views = {name: block.view(area) for name, block in layout.tables.items()}
            views["guidance"][...] = step.guidance
            chains = chain_tables(split, settings.max_timestep, settings.temperature)
            part, process = ("_alone", chains.alone) if split.longer else ("", chains.short)
            vectors = step.branches * self.batch * (split.longer or step.predicted)
            parts = modulation_parts(process.steps, vectors)
            for view, (start, stop) in zip(views[f"timestep{part}"], parts, strict=True):
                view[: vectors * (stop - start)] = np.repeat(process.timesteps[start:stop], vectors)  # for every row
            views[f"row{part}"][...] = np.arange(len(views[f"row{part}"])) % vectors
            views[f"coefficients{part}"][...] = process.coefficients[:, None]
            if not split.longer:
                continue
            views["row"][...] = np.arange(len(views["row"])) % (step.branches * self.batch * step.predicted)
            for side, process in ("long", chains.long), ("short", chains.short):
                views[f"timestep_{side}"][...] = process.timesteps
                views[f"coefficients_{side}"][...] = process.coefficients
            rows = self.batch * step.predicted
            views["row_index"][...] = np.arange(rows)
            views["slot_index"][...] = np.arange(self.batch * split.longer)
            if layout.scored:
                first = 0 if split.refined_longer else step.refined
                views["ranks"][...] = np.arange(first, first + split.longer)
                views["direction"][...] = -1.0 if settings.fts == "lowest" else 1.0

    def fill_inputs(self, area: NDArray[np.uint8], job: GenerationJob) -> None:
        """Writes what one generation of this plan and batch size needs to ``area`` [inputs_size]."""
        for name, block in self.conditioning.items():
            block.view(area)[...] = job.conditioning[name][: block.shape[0]]
        for layout in self.steps:
            step, split = layout.step, layout.split
            views = {name: block.view(area) for name, block in layout.inputs.items()}
            visible, predict, context = step.parts(job.orders)
            views["visible"][...], views["predict"][...], views["context"][...] = visible, predict, context
            draws = job.noise.draw(*device_draw(step, predict))
            views["x"][...] = draws[:, 0]
            by_step = draws[:, 1:].transpose(1, 0, 2)
            if split.longer:
                views["noise_alone"][...] = by_step[: split.alone]
                views["noise_long"][...] = by_step[split.alone :]
                views["noise_short"][...] = by_step[: split.common]
            else:
                views["noise"][...] = by_step
            if split.longer and not layout.scored:
                rule, total = self.plan.settings.fts, self.architecture.tokens
                refined = select(rule, step.refined, predict, job.seeds, total)
                views["rows"][...] = np.flatnonzero(refined == split.refined_longer).reshape(self.batch, -1)

    def refined(self, layout: StepLayout, rows: Integers | None) -> NDArray[np.bool_]:
        """bool [B, P]: which tokens an AR step refined, from the rows that the device chose."""
        step = layout.step
        if rows is None:
            return np.full((self.batch, step.predicted), step.refined == step.predicted > 0)
        chosen = np.zeros(self.batch * step.predicted, dtype=bool)
        chosen[rows.ravel()] = True
        return (chosen == layout.split.refined_longer).reshape(self.batch, step.predicted)


def device_layout(plan: SamplingPlan, architecture: Architecture, batch: int) -> DeviceLayout:
    """Lays out one plan at one batch size."""
    inputs, tables, work = Area(), Area(), Area()
    channels, width, columns = architecture.token_channels, architecture.width, len(COEFFICIENTS)
    branches = max(step.branches for step in plan.steps)
    conditioning = {
        tensor.name: inputs.block(np.dtype(tensor.dtype).type, *tensor.shape({"G": branches, "B": batch}))
        for tensor in family_of(architecture).conditioner.inputs
    }
    steps = tuple(_step_layout(step, plan, batch, channels, inputs, tables) for step in plan.steps)

    most_known = max(step.known for step in plan.steps)
    most_rows = batch * max(step.predicted for step in plan.steps)
    blocks = {
        "latents": work.block(np.float32, batch, architecture.tokens, channels),
        "tokens": work.block(np.float32, batch, most_known, channels),
        "z": work.block(np.float32, branches, most_rows, width),
        "x_even": work.block(np.float32, most_rows, channels),
        "x_odd": work.block(np.float32, most_rows, channels),
    }
    calls = [sizes for step in plan.steps for sizes in step_shapes(step, plan.settings, batch)]
    most_made = max(sizes["T"] for kind, sizes, _ in calls if kind == "modulation")
    blocks["modulation"] = work.block(np.float32, most_made, architecture.modulation)
    if architecture.modulation * 4 % ALIGNMENT:
        # A reverse step's part has at least one row, so that no part is more than twice as long with its padding.
        blocks["padded_modulation"] = work.block(np.uint8, most_made, padded(architecture.modulation * 4))
    split = [layout for layout in steps if layout.split.longer]
    if split:
        longer = batch * max(layout.split.longer for layout in split)
        rows = batch * max(layout.step.predicted for layout in split)
        alone = max(layout.split.alone for layout in split)
        common = max(layout.split.common for layout in split)
        for name, dtype, *shape in (
            ("score", np.float32, rows),
            ("norm", np.float32, rows),
            ("rows", np.int64, longer),
            ("z_rows", np.float32, branches, longer, width),
            ("x_rows", np.float32, longer, channels),
            ("noise_rows", np.float32, alone, longer, channels),
            ("x_merged", np.float32, rows, channels),
            ("merged_noise", np.float32, common, rows, channels),
            ("merged_timestep", np.int64, common, rows),
            ("merged_coefficients", np.float32, common, rows, columns),
        ):
            blocks[name] = work.block(dtype, *shape)
        # Padded copies of the dense tables, from which single reverse steps are taken.
        blocks["padded_noise"] = work.block(np.float32, max(alone, common), rows, channels, steps=True)
        most = [_parts(layout.split.common, layout.step.branches * batch * layout.step.predicted) for layout in split]
        blocks["part_timestep"] = work.block(np.int64, *map(max, zip(*most, strict=True)), steps=True)
        blocks["padded_coefficients"] = work.block(np.float32, common, rows, columns, steps=True)
    return DeviceLayout(plan, architecture, batch, conditioning, steps, blocks, inputs.size, tables.size, work.size)


def _step_layout(step: ARStep, plan: SamplingPlan, batch: int, channels: int, inputs: Area, tables: Area) -> StepLayout:
    split, columns = chain_shape(step), len(COEFFICIENTS)
    rows, total = batch * step.predicted, split.alone + split.common
    given = {
        "visible": inputs.block(np.int64, batch, step.known),
        "predict": inputs.block(np.int64, batch, step.predicted),
        "context": inputs.block(np.int64, batch, step.context),
        "x": inputs.block(np.float32, rows, channels),
    }
    fixed = {"guidance": tables.block(np.float32, rows)}
    scored = plan.settings.fts in SCORED_RULES

    def chain(part: str, rows: int, steps: int) -> None:
        parts, most = _parts(steps, step.branches * rows)
        fixed[f"row{part}"] = tables.block(np.int64, most)
        fixed[f"timestep{part}"] = tables.block(np.int64, parts, most, steps=True)
        fixed[f"coefficients{part}"] = tables.block(np.float32, steps, rows, columns, steps=True)

    if not split.longer:
        given["noise"] = inputs.block(np.float32, total, rows, channels, steps=True)
        chain("", rows, total)
        return StepLayout(step, split, scored, given, fixed)
    longer = batch * split.longer
    given["noise_alone"] = inputs.block(np.float32, split.alone, rows, channels)
    for side in ("short", "long"):
        given[f"noise_{side}"] = inputs.block(np.float32, split.common, rows, channels)
        fixed[f"timestep_{side}"] = tables.block(np.int64, split.common)
        fixed[f"coefficients_{side}"] = tables.block(np.float32, split.common, columns)
    chain("_alone", longer, split.alone)
    fixed["row"] = tables.block(np.int64, _parts(split.common, step.branches * rows)[1])
    fixed["row_index"] = tables.block(np.int64, rows)
    fixed["slot_index"] = tables.block(np.int64, longer)
    if scored:
        fixed["ranks"] = tables.block(np.int64, batch, split.longer)
        fixed["direction"] = tables.block(np.float32, 1)
    else:
        given["rows"] = inputs.block(np.int64, batch, split.longer)
    return StepLayout(step, split, scored, given, fixed)


def _parts(steps: int, vectors: int) -> tuple[int, int]:
    """How many parts a chain's modulation is made in, and the most rows of one."""
    parts = modulation_parts(steps, vectors)
    return len(parts), vectors * max(stop - start for start, stop in parts)


def ordered_to_grid(latents: Floats, orders: Integers) -> Floats:
    """Latents [B, L, C] in the order in which they were made -> in grid order."""
    result = np.empty_like(latents)
    np.put_along_axis(result, orders[:, :, None], latents, axis=1)
    return result
