"""Adapters of AdapterHub in and out of a model."""

from __future__ import annotations

import copy
import os
import re
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

# The head of each of transformers' classes that the library's head types stand for.
_HEADS = {"classification": "classifier", "tagging": "classifier", "question_answering": "qa_outputs"}
_TASKS = {
    "classification": "ForSequenceClassification",
    "tagging": "ForTokenClassification",
    "question_answering": "ForQuestionAnswering",
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
            _load_head(model, head, name, adapter)
    return model


def save_adapter_hub(model: nn.Module, folder: str | os.PathLike[str], *, adapter_name: str = "default") -> None:
    """Write an adapter for the `adapters` library: `load_adapter(folder, use_safetensors=True)` there. Without heads.

    Args:
        model: the `PeftModel`, on BERT, RoBERTa, XLM-R, ELECTRA or DistilBERT.
        folder: where to.
        adapter_name: the adapter.

    Raises:
        FormatError: the architecture is another one.
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
    write_adapter_hub(folder, HubAdapter(adapter_name, theirs, tensors, invertible, about), path_of=path_of)


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


def _find_head(base: nn.Module, adapter: HubAdapter) -> str:
    """The name of the module of the model that can take the file's head.

    Raises:
        FormatError: there is no head in the files, or the model has none that computes the same.
    """
    if adapter.head is None or not adapter.head_tensors:
        raise FormatError(f"adapter {adapter.name!r} comes without a head: leave with_head out.")
    kind = adapter.head.get("head_type")
    name = _HEADS.get(kind)
    module = getattr(base, name, None) if name else None
    linears = [m for m in module.modules() if isinstance(m, nn.Linear)] if isinstance(module, nn.Module) else []
    own = [tuple(linear.weight.shape) for linear in linears]
    file = [tuple(weight.shape) for weight, _ in adapter.head_tensors]
    is_task = kind in _TASKS and type(base).__name__.endswith(_TASKS[kind])
    # One layer stands on the pooled output where the model's classifier does; two have a tanh between them.
    pooled = kind != "classification" or bool(adapter.head.get("use_pooler")) == (len(own) == 1)
    curved = len(own) < 2 or adapter.head.get("activation_function") == "tanh"
    if not (is_task and own == file and pooled and curved):
        raise FormatError(
            f"the head of adapter {adapter.name!r} ({kind}, layers {file}, use_pooler="
            f"{adapter.head.get('use_pooler')}) has no counterpart in {type(base).__name__} (layers {own or 'none'}). "
            "Load the adapter without it, and build the head from read_adapter_hub(folder).head_tensors."
        )
    return name


def _load_head(model: PeftModel, head: str, adapter_name: str, adapter: HubAdapter) -> None:
    wrapper = getattr(base_model_of(model), head)
    module = wrapper.modules_to_save[adapter_name] if isinstance(wrapper, ModulesToSaveWrapper) else wrapper
    linears = [m for m in module.modules() if isinstance(m, nn.Linear)]
    for linear, (weight, bias) in zip(linears, adapter.head_tensors, strict=True):
        linear.weight.copy_(weight)
        if bias is not None:
            linear.bias.copy_(bias)
