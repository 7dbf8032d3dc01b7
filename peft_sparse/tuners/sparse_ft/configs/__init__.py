"""The configs of sparse fine-tuning, one module per kind of method."""
