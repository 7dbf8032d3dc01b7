"""The one canonical name of a tensor: the same in a PeftModel, in a transformers model, under DDP, FSDP and
torch.compile, and in an adapter's file.
"""

from __future__ import annotations

from collections.abc import Iterable

PREFIX = "base_model.model."
# Path components that stand for a wrapper, not for a module of the model.
_WRAPPERS = frozenset({"_fsdp_wrapped_module", "_orig_mod", "_checkpoint_wrapped_module"})
# What DDP and its like call the model that they wrap.
_WRAPPED = "module."
# What PEFT calls the module that a tuner layer is around.
_AROUND = "base_layer"
_HEADS = "modules_to_save"
# The containers that hold one entry per adapter, by its name: those of all tuner types here, and PEFT's own.
_OURS = frozenset({"sparse_ft_weight", "sparse_ft_bias", "ada_sft_weight", "bottleneck_adapters", "mad_g_generators"})
SLOTS = _OURS | {_HEADS, "trainable_tokens_delta", "trainable_tokens_original"}


def unwrapped(name: str) -> str:
    """A module's path or a tensor's key without what FSDP, DDP, torch.compile and checkpointing put into it; a key of
    an adapter's also without the layers of other adapter types that are around its own (see `path_of_layer`).
    """
    parts = [part for part in name.split(".") if part not in _WRAPPERS]
    slot = next((i for i, part in enumerate(parts) if part in _OURS), 0)
    plain = ".".join([*(part for part in parts[:slot] if part != _AROUND), *parts[slot:]]).removeprefix(_WRAPPED)
    if plain.startswith(PREFIX):
        return PREFIX + plain.removeprefix(PREFIX).removeprefix(_WRAPPED)
    return plain


def path_of_layer(path: str) -> str:
    """The path in the base model of what a tuner layer is around, whatever layers of other types are around it."""
    return ".".join(part for part in unwrapped(path).split(".") if part != _AROUND)


def without_adapter(key: str, adapter_name: str) -> str:
    """A key of a model's state dict as an adapter's file has it: unwrapped, and without the adapter's name.

    The name is told by its place behind a container of adapters; anywhere else it is a part of the model's own path.
    PEFT's `classifier.modules_to_save.<adapter>.weight` becomes `classifier.weight`.
    """
    parts, kept = unwrapped(key).split("."), list[str]()
    is_name = False
    for part in parts:
        if is_name and part == adapter_name:
            if kept[-1] == _HEADS:
                kept.pop()
            is_name = False
            continue
        kept.append(part)
        # An adapter may itself be called like a container.
        is_name = part in SLOTS and len(kept) > 1
    return ".".join(kept)


def ends_with(path: str, name: str) -> bool:
    """Whether a module's path is a name or ends with it, whole components alone: what `target_modules` means by it."""
    return path == name or path.endswith(f".{name}")


def is_above_encoder(path: str, root: str) -> bool:
    """Whether a module is of a head, or the pooler below it: what one class over a base model has and another has not.

    Args:
        path: of the module.
        root: path of the base model inside the class, with its dot ("bert.").
    """
    return not path.startswith(root) or path.removeprefix(root).partition(".")[0] == "pooler"


def is_trained_whole(path: str, names: Iterable[str]) -> bool:
    """Whether PEFT takes a module for one of `modules_to_save` or `trainable_token_indices`: by the end of its path,
    inside of a name as well, so that "classifier" means "pre_classifier", too.

    Args:
        path: of the module.
        names: what the field lists.
    """
    return path.endswith(tuple(names))


def lies_in_trained_whole(path: str, names: Iterable[str]) -> bool:
    """Whether a module is trained whole (see `is_trained_whole`), or lies inside of one that is."""
    parts, ends = path.split("."), tuple(names)
    return bool(ends) and any(is_trained_whole(".".join(parts[:end]), ends) for end in range(1, len(parts) + 1))
