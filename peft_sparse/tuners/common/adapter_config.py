"""Finding an adapter of a model by its name: its config, or an error that lists the adapters that there are."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, TypeVar

from peft import PeftModel, PeftType
from torch import nn

from ..._peft_bridge import BaseTunerLayer
from ...checks import nearest
from ...errors import ConfigError
from .base_model import base_model_of, carriers_in, modules_around_adapters, uncompiled

T = TypeVar("T")


def carrier_of(model: Any) -> Any:
    """The model that carries adapters: inside whatever it is wrapped in (DDP, torch.compile), or the only one that is a
    part of the model; None if there is none, or several.
    """
    carriers = carriers_of(model)
    return carriers[0] if len(carriers) == 1 else None


def carriers_of(model: Any) -> list[Any]:
    """All models that carry adapters; several only where they are parts of a model that itself carries none."""
    outer = outer_carrier_of(model)
    if outer is not None:
        return [outer]
    return carriers_in(model) if isinstance(model, nn.Module) else []


def outer_carrier_of(model: Any) -> Any:
    """The model that carries adapters, or None, without a look at parts of a model."""
    while model is not None:
        model = uncompiled(model)
        if isinstance(getattr(model, "peft_config", None), dict):
            break
        model = getattr(model, "module", None)
    return model


def carries_in_a_part(model: Any) -> bool:
    """Whether what carries adapters is but a part of a model, beside which it has weights of its own."""
    return outer_carrier_of(model) is None and carrier_of(model) is not None


def is_of_transformers(carrier: Any) -> bool:
    """Whether it is a model to which transformers' own verbs (`model.add_adapter`, `load_adapter`) gave adapters."""
    # A PeftModel over such a model passes the attribute on.
    return not isinstance(carrier, PeftModel) and getattr(carrier, "_hf_peft_config_loaded", False)


def active_adapters_of(carrier: Any) -> list[str]:
    """The adapters that are active in a `PeftModel`, or in a model to which transformers' verbs gave them; none of a
    model that has none, or into which PEFT injected them, where no verb saves or loads them.
    """
    if isinstance(carrier, PeftModel):
        return list(carrier.active_adapters)
    return list(carrier.active_adapters()) if is_of_transformers(carrier) else []


def refuse_transformers_verbs(model: Any) -> None:
    """Refuse a model whose adapters transformers' own verbs added, where those of a `PeftModel` are needed.

    Raises:
        ConfigError: it is one.
    """
    carrier = carrier_of(model)
    if is_of_transformers(carrier):
        raise ConfigError(
            f"model must be a PeftModel here, got a {type(carrier).__name__} to which transformers' own add_adapter or "
            f"load_adapter gave {sorted(carrier.peft_config)}. Load them with PeftModel.from_pretrained(base, folder) "
            "and its load_adapter(folder, name)."
        )


def peft_configs(model: nn.Module) -> dict[str, Any]:
    """{adapter name: config} of a model, whatever it is wrapped in.

    Raises:
        ConfigError: it carries no adapter.
    """
    carrier = carrier_of(model)
    if carrier is None:
        raise ConfigError(
            f"model must carry a PEFT adapter, got a {type(model).__name__}. Wrap it: get_peft_model(model, config), "
            "with a LotteryTicketConfig or an AdaSftConfig."
        )
    return carrier.peft_config


def refusing_unknown(found: Iterable[T], model: nn.Module, adapter_name: str) -> Iterator[T]:
    """Pass on what a walk over an adapter finds; if that is nothing, refuse a name that the model does not have.

    Args:
        found: the walk.
        model: whatever carries adapters; one without any is left to the caller.
        adapter_name: the name.

    Raises:
        ConfigError: nothing was found, and the model has other adapters; the message lists them.
    """
    is_there = False
    for one in found:
        is_there = True
        yield one
    if is_there:
        return
    layers = [module for _, module in modules_around_adapters(model) if isinstance(module, BaseTunerLayer)]
    known = {name for layer in layers for name in layer._all_available_adapter_names()}
    configs = getattr(base_model_of(model), "peft_config", None)  # PEFT notes all of them there, and transformers too
    known |= set(configs) if isinstance(configs, dict) else set()
    if known and adapter_name not in known:
        raise ConfigError(
            f"adapter_name must be one of {sorted(known)}, got {adapter_name!r}.{nearest(adapter_name, known)}"
        )


def config_of(model: nn.Module, adapter_name: str, kind: PeftType, *, called: str, way_out: str = "") -> Any:
    """The model's own copy of an adapter's config.

    Args:
        model: whatever carries the adapter.
        adapter_name: the adapter.
        kind: the tuner type that it must be of.
        called: what an adapter of this kind is called, such as "a sparse adapter".
        way_out: the last sentence of the error.

    Raises:
        ConfigError: the model has no adapter of this name and kind; the message lists those that it has.
    """
    configs = peft_configs(model)
    own = [name for name, config in configs.items() if config.peft_type == kind]
    if adapter_name not in own:
        known = f"one of {own}" if own else "and this model has none"
        other = f", which has a {type(configs[adapter_name]).__name__}" if adapter_name in configs else ""
        end = f" {way_out}" if way_out else ""
        raise ConfigError(f"adapter_name must be {called}, {known}, got {adapter_name!r}{other}.{end}")
    return configs[adapter_name]
