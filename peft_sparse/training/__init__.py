"""Training: LT-SFT's two phases, as verbs for a loop of one's own and inside any Hugging Face trainer."""
