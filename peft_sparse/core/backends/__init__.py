"""Ways to compute the same numbers: `reference` is slow and obviously right, `sddmm` is what training uses."""
