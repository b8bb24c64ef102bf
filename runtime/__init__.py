"""Deployment side: runs a bundle with NumPy and one engine library, without PyTorch."""
