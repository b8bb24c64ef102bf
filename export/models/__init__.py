"""MAR's networks as PyTorch modules, written to be trained, to serve as the reference, and to be exported."""
