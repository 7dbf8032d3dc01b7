"""Adding adapters up: the mathematics of `add_weighted_adapter`, on supports instead of dense tensors."""
