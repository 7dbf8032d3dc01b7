"""Bottleneck adapters: small modules between the layers of a frozen model, and invertible adapters of its embeddings."""
