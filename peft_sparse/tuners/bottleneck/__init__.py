"""Bottleneck adapters: small modules in the layers of a frozen model, and invertible ones behind its embeddings."""
