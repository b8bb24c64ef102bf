"""The same family on the torch side."""

from __future__ import annotations

import torch
from torch import Tensor

from gtr_deploy.export.families import ExportFamily, NetworkModule
from gtr_deploy.export.graphs.backbone import Backbone
from gtr_deploy.export.graphs.diffusion_head import DiffusionHead, DiffusionStep, Modulation
from gtr_deploy.export.zoo import ModelEntry
from gtr_deploy.runtime.models.mar import MarArchitecture
from toy.family import TOY_MODEL, ToyArchitecture


class UnconditionalBackbone(Backbone):
    """MAR's without the table of classes."""

    def __init__(self, architecture: ToyArchitecture) -> None:
        sizes = {name: getattr(architecture, name) for name in ToyArchitecture.__struct_fields__}
        super().__init__(MarArchitecture(**sizes, classes=1))
        del self.class_emb

    def forward(self, tokens: Tensor, visible: Tensor, predict: Tensor, context: Tensor) -> Tensor:
        """BackboneOutput vectors [1, B, P, D]; arguments as MAR's."""
        batch, width = predict.shape[0], self.fake_latent.shape[1]
        embedding = torch.zeros_like(predict[:, :1]).float() + self.fake_latent
        return self.vectors(tokens, visible, predict, context, embedding.reshape(1, batch, width))


TOY_EXPORT = ExportFamily(
    {
        "backbone": NetworkModule(UnconditionalBackbone),
        "modulation": NetworkModule(Modulation, "diffloss.net."),
        "diffusion_step": NetworkModule(DiffusionHead, "diffloss.net.", DiffusionStep),
    }
)
TOY_ENTRY = ModelEntry(TOY_MODEL)
