"""What PEFT's state-dict hooks do for Ada-SFT: check a file before loading, and follow its phase."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import ExitStack

import torch
from torch import Tensor, nn

from ...checkpoints.native import SOURCE, canonical_name
from ...checkpoints.native_checks import REMEDY
from ...errors import FormatError
from ..common.other_heads import heads_without_part, parts_of_other_heads, warn_of_other_head
from ..common.targets import Targets
from .config import HELD, AdaSftConfig
from .iteration import iter_masked

SLOT = "ada_sft_weight"


def for_saving(model: nn.Module, config: AdaSftConfig, adapter_name: str, own: dict[str, Tensor]) -> dict[str, Tensor]:
    """The adapter's own tensors; brings the config's `phase` up to date.

    Args:
        model: whatever carries the adapter.
        config: its config, about to be written next to the tensors.
        adapter_name: its name.
        own: its tensors, by key of the model's state dict.
    """
    for _, _, masked in iter_masked(model, adapter_name):
        config.phase = masked.phase
    return own


def phase_of(keys: Iterable[str], *, source: str = "the state dict") -> str:
    """The phase of the adapter whose tensors have these names.

    Raises:
        FormatError: they are none of Ada-SFT's.
    """
    found = {key.rpartition(".")[2] for key in keys if _is_own(key)}
    for phase, held in HELD.items():
        if found == set(held):
            return phase
    raise FormatError(
        f"{source} must hold scores, differences or both for every masked weight, found {sorted(found) or 'neither'}. "
        f"{REMEDY}"
    )


def for_loading(
    model: nn.Module, config: AdaSftConfig, adapter_name: str, tensors: dict[str, Tensor], undo: ExitStack
) -> dict[str, Tensor]:
    """Check a loaded file, and bring the adapter into its phase, which `undo` undoes; returns what is to be loaded.

    Raises:
        FormatError: the file does not belong to this model, or holds numbers that are not finite.
    """
    own = {name: masked for name, _, masked in iter_masked(model, adapter_name)}
    placed = _without_left_out(config, tensors)
    found = {canonical_name(key): tensor for key, tensor in placed.items() if _is_own(key)}
    phase = phase_of(found, source=SOURCE)
    module_of = {name: name.rpartition(".")[0] for name in own}
    _check(found, {f"{module_of[n]}.{SLOT}.{part}": own[n].shape for n in own for part in HELD[phase]})
    undo.callback(setattr, config, "phase", config.phase)
    for masked in own.values():
        undo.callback(masked.way_back())
        masked.enter(phase)
    config.phase = phase
    return placed


def _without_left_out(config: AdaSftConfig, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a file but those of a head that the model does not have."""
    return {key: tensor for key, tensor in tensors.items() if not modules_of([key]) & config.left_out.keys()}


def modules_of(keys: Iterable[str]) -> set[str]:
    """The modules that the adapter with these tensors tunes, by their path in the base model."""
    return {canonical_name(key).partition(f".{SLOT}.")[0] for key in keys if f".{SLOT}." in key}


def fit_head(config: AdaSftConfig, model: nn.Module, adapter_name: str, targets: Targets, held: set[str]) -> Targets:
    """The targets without those parts of the model's head that an adapter's file does not hold.

    Args:
        config: its copy of the config, which notes what the file holds of another head.
        model: the base model.
        adapter_name: the adapter.
        targets: what the config targets on the model.
        held: the modules in the file.
    """
    left_out, lacking = parts_of_other_heads(held, model), heads_without_part(targets, held, model)
    config.left_out = dict.fromkeys(left_out, 0)
    warn_of_other_head(adapter_name, model, left_out=left_out, lacking=lacking)
    return {name: parts for name, parts in targets.items() if name not in lacking}


def _is_own(key: str) -> bool:
    return key.startswith(f"{SLOT}.") or f".{SLOT}." in key


def _check(found: Mapping[str, Tensor], expected: Mapping[str, tuple[int, ...]]) -> None:
    for name in sorted(found.keys() ^ expected.keys()):
        what = "is missing" if name in expected else "has no place in this model"
        raise FormatError(f"{SOURCE}: tensor '{name}' {what}. {REMEDY}")
    for name, shape in expected.items():
        tensor = found[name]
        if tuple(tensor.shape) != shape or not tensor.is_floating_point():
            raise FormatError(
                f"{SOURCE}: tensor '{name}' must be floating point of shape {shape}, got {tensor.dtype} of shape "
                f"{tuple(tensor.shape)}. Nothing was loaded. Load the base model that the adapter was trained on "
                "(base_model_name_or_path in adapter_config.json)."
            )
        if not bool(torch.isfinite(tensor).all()):
            raise FormatError(
                f"{SOURCE}: tensor '{name}' holds values that are NaN or infinite, so the run that saved it had "
                "diverged. Nothing was loaded. Load an earlier checkpoint, or train again with a smaller learning rate."
            )
