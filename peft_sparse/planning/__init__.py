"""How much memory a run will need, computed from the model's config alone."""
