"""One process of a two-phase run under DDP; prints a digest of what it ended with. Started by `test_lottery_ddp.py`."""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "unit" / "training"))

from tiny_training import deltas, make_trainer
from transformers import TrainerCallback


class KillAt(TrainerCallback):
    def __init__(self, phase):
        self.phase, self.trainer = phase, None

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == 3 and self.trainer._phase_name == self.phase:
            raise SystemExit(3)


def main(folder: str, kill: str, resume: str) -> None:
    torch.set_num_threads(1)
    killer = KillAt(kill)
    trainer = make_trainer(
        folder,
        max_steps=4,
        per_device_train_batch_size=2,
        save_strategy="steps",
        save_steps=2,
        eval_strategy="steps",
        eval_steps=2,
        load_best_model_at_end=True,
        ddp_backend="gloo",
        dense_args={"max_steps": 4},
        callbacks=[killer],
    )
    killer.trainer = trainer
    trainer.train(resume_from_checkpoint=resume == "resume")
    digest = hashlib.sha256()
    total = 0
    for indices, values in deltas(trainer.model).values():
        digest.update(indices.numpy().tobytes() + values.numpy().tobytes())
        total += values.numel()
    report = {"digest": digest.hexdigest(), "total": total, "wrapper": type(trainer.model_wrapped).__name__}
    Path(folder, f"report_{trainer.args.process_index}.json").write_text(json.dumps(report), encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
