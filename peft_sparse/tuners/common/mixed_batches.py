"""`adapter_names`: one adapter per example of a batch.

The names are handed to the layers by hooks on the model, as in PEFT; but each thread has its own, so that several may
compute at a time, with names and without.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from threading import get_ident
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ..._peft_bridge import AuxiliaryTrainingWrapper, BaseTuner, BaseTunerLayer
from ...errors import ConfigError

# What a mixed batch calls an example without an adapter (PEFT's own word).
BASE = "__base__"
# Embeddings of the distance between two tokens (T5's relative_attention_bias): their ids are [queries, keys], of which
# all examples have the same.
_OF_DISTANCES = re.compile(r"(^|_)rel(ative)?_")


def names_by_module(
    tuner: BaseTuner,
    adapter_names: list[str],
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    kind: type[nn.Module],
) -> Iterator[tuple[nn.Module, list[str]]]:
    """The adapter of each example that each tuned layer and each head will see.

    Args:
        tuner: the model.
        adapter_names: one name per example of the batch; "__base__" stands for none.
        args, kwargs: what else the forward or generate call was given.
        kind: class of the tuned layers.

    Raises:
        ValueError: a name is unknown, there are more or fewer than examples, or the model is in training.
        ConfigError: an adapter tunes what all examples share, whatever their adapters are.
    """
    if tuner.training:
        raise ValueError("Cannot pass `adapter_names` when the model is in training mode.")
    unknown = sorted(set(adapter_names) - set(tuner.peft_config) - {BASE})
    if unknown:
        raise ValueError(f"Trying to infer with non-existing adapter(s): {', '.join(unknown)}")
    model = tuner.model
    batch = _batch(model, args, kwargs)
    if batch is not None:
        check_one_per_example(adapter_names, batch)
    beams = kwargs.get("num_beams") or 1
    encoder = model.get_encoder() if beams > 1 and hasattr(model, "get_encoder") else None
    in_encoder = set(encoder.modules()) if encoder is not None and encoder is not model else set()
    for path, module in model.named_modules():
        if isinstance(module, (kind, AuxiliaryTrainingWrapper)):
            _refuse_distances(path, module, adapter_names)
            # Beam search repeats every example inside the decoder, not in the encoder.
            repeats = 1 if module in in_encoder else beams
            own = adapter_names
            if isinstance(module, AuxiliaryTrainingWrapper):
                # Of an adapter without a head of its own the base model's acts, as when it alone is active.
                having = module._get_available_adapters()
                own = [name if name in having else BASE for name in adapter_names]
            yield module, [name for name in own for _ in range(repeats)]


def _batch(model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Tensor | None:
    """What a model is given, one row per example; None if that is not told."""
    own = getattr(model, "main_input_name", "input_ids")
    given = [*args[:1], *(kwargs.get(name) for name in (own, "inputs", "inputs_embeds"))]
    return next((value for value in given if isinstance(value, Tensor) and value.dim() > 1), None)


def _refuse_distances(path: str, module: nn.Module, adapter_names: Sequence[str]) -> None:
    base = module.get_base_layer() if isinstance(module, BaseTunerLayer) else None
    if not (isinstance(base, nn.Embedding) and _OF_DISTANCES.search(path.rsplit(".", 1)[-1])):
        return
    acting = [name for name in dict.fromkeys(adapter_names) if module.acts(name)]
    if acting:
        raise ConfigError(
            f"adapter_names cannot be given: the adapters {acting} tune {path}, which all examples share. Compute the "
            f"examples one adapter at a time (model.set_adapter), or train with exclude_modules=[{path!r}]."
        )


def check_one_per_example(adapter_names: Sequence[str], x: Tensor) -> None:
    """Refuse other than one name per example of a batch [B, ...].

    Raises:
        ValueError: there are more or fewer.
    """
    if len(adapter_names) != len(x):
        raise ValueError(
            f"adapter_names must name one adapter per example ({len(x)}), got {len(adapter_names)} names: "
            f"{list(adapter_names)}"
        )


def give_names(module: nn.Module, names: list[str]) -> RemovableHandle:
    """Hand a module the names as an argument of every forward of this thread, until the handle is removed."""
    return module.register_forward_pre_hook(partial(_with_names, names, get_ident()), with_kwargs=True)


def _with_names(
    names: list[str], thread: int, module: nn.Module, args: Any, kwargs: dict[str, Any] | None = None
) -> tuple[Any, dict[str, Any]] | None:
    # torch gives no kwargs to a hook that another thread takes away at this moment.
    return None if kwargs is None or get_ident() != thread else (args, {**kwargs, "adapter_names": names})


class NamedRows:
    """A layer that is told the adapter of each example without an argument of its forward."""

    # {thread: its names}
    _named_rows: dict[int, list[str]] | None = None

    @property
    def row_names(self) -> list[str] | None:
        """While this thread computes a mixed batch, the adapter of each example; None otherwise."""
        held = self._named_rows
        return held.get(get_ident()) if held else None

    @row_names.setter
    def row_names(self, names: list[str] | None) -> None:
        held = vars(self).setdefault("_named_rows", {})
        if names is None:
            held.pop(get_ident(), None)
        else:
            held[get_ident()] = names
