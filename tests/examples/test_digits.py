"""The shipped model makes digits, and the modules that are exported also train."""

from __future__ import annotations

from pathlib import Path

import judge
import numpy as np
import torch
import train as train_script
from commands import runner
from data import GRID, jitter, load, to_tokens
from jobs import ARCHITECTURES

from gtr_deploy.export.build.checkpoints import load_mar
from gtr_deploy.export.graphs.decoders import PatchDecoder
from gtr_deploy.export.graphs.diffusion_head import DiffusionHead
from gtr_deploy.export.zoo import MODELS
from gtr_deploy.runtime.models.architecture import Decoder
from gtr_deploy.runtime.models.mar import MarArchitecture
from gtr_deploy.runtime.pipeline import Pipeline

DIGITS = ARCHITECTURES["mar-digits"]


def test_the_judge_knows_real_digits() -> None:
    assert judge.train_judge().held_out_accuracy >= 0.97


def test_the_judge_recognises_enlarged_digits_and_rejects_wrong_labels() -> None:
    images, labels = load()
    pixels = PatchDecoder(DIGITS)(to_tokens(images)).numpy()
    accuracy = judge.train_judge().accuracy(pixels, labels.numpy())
    assert accuracy >= 0.97
    assert judge.train_judge().accuracy(pixels, (labels.numpy() + 1) % 10) <= 0.02


def test_the_shipped_model_makes_the_asked_digits(digits_pipeline: Pipeline) -> None:
    # docs/parity.md has the figures over 1,000 images; 150 are enough to notice a broken model or sampler.
    labels = np.arange(150) % 10
    images = digits_pipeline.generate(labels.tolist(), plan="gtr-fast", batch_size=50).images
    assert judge.train_judge().accuracy(images, labels) >= 0.95


def test_a_sampler_that_ignored_the_class_would_be_noticed(digits_pipeline: Pipeline) -> None:
    labels = np.arange(30) % 10
    images = digits_pipeline.generate(labels.tolist(), plan="gtr-fast", batch_size=30).images
    assert judge.train_judge().accuracy(images, (labels + 3) % 10) <= 0.2


def test_shipped_weights_load_as_any_checkpoint() -> None:
    shipped = MODELS["mar-digits"].shipped
    assert shipped is not None
    weights = load_mar(shipped, DIGITS).weights
    assert sum(w.numel() for w in weights.values()) == 2_387_552


def test_tokens_and_patch_decoder_are_inverse() -> None:
    images, _ = load()
    tokens = to_tokens(images[:5])
    assert tokens.shape == (5, GRID * GRID, 16)
    pixels = PatchDecoder(DIGITS)(tokens)
    expected = torch.round((images[:5, 0] + 1) / 2 * 255)
    assert torch.equal(pixels[..., 0].float(), expected)
    assert torch.equal(pixels[..., 0], pixels[..., 2])


def test_jitter_is_small_and_seeded() -> None:
    images, _ = load()
    moved = jitter(images[:20], torch.Generator().manual_seed(0))
    assert torch.equal(moved, jitter(images[:20], torch.Generator().manual_seed(0)))
    assert moved.min() >= -1.001
    assert 0.001 < (moved - images[:20]).square().mean() < 0.3


def test_masking_follows_the_paper() -> None:
    rng = np.random.default_rng(0)
    counts = np.array([train_script.masked_count(64, rng) for _ in range(2000)])
    assert counts.min() >= 45  # ceil(0.7 * 64)
    assert counts.max() == 64
    # The mean of a normal (1, 0.25) cut to [0.7, 1] is 0.867; rounding up adds half a token.
    assert abs(counts.mean() / 64 - (0.867 + 0.5 / 64)) < 0.006


def test_the_diffusion_loss_falls_when_the_head_learns() -> None:
    small = MarArchitecture(
        name="small",
        grid=(2, 2),
        token_channels=4,
        classes=3,
        buffer=2,
        width=8,
        depth=1,
        heads=2,
        head_depth=2,
        head_width=32,
        decoder=Decoder(kind="patches", stride=1, patch=2),
    )
    torch.manual_seed(0)
    model = train_script.TrainableMar(small)
    loss_function = train_script.DiffusionLoss()
    optimizer = torch.optim.Adam(model.head.parameters(), lr=3e-3)
    target, z = torch.full((512, 4), 0.5), torch.randn(512, 8)
    losses = []
    for step in range(60):
        loss = loss_function(model.head, target, z, torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert isinstance(model.head.denoising, DiffusionHead)
    assert np.mean(losses[-5:]) < 0.6 * np.mean(losses[:5])


def test_training_is_seeded_and_writes_a_loadable_checkpoint(tmp_path: Path) -> None:
    try:
        for name in ("a", "b"):
            arguments = ["--out", str(tmp_path / f"{name}.safetensors"), "--steps", "2", "--batch-size", "4"]
            result = runner().invoke(train_script.train, arguments)
            assert result.exit_code == 0, result.output
    finally:
        torch.use_deterministic_algorithms(False)
    weights = load_mar(tmp_path / "a.safetensors", DIGITS).weights
    again = load_mar(tmp_path / "b.safetensors", DIGITS).weights
    assert all(torch.equal(value, again[key]) for key, value in weights.items())  # the header's order may differ
    shipped = load_mar(MODELS["mar-digits"].shipped, DIGITS).weights  # type: ignore[arg-type]
    assert weights.keys() == shipped.keys()
