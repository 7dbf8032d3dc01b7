"""SPARSE_FT: sparse deltas on a model's own weights."""
