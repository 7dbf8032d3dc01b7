"""Files: the native format (FORMAT.md), the model card, AdapterHub's adapters, and merging into checkpoints on disk."""
