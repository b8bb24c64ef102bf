"""PyTorch as the reference: the modules with their weights, and a backend that runs them."""
