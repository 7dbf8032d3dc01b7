"""What merging on disk does to each tensor of a checkpoint: decided, and checked, before anything is written."""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..checks import FLOAT_DTYPES
from ..composition.combine import combine
from ..core.delta import SparseDelta
from ..core.names import is_above_encoder, lies_in_trained_whole
from ..core.overlay import Overlay
from ..errors import ConfigError, FormatError
from .architecture import (
    Names,
    class_name_of,
    class_trained_on,
    labels_of_head,
    listed,
    read_config,
    skeleton,
    tied_groups,
)
from .shards import Checkpoint

logger = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class Part:
    """An adapter to merge.

    Attributes:
        source: directory or repository.
        config: the content of adapter_config.json.
        deltas: {parameter: delta}, empty ones left out, values in the dtype that a model would hold them in.
        others: {name: tensor} of what else is in the file: heads, and embeddings that PEFT put there.
    """

    source: str
    config: Mapping[str, Any]
    deltas: Mapping[str, SparseDelta]
    others: Mapping[str, Tensor]

    @property
    def heads(self) -> dict[str, Tensor]:
        """The tensors of `modules_to_save`."""
        whole = self.config.get("modules_to_save") or ()
        return {n: tensor for n, tensor in self.others.items() if lies_in_trained_whole(n.rpartition(".")[0], whole)}


@dataclass(eq=False)
class Change:
    """What becomes of one tensor: deltas to add, or a head to put in its place."""

    deltas: list[SparseDelta] = field(default_factory=list)
    head: Tensor | None = None

    def apply(self, name: str, tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
        """The tensor as it is written.

        Raises:
            ConfigError: a finite value would not be one any more.
        """
        changed = self._changed(tensor, dtype)
        if changed is not tensor and changed.is_floating_point():
            infinite = ~changed.isfinite()
            if bool(infinite.any()):  # those that were infinite before stay as they are
                infinite &= (tensor if self.head is None else self.head).double().isfinite()
            if bool(infinite.any()):
                raise ConfigError(
                    f"{int(infinite.sum())} weights of {name} would be infinite or NaN: {changed.dtype} holds numbers "
                    f"up to {torch.finfo(changed.dtype).max:.4g}. Nothing was written. Give smaller weights, or a "
                    "wider dtype."
                )
        return changed

    def _changed(self, tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
        if self.head is not None:
            tensor = self.head.to(tensor.dtype)
        elif self.deltas:
            # Rounded once: to the tensor's own dtype, or to the one that was asked for.
            wide = tensor if dtype is None else tensor.to(torch.promote_types(tensor.dtype, torch.float32))
            tensor = Overlay([d.indices for d in self.deltas]).add(wide, [d.values for d in self.deltas])
        return tensor if dtype is None or not tensor.is_floating_point() else tensor.to(dtype)

    def is_large(self, dtype: torch.dtype) -> bool:
        """Whether adding this may leave the range of a dtype, whatever is below it."""
        limit = torch.finfo(dtype).max / 2
        return any(not bool((delta.values.double().abs() <= limit).all()) for delta in self.deltas)


class MergePlan:
    """Which tensor of a checkpoint gets what; everything is checked when it is made.

    Attributes:
        model_name: {name in the checkpoint: name in the model}.
        changes: by name in the model.
        added: names in the model of tensors that the result has and the base checkpoint has not.
    """

    def __init__(
        self, checkpoint: Checkpoint, parts: list[Part], factors: list[float] | None, head: Part | None
    ) -> None:
        self._checkpoint = checkpoint
        self._config = read_config(checkpoint.folder)
        self._num_labels: int | None = None
        self._model, self._class_name, parts = self._fitting_model(parts, head)
        self._tied = tied_groups(self._model)
        self._has_head = head is not None
        names = Names(self._model)
        mapped = {name: names.of_checkpoint(name) for name in checkpoint.names()}
        self.model_name = {name: own for name, (own, _) in mapped.items()}
        self._stored: dict[str, list[str]] = {}
        for name, own in self.model_name.items():
            self._stored.setdefault(own, []).append(name)
        self._check_targets(parts, names, {own for own, is_whole in mapped.values() if not is_whole})
        self.changes = self._add_up(parts, factors, names)
        for name, tensor in ({} if head is None else head.heads).items():
            self.changes[names.of_adapter(name)] = Change(head=tensor)
        heads = [name for name, change in self.changes.items() if change.head is not None]
        self.is_untied = any(len({id(self.changes.get(name)) for name in group}) > 1 for group in self._tied)
        self._check_heads(heads)
        tied = [name for group in self._tied for name in group] if self.is_untied else []
        self.added = [name for name in dict.fromkeys([*heads, *tied]) if name not in self._stored]
        missing = [name for name in names.parameters if self._stored_as(name) is None and name not in self.changes]
        if missing:
            logger.warning(
                "These parameters of %s are neither in the checkpoint nor in the adapters, and will be random:%s",
                self._class_name,
                listed(missing),
            )

    def original(self, name: str) -> Tensor:
        """The tensor of the base model behind a name that the checkpoint may store under another one."""
        stored = self._stored_as(name)
        if stored is not None:
            return self._checkpoint.tensor(stored).clone()
        head = self.changes[name].head
        assert head is not None  # `_check_targets` has seen to deltas
        return head.to(self._config.dtype) if self._config.dtype is not None else head

    def check_range(self, dtype: torch.dtype | None) -> None:
        """Refuse sums that leave the range of their dtype, where deltas are so large that they may.

        Raises:
            ConfigError: see `Change.apply`.
        """
        for name, change in self.changes.items():
            stored = self._stored_as(name)
            if stored is not None and change.is_large(dtype or self._checkpoint.dtype(stored)):
                change.apply(name, self.original(name), dtype)

    def config_changes(self, dtype: torch.dtype | None) -> dict[str, Any]:
        """What config.json says otherwise than the base model's."""
        changed: dict[str, Any] = {}
        if dtype is not None:
            changed["torch_dtype" if "torch_dtype" in self._checkpoint.config else "dtype"] = str(dtype).split(".")[-1]
        if self.is_untied:
            changed["tie_word_embeddings"] = False
        if self._has_head:
            changed["architectures"] = [self._class_name]
        if self._num_labels is not None:
            labels = {i: f"LABEL_{i}" for i in range(self._num_labels)}
            changed.update(id2label=labels, label2id={label: i for i, label in labels.items()})
        return changed

    def _fitting_model(self, parts: list[Part], head: Part | None) -> tuple[PreTrainedModel, str, list[Part]]:
        """The architecture on the meta device: the checkpoint's own, or an adapter's if a head or a name needs it.

        If no class has all that the adapters tune, one that lacks the heads of others alone; these are left out.
        """
        own = [name for name in self._config.architectures or () if hasattr(transformers, name)][:1]
        trained_on = [
            name for part in ([head] if head else parts) if (name := class_trained_on(part.config, self._config))
        ]
        candidates = list(dict.fromkeys([*trained_on, *own] if head else [*own, *trained_on]))
        candidates = candidates or [class_name_of(self._config)]
        wanted = {name for part in parts for name in part.deltas} | set(head.heads if head else ())
        failures = []
        without_heads: tuple[PreTrainedModel, str, set[str]] | None = None
        for class_name in candidates:
            model = skeleton(self._config, class_name)
            shapes = {name: tuple(tensor.shape) for name, tensor in (head.heads if head else {}).items()}
            self._num_labels = labels_of_head(self._config, model, shapes)
            if self._num_labels is not None:
                self._config.num_labels = self._num_labels
                model = skeleton(self._config, class_name)
            names = Names(model)
            unknown = sorted(name for name in wanted if names.of_adapter(name) not in names.parameters)
            if not unknown:
                return model, type(model).__name__, parts
            if without_heads is None and unknown == _of_other_heads(unknown, wanted, model, head):
                without_heads = model, type(model).__name__, set(unknown)
            failures.append(f"{class_name} has no parameters of these names:{listed(unknown)}")
        if without_heads is not None:
            model, class_name, left_out = without_heads
            logger.warning("%s has no such parts of a head; they are left out:%s", class_name, listed(sorted(left_out)))
            kept = [{name: d for name, d in part.deltas.items() if name not in left_out} for part in parts]
            return model, class_name, [replace(part, deltas=own) for part, own in zip(parts, kept, strict=True)]
        raise FormatError(
            f"the adapters do not fit {self._checkpoint.source}. Nothing was written. " + "\n".join(failures)
        )

    def _check_targets(self, parts: list[Part], names: Names, in_pieces: set[str]) -> None:
        wrong = []
        for part in parts:
            for name, delta in part.deltas.items():
                if misfit := self._misfit(names.of_adapter(name), delta.shape, in_pieces):
                    wrong.append(f"{name} of {part.source}: {misfit}")
            wrong += self._differing_extras(part, names)
        if wrong:
            raise FormatError(
                f"the adapters do not fit {self._checkpoint.source}. Nothing was written. These tensors do not match:"
                + listed(wrong)
            )

    def _misfit(self, own: str, shape: tuple[int, ...], in_pieces: set[str]) -> str | None:
        """Why a delta cannot be added to a parameter, if so."""
        stored = self._stored_as(own)
        if stored is None:
            return "the checkpoint has no tensor for it"
        if self.model_name[stored] in in_pieces:
            return "the checkpoint stores it in pieces, which are joined only when it is loaded"
        if len(same := self._stored[self.model_name[stored]]) > 1:
            return f"the checkpoint has it more than once, as {', '.join(same)}"
        if self._checkpoint.shape(stored) != shape:
            return f"it has shape {shape} there, {self._checkpoint.shape(stored)} in the checkpoint"
        if self._checkpoint.dtype(stored) not in FLOAT_DTYPES.values():
            return f"it is quantised in the checkpoint, of dtype {self._checkpoint.dtype(stored)}"
        return None

    def _stored_as(self, own: str) -> str | None:
        """The name under which the checkpoint holds a parameter of the model, or what it is tied to."""
        twins = next((group for group in self._tied if own in group), [])
        return next((self._stored[name][0] for name in [own, *twins] if name in self._stored), None)

    def _differing_extras(self, part: Part, names: Names) -> list[str]:
        """Embeddings that PEFT saved beside the adapter, where they are not those of the checkpoint."""
        wrong = []
        for name in part.others.keys() - part.heads.keys():
            stored = self._stored_as(names.of_adapter(name))
            if stored is None or not torch.equal(self._checkpoint.tensor(stored), part.others[name]):
                wrong.append(f"{name}: {part.source} brings one of its own; load it with PEFT and merge_and_unload()")
        return sorted(wrong)

    def _check_heads(self, heads: list[str]) -> None:
        shapes = {name: tuple(parameter.shape) for name, parameter in self._model.state_dict().items()}
        wrong = []
        for name in heads:
            head = self.changes[name].head
            if head is not None and tuple(head.shape) != shapes[name]:
                wrong.append(f"{name}: of shape {tuple(head.shape)} in the adapter, {shapes[name]} in the model")
        if wrong:
            raise FormatError(f"the head does not fit {self._class_name}. Nothing was written.{listed(wrong)}")

    def _add_up(self, parts: list[Part], factors: list[float] | None, names: Names) -> dict[str, Change]:
        """{name in the model: what is added}: one delta per adapter, or their weighted sum; one change for tensors that
        stay the same.
        """
        found: dict[str, list[tuple[SparseDelta, float]]] = {}
        for part, factor in zip(parts, factors or [1.0] * len(parts), strict=True):
            for name, delta in self._with_followers(part, names).items():
                found.setdefault(name, []).append((delta, factor))
        dtypes = {part.config.get("values_dtype", "float32") for part in parts}
        dtype = getattr(torch, dtypes.pop()) if len(dtypes) == 1 else torch.float32
        made: dict[tuple[int, ...], Change] = {}
        changes = {}
        for name, pairs in found.items():
            deltas = [delta for delta, _ in pairs]
            key = tuple(map(id, deltas))
            if key not in made:
                made[key] = Change(deltas if factors is None else [_summed(pairs, dtype)])
            changes[name] = made[key]
        return changes

    def _with_followers(self, part: Part, names: Names) -> dict[str, SparseDelta]:
        """An adapter's deltas by name in the model; embeddings that share a tuned matrix follow it, by the tuner's rule
        (`tuners.sparse_ft.tied_tensors`).
        """
        deltas = {names.of_adapter(name): delta for name, delta in part.deltas.items()}
        for group in self._tied:
            lookups = [name for name in group if self._is_embedding(name)]
            tuned = [name for name in lookups if name in deltas]
            for name in lookups if tuned else ():
                deltas.setdefault(name, deltas[tuned[0]])
        return deltas

    def _is_embedding(self, parameter: str) -> bool:
        return isinstance(self._model.get_submodule(parameter.rpartition(".")[0]), nn.Embedding)


def _summed(pairs: list[tuple[SparseDelta, float]], dtype: torch.dtype) -> SparseDelta:
    combined = combine([delta for delta, _ in pairs], [factor for _, factor in pairs], "linear")
    return SparseDelta(combined.indices, combined.values.to(dtype), combined.shape)


def _of_other_heads(
    unknown: Collection[str], wanted: Collection[str], model: PreTrainedModel, head: Part | None
) -> list[str]:
    """Of the names that a model does not have, those of heads that the result does not get anyway."""
    root = f"{model.base_model_prefix}."
    if not hasattr(model, model.base_model_prefix) or not any(name.startswith(root) for name in wanted):
        return []
    heads = {} if head is None else head.heads
    return [name for name in unknown if is_above_encoder(name.rpartition(".")[0], root) and name not in heads]
