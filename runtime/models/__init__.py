"""What a model is: sizes, families, the contract of its graphs, conditioning, FLOPs."""
