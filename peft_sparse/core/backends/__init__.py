"""Ways to compute the same numbers: `reference` is slow and obviously right, the other modules are fast."""
