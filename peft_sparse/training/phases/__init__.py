"""The phases before a sparse training: what they train, how they end, and how they are saved."""
