"""The tuned layers: where a delta meets a module of the base model."""
