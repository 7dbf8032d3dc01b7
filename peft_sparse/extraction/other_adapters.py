"""Differences that PEFT's own adapters stand for: LoRA, SHiRA and Super-Tuning, a layer at a time."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Callable
from typing import Any

import torch
from peft import PeftConfig, PeftModel, set_peft_model_state_dict
from torch import Tensor, nn

from .._peft_bridge import BaseTunerLayer
from ..checkpoints import architecture
from ..checkpoints.adapter_files import need_file, read_config
from ..checkpoints.files import load_tensors
from ..checkpoints.foreign import how_to_import
from ..checkpoints.native import PREFIX
from ..checkpoints.native import SOURCE as WEIGHTS
from ..core.names import lies_in_trained_whole
from ..errors import FormatError
from ..selection.patterns import fullmatch
from ..untrusted import UNREADABLE
from .skeleton import Skeleton

logger = logging.getLogger(__name__)

_ADAPTER = "extracted"
_WAY_OUT = (
    "Merge it and give the result instead: PeftModel.from_pretrained(base, ...).merge_and_unload().save_pretrained(...)"
)
# Initialisations that leave the base model as it is. The others (PiSSA, OLoRA, CorDA, LoftQ, ...) write into it, so
# that the adapter is no difference from the base that is on disk.
_PLAIN_STARTS = (True, False, None, "gaussian", "orthogonal", "eva")

# What a config may not say, by type: {field: values under which the adapter is nothing but a difference of weights}.
_PURE: dict[str, dict[str, tuple[Any, ...]]] = {
    "LORA": {
        "use_dora": (False,),
        "use_qalora": (False,),
        "lora_bias": (False,),
        "bias": ("none",),
        "alora_invocation_tokens": (None,),
        "arrow_config": (None,),
        "layer_replication": (None,),
        "megatron_config": (None,),
        "target_parameters": (None, []),
        "trainable_token_indices": (None,),
        "init_lora_weights": _PLAIN_STARTS,
    },
    "SHIRA": {},
    "SUPERTUNING": {"save_precomputed_indices": (True,)},
}


class AdapterOnBase:
    """What an adapter of PEFT's adds to the weights of its base model. No weight of the base is read.

    Args:
        base: directory or Hub repository of the base model, of which only config.json is needed.
        adapter: directory of the adapter, or id of the Hub ("owner/name[/folder][@revision]").
        base_revision: branch, tag or commit of the base on the Hub.
        tuned_revision: the same of the adapter, if its id does not say it.

    Raises:
        ConfigError: there is no such adapter, or the base has no config of a transformers model.
        FormatError: a type other than LoRA, SHiRA and Super-Tuning; a variant that is more than a difference of weights
            (DoRA, trained biases, ...); a pickled file; or tensors that do not fit the base model.

    Cost: the adapter's own weights in memory; for each difference asked for, one dense tensor and, with LoRA, the
        product of its factors.
    """

    def __init__(
        self, base: str, adapter: str, *, base_revision: str | None = None, tuned_revision: str | None = None
    ) -> None:
        self.adapter = adapter
        self.base_revision, self.tuned_revision = base_revision, tuned_revision
        settings = read_config(adapter, revision=tuned_revision)
        _check_pure(settings, adapter)
        path = need_file(adapter, WEIGHTS, revision=tuned_revision)
        try:
            config = PeftConfig.from_pretrained(os.fspath(path.parent))
        except UNREADABLE as error:
            raise FormatError(f"{adapter}: PEFT cannot read its config ({error}). Nothing was written.") from error
        base_config = architecture.read_config(base, revision=base_revision)
        class_name = architecture.class_trained_on(settings, base_config) or architecture.class_name_of(base_config)
        self.skeleton = Skeleton.of(architecture.skeleton(base_config, class_name))
        kept, config.modules_to_save = list(config.modules_to_save or ()), None
        if settings["peft_type"] == "LORA":
            config.init_lora_weights = True
        state = load_tensors(path)
        self._heads = _split_heads(state, kept, adapter)
        self.heads = [head for head in kept if any(_is_of_head(name, [head]) for name in self._heads)]
        _check_claims(settings, state, adapter)
        _name_targets(config, self.skeleton.model)
        _fill_with_nothing(self.skeleton.model)
        self._layers = _inject(self.skeleton, config, state, base, adapter)
        self.names = [name for name in self.skeleton.shapes if name in self._layers]

    def difference(self, name: str) -> Tensor:
        """See `Source`."""
        with torch.no_grad():
            difference = self._layers[name]()
        difference = (difference.to_dense() if difference.is_sparse else difference).to(torch.float32)
        if not bool(difference.isfinite().all()):
            raise FormatError(f"{self.adapter}: its difference on '{name}' holds NaN or infinity. Nothing was written.")
        return difference

    def values(self, name: str, indices: Tensor, dtype: torch.dtype) -> tuple[Tensor, int]:
        """See `Source`. The differences themselves: there is no tuned weight that a sum could miss."""
        return self.difference(name).reshape(-1)[indices.long()].to(dtype), 0

    def head_tensors(self) -> dict[str, Tensor]:
        """See `Source`."""
        return self._heads


def _check_pure(settings: dict[str, Any], adapter: str) -> None:
    kind = settings.get("peft_type")
    if kind not in _PURE:
        raise FormatError(
            how_to_import(adapter, settings)
            or f"{adapter} is an adapter of type {kind}; differences can be had of {', '.join(_PURE)}. {_WAY_OUT}"
        )
    for field, plain in _PURE[kind].items():
        if field in settings and settings[field] not in plain:
            raise FormatError(
                f"{adapter} has {field}={settings[field]!r}, so it is more than a difference that could be computed "
                f"from its own weights. {_WAY_OUT}"
            )


def _check_claims(settings: dict[str, Any], state: dict[str, Tensor], adapter: str) -> None:
    """Refuse ranks that no tensor of the file has, before PEFT makes matrices of them."""
    ranks = settings.get("rank_pattern") or {}
    # Super-Tuning has a rank only where it has a low-rank part.
    claimed = [settings.get("r") or 0, *(ranks.values() if isinstance(ranks, dict) else [ranks])]
    largest = max((size for tensor in state.values() for size in tensor.shape), default=0)
    if any(type(rank) is not int or rank > largest for rank in claimed):
        raise FormatError(f"{adapter} claims the ranks {str(claimed)[:200]}, which none of its tensors has.")


def _name_targets(config: PeftConfig, model: nn.Module) -> None:
    """Put the modules that regular expressions match in their place: PEFT would match them however long it takes."""
    for field in ("target_modules", "exclude_modules"):
        pattern = getattr(config, field, None)
        if isinstance(pattern, str) and pattern != "all-linear":
            setattr(config, field, {name for name, _ in model.named_modules() if fullmatch(pattern, name)})


def _split_heads(state: dict[str, Tensor], modules_to_save: list[str], adapter: str) -> dict[str, Tensor]:
    """Take out of a state dict what are not the tuner's own tensors; returns the heads among them."""
    heads: dict[str, Tensor] = {}
    for key in list(state):
        name = key.removeprefix(PREFIX)
        is_own = re.search(r"lora_|shira_|supertuning_", name)
        if not is_own and ".base_layer." not in name and _is_of_head(name, modules_to_save):
            heads[name] = state.pop(key)
        elif ".base_layer." in name or not is_own:
            # PEFT's save_embedding_layers adds the base model's own embeddings.
            logger.warning("%s: %s belongs to the base model and was left out.", adapter, key)
            del state[key]
    return heads


def _is_of_head(tensor: str, modules_to_save: list[str]) -> bool:
    return lies_in_trained_whole(tensor.rpartition(".")[0], modules_to_save)


def _fill_with_nothing(model: nn.Module) -> None:
    """Give every parameter zeros that take no memory: PEFT puts an adapter where its layer's weight is."""
    zero = torch.zeros((), dtype=torch.float32)
    filled: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                empty = nn.Parameter(zero.expand(parameter.shape), requires_grad=False)
                module._parameters[name] = filled.setdefault(id(parameter), empty)


def _inject(
    skeleton: Skeleton, config: PeftConfig, state: dict[str, Tensor], base: str, adapter: str
) -> dict[str, Callable[[], Tensor]]:
    """{parameter: function that gives its difference}, from the adapter's layers around those of the skeleton."""
    try:
        model = PeftModel(skeleton.model, config, adapter_name=_ADAPTER)
        loaded = set_peft_model_state_dict(model, dict(state), adapter_name=_ADAPTER)
        own = (f".{_ADAPTER}", model.base_model.prefix)
        problems = [f"{key}: surplus" for key in loaded.unexpected_keys]
        problems += [f"{key}: missing" for key in loaded.missing_keys if all(part in key for part in own)]
    except UNREADABLE as error:
        problems = [str(error)]
    if problems:
        raise FormatError(
            f"{adapter} does not fit {base}. Give the base model that it was trained on.{architecture.listed(problems)}"
        )
    layers: dict[str, Callable[[], Tensor]] = {}
    for path, layer in model.base_model.model.named_modules():
        if isinstance(layer, BaseTunerLayer):
            layers[f"{path}.weight"] = lambda layer=layer: layer.get_delta_weight(_ADAPTER)
    return layers
