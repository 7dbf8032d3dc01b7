"""LT-SFT in a training loop of one's own: start the dense phase, select, start the sparse phase."""

from __future__ import annotations

import logging
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn

from ..._peft_bridge import BaseTuner
from ...errors import ConfigError, SelectionError
from ...tuners.common.base_model import base_model_of
from ...tuners.common.packed import find_backend, is_packed
from ...tuners.sparse_ft.configs.base import DENSE_PHASE, SparseConfig
from ...tuners.sparse_ft.iteration import iter_deltas, iter_layers
from ...tuners.sparse_ft.unselected import is_unselected, open_phase
from ..distributed import refuse_sharded
from .dense_phase import DensePhase, Target

logger = logging.getLogger(__name__)


def start_dense_phase(model: nn.Module, adapter_name: str = "default") -> DensePhase:
    """Unfreeze exactly the targeted base parameters and remember where they start.

    Use weight decay 0 in this phase, as the authors do: decay moves every weight, and would be taken for learning. A
    base model in bfloat16 or float16 gets a warning, because it loses most small updates.

    Args:
        model: a PeftModel (or a tuner) whose adapter has the method "lottery_ticket" and no weights yet. Not wrapped:
            DDP is made anew for each phase, after its start, because each trains other parameters.
        adapter_name: that adapter; it must be active.

    Returns:
        DensePhase: its `select()` and `start_sparse_phase()` end it, as do the functions of the same names; also a
        context manager.

    Raises:
        ConfigError: the adapter is of another method, has its weights already, is not active, or is merged; the base is
            quantised, sharded or on the meta device; the model is wrapped; another dense phase is open.

    Cost: a copy of the targeted parameters on the CPU (on their own device with `l1`), and one of a tied output matrix
    beside it.
    Source: Ansell et al. 2022, arXiv:2110.07560, section 3.1. Differs from the authors' code in: K is exact, fewer than
    K moved weights are an error, weights are restored from copies and never by subtraction, and only what is targeted
    is unfrozen.
    """
    refuse_wrapper(model)
    config = adapter_config(model, adapter_name)
    targets = targets_of_adapter(model, adapter_name)
    _check_adapter(model, adapter_name, config)
    for target in targets:
        check_active(adapter_name, target)
        _check_target(target)
    for _, layer in iter_layers(model):
        layer.restore()
    _warn_of_low_precision(targets)
    return DensePhase(model, adapter_name, config, targets)


def select(model: nn.Module, adapter_name: str = "default") -> dict[str, Tensor]:
    """Choose the weights that moved most in the open dense phase. See `DensePhase.select`."""
    return _open_phase(model, adapter_name).select()


def start_sparse_phase(model: nn.Module, adapter_name: str = "default") -> dict[str, int]:
    """Rewind the model and go on with the selected weights alone. See `DensePhase.start_sparse_phase`.

    Raises:
        ConfigError: the model is still wrapped in DDP, DeepSpeed or FSDP.
    """
    refuse_wrapper(model)
    return _open_phase(model, adapter_name).start_sparse_phase()


def adapter_config(model: nn.Module, adapter_name: str) -> SparseConfig:
    """The model's own copy of an adapter's config.

    Raises:
        ConfigError: the model has no such adapter, or it is none of ours.
    """
    configs = peft_configs(model)
    if adapter_name not in configs:
        raise ConfigError(f"adapter_name must be one of {sorted(configs)}, got {adapter_name!r}.")
    config = configs[adapter_name]
    if not isinstance(config, SparseConfig):
        raise ConfigError(
            f"adapter {adapter_name!r} has a {type(config).__name__}, and its weights are not selected by this "
            "library. Of ours are LotteryTicketConfig and OneShotConfig."
        )
    return config


def targets_of_adapter(model: nn.Module, adapter_name: str) -> list[Target]:
    """Every parameter that an adapter may tune."""
    return [Target(*found) for found in iter_deltas(model, adapter_name)]


def refuse_wrapper(model: nn.Module) -> None:
    """Refuse what averages the gradients of the parameters that were trainable when it was made, and of no others."""
    if not isinstance(model, (PeftModel, BaseTuner)) and isinstance(getattr(model, "module", None), nn.Module):
        raise ConfigError(
            f"model must not be wrapped when its phase changes, got a {type(model).__name__}: it would not average the "
            "gradients of the weights that train from now on. Pass the model inside it (model.module), and wrap that "
            "anew for each phase."
        )


def peft_configs(model: nn.Module) -> dict[str, Any]:
    """{adapter name: config} of a model, whatever it is wrapped in.

    Raises:
        ConfigError: it carries no adapter.
    """
    wrapped: Any = model
    while wrapped is not None and not isinstance(getattr(wrapped, "peft_config", None), dict):
        wrapped = getattr(wrapped, "module", None)
    if wrapped is None:
        raise ConfigError(
            f"model must carry a PEFT adapter, got a {type(model).__name__}. Wrap it: get_peft_model(model, config), "
            "with a LotteryTicketConfig or an AdaSftConfig."
        )
    return wrapped.peft_config


def _open_phase(model: nn.Module, adapter_name: str) -> DensePhase:
    phase = open_phase(base_model_of(model))
    if not isinstance(phase, DensePhase) or phase.adapter_name != adapter_name:
        raise SelectionError(
            f"adapter {adapter_name!r} is in no dense phase. Call start_dense_phase(model, {adapter_name!r}) and train "
            "first."
        )
    return phase


def _check_adapter(model: nn.Module, adapter_name: str, config: SparseConfig) -> None:
    if config.selected_by != DENSE_PHASE:
        what_then = "call select_by_gradients(model, batches)" if is_unselected(config) else "train it in any loop"
        raise ConfigError(
            f"adapter {adapter_name!r} has the method {config.method!r}, whose weights need no dense phase: "
            f"{what_then}. For LT-SFT use LotteryTicketConfig(...)"
        )
    if not is_unselected(config):
        raise ConfigError(
            f"adapter {adapter_name!r} has its {sum((config.counts or {}).values())} weights already. Train them, or "
            "select anew in a new adapter: model.add_adapter(name, LotteryTicketConfig(...))"
        )
    other = open_phase(base_model_of(model))
    if other is not None:
        raise ConfigError(
            f"a {other.name} phase of adapter {other.adapter_name!r} is open on this model. Select and rewind "
            "first, or abort() it."
        )


def check_active(adapter_name: str, target: Target) -> None:
    """Raise a ConfigError if an adapter does not act on a target, or another one stands in its weights."""
    layer: Any = target.layer
    if adapter_name not in layer.active_adapters or layer.disable_adapters:
        raise ConfigError(
            f"adapter {adapter_name!r} must be active while its weights are selected (in its dense phase, or by "
            f"gradients): model.set_adapter({adapter_name!r})"
        )
    if layer.merged:
        raise ConfigError(
            f"adapters {layer.merged_adapters} are merged into {target.name}: model.unmerge_adapter() first."
        )


def _check_target(target: Target) -> None:
    if (target.which == "weight" and find_backend(target.module) is not None) or is_packed(target.parameter):
        raise ConfigError(
            f"{target.name} is quantised, and a dense phase trains the base weights themselves. Load the base "
            "unquantised, or use a method without a dense phase: SpIEL, or Rand-SFT (RandConfig)."
        )
    refuse_sharded(target.name, target.parameter)


def _warn_of_low_precision(targets: list[Target]) -> None:
    low = sorted({str(t.parameter.dtype) for t in targets if t.parameter.dtype in (torch.bfloat16, torch.float16)})
    if low:
        logger.warning(
            "The dense phase trains base weights in %s, which rounds small updates away: at a learning rate of 5e-5, "
            "bfloat16 weights above 0.016 do not move at all, so the selection would prefer small weights. Load the "
            "base in float32 and train under autocast.",
            " and ".join(low),
        )
