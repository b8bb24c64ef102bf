"""Plans: presets, token and diffusion schedules, guidance, FLOPs, and every way in which settings can be wrong."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from golden import CASES, load_case
from hypothesis import given, settings
from hypothesis import strategies as st
from jobs import ARCHITECTURES, PLAN_DEFAULTS
from msgspec import structs
from torch.utils.flop_counter import FlopCounterMode

from gtr_deploy.export.graphs.backbone import Backbone
from gtr_deploy.export.graphs.diffusion_head import DiffusionHead, Modulation
from gtr_deploy.runtime.errors import PlanError
from gtr_deploy.runtime.models.architecture import Architecture
from gtr_deploy.runtime.models.flops import head_flops
from gtr_deploy.runtime.models.mar import backbone_flops
from gtr_deploy.runtime.sampling.plan import PRESETS, PlanSettings, SamplingPlan, fitted, preset, resolve

MAR_B, MAR_H = ARCHITECTURES["mar-b"], ARCHITECTURES["mar-h"]
GTR = PRESETS["gtr"]


def plan_of(name: str, architecture: Architecture = MAR_H, **changes: Any) -> SamplingPlan:
    return resolve(replace(preset(name, architecture), **changes), architecture)


def mar_masked_after(total: int, steps: int) -> list[int]:
    """Masked tokens after each step, floor(L cos(pi/2 (s+1)/S)) clamped to [1, previous - 1]; the last keeps one."""
    masked, previous = [], total
    for s in range(steps):
        previous = max(1, min(previous - 1, math.floor(total * math.cos(math.pi / 2 * (s + 1) / steps))))
        masked.append(previous)
    return masked


def test_presets_are_the_documented_ones() -> None:
    assert list(PRESETS) == ["mar", "mar-256", "gtr", "gtr-compact", "gtr-fast", "disa", "halton"]
    assert {name: (s.stage_steps, s.order, s.context) for name, s in PRESETS.items()} == {
        "mar": ((64,), "random", "full"),
        "mar-256": ((256,), "random", "full"),
        "gtr": ((24, 6, 2), "gtr", "full"),
        "gtr-compact": ((24, 6, 2), "gtr", "compact"),
        "gtr-fast": ((12, 3, 1), "gtr", "full"),
        "disa": ((64,), "random", "full"),
        "halton": ((16,), "halton", "full"),
    }
    assert {s.generation_diffusion for n, s in PRESETS.items() if n in ("mar", "mar-256", "halton")} == {(100, 100)}
    assert {s.generation_diffusion for n, s in PRESETS.items() if n.startswith("gtr")} == {(50, 20)}
    assert (PRESETS["disa"].generation_diffusion, PRESETS["disa"].max_timestep) == ((50, 5), 950)
    assert all(s.max_timestep is None for n, s in PRESETS.items() if n != "disa")
    assert {n for n, s in PRESETS.items() if s.fts == "fts"} == {"gtr", "gtr-compact", "gtr-fast"}


@pytest.mark.parametrize("architecture", ARCHITECTURES.values(), ids=list(ARCHITECTURES))
@pytest.mark.parametrize("name", PRESETS)
def test_presets_resolve_on_every_model(name: str, architecture: Architecture) -> None:
    plan = plan_of(name, architecture, cfg=2.9)
    assert sum(step.predicted for step in plan.steps) == architecture.tokens
    assert min(step.predicted for step in plan.steps) >= 1
    assert [step.index for step in plan.steps] == list(range(len(plan.steps)))
    assert plan.settings.name == name
    assert len(plan.steps) == sum(plan.settings.stage_steps)
    if architecture.grid == (16, 16):
        assert plan.settings.stage_steps == PRESETS[name].stage_steps
    assert plan.flops == sum(step.backbone_flops + step.head_flops for step in plan.steps)


def test_presets_are_cut_to_the_tokens_of_a_small_model() -> None:
    digits = ARCHITECTURES["mar-digits"]  # stages of 16, 16 and 32 tokens
    cut = {name: preset(name, digits).stage_steps for name in PRESETS}
    assert cut == {
        "mar": (64,),
        "mar-256": (64,),
        "gtr": (16, 6, 2),
        "gtr-compact": (16, 6, 2),
        "gtr-fast": (12, 3, 1),
        "disa": (64,),
        "halton": (16,),
    }


def test_gtr_on_mar_h() -> None:
    steps = plan_of("gtr", cfg=3.2).steps
    assert [step.stage for step in steps] == [0] * 24 + [1] * 6 + [2] * 2
    assert [step.predicted for step in steps] == [2, 3, 3] * 8 + [10, 11, 11] * 2 + [64, 64]
    assert [step.known for step in steps[-3:]] == [117, 128, 192]
    generation = [step.diffusion_steps for step in steps[:30]]
    assert generation == [20 + 30 * (29 - s) // 29 for s in range(30)]
    assert (generation[0], generation[29]) == (50, 20)
    assert all(a >= b for a, b in pairwise(generation))
    assert [(step.refined, step.refined_diffusion_steps) for step in steps[:30]] == [(0, 0)] * 30
    assert [(s.diffusion_steps, s.refined, s.refined_diffusion_steps) for s in steps[30:]] == [(20, 6, 50)] * 2
    assert {step.branches for step in steps} == {2}


@settings(deadline=None, max_examples=100)
@given(data=st.data(), grid=st.tuples(st.integers(3, 12), st.integers(3, 12)), stages=st.integers(1, 3))
def test_every_plan_covers_the_image(data: st.DataObject, grid: tuple[int, int], stages: int) -> None:
    architecture = structs.replace(ARCHITECTURES["mar-digits"], grid=grid)
    board = [i + j for i in range(grid[0]) for j in range(grid[1])]
    sizes = {
        1: [len(board)],
        2: [sum(d % 2 == 0 for d in board), sum(d % 2 == 1 for d in board)],
        3: [sum(d % 4 == 0 for d in board), sum(d % 4 == 2 for d in board), sum(d % 2 == 1 for d in board)],
    }[stages]
    counts = tuple(data.draw(st.integers(1, size)) for size in sizes)
    schedule = data.draw(st.sampled_from(["uniform", "cosine"]))
    context = data.draw(st.sampled_from(["full", "compact"]))
    rule = data.draw(st.sampled_from(["fts", "none", "all"]))
    first, last = data.draw(st.tuples(st.integers(1, 60), st.integers(1, 60)))
    chosen = PlanSettings(
        "x", counts, token_schedule=schedule, context=context, fts=rule, generation_diffusion=(first, last), cfg=2.0
    )
    plan = resolve(chosen, architecture)
    known, index = 0, 0
    generation = counts[0] if stages == 1 else sum(counts[:-1])
    for stage, (size, wanted) in enumerate(zip(sizes, counts, strict=True)):
        for t in range(wanted):
            step = plan.steps[index]
            assert (step.index, step.stage, step.known) == (index, stage, known)
            if schedule == "uniform":
                assert step.predicted == size * (t + 1) // wanted - size * t // wanted
            assert step.predicted >= 1
            known += step.predicted
            seen = sum(sizes[: stage + 1]) if context == "compact" else sum(sizes)
            assert step.context == seen - known
            if stage == stages - 1 and stages > 1:
                assert step.diffusion_steps == 20
                count = {"fts": max(1, step.predicted // 10), "none": 0, "all": step.predicted}[rule]
                assert (step.refined, step.refined_diffusion_steps) == (count, 50 if count else 0)
            else:
                assert step.refined == 0
                span = generation - 1
                wanted_steps = last + (first - last) * (span - index) // span if span else first
                assert step.diffusion_steps == wanted_steps
            index += 1
    assert (known, index) == (sum(sizes), len(plan.steps))


@pytest.mark.parametrize("steps", [1, 4, 16, 64, 100, 255, 256])
def test_cosine_schedule_is_mars(steps: int) -> None:
    plan = resolve(PlanSettings("x", (steps,), token_schedule="cosine", fts="none", cfg=3.0), MAR_B)
    masked = [*mar_masked_after(256, steps)[:-1], 0]
    assert [256 - step.known - step.predicted for step in plan.steps] == masked
    # The original takes the scale after the clamp, so that its last step counts one masked token.
    guided = [1 + 2 * (256 - max(1, left)) / 256 for left in masked]
    assert [step.guidance for step in plan.steps] == pytest.approx(guided, rel=1e-12)


def test_cosine_schedule_examples() -> None:
    predicted = [step.predicted for step in plan_of("mar").steps]
    assert predicted[:4] == [1, 1, 1, 1]  # floor(256 cos) falls by less than one, the clamp takes one
    assert predicted[-1] == 256 - sum(predicted[:-1]) == math.floor(256 * math.cos(math.pi / 2 * 63 / 64))
    assert [step.predicted for step in plan_of("mar-256").steps] == [1] * 256


@pytest.mark.parametrize("name", CASES)
def test_recorded_plans(name: str) -> None:
    case = load_case(name)
    steps = case.plan.steps
    np.testing.assert_allclose([step.guidance for step in steps], case.arrays["cfg_per_step"], rtol=1e-6)
    batch = case.settings["batch"]
    assert steps[0].predicted * batch == len(case.arrays["rows_first"])
    assert steps[-1].predicted * batch == len(case.arrays["rows_last"])


def test_compact_context_leaves_later_stages_out() -> None:
    full, compact = plan_of("gtr").steps, plan_of("gtr-compact").steps
    assert [s.context for s in full] == [256 - s.known - s.predicted for s in full]
    assert [s.context for s in compact[:24]] == [64 - s.known - s.predicted for s in compact[:24]]
    assert [s.context for s in compact[24:30]] == [128 - s.known - s.predicted for s in compact[24:30]]
    assert [s.context for s in compact[30:]] == [64, 0]
    assert [s.context for s in compact[30:]] == [s.context for s in full[30:]]


@pytest.mark.parametrize(
    ("model", "row"),
    [
        ("mar-b", [14.63, 11.76, 5.96, 3.44, 3.96]),
        ("mar-l", [33.03, 27.22, 13.63, 7.74, 8.98]),
        ("mar-h", [65.11, 52.95, 26.72, 15.30, 17.76]),
    ],
)
def test_flop_table(model: str, row: list[float]) -> None:
    names = ["mar", "disa", "gtr", "gtr-fast", "gtr-compact"]
    found = [plan_of(name, ARCHITECTURES[model], cfg=2.9).flops / 1e12 for name in names]
    assert found == pytest.approx(row, rel=0.02)


@pytest.mark.parametrize("branches", [1, 2])
@pytest.mark.parametrize(("known", "predicted", "context"), [(0, 1, 63), (5, 7, 52), (5, 7, 0), (40, 24, 0)])
def test_flops_equal_torchs_own_count(known: int, predicted: int, context: int, branches: int) -> None:
    architecture = structs.replace(
        MAR_B, grid=(8, 8), width=48, depth=2, heads=4, buffer=6, head_depth=3, head_width=40, classes=3
    )
    backbone = Backbone(architecture).eval()
    head, modulation = DiffusionHead(architecture).eval(), Modulation(architecture).eval()
    places = torch.arange(64)[None]
    visible, predict, rest = places.split([known, predicted, 64 - known - predicted], dim=1)
    labels = torch.zeros(branches, 1, dtype=torch.int64)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        backbone(torch.zeros(1, known, 16), visible, predict, rest[:, :context], labels)
    # After attention, this project's last decoder block computes only the rows that are read.
    total = architecture.buffer + known + predicted + context
    left_out = branches * (total - predicted) * (18 * architecture.width**2 + 4 * total * architecture.width)
    whole = backbone_flops(architecture, known, predicted, context, branches)
    assert whole - left_out == counter.get_total_flops()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        rows = torch.arange(branches * 5)
        made = modulation(torch.zeros(branches * 5, 48), rows, torch.zeros_like(rows))
        head(torch.zeros(5, 16), made.unflatten(0, (branches, 5)))
    # The timestep is embedded for every row here, and once for all branches in the original.
    repeated = 2 * (branches - 1) * 5 * (256 * 40 + 40**2)
    assert 5 * head_flops(architecture, branches) == counter.get_total_flops() - repeated


def test_head_flops_of_a_step_count_refined_and_plain_tokens() -> None:
    step = plan_of("gtr", cfg=3.2).steps[-1]
    assert step.head_flops == (58 * 20 + 6 * 50) * head_flops(MAR_H, 2)
    assert step.backbone_flops == backbone_flops(MAR_H, 192, 64, 0, 2)
    assert step.flops == step.head_flops + step.backbone_flops


def test_head_calls() -> None:
    assert plan_of("mar").head_calls == 6400
    # T_s over the 30 generation steps, then two reconstruction steps of 50 calls: refined and plain tokens end as one.
    calls = sum(20 + 30 * (29 - s) // 29 for s in range(30)) + 2 * 50
    assert plan_of("gtr").head_calls == calls == pytest.approx(1190, rel=0.05)
    assert plan_of("gtr", fts="none").head_calls == calls - 60
    assert plan_of("gtr", fts="all", fts_diffusion=10).head_calls == calls - 80
    assert plan_of("gtr", fts_diffusion=10).head_calls == calls - 60


BAD_SETTINGS: list[tuple[dict[str, Any], str]] = [
    ({"stage_steps": ()}, "stage steps are empty: give AR steps per stage, for example 24,6,2"),
    ({"stage_steps": (24, 6.0, 2)}, "stage steps 6.0 is not a whole number"),
    ({"stage_steps": (24, True, 2)}, "stage steps True is not a whole number"),
    ({"stage_steps": "24"}, "stage steps '24' is not a list of whole numbers"),
    ({"stage_steps": (65, 6, 2)}, "stage 1 has 64 tokens: its AR steps must be in 1..64, not 65"),
    ({"stage_steps": (24, 0, 2)}, "stage 2 has 64 tokens: its AR steps must be in 1..64, not 0"),
    ({"stage_steps": (24, 6, -1)}, "stage 3 has 128 tokens: its AR steps must be in 1..128, not -1"),
    (
        {"stage_steps": (257,), "token_schedule": "cosine"},
        "stage 1 has 256 tokens: its AR steps must be in 1..256, not 257",
    ),
    ({"stage_steps": (1,) * 7}, "stage 2 of 7 has no token on a 16x16 grid; use fewer stages"),
    ({"order": "spiral"}, "order 'spiral' is not one of gtr, random, raster, halton"),
    ({"order": None}, "order None is not one of gtr, random, raster, halton"),
    ({"parity": "both"}, "parity 'both' is not one of odd, even"),
    ({"token_schedule": "linear"}, "token schedule 'linear' is not one of uniform, cosine"),
    ({"fts": "best"}, "FTS rule 'best' is not one of fts, norm, random, lowest, none, all"),
    ({"cfg_schedule": "cosine"}, "cfg schedule 'cosine' is not one of linear, constant"),
    ({"context": "none"}, "decoder context 'none' is not one of full, compact"),
    ({"max_timestep": 950.0}, "max timestep 950.0 is not a whole number"),
    ({"max_timestep": True}, "max timestep True is not a whole number"),
    ({"max_timestep": 1000}, "max timestep 1000 is not in 0..999"),
    ({"max_timestep": -1}, "max timestep -1 is not in 0..999"),
    ({"generation_diffusion": (50,)}, "generation diffusion steps are two numbers, first and last"),
    ({"generation_diffusion": (50, 20, 5)}, "generation diffusion steps are two numbers, first and last"),
    ({"generation_diffusion": ("50", 20)}, "generation diffusion steps '50' is not a whole number"),
    (
        {"generation_diffusion": (50, 0)},
        "generation diffusion steps: 0 diffusion steps cannot be kept out of timesteps 0..999",
    ),
    (
        {"generation_diffusion": (1001, 5)},
        "generation diffusion steps: 1001 diffusion steps cannot be kept out of timesteps 0..999",
    ),
    (
        {"reconstruction_diffusion": 0},
        "reconstruction diffusion steps: 0 diffusion steps cannot be kept out of timesteps 0..999",
    ),
    ({"reconstruction_diffusion": 2.5}, "reconstruction diffusion steps 2.5 is not a whole number"),
    ({"fts_diffusion": False}, "FTS diffusion steps False is not a whole number"),
    (
        {"fts_diffusion": 60, "max_timestep": 50, "generation_diffusion": (50, 20)},
        "FTS diffusion steps: 60 diffusion steps cannot be kept out of timesteps 0..50",
    ),
    ({"fts_fraction": 1.1}, "FTS fraction 1.1 is not in 0..1"),
    ({"fts_fraction": -0.1}, "FTS fraction -0.1 is not in 0..1"),
    ({"fts_fraction": math.nan}, "FTS fraction nan is not in 0..1"),
    ({"fts_fraction": "0.1"}, "FTS fraction '0.1' is not in 0..1"),
    ({"fts_fraction": True}, "FTS fraction True is not in 0..1"),
    ({"cfg": -1}, "cfg -1 is not in 0..100"),
    ({"cfg": math.inf}, "cfg inf is not in 0..100"),
    ({"guidance_interval": 0.2}, "guidance interval 0.2 is not two shares of known tokens"),
    ({"guidance_interval": (0.2, 0.4, 1)}, "guidance interval (0.2, 0.4, 1) is not two shares of known tokens"),
    ({"guidance_interval": (0.2, 1.1)}, "guidance interval 1.1 is not in 0..1"),
    ({"guidance_interval": (math.nan, 1)}, "guidance interval nan is not in 0..1"),
    ({"guidance_interval": ("0", 1)}, "guidance interval '0' is not in 0..1"),
    ({"guidance_interval": (0.4, 0.4)}, "guidance interval 0.4..0.4 is empty; give cfg 1 for no guidance"),
    ({"temperature": 11}, "temperature 11 is not in 0..10"),
    ({"temperature": math.nan}, "temperature nan is not in 0..10"),
]


@pytest.mark.parametrize(("changes", "message"), BAD_SETTINGS, ids=[str(changes) for changes, _ in BAD_SETTINGS])
def test_settings_out_of_range(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(PlanError) as error:
        resolve(replace(GTR, **changes), MAR_H)
    assert str(error.value) == message


@pytest.mark.parametrize(("name", "value"), [("stage_steps", 24), ("generation_diffusion", 50), ("stage_steps", None)])
def test_numbers_where_lists_belong(name: str, value: object) -> None:
    section: dict[str, Any] = {**GTR.to_json(), name: value}
    with pytest.raises(PlanError, match=name.replace("_", " ")):
        resolve(PlanSettings.from_json(section), MAR_H)


def test_limits_themselves_are_allowed() -> None:
    edge = replace(GTR, fts_fraction=0.0, cfg=0.0, temperature=0.0, stage_steps=(64, 64, 128))
    assert {step.refined for step in resolve(edge, MAR_H).steps if step.stage == 2} == {1}
    edge = replace(GTR, fts_fraction=1, cfg=100, temperature=10, max_timestep=49, generation_diffusion=(1, 50))
    assert [step.refined for step in resolve(edge, MAR_H).steps[-2:]] == [64, 64]


def test_rising_diffusion_steps_are_allowed() -> None:
    steps = resolve(replace(GTR, generation_diffusion=(20, 50)), MAR_H).steps
    assert (steps[0].diffusion_steps, steps[29].diffusion_steps) == (20, 50)


def test_unknown_preset() -> None:
    with pytest.raises(PlanError) as error:
        preset("fast", MAR_H)
    assert str(error.value) == ("plan 'fast' is not one of mar, mar-256, gtr, gtr-compact, gtr-fast, disa, halton")


def test_preset_on_a_grid_that_is_too_small() -> None:
    with pytest.raises(PlanError, match=r"^stage 2 of 3 has no token on a 1x2 grid; use fewer stages$"):
        preset("gtr", structs.replace(MAR_H, grid=(1, 2)))


def test_model_defaults() -> None:
    found = preset("gtr", MAR_H, {"cfg": 3.2, "temperature": 0.9, "max_timestep": 950})
    assert found == fitted(replace(GTR, cfg=3.2, temperature=0.9, max_timestep=950), MAR_H)
    # A preset's own lower limit stays, whatever the model says.
    assert preset("disa", MAR_H, {"max_timestep": 999}).max_timestep == 950
    assert preset("disa", MAR_H, {"max_timestep": 900}).max_timestep == 900
    assert preset("disa", MAR_H).max_timestep == 950
    assert PRESETS["gtr"] == GTR


def test_a_model_cannot_have_defaults_for_everything() -> None:
    with pytest.raises(PlanError) as error:
        preset("gtr", MAR_H, {"cfg": 3.2, "order": "raster", "fts": "none"})
    assert str(error.value) == (
        "a model cannot have defaults for fts, order, only for cfg, cfg_schedule, guidance_interval, "
        "max_timestep, temperature"
    )


@pytest.mark.parametrize("name", PLAN_DEFAULTS)
def test_published_guidance_is_the_default(name: str) -> None:
    wanted = {"mar-b": (2.9, 999), "mar-l": (3.0, 999), "mar-h": (3.2, 999), "mar-digits": (2.0, 950)}[name]
    found = preset("gtr", ARCHITECTURES[name], PLAN_DEFAULTS[name])
    assert (found.cfg, found.max_timestep, found.cfg_schedule) == (*wanted, "linear")
    assert sum(step.predicted for step in resolve(found, ARCHITECTURES[name]).steps) == ARCHITECTURES[name].tokens


@pytest.mark.parametrize("name", PRESETS)
def test_json_round_trip(name: str) -> None:
    text = json.dumps(PRESETS[name].to_json())
    assert PlanSettings.from_json(json.loads(text)) == PRESETS[name]


def test_json_fields() -> None:
    assert PlanSettings.from_json({"name": "x", "stage_steps": [4, 2]}) == PlanSettings("x", (4, 2))
    with pytest.raises(PlanError, match=r"^plan settings have unknown or missing fields: \['colour', 'size'\]$"):
        PlanSettings.from_json({**GTR.to_json(), "size": 3, "colour": "red"})
    for missing in ("name", "stage_steps"):
        section = GTR.to_json()
        del section[missing]
        with pytest.raises(PlanError, match=r"^plan settings have unknown or missing fields: name, stage_steps$"):
            PlanSettings.from_json(section)
