"""Trains mar-digits, the small real model that ships with the package, on the CPU.

    python examples/digits/train.py --out mar_digits.safetensors

The MAR objective (models/mar.py and models/diffloss.py of the original project): a masking ratio from a normal
distribution with mean 1 and standard deviation 0.25, cut to [0.7, 1]; the diffusion loss (noise prediction plus learned
variance) on masked tokens, about two timesteps per token; the class replaced by the null embedding in 10 % of the
images; an exponential moving average of the weights, which is what is written.
"""

from __future__ import annotations

import copy
import json
import math
import time
from pathlib import Path

import click
import numpy as np
import torch
from data import jitter, load, to_tokens
from safetensors.torch import save_file
from torch import Tensor, nn

from gtr_deploy.export.graphs.backbone import Backbone
from gtr_deploy.export.graphs.diffusion_head import DiffusionHead, Modulation
from gtr_deploy.export.graphs.layers import Linear
from gtr_deploy.runtime.models.architecture import Architecture
from gtr_deploy.runtime.models.families import known_models
from gtr_deploy.runtime.sampling.diffusion import TRAINING_STEPS, cosine_betas

HEAD_TOKENS = 6144
"""Masked tokens, drawn with repetition, that the diffusion loss sees in one step; each gets its own timestep."""


class Head(nn.Module):
    """The diffusion head in one piece, as it is trained."""

    def __init__(self, architecture: Architecture) -> None:
        super().__init__()
        self.modulation, self.denoising = Modulation(architecture), DiffusionHead(architecture)

    def forward(self, x: Tensor, z: Tensor, timestep: Tensor) -> tuple[Tensor, Tensor]:
        """eps and variance [1, N, C] for x [N, C], z [N, D], timestep [N]."""
        made = self.modulation(z, torch.arange(len(z)), timestep)
        return self.denoising(x, made.unsqueeze(0))


class TrainableMar(nn.Module):
    """Backbone and head under the checkpoint's names."""

    def __init__(self, architecture: Architecture) -> None:
        super().__init__()
        self.backbone = Backbone(architecture)
        self.head = Head(architecture)
        for name, parameter in self.backbone.named_parameters():
            if name.endswith(("pos_embed_learned", "fake_latent", "mask_token", "class_emb.weight")):
                nn.init.normal_(parameter, std=0.02)
        for module in self.modules():
            if isinstance(module, Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        for name, parameter in self.head.named_parameters():
            if ".time_embed." in name and name.endswith("weight"):
                nn.init.normal_(parameter, std=0.02)
            elif name.endswith(("adaLN_modulation.1.weight", "final_layer.linear.weight")):
                nn.init.zeros_(parameter)

    def checkpoint(self) -> dict[str, Tensor]:
        """The state dict in the official layout."""
        parts = (self.head.modulation, self.head.denoising)
        head = {f"diffloss.net.{key}": value for part in parts for key, value in part.state_dict().items()}
        return {**self.backbone.state_dict(), **head}


class DiffusionLoss:
    """Noise prediction error plus the variational bound of the learned variance (``training_losses``)."""

    def __init__(self) -> None:
        betas = cosine_betas()
        alpha_bar = np.cumprod(1 - betas)
        previous = np.append(1.0, alpha_bar[:-1])
        variance = betas * (1 - previous) / (1 - alpha_bar)
        tables = {
            "signal": np.sqrt(alpha_bar),
            "spread": np.sqrt(1 - alpha_bar),
            "recip": np.sqrt(1 / alpha_bar),
            "recipm1": np.sqrt(1 / alpha_bar - 1),
            "mean_x0": betas * np.sqrt(previous) / (1 - alpha_bar),
            "mean_xt": (1 - previous) * np.sqrt(1 - betas) / (1 - alpha_bar),
            "log_posterior": np.log(np.append(variance[1], variance[1:])),
            "log_beta": np.log(betas),
        }
        self.tables = {name: torch.tensor(table, dtype=torch.float32) for name, table in tables.items()}

    def __call__(self, head: Head, target: Tensor, z: Tensor, generator: torch.Generator) -> Tensor:
        """Mean loss over target [N, C] given condition vectors z [N, D]."""
        timestep = torch.randint(0, TRAINING_STEPS, (len(target),), generator=generator)
        noise = torch.randn(target.shape, generator=generator)
        table = {name: values[timestep].unsqueeze(1) for name, values in self.tables.items()}
        noisy = table["signal"] * target + table["spread"] * noise
        eps, variance = (part.squeeze(0).float() for part in head(noisy, z, timestep))
        error = (noise - eps).square().mean(dim=1)

        # The bound trains the variance only: the predicted noise is detached, as in the original.
        x0 = table["recip"] * noisy - table["recipm1"] * eps.detach()
        mean = table["mean_x0"] * x0 + table["mean_xt"] * noisy
        true_mean = table["mean_x0"] * target + table["mean_xt"] * noisy
        fraction = (variance + 1) / 2
        log_variance = fraction * table["log_beta"] + (1 - fraction) * table["log_posterior"]
        true_log_variance = table["log_posterior"]
        divergence = 0.5 * (
            log_variance
            - true_log_variance
            + torch.exp(true_log_variance - log_variance)
            - 1
            + (true_mean - mean).square() * torch.exp(-log_variance)
        )
        # At t = 0 the original uses the likelihood of 8-bit pixels; tokens are continuous, so the bound is kept. [ours]
        bound = divergence.mean(dim=1) / math.log(2)
        return (error + bound).mean()


def masked_count(tokens: int, rng: np.random.Generator) -> int:
    """Tokens to mask: ceil(ratio * tokens), ratio from N(1, 0.25) cut to [0.7, 1] (MAR, section 3.4)."""
    while True:
        ratio = rng.normal(1.0, 0.25)
        if 0.7 <= ratio <= 1.0:
            return math.ceil(tokens * ratio)


@click.command()
@click.option("--out", type=click.Path(path_type=Path, dir_okay=False), required=True, help="safetensors file to write")
@click.option("--steps", default=2600, show_default=True, help="0.8 s each on two cores without other load")
@click.option("--batch-size", default=64, show_default=True)
@click.option("--learning-rate", default=1.2e-3, show_default=True)
@click.option("--seed", default=0, show_default=True)
def train(out: Path, steps: int, batch_size: int, learning_rate: float, seed: int) -> None:
    """Trains mar-digits and writes its EMA weights."""
    # Without this, threads add the gradients of a token that was drawn twice in any order.
    torch.use_deterministic_algorithms(True)
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    rng = np.random.default_rng(seed)
    architecture = known_models()["mar-digits"].architecture
    images, labels = load()
    model = TrainableMar(architecture)
    average = copy.deepcopy(model).requires_grad_(False)
    decayed = [p for p in model.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.ndim <= 1]
    groups = [{"params": decayed, "weight_decay": 0.02}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=learning_rate, betas=(0.9, 0.95))
    loss_function = DiffusionLoss()
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters, {len(images):,} images", flush=True)

    start, recent = time.monotonic(), []
    for step in range(1, steps + 1):
        done = step / steps
        rate = learning_rate * min(1.0, step / 200) * 0.5 * (1 + math.cos(math.pi * done))
        for group in optimizer.param_groups:
            group["lr"] = rate
        chosen = torch.randint(0, len(images), (batch_size,), generator=generator)
        tokens = to_tokens(jitter(images[chosen], generator))
        classes = labels[chosen].clone()
        classes[torch.rand(batch_size, generator=generator) < 0.1] = architecture.classes
        count = masked_count(architecture.tokens, rng)
        order = torch.rand(batch_size, architecture.tokens, generator=generator).argsort(dim=1)
        masked, known = order[:, :count], order[:, count:]
        target = torch.gather(tokens, 1, masked.unsqueeze(-1).expand(-1, -1, architecture.token_channels))
        given = torch.gather(tokens, 1, known.unsqueeze(-1).expand(-1, -1, architecture.token_channels))
        nothing = torch.empty(batch_size, 0, dtype=torch.int64)
        z = model.backbone(given, known, masked, nothing, classes.unsqueeze(0))[0].flatten(0, 1)
        drawn = torch.randint(0, len(z), (HEAD_TOKENS,), generator=generator)
        loss = loss_function(model.head, target.flatten(0, 1)[drawn], z[drawn], generator)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 3.0)
        optimizer.step()
        decay = min(0.999, step / (step + 50))
        with torch.no_grad():
            torch._foreach_lerp_(list(average.parameters()), list(model.parameters()), 1 - decay)
        recent.append(loss.item())
        if step % 50 == 0:
            minutes = (time.monotonic() - start) / 60
            print(f"step {step:6d} of {steps}  loss {np.mean(recent):.4f}  {minutes:.1f} min", flush=True)
            recent.clear()

    weights = {key: value.half().contiguous() for key, value in average.checkpoint().items()}
    recipe = {"seed": seed, "steps": steps, "batch_size": batch_size, "learning_rate": learning_rate}
    out.parent.mkdir(parents=True, exist_ok=True)
    save_file(weights, out, metadata={"model": architecture.name, "recipe": json.dumps(recipe)})
    out.chmod(0o644)
    print(f"{steps} steps -> {out} ({out.stat().st_size / 1e6:.2f} MB)")


if __name__ == "__main__":
    train()
