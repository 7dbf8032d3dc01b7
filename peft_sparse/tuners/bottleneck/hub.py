"""Adapters of AdapterHub in and out of a model."""

from __future__ import annotations

import copy
import os
import re
from collections.abc import Mapping
from typing import Any

import torch
from peft import PeftModel, get_peft_model
from peft.utils.other import ModulesToSaveWrapper
from torch import Tensor, nn

from ...checkpoints.adapter_hub import (
    HubAdapter,
    Place,
    config_fields,
    place_of,
    read_adapter_hub,
    write_adapter_hub,
)
from ...errors import FormatError
from ..sparse_ft.iteration import base_model_of
from .adapter import LEARNED
from .config import BottleneckConfig
from .layer import make_adapter
from .placement import INVERTIBLE, find_sites, resolve
from .weights import iter_bottlenecks, iter_layers

# The library's head types: (ending of the names of transformers' classes with such a head, the module that it is).
_HEADS = {
    "classification": ("ForSequenceClassification", "classifier"),
    "tagging": ("ForTokenClassification", "classifier"),
    "question_answering": ("ForQuestionAnswering", "qa_outputs"),
}
# How transformers' classifiers of sequences compute, in the library's terms, by model_type: one layer behind the
# pooler, or two layers on the first token with an activation between them.
_POOLED: dict[str, Any] = {"layers": 1, "use_pooler": True}
_TWO_LAYERS: dict[str, Any] = {"layers": 2, "use_pooler": False}
_CLASSIFIERS = {
    "bert": _POOLED,
    "albert": _POOLED,
    "roberta": {**_TWO_LAYERS, "activation_function": "tanh"},
    "camembert": {**_TWO_LAYERS, "activation_function": "tanh"},
    "xlm-roberta": {**_TWO_LAYERS, "activation_function": "tanh"},
    "electra": {**_TWO_LAYERS, "activation_function": "gelu"},
}
_PRESETS = {
    "pfeiffer": {"original_ln_before": True, "mh_adapter": False, "output_adapter": True, "is_parallel": False},
    "houlsby": {"original_ln_before": False, "mh_adapter": True, "output_adapter": True, "is_parallel": False},
    "parallel": {"original_ln_before": False, "mh_adapter": False, "output_adapter": True, "is_parallel": True},
}
# The library's names of the modules that hold adapters, by model_type: (of attention, of the feed-forward), where the
# layers' own path is kept in front.
_HOLDERS = {
    **dict.fromkeys(("bert", "roberta", "xlm-roberta", "electra"), ("attention.output", "output")),
    "distilbert": ("attention_adapters", "output_adapters"),
}


def load_adapter_hub(
    model: nn.Module, folder: str | os.PathLike[str], *, adapter_name: str | None = None, with_head: bool = False
) -> PeftModel:
    """Add an adapter that the `adapters` library or adapter-transformers saved to a model.

    Args:
        model: the base model, or a `PeftModel` with bottleneck adapters, which gets one more.
        folder: what `save_adapter` wrote, or a downloaded AdapterHub repository.
        adapter_name: its name in the model; the file's own if None.
        with_head: load the prediction head beside it too, into the model's own head, which is then saved with the
            adapter (`modules_to_save`).

    Returns:
        the `PeftModel`; the adapter is active if it is the first.

    Raises:
        FormatError: the files are damaged, ask for what no adapter of this package does, or do not fit the model.
    """
    adapter = read_adapter_hub(folder)
    name = adapter_name or adapter.name
    if "." in name:
        raise FormatError(f"adapter_name {name!r} has a dot, which no module's name may have: give another one.")
    base = base_model_of(model)
    head = _find_head(base, adapter) if with_head else None
    config = BottleneckConfig(**config_fields(adapter), modules_to_save=[head] if head else None)
    _check_fits(base, config, adapter)
    if isinstance(model, PeftModel):
        model.add_adapter(name, config)
    else:
        model = get_peft_model(model, config, adapter_name=name)
    with torch.no_grad():
        for path, bottleneck in iter_bottlenecks(model, name):
            for part, tensor in adapter.tensors[_place(path)].items():
                bottleneck.get_parameter(part).copy_(tensor)
        for _, layer in iter_layers(model):
            if layer.placements.get(name) == INVERTIBLE:
                for key, tensor in adapter.invertible.items():
                    layer.bottleneck_adapters[name].get_parameter(key).copy_(tensor)
        if head is not None:
            _load_head(base, name, adapter)
    return model


def save_adapter_hub(
    model: nn.Module, folder: str | os.PathLike[str], *, adapter_name: str = "default", with_head: bool = False
) -> None:
    """Write an adapter for the `adapters` library: `load_adapter(folder, use_safetensors=True)` there.

    Args:
        model: the `PeftModel`, on BERT, RoBERTa, XLM-R, ELECTRA or DistilBERT.
        folder: where to.
        adapter_name: the adapter.
        with_head: write the model's prediction head beside it, the adapter's own copy if it has one, as one of the
            library's flexible heads (`AutoAdapterModel`): of sequences or tokens, or for questions. Else the library
            keeps the head that its model has.

    Raises:
        FormatError: the architecture is another one, or the library has no head that computes the same.
    """
    base = base_model_of(model)
    model_type = getattr(base.config, "model_type", None)
    if model_type not in _HOLDERS:
        raise FormatError(
            f"adapters on {model_type!r} cannot be written for the adapters library: the names of its modules are "
            f"known here for {', '.join(sorted(_HOLDERS))}. Use save_pretrained()."
        )
    config: BottleneckConfig = model.peft_config[adapter_name]
    bottlenecks = dict(iter_bottlenecks(model, adapter_name))
    roots = {_place(path): re.match(r"(.*?\.\d+)\.", path)[1] for path in bottlenecks}
    prefix = base.base_model_prefix
    holders = dict(zip(("attention", "output"), _HOLDERS[model_type], strict=True))

    def path_of(place: Place) -> str:
        if place.position == INVERTIBLE:
            return prefix
        root = roots[place]
        return f"{root if root.startswith(f'{prefix}.') else f'{prefix}.{root}'}.{holders[place.position]}"

    tensors = {_place(path): dict(module.named_parameters()) for path, module in bottlenecks.items()}
    invertible: dict[str, Tensor] = {}
    for _, layer in iter_layers(model):
        if layer.placements.get(adapter_name) == INVERTIBLE:
            invertible = dict(layer.bottleneck_adapters[adapter_name].named_parameters())
    size, width = next(iter(tensors.values()))["down.weight"].shape
    present = {place.layer for place in tensors}
    left_out = [index for index in range(getattr(base.config, "num_hidden_layers", 0)) if index not in present]
    theirs = _library_config(config, width=width, size=size, left_out=left_out)
    about = {"hidden_size": width, "model_type": model_type, "model_class": type(base).__name__, "model_name": ""}
    adapter = HubAdapter(adapter_name, theirs, tensors, invertible, about)
    if with_head:
        _add_head(adapter, base)
    write_adapter_hub(folder, adapter, path_of=path_of)


def _library_config(config: BottleneckConfig, *, width: int, size: int, left_out: list[int]) -> dict[str, Any]:
    """The library's config for an adapter of ours."""
    return {
        **_PRESETS[config.kind],
        "original_ln_after": True,
        "residual_before_ln": True,
        "adapter_residual_before_ln": False,
        "ln_before": False,
        "ln_after": False,
        "init_weights": "bert",
        "non_linearity": "leakyrelu" if config.activation == "leaky_relu" else config.activation,
        # The library computes int(width // factor); half a unit more keeps rounding from giving the next smaller size.
        "reduction_factor": width // size if width % size == 0 else width / (size + 0.5),
        "scaling": LEARNED if config.scaling == LEARNED else float(config.scaling),
        "dropout": config.dropout,
        "inv_adapter": config.invertible,
        "inv_adapter_reduction_factor": config.invertible_reduction_factor if config.invertible else None,
        "leave_out": left_out,
        "phm_layer": False,
        "use_gating": False,
    }


def _place(path: str) -> Place:
    found = place_of(path)
    if found is None:
        raise FormatError(f"{path} lies in no numbered layer, where the adapters library has its adapters.")
    return found


def _check_fits(base: nn.Module, config: BottleneckConfig, adapter: HubAdapter) -> None:
    """Refuse a file before the model is touched."""
    sites = find_sites(resolve(copy.deepcopy(config), base), base)
    places = {_place(path): site for path, site in sites.items() if site.placement != INVERTIBLE}
    if places.keys() != adapter.tensors.keys():
        lacking, more = sorted(places.keys() - adapter.tensors.keys()), sorted(adapter.tensors.keys() - places.keys())
        raise FormatError(
            f"adapter {adapter.name!r} does not fit this {type(base).__name__}: it lacks {[*map(tuple, lacking)]} and "
            f"has {[*map(tuple, more)]} too many (stack, layer, position)."
        )
    for path, site in sites.items():
        module = make_adapter(config, placement=site.placement, width=site.width, device=torch.device("meta"))
        own = {key: tuple(parameter.shape) for key, parameter in module.named_parameters()}
        tensors = adapter.invertible if site.placement == INVERTIBLE else adapter.tensors[_place(path)]
        file = {key: tuple(tensor.shape) for key, tensor in tensors.items()}
        if own != file:
            raise FormatError(
                f"adapter {adapter.name!r} does not fit this {type(base).__name__} of width {site.width}: at {path} it "
                f"has tensors of the shapes {file} where {own} are needed."
            )


def _head_of(base: nn.Module) -> dict[str, Any] | None:
    """The library's config of the head that the model has; None if the library has no such head.

    Its layers are those of the module that `_HEADS` names.
    """
    kinds = [kind for kind, (ending, _) in _HEADS.items() if type(base).__name__.endswith(ending)]
    model_type = getattr(base.config, "model_type", None)
    if not kinds or (kinds == ["classification"] and model_type not in _CLASSIFIERS):
        return None
    (kind,) = kinds
    computes = {"bias": True, **_CLASSIFIERS[model_type]} if kind == "classification" else {"layers": 1}
    label2id = {str(label): index for index, label in base.config.id2label.items()}
    about = {"num_labels": base.config.num_labels, "label2id": label2id, "dropout_prob": None}
    return {"head_type": kind, "activation_function": "tanh", **about, **computes}


def _linears(base: nn.Module, head: Mapping[str, Any], adapter_name: str | None = None) -> list[nn.Linear]:
    """The layers of the model's head, of an adapter's own copy where it has one."""
    module = base.get_submodule(_HEADS[head["head_type"]][1])
    if isinstance(module, ModulesToSaveWrapper):
        has_own = adapter_name in module.modules_to_save
        module = module.modules_to_save[adapter_name] if has_own else module.original_module
    return [part for part in module.modules() if isinstance(part, nn.Linear)]


def _find_head(base: nn.Module, adapter: HubAdapter) -> str:
    """The name of the module of the model that can take the file's head.

    Raises:
        FormatError: there is no head in the files, or the model has none that computes the same.
    """
    if adapter.head is None or not adapter.head_tensors:
        raise FormatError(f"adapter {adapter.name!r} comes without a head: leave with_head out.")
    own, theirs = _head_of(base), adapter.head
    shapes = [tuple(linear.weight.shape) for linear in _linears(base, own)] if own else []
    file = [tuple(weight.shape) for weight, _ in adapter.head_tensors]
    same = ["head_type"]
    if own and own["head_type"] == "classification":
        same += ["use_pooler", "activation_function"] if own["layers"] > 1 else ["use_pooler"]
    if not own or shapes != file or any(own[key] != theirs.get(key) for key in same):
        raise FormatError(
            f"the head of adapter {adapter.name!r} ({theirs.get('head_type')}, layers {file}, use_pooler="
            f"{theirs.get('use_pooler')}, {theirs.get('activation_function')}) has no counterpart in "
            f"{type(base).__name__} (layers {shapes or 'none'}). Load the adapter without it, and build the head from "
            "read_adapter_hub(folder).head_tensors."
        )
    return _HEADS[own["head_type"]][1]


def _load_head(base: nn.Module, adapter_name: str, adapter: HubAdapter) -> None:
    for linear, (weight, bias) in zip(_linears(base, _head_of(base), adapter_name), adapter.head_tensors, strict=True):
        linear.weight.copy_(weight)
        if bias is not None:
            linear.bias.copy_(bias)


def _add_head(adapter: HubAdapter, base: nn.Module) -> None:
    """The model's head as the library has it, into an adapter that is to be written.

    Raises:
        FormatError: the library has no head that computes the same.
    """
    adapter.head = _head_of(base)
    if adapter.head is None:
        raise FormatError(
            f"the head of {type(base).__name__} has no counterpart in the adapters library: leave with_head out."
        )
    # The library takes a head as one of its flexible ones only under its own name of the class.
    adapter.about["model_class"] = re.sub("For[A-Z].*", "AdapterModel", type(base).__name__)
    linears = _linears(base, adapter.head, adapter.name)
    adapter.head_tensors = [(linear.weight, linear.bias) for linear in linears]
