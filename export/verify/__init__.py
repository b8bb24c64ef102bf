"""How far the evidence for a bundle reaches."""
