"""The graphs of a model with a decoder, in the order in which they are built."""

KINDS = (
    "backbone",
    "modulation",
    "diffusion_step",
    "detail_score",
    "decoder",
    "select_rows",
    "gather_rows",
    "merge_rows",
)
