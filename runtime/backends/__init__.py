"""Which engine library runs a bundle, and how."""
