"""The original project's own code as a contender: imported from a checkout, not copied and not changed.

git clone https://github.com/LTH14/mar
python benchmarks/compare.py ... --original mar

It needs timm (0.9.12 is what the original names), torchvision, scipy and tqdm beside torch, in this Python or on
PYTHONPATH. Its ``.cuda()`` calls do nothing while this runs on a CPU. Weights are those of the bundle.
"""

from __future__ import annotations

import importlib
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
from compare_calls import Job, Prepared
from compare_contenders import ORIGINAL, Parts

from gtr_deploy.runtime import Bundle, GtrError, SamplingPlan, UsageError
from gtr_deploy.runtime.commands.console import Reporter

FILES = ("models/mar.py", "models/diffloss.py", "diffusion/__init__.py")


class OriginalContender:
    """``MAR.sample_tokens`` of LTH14/mar in float32, on the CPU."""

    backend, precision = ORIGINAL, "fp32"

    def __init__(self, folder: Path, bundle: Bundle, threads: int) -> None:
        """Args:
            folder: checkout of the original project.
            bundle: fp32; the weights that it was built from are loaded.

        Raises:
            UsageError: the folder is no checkout.
            GtrError: a module that it needs is missing, or the bundle's weights are not found.
        """
        self.bundle = bundle
        missing = [name for name in FILES if not (folder / name).is_file()]
        if missing:
            raise UsageError(f"--original {folder} has no {missing[0]}; it should be a checkout of LTH14/mar")
        import torch

        from gtr_deploy.export.build.sources import weights_of_bundle

        torch.set_num_threads(threads)
        self._torch, self._architecture = torch, bundle.architecture
        sys.path.insert(0, str(folder.resolve()))
        try:
            models = importlib.import_module("models.mar")
            self._create_diffusion: Callable[..., Any] = importlib.import_module("diffusion").create_diffusion
        except ImportError as error:
            raise GtrError(
                f"the original project cannot be imported: {error}; see the head of benchmarks/compare_original.py"
            ) from None
        finally:
            sys.path.remove(str(folder.resolve()))
        weights, why_not = weights_of_bundle(bundle, None, None, Reporter(quiet=True))
        if weights is None:
            raise GtrError(f"the original needs the bundle's weights: {why_not}")
        a = bundle.architecture
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

    @contextmanager
    def _on_cpu(self) -> Iterator[None]:
        """Without gradients, and with ``.cuda()`` as a no-op."""
        with self._torch.no_grad(), patch.object(self._torch.Tensor, "cuda", lambda tensor, *_, **__: tensor):
            yield

    def refusal(self, plan: SamplingPlan, calls: bool) -> str | None:
        """Only MAR's own plans: one stage, random order, cosine schedule, one number of diffusion steps."""
        settings = plan.settings
        steps = set(settings.generation_diffusion)
        own = len(settings.stage_steps) == 1 and settings.order == "random" and settings.token_schedule == "cosine"
        if own and len(steps) == 1 and settings.cfg != 1.0:
            return None
        return "the original code has no such plan"

    def prepare(self, job: Job) -> Prepared:
        """A backbone call sees masks as they are after ``known`` tokens; a chain has the job's number of steps."""
        torch, a, step, model = self._torch, self._architecture, job.step, self._model
        if job.kind == "chain":
            diffusion = self._create_diffusion(timestep_respacing=str(step.diffusion_steps), noise_schedule="cosine")
            z = torch.randn(2 * job.batch * step.predicted, a.width)

            def chain() -> Any:
                with self._on_cpu(), patch.object(model.diffloss, "gen_diffusion", diffusion):
                    return model.diffloss.sample(z, 1.0, 2.0)

            return chain
        rng = np.random.default_rng(0)
        mask = np.ones((job.batch, a.tokens), np.float32)
        for row in mask:
            row[rng.permutation(a.tokens)[: step.known]] = 0.0
        masks = torch.from_numpy(np.concatenate([mask, mask]))
        tokens = torch.randn(2 * job.batch, a.tokens, a.token_channels)
        labels = torch.zeros(job.batch, dtype=torch.long)

        def backbone() -> Any:
            with self._on_cpu():
                known = model.class_emb(labels)
                embedding = torch.cat([known, model.fake_latent.repeat(job.batch, 1)])
                return model.forward_mae_decoder(model.forward_mae_encoder(tokens, masks, embedding), masks)

        return backbone

    def host(self, plan: SamplingPlan, batch: int) -> float:
        """``sample_tokens`` with its networks left out: masks, orders, gathering."""
        torch, a, model = self._torch, self._architecture, self._model
        z = torch.zeros(2 * batch, a.tokens, a.width)
        found = []
        with (
            patch.object(model, "forward_mae_encoder", lambda *_: None),
            patch.object(model, "forward_mae_decoder", lambda *_: z),
            patch.object(model.diffloss, "sample", lambda rows, *_: torch.zeros(len(rows), a.token_channels)),
        ):
            for _ in range(3):
                start = time.perf_counter()
                self._sample(plan, batch)
                found.append(time.perf_counter() - start)
        return sorted(found)[1]

    def generate(self, plan: SamplingPlan, batch: int, seed: int) -> Parts:
        """A whole ``sample_tokens``."""
        spent = {"backbone": 0.0, "head": 0.0}

        def timed(part: str, call: Callable[..., Any]) -> Callable[..., Any]:
            def run(*arguments: Any, **options: Any) -> Any:
                start = time.perf_counter()
                try:
                    return call(*arguments, **options)
                finally:
                    spent[part] += time.perf_counter() - start

            return run

        model, count = self._model, plan.settings.generation_diffusion[0]
        diffusion = self._create_diffusion(timestep_respacing=str(count), noise_schedule="cosine")
        self._torch.manual_seed(seed)
        np.random.seed(seed % 2**32)
        with (
            patch.object(model.diffloss, "gen_diffusion", diffusion),
            patch.object(model, "forward_mae_encoder", timed("backbone", model.forward_mae_encoder)),
            patch.object(model, "forward_mae_decoder", timed("backbone", model.forward_mae_decoder)),
            patch.object(model.diffloss, "sample", timed("head", model.diffloss.sample)),
        ):
            start = time.perf_counter()
            self._sample(plan, batch)
            total = time.perf_counter() - start
        return {**spent, "host": total - sum(spent.values())}

    def _sample(self, plan: SamplingPlan, batch: int) -> None:
        settings = plan.settings
        labels = self._torch.arange(batch) % self._architecture.classes
        with self._on_cpu():
            self._model.sample_tokens(
                batch, len(plan.steps), settings.cfg, settings.cfg_schedule, labels, settings.temperature
            )

    def close(self) -> None:
        """Nothing to do."""
