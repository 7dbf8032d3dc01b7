"""Files of the `adapters` library and its predecessor, adapter-transformers, as AdapterHub shares them.

A folder holds `adapter_config.json` and `pytorch_adapter.bin` or `adapter.safetensors`; with a head also
`head_config.json` and `pytorch_model_head.bin` or `model_head.safetensors`. The `.bin` files are pickles. They are read
by torch's weights-only unpickler, which builds tensors and runs no code.

Source: the library's documentation of its configs and the files that adapters 1.3.0 writes; the names of older files
from its table of legacy names.
"""

from __future__ import annotations

import json
import os
import pickle
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from ..errors import FormatError
from ..files import AtomicFolder, save_tensors

CONFIG = "adapter_config.json"
WEIGHTS = ("adapter.safetensors", "pytorch_adapter.bin")
HEAD_CONFIG = "head_config.json"
HEAD_WEIGHTS = ("model_head.safetensors", "pytorch_model_head.bin")
# Written as the version of exported files: the one whose format they have.
VERSION = "adapters.1.3.0"

_LEGACY = re.compile(r"(attention|layer)_text_(task|lang)_adapters")
_BOTTLENECK = re.compile(
    r"(?P<path>.*?)(^|\.)adapters\.(?P<adapter>[^.]+)\."
    r"(?P<part>adapter_down\.0\.weight|adapter_down\.0\.bias|adapter_up\.weight|adapter_up\.bias|scaling)"
)
_INVERTIBLE = re.compile(
    r"(?P<path>.*?)(^|\.)invertible_adapters\.(?P<adapter>[^.]+)\."
    r"(?P<net>F|G|s1|s2)\.(?P<layer>0|2)\.(?P<part>weight|bias)"
)
_PARTS = {
    "adapter_down.0.weight": "down.weight",
    "adapter_down.0.bias": "down.bias",
    "adapter_up.weight": "up.weight",
    "adapter_up.bias": "up.bias",
    "scaling": "scaling",
}
# Subnetworks of the couplings: the one that changes the first half of the embedding, then the other.
_NETS = {"F": "first", "s2": "first", "G": "second", "s1": "second"}
_LAYERS = {"0": "down", "2": "up"}
# The library's names of activations that transformers calls otherwise.
_ACTIVATIONS = {"leakyrelu": "leaky_relu"}
# What no adapter of this package can do, and the value at which a file does not ask for it.
_UNSUPPORTED: dict[str, tuple[object, ...]] = {
    "phm_layer": (False, None),
    "use_gating": (False, None),
    "ln_before": (False, None),
    "ln_after": (False, None),
    "stochastic_depth": (0.0, 0, None),
    "original_ln_after": (True, None),
    "residual_before_ln": (True, None),
}


class Place(NamedTuple):
    """Where in a model a bottleneck stands, in terms that no architecture's names enter.

    Attributes:
        stack: "decoder" in the decoder of an encoder-decoder model, "" anywhere else.
        layer: index of the layer.
        position: "attention", "cross" (attention to an encoder) or "output" (the feed-forward).
    """

    stack: str
    layer: int
    position: str


@dataclass
class HubAdapter:
    """An adapter as AdapterHub shares it.

    Attributes:
        name: its name.
        config: the library's config, as its `adapter_config.json` has it under "config".
        tensors: {place: {"down.weight", "down.bias", "up.weight", "up.bias", perhaps "scaling": tensor}}.
        invertible: {"first.down.weight", ...: tensor}; empty without an invertible adapter.
        about: what else `adapter_config.json` says: hidden_size, model_type, model_class, model_name.
        head: the library's head config, None without a head.
        head_tensors: [(weight, bias)] of the head's linear layers, in order.
    """

    name: str
    config: dict[str, Any]
    tensors: dict[Place, dict[str, Tensor]]
    invertible: dict[str, Tensor] = field(default_factory=dict)
    about: dict[str, Any] = field(default_factory=dict)
    head: dict[str, Any] | None = None
    head_tensors: list[tuple[Tensor, Tensor | None]] = field(default_factory=list)


def read_adapter_hub(folder: str | os.PathLike[str]) -> HubAdapter:
    """Read an adapter that the `adapters` library or adapter-transformers saved.

    Args:
        folder: a folder that `save_adapter` wrote, or a downloaded AdapterHub repository.

    Raises:
        FormatError: files are missing or unreadable, or hold anything but bottleneck and invertible adapters.
    """
    root = Path(folder)
    about = _read_json(root / CONFIG)
    config, name = about.pop("config", None), about.pop("name", None)
    if not isinstance(config, dict) or not isinstance(name, str):
        raise FormatError(
            f'{root / CONFIG} must hold a "config" and a "name" as the adapters library writes them, got '
            f"{type(config).__name__} and {name!r}."
        )
    adapter = HubAdapter(name, config, {}, about=about)
    path, weights = _read_tensors(root, WEIGHTS)
    for key, tensor in weights.items():
        _sort_in(adapter, key, tensor, path)
    if not adapter.tensors:
        raise FormatError(f"{path} holds no bottleneck adapter.")
    for place, parts in adapter.tensors.items():
        missing = [part for part in _PARTS.values() if part not in parts and part != "scaling"]
        if missing:
            raise FormatError(f"{path} lacks {', '.join(missing)} in layer {place.layer} ({place.position}).")
    if (root / HEAD_CONFIG).is_file():
        adapter.head = _read_json(root / HEAD_CONFIG).get("config")
        _, head = _read_tensors(root, HEAD_WEIGHTS)
        adapter.head_tensors = _linears(head)
    return adapter


def _sort_in(adapter: HubAdapter, key: str, tensor: Tensor, path: Path) -> None:
    """Put one tensor of a file where it belongs."""
    plain = _LEGACY.sub("adapters", key).replace("invertible_lang_adapters", "invertible_adapters")
    found = _INVERTIBLE.fullmatch(plain)
    if found is not None:
        adapter.invertible[f"{_NETS[found['net']]}.{_LAYERS[found['layer']]}.{found['part']}"] = tensor
        return
    found = _BOTTLENECK.fullmatch(plain)
    layer = place_of(found["path"]) if found is not None else None
    if found is None or layer is None:
        raise FormatError(
            f"{path} holds {key}, which is no part of a bottleneck or invertible adapter. Nothing else can be imported."
        )
    adapter.tensors.setdefault(layer, {})[_PARTS[found["part"]]] = tensor


def place_of(path: str) -> Place | None:
    """The place of a module by its path in a model; None outside the numbered layers."""
    number = re.search(r"\.(\d+)(\.|$)", path)
    if number is None:
        return None
    inside = path[number.end() :]
    position = "output"
    if re.search(r"cross_?attention|encoder_attn|EncDecAttention", inside):
        position = "cross"
    elif re.search(r"attention|attn|SelfAttention", inside):
        position = "attention"
    return Place("decoder" if re.search(r"(^|\.)decoder\.", path) else "", int(number[1]), position)


def config_fields(adapter: HubAdapter) -> dict[str, Any]:
    """What the library's config says, as fields of `BottleneckConfig`.

    Raises:
        FormatError: the config asks for what no adapter of this package does.
    """
    config = {name.lower(): value for name, value in adapter.config.items()}
    for name, allowed in _UNSUPPORTED.items():
        if config.get(name) not in allowed:
            raise FormatError(
                f"adapter {adapter.name!r} has {name}={config[name]!r}, which no bottleneck adapter of this package "
                f"does (they know {allowed[0]!r})."
            )
    scaling = config.get("scaling", 1.0)
    if scaling != "learned" and not isinstance(scaling, (int, float)):
        raise FormatError(f'adapter {adapter.name!r} has scaling={scaling!r}; a number or "learned" can be imported.')
    sizes = {parts["down.weight"].shape[0] for parts in adapter.tensors.values()}
    if len(sizes) != 1:
        raise FormatError(
            f"adapter {adapter.name!r} has bottlenecks of the sizes {sorted(sizes)}; one size in all layers can be "
            "imported."
        )
    # Files from before version 2 have the invertible adapter's settings in a dictionary of their own. Task adapters of
    # that time name one that they do not have.
    old = config.get("invertible_adapter") or {}
    block, factor = config.get("inv_adapter"), config.get("inv_adapter_reduction_factor")
    block, factor = block or old.get("block_type"), factor or old.get("reduction_factor")
    activation = str(config.get("non_linearity", "relu")).lower()
    return {
        "kind": _kind(config, adapter),
        "bottleneck_size": sizes.pop(),
        "activation": _ACTIVATIONS.get(activation, activation),
        "scaling": scaling,
        "dropout": config.get("dropout") or 0.0,
        "leave_out": list(config.get("leave_out") or ()) or None,
        "invertible": block if adapter.invertible else None,
        "invertible_reduction_factor": factor or 2,
    }


def _kind(config: Mapping[str, Any], adapter: HubAdapter) -> str:
    positions = {place.position for place in adapter.tensors}
    before = bool(config.get("original_ln_before"))
    if config.get("is_parallel") and positions == {"output"}:
        return "parallel"
    if not config.get("is_parallel") and before and positions == {"output"}:
        return "pfeiffer"
    if not config.get("is_parallel") and not before and {"attention", "output"} <= positions:
        return "houlsby"
    raise FormatError(
        f"adapter {adapter.name!r} has adapters behind {sorted(positions)} with original_ln_before={before} and "
        f"is_parallel={bool(config.get('is_parallel'))}; only the kinds pfeiffer (output, True, False), houlsby "
        "(attention and output, False, False) and parallel (output, False, True) can be imported."
    )


def write_adapter_hub(folder: str | os.PathLike[str], adapter: HubAdapter, *, path_of: Callable[[Place], str]) -> None:
    """Write an adapter for the `adapters` library: `load_adapter(folder, use_safetensors=True)`.

    Args:
        folder: made if it does not exist; files of the same names are replaced. A head's files that lie there are
            removed if the adapter has no head.
        adapter: the adapter.
        path_of: the library's path of the module that holds the adapters of a place, such as
            "bert.encoder.layer.0.output"; for `Place("", -1, "invertible")` the base model's name, such as "bert".
    """
    heads = (HEAD_CONFIG, *HEAD_WEIGHTS)
    doors = (WEIGHTS[0], CONFIG)
    with AtomicFolder(folder, overwrite=True, is_replaced=lambda name: name in heads, doors=doors) as atomic:
        _write_all(atomic.staging, adapter, path_of)


def _write_all(root: Path, adapter: HubAdapter, path_of: Callable[[Place], str]) -> None:
    back = {ours: theirs for theirs, ours in _PARTS.items()}
    tensors = {
        f"{path_of(place)}.adapters.{adapter.name}.{back[part]}": tensor.detach().cpu().contiguous().clone()
        for place, parts in adapter.tensors.items()
        for part, tensor in parts.items()
    }
    nets = ("F", "G") if adapter.config.get("inv_adapter") != "glow" else ("s2", "s1")
    names = {"first": nets[0], "second": nets[1], "down": "0", "up": "2"}
    base = path_of(Place("", -1, "invertible"))
    for key, tensor in adapter.invertible.items():
        net, layer, part = key.split(".")
        name = ".".join(filter(None, (base, "invertible_adapters", adapter.name, names[net], names[layer], part)))
        tensors[name] = tensor.detach().cpu().contiguous().clone()
    about = {**adapter.about, "name": adapter.name, "version": VERSION}
    _write_pair(root, (WEIGHTS[0], tensors), (CONFIG, {**about, "config": adapter.config}))
    if adapter.head is None:
        return
    # A dropout stands before each of the head's layers, and an activation behind each but the last.
    layers = {f"heads.{adapter.name}.{1 + 3 * i}": pair for i, pair in enumerate(adapter.head_tensors)}
    head = {f"{name}.weight": weight for name, (weight, _) in layers.items()}
    head |= {f"{name}.bias": bias for name, (_, bias) in layers.items() if bias is not None}
    head = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in head.items()}
    _write_pair(root, (HEAD_WEIGHTS[0], head), (HEAD_CONFIG, {**about, "config": adapter.head}))


def _write_pair(root: Path, weights: tuple[str, dict[str, Tensor]], config: tuple[str, dict[str, Any]]) -> None:
    """Tensors, and then the JSON file that names them."""
    text = json.dumps(config[1], indent=2, sort_keys=True)
    save_tensors(weights[1], root / weights[0], metadata={"format": "pt"})
    (root / config[0]).write_text(text, encoding="utf-8")


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise FormatError(f"{path} does not exist: the folder must be one that save_adapter() wrote.") from error
    except ValueError as error:
        raise FormatError(f"{path} is not readable JSON: {error}.") from error
    if not isinstance(content, dict):
        raise FormatError(f"{path} must hold a JSON object, got {type(content).__name__}.")
    return content


def _read_tensors(root: Path, names: tuple[str, ...]) -> tuple[Path, dict[str, Tensor]]:
    """The tensors of the first of these files that exists."""
    for name in names:
        path = root / name
        if not path.is_file():
            continue
        try:
            content = load_file(path) if path.suffix == ".safetensors" else _unpickle(path)
        except (SafetensorError, pickle.UnpicklingError, RuntimeError, EOFError, KeyError) as error:
            raise FormatError(
                f"{path} is not readable ({error}). Pickles are read without running what is in them: only tensors."
            ) from error
        if not isinstance(content, dict) or not all(isinstance(value, Tensor) for value in content.values()):
            raise FormatError(f"{path} must hold named tensors and nothing else.")
        return path, content
    raise FormatError(f"{root} holds none of {', '.join(names)}.")


def _unpickle(path: Path) -> Any:
    return torch.load(path, map_location="cpu", weights_only=True)


def _linears(head: Mapping[str, Tensor]) -> list[tuple[Tensor, Tensor | None]]:
    """The head's linear layers in the order of their numbers."""
    weights = {key.removesuffix("weight"): t for key, t in head.items() if key.endswith(".weight") and t.dim() == 2}

    def number(key: str) -> int:
        found = re.search(r"(\d+)\.$", key)
        return int(found[1]) if found else -1

    return [(weights[key], head.get(f"{key}bias")) for key in sorted(weights, key=number)]
