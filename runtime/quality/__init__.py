"""What pictures are worth, in numbers with intervals."""
