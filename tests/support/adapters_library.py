"""What the `adapters` library computed: fixtures, made by fixtures/make_adapters_library.py."""

from __future__ import annotations

from pathlib import Path

import transformers
from safetensors.torch import load_file
from torch import Tensor, nn

ROOT = Path(__file__).parents[1] / "fixtures" / "adapters_library"
MODELS = ("bert", "xlm-roberta", "distilbert")
ADAPTERS = ("pfeiffer", "houlsby", "language", "parallel", "last_left_out", "learned_scaling")
STACKS = ("language+pfeiffer", "houlsby+pfeiffer")


def base_model(name: str, kind: str = "AutoModelForMaskedLM") -> nn.Module:
    """The tiny model of that name in evaluation mode; a head that the file does not have stays random."""
    config = transformers.AutoConfig.from_pretrained(ROOT / name)
    model = getattr(transformers, kind).from_config(config).eval()
    own, weights = model.state_dict(), load_file(ROOT / name / "base.safetensors")
    prefix = f"{model.base_model_prefix}."
    model.load_state_dict({key: weights.get(key, weights.get(prefix + key, own[key])) for key in own})
    return model


def expected(name: str) -> dict[str, Tensor]:
    """The input ids, and the logits under every setup."""
    return load_file(ROOT / name / "expected.safetensors")
