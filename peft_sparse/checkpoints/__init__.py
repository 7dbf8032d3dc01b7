"""Files: the native format (FORMAT.md) and the model card."""
