"""The same family on the torch side."""

from __future__ import annotations

from gtr_deploy.export.families import ExportFamily, NetworkModule
from gtr_deploy.export.graphs.backbone import UnconditionalBackbone
from gtr_deploy.export.graphs.diffusion_head import DiffusionHead, DiffusionStep, Modulation
from gtr_deploy.export.zoo import ModelEntry
from toy.family import TOY_MODEL

TOY_EXPORT = ExportFamily(
    {
        "backbone": NetworkModule(UnconditionalBackbone),
        "modulation": NetworkModule(Modulation, "diffloss.net."),
        "diffusion_step": NetworkModule(DiffusionHead, "diffloss.net.", DiffusionStep),
    }
)
TOY_ENTRY = ModelEntry(TOY_MODEL)
