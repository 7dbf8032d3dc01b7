"""Sparse adapters without training: out of two checkpoints, or of a base model and another adapter."""
