"""Adapters of AdapterHub in and out of a model."""

from __future__ import annotations

import copy
import logging
import os
import re
from typing import Any

import torch
from peft import PeftModel, get_peft_model
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
from ..common.adapter_config import carrier_of, config_of
from ..common.base_model import base_model_of
from .adapter import LEARNED
from .config import BOTTLENECK, BottleneckConfig
from .hub_heads import head_layers, head_of, load_head, plan_head
from .iteration import iter_bottlenecks, iter_layers
from .layer import make_adapter
from .placement import INVERTIBLE, find_sites, reads_after_norm, resolve

logger = logging.getLogger(__name__)

# No separator of paths, nothing that a shell or a file system reads otherwise.
_NAME = re.compile(r"[\w+@=,()\[\]-][\w +@=,()\[\]-]{0,199}")

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
        folder: what `save_adapter` wrote, or the id of a repository of AdapterHub's on the Hub ("owner/name"; a folder
            in it and a revision may follow: "owner/name/folder@revision").
        adapter_name: its name in the model; the file's own if None.
        with_head: load the prediction head beside it too, into the model's own head, which is then saved with the
            adapter (`modules_to_save`). Its outputs go to the model's labels of the same names
            (`config.id2label`); a model without names for them takes the file's.

    Returns:
        the `PeftModel`; the adapter is active if it is the first, and in the mode (training, evaluation) of the model.

    Raises:
        ConfigError: there is no such folder or repository.
        FormatError: the files are damaged, contradict each other, ask for what no adapter of this package does, or do
            not fit the model, or the adapter's name cannot be one or is taken. The model is as it was before.
    """
    adapter = read_adapter_hub(folder, with_head=with_head)
    name = adapter_name or adapter.name
    _check_name(name, model)
    base = base_model_of(model)
    _check_architecture(base, adapter)
    head = plan_head(base, adapter) if with_head else None
    config = BottleneckConfig(**config_fields(adapter), modules_to_save=list(head.modules) if head else None)
    config.exclude_modules = _without_cross_attention(base, config, adapter)
    _check_fits(base, config, adapter)
    carrier = carrier_of(model)
    if isinstance(carrier, PeftModel):
        model = carrier
        model.add_adapter(name, config)
    else:
        training = model.training
        model = get_peft_model(model, config, adapter_name=name)
        # The modules around the base model take its mode; those inside have it.
        model.training = model.base_model.training = training
    with torch.no_grad():
        for path, bottleneck in iter_bottlenecks(model, name):
            for part, tensor in adapter.tensors[_place(path)].items():
                bottleneck.get_parameter(part).copy_(tensor)
        for _, layer in iter_layers(model):
            if layer.placements.get(name) == INVERTIBLE:
                for key, tensor in adapter.invertible.items():
                    layer.bottleneck_adapters[name].get_parameter(key).copy_(tensor)
    if head is not None:
        load_head(base, name, head)
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
        ConfigError: the model has no such bottleneck adapter.
        FormatError: the architecture is another one, the adapter lies where the library has none of that kind or has
            what the library has none of (token rows), or the library has no head that computes the same.
    """
    base = base_model_of(model)
    config: BottleneckConfig = config_of(model, adapter_name, BOTTLENECK, called="a bottleneck adapter")
    if config.trainable_token_indices:
        raise FormatError(
            f"adapter {adapter_name!r} has rows of trained tokens (trainable_token_indices), of which the adapters "
            "library has none: there it would compute something else. Use save_pretrained()."
        )
    model_type = getattr(base.config, "model_type", None)
    if model_type not in _HOLDERS:
        raise FormatError(
            f"adapters on {model_type!r} cannot be written for the adapters library: the names of its modules are "
            f"known here for {', '.join(sorted(_HOLDERS))}. Use save_pretrained()."
        )
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
    _check_places(base, adapter, BottleneckConfig(kind=config.kind, invertible=config.invertible, leave_out=left_out))
    if with_head:
        _add_head(adapter, base)
    write_adapter_hub(folder, adapter, path_of=path_of)


def _check_places(base: nn.Module, adapter: HubAdapter, config: BottleneckConfig) -> None:
    """Refuse to write an adapter that its library's config, `config` here, would put elsewhere."""
    config.exclude_modules = _without_cross_attention(base, config, adapter)
    theirs = {path: site.placement for path, site in find_sites(resolve(config, base), base).items()}
    own = {
        path: layer.placements[adapter.name] for path, layer in iter_layers(base) if adapter.name in layer.placements
    }
    if own != theirs:
        path = min(path for path, _ in own.items() ^ theirs.items())
        raise FormatError(
            f"adapter {adapter.name!r} lies where the adapters library has none of its kind: at {path} it is "
            f"{own.get(path)!r}, and there {theirs.get(path)!r}. Use save_pretrained()."
        )


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


def _check_name(name: str, model: nn.Module) -> None:
    """Refuse a name that cannot be a module's, or that would be a path when the adapter is saved.

    Raises:
        FormatError: it cannot be had, or the model has an adapter of that name.
    """
    if "." in name:
        raise FormatError(f"adapter_name {name!r} has a dot, which no module's name may have: give another one.")
    if not _NAME.fullmatch(name) or hasattr(nn.ModuleDict(), name):
        raise FormatError(
            f"the adapter's name {name[:80]!r} cannot be one here: it must have 1 to 200 letters, digits, spaces or "
            "any of -_+@=,()[], for it becomes the name of a module and of a folder. Give another with adapter_name=..."
        )
    if name in getattr(model, "peft_config", {}):
        raise FormatError(f"the model has an adapter {name!r} already. Give the new one adapter_name=...")


def _check_architecture(base: nn.Module, adapter: HubAdapter) -> None:
    """Tell of a file that was made on another architecture; `_check_fits` sees whether its tensors fit at all."""
    own, theirs = getattr(base.config, "model_type", None), adapter.about.get("model_type")
    if theirs is not None and theirs != own:
        logger.warning(
            "Adapter %r was trained on a model of type %r and is being added to one of type %r, whose hidden states it "
            "has not seen: expect nothing good of it.",
            *(adapter.name, theirs, own),
        )


def _without_cross_attention(base: nn.Module, config: BottleneckConfig, adapter: HubAdapter) -> list[str] | None:
    """The sites to leave out where a file has no adapters behind attention to an encoder, the library's default."""
    if any(place.position == "cross" for place in adapter.tensors):
        return None
    sites = find_sites(resolve(copy.deepcopy(config), base), base)
    cross = [path for path, site in sites.items() if site.placement != INVERTIBLE and _place(path).position == "cross"]
    # From the decoder on, so that they are the same in a model with another head.
    return [path[path.rfind("decoder.") :] if "decoder." in path else path for path in cross] or None


def _check_fits(base: nn.Module, config: BottleneckConfig, adapter: HubAdapter) -> None:
    """Refuse a file before the model is touched."""
    resolved = resolve(copy.deepcopy(config), base)
    if config.kind == "parallel" and reads_after_norm(base):
        raise FormatError(
            f"adapter {adapter.name!r} is a parallel one, which in the adapters library reads the residual before the "
            f"norm of the feed-forward; in {type(base).__name__} adapters of this package read what the norm gives. "
            "It would compute something else."
        )
    sites = find_sites(resolved, base)
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


def _add_head(adapter: HubAdapter, base: nn.Module) -> None:
    """The model's head as the library has it, into an adapter that is to be written.

    Raises:
        FormatError: the library has no head that computes the same.
    """
    adapter.head = head_of(base)
    if adapter.head is None:
        raise FormatError(
            f"the head of {type(base).__name__} has no counterpart in the adapters library: leave with_head out."
        )
    # The library takes a head as one of its flexible ones only under its own name of the class.
    adapter.about["model_class"] = re.sub("For[A-Z].*", "AdapterModel", type(base).__name__)
    linears = head_layers(base, adapter.name)
    adapter.head_tensors = [(linear.weight, linear.bias) for linear in linears]
