"""How many weights, which ones, and when: pure functions of tensors and sizes."""
