"""One side of bottleneck_step.py, in a process of its own: imports only what its side's environment has.

    python _bottleneck_worker.py peft_sparse|adapters FOLDER SETUP THREADS

FOLDER holds `config.json` (arguments of BertConfig), `base.safetensors`, `batch.safetensors`, and for each SETUP but
"frozen" a folder with an adapter as the `adapters` library saves it. It answers every line that it is given with one of
JSON: "loss" (without dropout), "step" (seconds), "peak" (bytes that the steps needed beyond what the model takes; null
where /proc cannot tell).
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import torch
import transformers
from safetensors.torch import load_file
from transformers import BertConfig, BertForMaskedLM

FROZEN = "frozen"


def build(library: str, folder: Path, setup: str) -> torch.nn.Module:
    config = BertConfig(**json.loads((folder / "config.json").read_text(encoding="utf-8")))
    model = BertForMaskedLM(config)
    model.load_state_dict(load_file(folder / "base.safetensors"))
    model.tie_weights()
    if library == "peft_sparse":
        from peft_sparse import load_adapter_hub

        if setup != FROZEN:
            return load_adapter_hub(model, folder / setup)
    else:
        sys.path.insert(0, str(Path(__file__).parents[1] / "fixtures"))
        from make_adapters_library import with_flexible_head

        model = with_flexible_head(model, config)
        if setup != FROZEN:
            model.train_adapter(model.load_adapter(str(folder / setup), use_safetensors=True))
            model.heads.requires_grad_(False)
            return model
    return model.requires_grad_(False)


class Training:
    def __init__(self, library: str, folder: Path, setup: str) -> None:
        self.model = build(library, folder, setup).train()
        self.batch = load_file(folder / "batch.safetensors")
        parameters = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(parameters, lr=1e-5, fused=True) if parameters else None

    def step(self) -> None:
        if self.optimizer is None:
            embedded = self.model.get_input_embeddings()(self.batch["input_ids"]).requires_grad_()
            self.model(inputs_embeds=embedded, labels=self.batch["labels"]).loss.backward()
        else:
            self.model(**self.batch).loss.backward()
            self.optimizer.step()
            self.optimizer.zero_grad()

    @torch.no_grad()
    def loss(self) -> float:
        self.model.eval()
        loss = self.model(**self.batch).loss.item()
        self.model.train()
        return loss


def resident_bytes(field: str) -> int:
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:"))


def main() -> None:
    library, folder, setup, threads = sys.argv[1:]
    torch.set_num_threads(int(threads))
    transformers.logging.set_verbosity_error()
    clock = time.process_time if threads == "1" else time.perf_counter
    training = Training(library, Path(folder), setup)
    knows_peak = Path("/proc/self/clear_refs").exists()
    if knows_peak:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # The high-water mark starts over.
        before = resident_bytes("VmRSS")
    for line in sys.stdin:
        if line.strip() == "loss":
            answer = training.loss()
        elif line.strip() == "step":
            start = clock()
            training.step()
            answer = clock() - start
        else:
            answer = resident_bytes("VmHWM") - before if knows_peak else None
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
