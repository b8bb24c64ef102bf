"""The original project's own code as a contender: imported from a checkout, not copied and not changed.

git clone https://github.com/LTH14/mar
python benchmarks/speed.py measure ... --original mar

It needs timm (0.9.12 is what the original names), torchvision, scipy and tqdm beside torch, in this Python or on
PYTHONPATH. Its ``.cuda()`` calls do nothing while this runs, on a CPU. Weights are those of the bundle.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
from contenders import Seconds, stopwatch
from records import AUTOCAST, COMPILED, ORIGINAL

from gtr_deploy.runtime import Bundle, GtrError, SamplingPlan, UsageError
from gtr_deploy.runtime.commands.console import Reporter
from gtr_deploy.runtime.models.mar import MarArchitecture

FILES = ("models/mar.py", "models/diffloss.py", "diffusion/__init__.py")


class OriginalContender:
    """``MAR.sample_tokens`` of LTH14/mar on the CPU, in float32 or as one of ``PEERS``."""

    def __init__(self, folder: Path, bundle: Bundle, threads: int, backend: str = ORIGINAL) -> None:
        """Args:
            folder: checkout of the original project.
            bundle: fp32; the weights that it was built from are loaded.
            backend: ``ORIGINAL`` or one of ``PEERS``.

        Raises:
            UsageError: the folder is no checkout, or the model none of the original's.
            GtrError: a module that it needs is missing, or the bundle's weights are not found.
        """
        a = bundle.architecture
        if not isinstance(a, MarArchitecture):
            raise UsageError(f"--original: {a.name} is no model of the original project")
        self.bundle, self._classes, self.backend = bundle, a.classes, backend
        missing = [name for name in FILES if not (folder / name).is_file()]
        if missing:
            raise UsageError(f"--original {folder} has no {missing[0]}; it should be a checkout of LTH14/mar")
        import torch

        from gtr_deploy.export.build.sources import weights_of_bundle

        torch.set_num_threads(threads)
        self._torch = torch
        sys.path.insert(0, str(folder.resolve()))
        try:
            models = importlib.import_module("models.mar")
            self._create_diffusion: Callable[..., Any] = importlib.import_module("diffusion").create_diffusion
        except (ImportError, RuntimeError) as error:  # RuntimeError: a torchvision of another torch
            raise GtrError(f"the original cannot be imported: {error}; see benchmarks/original.py") from None
        finally:
            sys.path.remove(str(folder.resolve()))
        weights, why_not = weights_of_bundle(bundle, None, None, Reporter(quiet=True))
        if weights is None:
            raise GtrError(f"the original needs the bundle's weights: {why_not}")
        with self._on_cpu():
            # Grid, not pixels: stride and patch of 1 give the grid itself as the image.
            self._model = models.MAR(
                img_size=a.grid[0], vae_stride=1, patch_size=1, vae_embed_dim=a.token_channels,
                encoder_embed_dim=a.width, encoder_depth=a.depth, encoder_num_heads=a.heads,
                decoder_embed_dim=a.width, decoder_depth=a.depth, decoder_num_heads=a.heads,
                mlp_ratio=4, norm_layer=partial(torch.nn.LayerNorm, eps=1e-6), class_num=a.classes,
                buffer_size=a.buffer, diffloss_d=a.head_depth, diffloss_w=a.head_width,
                num_sampling_steps="100",
            )  # fmt: skip
        self._model.load_state_dict(dict(weights.checkpoint()))
        self._model.eval()
        if backend == COMPILED:
            for owner, name in (
                (self._model, "forward_mae_encoder"),
                (self._model, "forward_mae_decoder"),
                (self._model.diffloss.net, "forward_with_cfg"),
            ):
                setattr(owner, name, torch.compile(getattr(owner, name), dynamic=True))

    @contextmanager
    def _on_cpu(self) -> Iterator[None]:
        """Without gradients, and with ``.cuda()`` as a no-op."""
        with self._torch.no_grad(), patch.object(self._torch.Tensor, "cuda", lambda tensor, *_, **__: tensor):
            yield

    def refusal(self, plan: SamplingPlan) -> str | None:
        """Only MAR's own plans: one stage, random order, cosine schedule, one number of diffusion steps."""
        settings = plan.settings
        own = len(settings.stage_steps) == 1 and settings.order == "random" and settings.token_schedule == "cosine"
        if own and len(set(settings.generation_diffusion)) == 1 and settings.cfg != 1.0:
            return None if all(step.branches == 2 for step in plan.steps) else "the original code guides every step"
        return "the original code has no such plan"

    def generate(self, plan: SamplingPlan, batch: int, seed: int) -> Seconds:
        settings = plan.settings
        steps = str(settings.generation_diffusion[0])
        diffusion = self._create_diffusion(timestep_respacing=steps, noise_schedule="cosine")
        self._torch.manual_seed(seed)
        np.random.seed(seed % 2**32)
        labels = self._torch.arange(batch) % self._classes
        lower = self._torch.autocast("cpu", self._torch.bfloat16) if self.backend == AUTOCAST else nullcontext()
        with (
            self._on_cpu(),
            lower,
            patch.object(self._model.diffloss, "gen_diffusion", diffusion),
            stopwatch() as spent,
        ):
            self._model.sample_tokens(
                batch, len(plan.steps), settings.cfg, settings.cfg_schedule, labels, settings.temperature
            )
        return spent[0]

    def close(self) -> None:
        """Nothing to do."""
