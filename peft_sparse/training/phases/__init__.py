"""The phases before the sparse one: what they train, how they end, and how they are saved."""
