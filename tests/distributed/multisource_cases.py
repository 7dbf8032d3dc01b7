"""Multi-source training in several processes: the function runs in each of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tiny_languages import train_languages
from training_cases import rank_and_world

from peft_sparse import iter_deltas


def train(folder: str, *, resume: bool = False) -> dict[str, Any]:
    """Eight updates, with a checkpoint after five."""
    _, world = rank_and_world()
    trainer = train_languages(
        Path(folder),
        resume=resume,
        save_strategy="steps",
        save_steps=5,
        ddp_backend="gloo" if world > 1 else None,
        average_tokens_across_devices=False,
    )
    logs = [record for record in trainer.state.log_history if "loss" in record]
    return {
        "seen": [(language, ids) for language, ids, _ in trainer.seen],
        "counts": {key: value for key, value in logs[-1].items() if key.startswith("batches/")},
        "own": trainer.switch.counts,
        "values": {name: delta.held_values.detach() for name, _, _, delta in iter_deltas(trainer.model, "task")},
    }
