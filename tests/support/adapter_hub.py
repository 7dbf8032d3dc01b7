"""Small adapters as AdapterHub shares them, with whatever is to be wrong about them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn

Tensors = dict[str, Tensor]
IDS = torch.arange(5, 15)[None]
LAYERS, WIDTH, SIZE = 3, 32, 8
CONFIG = {
    "original_ln_before": True,
    "original_ln_after": True,
    "residual_before_ln": True,
    "ln_before": False,
    "ln_after": False,
    "mh_adapter": False,
    "output_adapter": True,
    "cross_adapter": False,
    "is_parallel": False,
    "non_linearity": "relu",
    "reduction_factor": WIDTH // SIZE,
    "inv_adapter": None,
    "inv_adapter_reduction_factor": None,
    "leave_out": [],
    "dropout": 0.0,
    "scaling": 1.0,
    "phm_layer": False,
    "use_gating": False,
}


def bert(cls: str = "BertModel", **more: Any) -> nn.Module:
    torch.manual_seed(0)
    sizes = {"hidden_size": WIDTH, "num_hidden_layers": LAYERS, "num_attention_heads": 2, "intermediate_size": 64}
    config = transformers.BertConfig(vocab_size=100, max_position_embeddings=64, **sizes, **more)
    return getattr(transformers, cls)(config).eval()


def bottleneck(prefix: str, generator: torch.Generator) -> Tensors:
    """The four tensors of one adapter."""

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator) * 0.3

    return {
        f"{prefix}.adapter_down.0.weight": draw(SIZE, WIDTH),
        f"{prefix}.adapter_down.0.bias": draw(SIZE),
        f"{prefix}.adapter_up.weight": draw(WIDTH, SIZE),
        f"{prefix}.adapter_up.bias": draw(WIDTH),
    }


def tensors(name: str = "qu", *, seed: int = 1) -> Tensors:
    generator = torch.Generator().manual_seed(seed)
    found: Tensors = {}
    for layer in range(LAYERS):
        found |= bottleneck(f"bert.encoder.layer.{layer}.output.adapters.{name}", generator)
    return found


def write_hub(
    folder: Path,
    *,
    config: dict[str, Any] | None = None,
    name: str = "qu",
    head: tuple[dict[str, Any], Tensors] | None = None,
    change: Callable[[Tensors], Any] = lambda tensors: tensors,
    **about: Any,
) -> Path:
    """A folder with an adapter for `bert()`.

    Args:
        config: changes to `CONFIG`.
        head: the content of head_config.json, and the head's tensors.
        change: what is made of the adapter's tensors before they are saved.
        about: changes to what adapter_config.json says beside the config.
    """
    folder.mkdir(parents=True, exist_ok=True)
    plain = {"hidden_size": WIDTH, "model_class": "BertModel", "model_type": "bert", "name": name, "version": "3.1.0"}
    text = json.dumps({"config": {**CONFIG, **(config or {})}, **plain, **about})
    (folder / "adapter_config.json").write_text(text)
    torch.save(change(tensors(name)), folder / "pytorch_adapter.bin")
    if head is not None:
        (folder / "head_config.json").write_text(json.dumps(head[0]))
        torch.save(head[1], folder / "pytorch_model_head.bin")
    return folder


def flexible_head(layers: list[tuple[int, int]], *, name: str = "qu", **config: Any) -> tuple[dict[str, Any], Tensors]:
    """A head of the library's with linear layers of these shapes: (head_config.json, tensors)."""
    generator = torch.Generator().manual_seed(9)
    found: Tensors = {}
    for number, shape in enumerate(layers):
        found[f"heads.{name}.{1 + 3 * number}.weight"] = torch.randn(shape, generator=generator)
        found[f"heads.{name}.{1 + 3 * number}.bias"] = torch.randn(shape[0], generator=generator)
    about = {"layers": len(layers), "num_labels": layers[-1][0], "activation_function": "tanh"}
    return {"config": {**about, **config}, "name": name}, found


LABELS = {"B-PER": 0, "I-PER": 1, "O": 2}
OTHER_ORDER = {"O": 0, "B-PER": 1, "I-PER": 2}
TAGGING = flexible_head([(3, WIDTH)], head_type="tagging", label2id=LABELS)


def tagger(labels=None):
    names = {} if labels is None else {"id2label": {i: label for label, i in labels.items()}, "label2id": labels}
    return bert("BertForTokenClassification", num_labels=3, **names)
