"""Trainers that know the phases, their arguments and their checkpoints."""
