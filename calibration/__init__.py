"""Post-training quantisation along the sampler's own trajectories: ranges, Q/DQ graphs, sensitivity, accuracy."""
