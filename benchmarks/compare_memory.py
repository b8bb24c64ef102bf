"""Peak memory of one contender, in a process of its own: the model loaded, and the largest calls of a plan made once.

python benchmarks/compare_memory.py bundles/mar-b-fp32 onnxruntime gtr-fast 8
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import click
from compare_calls import Job, PlanCalls
from compare_contenders import open_contender

from gtr_deploy.runtime import Bundle, SamplingPlan
from gtr_deploy.runtime.commands.console import print_json
from gtr_deploy.runtime.commands.timing import peak_memory
from gtr_deploy.runtime.sampling.plan import preset, resolve


def peak_of(folder: Path, backend: str, plan: str, batch: int, threads: int) -> int | None:
    """Highest resident memory, bytes: runtime, weights (the VAE decoder's too) and work space.

    Returns:
        None where the process fails; what is wrong has been said when the contender was timed.
    """
    command = [sys.executable, str(Path(__file__).resolve()), str(folder), backend, plan, str(batch)]
    command += ["--threads", str(threads)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    try:
        return int(json.loads(done.stdout)["peak_bytes"])
    except (ValueError, KeyError, TypeError):
        return None


def largest_jobs(plan: SamplingPlan, batch: int, architecture: Any) -> list[Job]:
    """The backbone call with the most known tokens, and a short chain of the most rows."""
    jobs = PlanCalls(plan, batch, architecture, samples=0).jobs
    backbone = max((job for job in jobs if job.kind == "backbone"), key=lambda job: job.step.known)
    chain = max((job for job in jobs if job.kind == "chain"), key=lambda job: job.step.predicted)
    return [backbone, chain]


@click.command()
@click.argument("folder", type=click.Path(path_type=Path))
@click.argument("backend")
@click.argument("plan")
@click.argument("batch", type=click.IntRange(1))
@click.option("--threads", type=click.IntRange(1), default=1, show_default=True)
def main(folder: Path, backend: str, plan: str, batch: int, threads: int) -> None:
    """Prints {"peak_bytes": N}."""
    bundle = Bundle.load(folder)
    contender = open_contender(backend, bundle, threads)
    resolved = resolve(preset(plan, bundle.architecture, bundle.plan_defaults), bundle.architecture)
    if contender.refusal(resolved, calls=True) is not None:
        contender.generate(resolved, batch, 0)
    else:
        for job in largest_jobs(resolved, batch, bundle.architecture):
            contender.prepare(job)()
    print_json({"peak_bytes": peak_memory()})


if __name__ == "__main__":
    main()
