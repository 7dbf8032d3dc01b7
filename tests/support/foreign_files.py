"""Files of the structure that other libraries write, made from the description of their formats."""

from __future__ import annotations

import io
import json
import os
import pickle
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    BertForTokenClassification,
    XLMRobertaConfig,
    XLMRobertaForMaskedLM,
    XLMRobertaForSequenceClassification,
)

from peft_sparse import import_adapter
from peft_sparse.errors import FormatError

PREFIX = "base_model.model."
SIZES = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "vocab_size": 40,
    "max_position_embeddings": 40,
}
IDS = torch.arange(2, 12)[None]


def bert(kind: type = BertForTokenClassification, **fields: Any) -> nn.Module:
    torch.manual_seed(0)
    return kind(BertConfig(**SIZES, **fields)).eval()


def xlmr(kind: type = XLMRobertaForSequenceClassification, **fields: Any) -> nn.Module:
    torch.manual_seed(0)
    return kind(XLMRobertaConfig(**SIZES, **fields)).eval()


MODELS = {
    "bert tokens": (bert, BertForTokenClassification),
    "bert sequence": (bert, BertForSequenceClassification),
    "xlmr sequence": (xlmr, XLMRobertaForSequenceClassification),
    "bert mlm": (bert, BertForMaskedLM),
    "xlmr mlm": (xlmr, XLMRobertaForMaskedLM),
}


def encode(difference: Tensor) -> dict[str, Any]:
    """A difference as composable-sft describes it: column-major gaps, the first of them a number of numpy's."""
    column_major = difference.permute(*reversed(range(difference.dim()))).reshape(-1)
    flat = column_major.nonzero().squeeze(1)
    steps: list[Any] = np.diff(flat.numpy(), prepend=0).tolist()
    if steps:
        steps[0] = np.int64(steps[0])
    return {"size": difference.size(), "index_steps": steps, "values": column_major[flat].clone()}


def differences(model: nn.Module, *, share: float = 0.3, prefix: str | None = None, seed: int = 3) -> dict[str, Tensor]:
    """A sparse difference for each parameter of the base model; LayerNorms are frozen, as they were in the papers."""
    generator = torch.Generator().manual_seed(seed)
    prefix = f"{model.base_model_prefix}." if prefix is None else prefix
    found = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if not name.startswith(prefix):
            continue
        noise = torch.randn(parameter.shape, generator=generator) * 0.05
        chosen = torch.rand(parameter.shape, generator=generator) < (0 if "LayerNorm" in name else share)
        found[name] = noise * chosen
    return found


def heads_of(model: nn.Module) -> dict[str, Tensor]:
    torch.manual_seed(9)
    prefix = f"{model.base_model_prefix}."
    return {n: torch.randn_like(p) for n, p in model.named_parameters() if not n.startswith(prefix)}


def write_diff(folder: Path, diffs: Mapping[str, Tensor], heads: Mapping[str, Any] | None = None, **more: Any) -> Path:
    """`pytorch_diff.bin`."""
    folder.mkdir(parents=True, exist_ok=True)
    content = {"diffs": {name: encode(d) for name, d in diffs.items()}, "abs": dict(heads or {}), **more}
    torch.save(content, folder / "pytorch_diff.bin")
    return folder


def rewrite(path: Path, edit: Callable[[str, bytes], bytes]) -> None:
    """Change members of a zip file."""
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        for name, content in members.items():
            archive.writestr(name, edit(name, content))


def with_old_numpy(path: Path) -> None:
    """The spelling that numpy had until its version 2, which all files of those years have."""
    rewrite(path, lambda _, content: content.replace(b"numpy._core.multiarray", b"numpy.core.multiarray"))


def write_pickle(folder: Path, pickled: bytes, storages: Mapping[str, bytes] | None = None) -> Path:
    """`pytorch_diff.bin` with any pickle in it."""
    folder.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(folder / "pytorch_diff.bin", "w", zipfile.ZIP_STORED) as archive:
        archive.writestr("pytorch_diff/data.pkl", pickled)
        archive.writestr("pytorch_diff/version", "3\n")
        for key, content in (storages or {}).items():
            archive.writestr(f"pytorch_diff/data/{key}", content)
    return folder


def pickled(value: Any, protocol: int = 2) -> bytes:
    buffer = io.BytesIO()
    pickle.Pickler(buffer, protocol=protocol).dump(value)
    return buffer.getvalue()


def write_peft(
    folder: Path, settings: Mapping[str, Any], tensors: Mapping[str, Tensor], *, pickle: bool = False
) -> Path:
    """An adapter as forks of PEFT save it: adapter_config.json and the weights, under PEFT's keys."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "adapter_config.json").write_text(json.dumps(dict(settings)))
    keyed = {PREFIX + name: tensor.contiguous() for name, tensor in tensors.items()}
    if pickle:
        torch.save(keyed, folder / "adapter_model.bin")
    else:
        save_file(keyed, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    return folder


def add(model: nn.Module, diffs: Mapping[str, Tensor], heads: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
    """{parameter: base + difference}, computed densely; heads in their place."""
    state = {name: p.detach().clone() for name, p in model.named_parameters(remove_duplicate=False)}
    for name, difference in diffs.items():
        state[name] = state[name] + difference
    return {**state, **(heads or {})}


NAME = "bert.a.weight"


def refused(folder, message: str) -> None:
    """Importing is refused with this message, and leaves nothing."""
    before = sorted(os.listdir(folder.parent))
    with pytest.raises(FormatError, match=message):
        import_adapter(folder, folder.parent / "out", base="some/base")
    assert sorted(os.listdir(folder.parent)) == before


class Calls:
    """Pickled as a call."""

    def __init__(self, function, *arguments) -> None:
        self.call = (function, arguments)

    def __reduce__(self):
        return self.call
