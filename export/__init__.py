"""Torch side: turns a MAR checkpoint into a bundle, and proves that the bundle computes the same."""
