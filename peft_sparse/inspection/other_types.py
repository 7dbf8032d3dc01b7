"""What is in an adapter that is no sparse delta: tensors by layer, and the change that they make."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import sqrt
from typing import Any

import torch
from torch import Tensor

from ..checkpoints.adapter_files import need_file, read_config
from ..checkpoints.files import load_tensors
from ..checkpoints.foreign import how_to_import
from ..checkpoints.native import SOURCE
from ..core.names import PREFIX
from ..errors import FormatError
from ..selection.anatomy import by_group, place_of
from ..tuners.sparse_ft.configs.base import SPARSE_FT

# Fields of configs that say nothing about an adapter, or that have a line of their own.
_UNSAID = {
    *("peft_type", "auto_mapping", "inference_mode", "base_model_name_or_path", "revision", "peft_version"),
    *("task_type", "init_weights"),
}
# {type of PEFT's that is a difference of weights: how its tensors' names begin}
_DIFFERENCES = {"LORA": "lora_", "SHIRA": "shira_", "SUPERTUNING": "supertuning_"}


@dataclass(frozen=True)
class TensorGroup:
    """The tensors of a layer, of the embeddings, or of what lies outside of both ("other").

    Attributes:
        name: such as "encoder.layer.3" (`Place.group`).
        tensors: how many.
        numel: elements of all of them.
        norm: Euclidean norm of all of them.
        change: Euclidean norm of the change that they make to the base model's weights; None where they make none (a
            bottleneck computes beside them), or the files do not say it (DoRA, patterns of scales).
    """

    name: str
    tensors: int
    numel: int
    norm: float
    change: float | None


@dataclass(frozen=True)
class OtherReport:
    """What is in an adapter that is no sparse delta.

    Attributes:
        name: what the adapter is called here.
        source: where it came from.
        peft_type: such as "BOTTLENECK" or "LORA".
        base_model: name of the base model; None if the config does not say.
        revision: of the base model.
        peft_version: that wrote the config.
        settings: the config's other fields that are set.
        groups: tensors by layer, in the order of the model.
        dtype: of the tensors; several are joined by "+".
        file_bytes: size of the file.
    """

    name: str
    source: str
    peft_type: str
    base_model: str | None
    revision: str | None
    peft_version: str | None
    settings: Mapping[str, Any]
    groups: Sequence[TensorGroup]
    dtype: str
    file_bytes: int

    @property
    def numel(self) -> int:
        """Elements of all tensors."""
        return sum(group.numel for group in self.groups)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON; the keys are part of the library's interface."""
        return {
            "name": self.name,
            "source": self.source,
            "peft_type": self.peft_type,
            "provenance": {
                "base_model": self.base_model,
                "revision": self.revision,
                "peft_version": self.peft_version,
                "settings": dict(self.settings),
            },
            "groups": [vars(group) for group in self.groups],
            "dtype": self.dtype,
            "numel": self.numel,
            "file": {"bytes": self.file_bytes},
        }


def is_sparse(where: str | os.PathLike[str]) -> bool:
    """Whether an adapter's config says that it is a sparse one; one of another library counts, for the error it gets.

    Raises:
        ConfigError: there is no such adapter.
        FormatError: its config is damaged.
    """
    config = read_config(where)
    return config.get("peft_type") == SPARSE_FT or how_to_import(where, config) is not None


def report_on_other(where: str | os.PathLike[str], *, name: str | None = None) -> OtherReport:
    """What is in a saved adapter of any type of PEFT's or of ours.

    Args:
        where: folder or Hub id ("owner/name[/folder][@revision]").
        name: what to call it; the last part of `where` if None.

    Raises:
        ConfigError: there is no such adapter.
        FormatError: it is damaged or pickled, or of another type than its config says.
    """
    config = read_config(where)
    kind = config.get("peft_type")
    if not isinstance(kind, str):
        raise FormatError(f"'{os.fspath(where)}': peft_type must be a name, got {str(kind)[:200]!r}.")
    path = need_file(where, SOURCE)
    tensors = {key.removeprefix(PREFIX): tensor for key, tensor in load_tensors(path).items()}
    if kind in _DIFFERENCES and not _by_layer(tensors):
        raise FormatError(
            f"{path} has none of the tensors of a {kind} adapter, which its config says it is. Download or save "
            "the adapter again."
        )
    return OtherReport(
        name=name or os.path.basename(os.path.normpath(where)),
        source=os.fspath(where),
        peft_type=kind,
        base_model=config.get("base_model_name_or_path"),
        revision=config.get("revision"),
        peft_version=config.get("peft_version"),
        settings={key: config[key] for key in sorted(config) if key not in _UNSAID and config[key]},
        groups=_groups(tensors, config),
        dtype="+".join(sorted({str(tensor.dtype).removeprefix("torch.") for tensor in tensors.values()})),
        file_bytes=path.stat().st_size,
    )


def _groups(tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> tuple[TensorGroup, ...]:
    changes: dict[str, list[float | None]] = {}
    for layer, parts in _by_layer(tensors).items():
        changes.setdefault(place_of(f"{layer}.weight").group, []).append(_squared_change(parts, config))
    found = []
    for group, names in by_group(tensors).items():
        inside = [tensors[name] for name in names]
        squares = changes.get(group, [])
        change = None if not squares or None in squares else sqrt(sum(filter(None, squares)))
        found.append(
            TensorGroup(group, len(inside), sum(t.numel() for t in inside), sqrt(sum(map(_squares, inside))), change)
        )
    return tuple(found)


def _by_layer(tensors: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """{tuned layer: {rest of the name: tensor}} of the three types of PEFT's that are differences of weights."""
    layers: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        for prefix in _DIFFERENCES.values():
            layer, found, part = name.partition(f".{prefix}")
            if found:
                layers.setdefault(layer, {})[prefix + part] = tensor
    return layers


def _squared_change(parts: Mapping[str, Tensor], config: Mapping[str, Any]) -> float | None:
    """Squared norm of the difference that a layer's tensors stand for; None if they do not say it."""
    kind = config.get("peft_type")
    if kind == "SHIRA" and set(parts) == {"shira_weight", "shira_indices"}:
        return _squares(parts["shira_weight"])
    if kind == "SUPERTUNING" and set(parts) == {"supertuning_values", "supertuning_indices"}:
        return _squares(parts["supertuning_values"])
    if kind != "LORA" or set(parts) != {"lora_A.weight", "lora_B.weight"} or config.get("alpha_pattern"):
        return None
    alpha, (down, up) = config.get("lora_alpha"), (parts["lora_A.weight"].double(), parts["lora_B.weight"].double())
    if not isinstance(alpha, (int, float)) or down.dim() != 2 or up.dim() != 2 or up.shape[1] != down.shape[0]:
        return None
    rank = down.shape[0]
    scale = alpha / (sqrt(rank) if config.get("use_rslora") else rank)
    # The trace of (BA)'BA, without the product.
    return scale**2 * float(((up.t() @ up) * (down @ down.t())).sum())


def _squares(tensor: Tensor) -> float:
    return float(tensor.double().square().sum()) if tensor.dtype != torch.bool else float(tensor.sum())
