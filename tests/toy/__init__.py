"""What a stranger would add: a second model family, one file on each side, and rows in tables."""
