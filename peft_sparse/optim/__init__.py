"""Optimizers for weights that come and go, and carrying any optimizer's state to a new support."""
