"""gtr-run plan: what every AR step of a plan does and costs."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click

from ..models.architecture import Architecture
from ..models.families import family_of, known_models
from ..sampling.named import named_plan
from ..sampling.plan import ARStep, preset, resolve
from .console import echo, print_json, print_table
from .plan_options import plan_options

#: Of every step, in the JSON.
_TOLD = (
    "known", "predicted", "context", "diffusion_steps", "refined", "refined_diffusion_steps", "guidance", "branches",
    "flops",
)  # fmt: skip


@click.command("plan")
@click.argument("bundle")
@plan_options()
@click.option("--json", "as_json", is_flag=True, help="One JSON document on standard output.")
def show_plan(bundle: str, plan: str, overrides: Mapping[str, Any], as_json: bool) -> None:
    """Print a plan as a table: what every AR step does and costs. BUNDLE may also be a model name such as mar-h."""
    architecture, defaults = _model_of(bundle)
    resolved = named_plan(plan, architecture, defaults, overrides)
    original = next(iter(family_of(architecture).presets))
    baseline = resolve(preset(original, architecture, {**defaults, "cfg": resolved.settings.cfg}), architecture)
    ratio = baseline.flops / resolved.flops
    if as_json:
        print_json(
            {
                "model": architecture.name,
                "plan": resolved.settings.to_json(),
                "steps": [
                    {
                        "ar_step": step.index + 1,
                        "stage": step.stage + 1,
                        **{name: getattr(step, name) for name in _TOLD},
                        "share": step.flops / resolved.flops,
                    }
                    for step in resolved.steps
                ],
                "flops": resolved.flops,
                "head_calls": resolved.head_calls,
                f"ratio_to_{original}": ratio,
            }
        )
        return
    rows = [
        [
            *map(str, (step.index + 1, step.stage + 1, step.known, step.predicted, step.context)),
            _diffusion_cell(step),
            f"{step.guidance:.2f}" if step.branches > 1 else "none",
            f"{step.backbone_flops / resolved.flops:.1%}",
            f"{step.head_flops / resolved.flops:.1%}",
        ]
        for step in resolved.steps
    ]
    columns = ["AR step", "stage", "known", "predicted", "in context", "diffusion steps", "cfg", "backbone", "head"]
    print_table(columns, rows, title=f"{architecture.name}, plan {resolved.settings.name}")
    echo(
        f"{len(resolved.steps)} AR steps, {resolved.head_calls} diffusion head calls, "
        f"{flops_text(resolved.flops)} per image; {original} needs {flops_text(baseline.flops)}: {ratio:.2f}x"
    )


def _diffusion_cell(step: ARStep) -> str:
    refined = f" ({step.refined} tokens: {step.refined_diffusion_steps})" if step.refined else ""
    return f"{step.diffusion_steps}{refined}"


def flops_text(value: int) -> str:
    """Such as ``13.82 GFLOP``."""
    return f"{value / 1e12:.2f} TFLOP" if value >= 1e11 else f"{value / 1e9:.2f} GFLOP"


def _model_of(bundle: str) -> tuple[Architecture, Mapping[str, Any]]:
    """A bundle's model and plan defaults, read from its manifest alone; or those of a model name."""
    from ..bundle.reader import Bundle

    if not Path(bundle).exists() and (known := known_models().get(bundle)):
        return known.architecture, known.plan_defaults
    opened = Bundle.load(Path(bundle))
    return opened.architecture, opened.plan_defaults
