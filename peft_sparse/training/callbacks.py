"""Callbacks that every Hugging Face trainer has without being given them."""

from __future__ import annotations

from transformers import TrainerCallback


def add_to_every_trainer(callback: type[TrainerCallback]) -> None:
    """Let every trainer that is built from now on have a callback of this class; a second call changes nothing."""
    # Here and not above: transformers' trainer is slow to import.
    import transformers.trainer

    if callback not in transformers.trainer.DEFAULT_CALLBACKS:
        transformers.trainer.DEFAULT_CALLBACKS.append(callback)
