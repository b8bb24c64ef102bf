"""What a generation does: plans, orders, selection, diffusion, noise, shapes and the loop."""
