"""What `tests/distributed` runs in each of several processes."""
