"""Saved adapters follow a reduced vocabulary: rows of tokens that stayed move, rows of tokens that went are lost."""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..checkpoints.adapter_files import CONFIG_FILE, need_file, read_adapter, read_config
from ..checkpoints.card import README
from ..checkpoints.files import load_tensors
from ..checkpoints.native import SOURCE, build
from ..checkpoints.shards import WEIGHTS, Checkpoint
from ..core.delta import SparseDelta
from ..core.indices import index_dtype
from ..core.names import PREFIX
from ..errors import FormatError
from ..files import AtomicFolder, check_apart, save_tensors
from ..selection.anatomy import place_of
from ..tuners.sparse_ft.configs.base import SparseConfig
from .rows import VocabularyRows
from .vocabulary import ReducedVocabulary

logger = logging.getLogger(__name__)

Shapes = Mapping[str, tuple[int, ...]]
_TOKEN_ROWS = "trainable_tokens_delta"
# LoRA's factors on the side of the hidden states, which may be as wide as the vocabulary is large.
_HIDDEN_SIDE = ("lora_A.weight", "lora_embedding_B")
# Where a vocabulary's matrices lie in classes that the reduced model is none of: heads of language models.
_OUTPUT = re.compile(r"lm_head|predictions|embed_tokens|word_embeddings|embed_out|generator|vocab|(^|\.)(wte|shared)\.")


@dataclass(frozen=True)
class ReducedAdapter:
    """What `reduce_adapter` wrote.

    Attributes:
        directory: where.
        kept: {tensor that depends on the vocabulary: numbers in it that stayed}.
        lost: the same of the numbers that belonged to tokens that went.
    """

    directory: Path
    kept: Mapping[str, int]
    lost: Mapping[str, int]

    @property
    def num_lost(self) -> int:
        """How many numbers of the adapter went."""
        return sum(self.lost.values())


def reduce_adapter(
    adapter: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    vocabulary: ReducedVocabulary | VocabularyRows | str | os.PathLike[str],
    base: str | None = None,
    overwrite: bool = False,
) -> ReducedAdapter:
    """Make a saved adapter of a model one of the same model with a reduced vocabulary, on disk.

    Deltas on embeddings and output matrices are re-indexed by rows, and so are heads with a row per token, LoRA factors
    and `trainable_token_indices`. Whatever does not depend on the vocabulary stays as it is, bit for bit. On tokens
    that stayed, the model with the adapter computes what the whole model did with the whole adapter.

    Args:
        adapter: a folder, or an id of the Hub; of any PEFT type, in safetensors.
        output: folder to write into.
        vocabulary: what `reduce_vocabulary` gave, or the folder that it was saved in.
        base: what the new adapter says its base model is; None for the folder `vocabulary`, if it is one.
        overwrite: replace an adapter that is there.

    Raises:
        ConfigError: there is no such adapter or no such vocabulary, or the output exists.
        FormatError: the adapter is damaged, pickled, or one of another base model: told by the size of its vocabulary
            and, if it is sparse and the reduced model at hand, by the names and shapes of what it tunes.
    """
    if base is None and isinstance(vocabulary, (str, os.PathLike)):
        base = os.fspath(vocabulary)
    check_apart(output, adapter=adapter, model=vocabulary if isinstance(vocabulary, (str, os.PathLike)) else None)
    rows = _rows_of(vocabulary)
    config = read_config(adapter)
    _check_not_reduced(adapter, config, rows, vocabulary)
    write = _reduce_sparse if config.get("peft_type") == "SPARSE_FT" else _reduce_other
    cut = _Cut(rows, os.fspath(adapter), config, _shapes_of(vocabulary))
    with AtomicFolder(Path(output), overwrite=overwrite, what="adapter", doors=(SOURCE, CONFIG_FILE)) as folder:
        write(adapter, cut, base, folder.staging)
    result = cut.result(Path(output))
    logger.info("Reduced %s: %d numbers of tokens that went are lost", os.fspath(adapter), result.num_lost)
    return result


def _check_not_reduced(
    adapter: str | os.PathLike[str], config: Mapping[str, Any], rows: VocabularyRows, vocabulary: object
) -> None:
    """Refuse an adapter of the reduced model itself: ids of tokens in it are the new ones already."""
    base, size = config.get("base_model_name_or_path"), (config.get("provenance") or {}).get("tokens")
    is_its_own = (
        isinstance(vocabulary, (str, os.PathLike)) and base and Path(base).resolve() == Path(vocabulary).resolve()
    )
    if is_its_own or (size is not None and size != rows.old_size):
        raise FormatError(
            f"{os.fspath(adapter)} belongs to a reduced model already ({base!r}): nothing in it is to be re-indexed. "
            "Nothing was written. Give the adapter of the whole model."
        )


def _rows_of(vocabulary: ReducedVocabulary | VocabularyRows | str | os.PathLike[str]) -> VocabularyRows:
    if isinstance(vocabulary, VocabularyRows):
        return vocabulary
    return vocabulary.rows if isinstance(vocabulary, ReducedVocabulary) else VocabularyRows.load(vocabulary)


def _shapes_of(vocabulary: ReducedVocabulary | VocabularyRows | str | os.PathLike[str]) -> Shapes:
    """{tensor of the reduced model: shape}; empty where there is nothing but the rows."""
    if isinstance(vocabulary, ReducedVocabulary):
        return {name: tuple(tensor.shape) for name, tensor in vocabulary.model.state_dict().items()}
    if isinstance(vocabulary, VocabularyRows) or not any(Path(vocabulary).glob(f"{WEIGHTS}*")):
        return {}
    model = Checkpoint(vocabulary)
    return {name: model.shape(name) for name in model.names()}


class _Cut:
    """Cuts tensors of one adapter, and counts what is lost."""

    def __init__(self, rows: VocabularyRows, source: str, config: Mapping[str, Any], model: Shapes) -> None:
        self.rows, self.source = rows, source
        # Classes over the same base differ by a first part of the names.
        self._model = {name.partition(".")[2]: shape for name, shape in model.items()} | dict(model)
        self.kept: dict[str, int] = {}
        self.lost: dict[str, int] = {}
        self._new_rows = rows.new_rows()
        self._names = [name.split(".") for name in rows.tensors]
        # What an adapter adds to a matrix lies in the matrix's module; that of a lone bias holds other things as well.
        self._modules = [path[:-1] for path in self._names if path[-1] == "weight"]
        self.token_indices = config.get("trainable_token_indices")

    def is_of_vocabulary(self, name: str, size: int) -> bool:
        """Whether a tensor or parameter belongs to one of the vocabulary's modules.

        Args:
            name: without PEFT's prefix.
            size: its dimension that counts tokens, if it does.
        """
        path = name.split(".")
        if any(_contains(path[:-1], module) for module in self._modules) or any(
            _contains(path, own) for own in self._names
        ):
            return True
        return size == self.rows.old_size and place_of(name).layer is None and bool(_OUTPUT.search(name))

    def check_model(self, shapes: Shapes) -> None:
        """Refuse an adapter whose deltas, of these shapes, are on none of the model's tensors, or on ones of other
        shapes.
        """
        shapes = {name: shape for name, shape in shapes.items() if not self.is_of_vocabulary(name, shape[0])}
        known = {name: self._model.get(name, self._model.get(name.partition(".")[2])) for name in shapes}
        for name, shape in shapes.items() if self._model else ():
            if known[name] not in (None, shape) or not any(known.values()):
                raise FormatError(
                    f"{self.source}: '{name}' is of shape {shape}, and the reduced model has "
                    f"{'no such tensor' if known[name] is None else f'one of {known[name]}'}: the adapter belongs to "
                    "another base model. Nothing was written."
                )

    def delta(self, name: str, delta: SparseDelta) -> SparseDelta:
        """A delta with the rows that stayed."""
        if not self.is_of_vocabulary(name, delta.shape[0]):
            return delta
        self._check_size(name, delta.shape, [0] if delta.shape[0] == self.rows.old_size else [])
        width = delta.numel // delta.shape[0]
        old, column = delta.indices.long() // width, delta.indices.long() % width
        moved = self._new_rows[old] * width + column
        stays = self._new_rows[old] >= 0
        order = moved[stays].argsort()
        shape = (len(self.rows.kept), *delta.shape[1:])
        dtype = index_dtype(len(self.rows.kept) * width)
        self._count(name, int(stays.sum()), int((~stays).sum()))
        return SparseDelta(moved[stays][order].to(dtype), delta.values[stays][order].contiguous(), shape).check(
            name=name
        )

    def tensor(self, name: str, tensor: Tensor) -> Tensor:
        """A whole tensor (a head, a LoRA factor, rows of tokens) with the rows that stayed."""
        if name.endswith(_TOKEN_ROWS):
            stays = [self._new_rows[index] >= 0 for index in self._indices_of(name)]
            if len(stays) != len(tensor):
                raise FormatError(f"{self.source}: '{name}' has {len(tensor)} rows for {len(stays)} token indices.")
            cut = tensor[torch.tensor(stays, dtype=torch.bool)]
        else:
            sizes = [place for place, size in enumerate(tensor.shape) if size == self.rows.old_size]
            if not self.is_of_vocabulary(name, self.rows.old_size if sizes else -1):
                return tensor
            if name.endswith(_HIDDEN_SIDE) or (not sizes and "lora" in name):
                return tensor
            self._check_size(name, tuple(tensor.shape), sizes)
            cut = tensor.index_select(sizes[0], self.rows.kept)
        self._count(name, cut.numel(), tensor.numel() - cut.numel())
        return cut.contiguous()

    def tensors(self, given: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Whole tensors with the rows that stayed, without those of rows of tokens that all went."""
        cut = {name: self.tensor(name, tensor) for name, tensor in given.items()}
        return {name: tensor for name, tensor in cut.items() if len(tensor) or not name.endswith(_TOKEN_ROWS)}

    def new_token_indices(self) -> Any:
        """`trainable_token_indices` of the config, under new ids; None if all of them went."""
        given = self.token_indices
        if isinstance(given, Mapping):
            new = {module: self._renumbered(ids) for module, ids in given.items()}
            return {module: ids for module, ids in new.items() if ids} or None
        return given if given is None else self._renumbered(given) or None

    def result(self, directory: Path) -> ReducedAdapter:
        """What was kept and lost."""
        return ReducedAdapter(directory, self.kept, self.lost)

    def _indices_of(self, name: str) -> list[int]:
        given = self.token_indices
        if isinstance(given, Mapping):
            given = next((ids for module, ids in given.items() if f".{module}." in f".{name}"), None)
        if given is None:
            raise FormatError(f"{self.source}: '{name}' has no token indices in {CONFIG_FILE}.")
        return self._checked(given)

    def _checked(self, ids: Any) -> list[int]:
        beyond = [index for index in ids if not 0 <= index < self.rows.old_size]
        if beyond:
            raise FormatError(f"{self.source}: trainable_token_indices {beyond} are not below {self.rows.old_size}.")
        return list(ids)

    def _renumbered(self, ids: Any) -> list[int]:
        return [new for new in self._new_rows[self._checked(ids)].tolist() if new >= 0]

    def _check_size(self, name: str, shape: tuple[int, ...], places: list[int]) -> None:
        if len(places) != 1:
            raise FormatError(
                f"{self.source}: '{name}' is of shape {shape}, and the vocabulary was reduced from "
                f"{self.rows.old_size} tokens: the adapter belongs to another base model, or to one that is reduced "
                "already. Nothing was written."
            )

    def _count(self, name: str, kept: int, lost: int) -> None:
        self.kept[name], self.lost[name] = kept, lost


def _contains(path: list[str], module: list[str]) -> bool:
    """Whether a path leads through a module, from the root of either one's class."""
    length = len(module)
    if any(path[start : start + length] == module for start in range(len(path) - length + 1)):
        return True
    return any(path[: length - start] == module[start:] for start in range(1, length))


def _reduce_sparse(adapter: str | os.PathLike[str], cut: _Cut, base: str | None, staging: Path) -> None:
    files = read_adapter(adapter)
    cut.check_model({name: delta.shape for name, delta in files.deltas.items()})
    deltas = {name: cut.delta(name, delta) for name, delta in files.deltas.items()}
    own = {name: tensor for name, tensor in files.others.items() if ".base_layer." not in name}  # copies of the base's
    others = cut.tensors(own)
    config = SparseConfig.from_pretrained(os.fspath(files.folder))
    config = replace(config, trainable_token_indices=cut.new_token_indices())
    config.counts = (
        {name: delta.count for name, delta in deltas.items()} if files.config["counts"] is not None else None
    )
    config.base_model_name_or_path = base or config.base_model_name_or_path
    size = {"tokens": len(cut.rows.kept), "tokens_before": cut.rows.old_size}
    config.provenance = {**(config.provenance or {}), **size}
    save_tensors(build(deltas, others), staging / SOURCE, metadata={"format": "pt"})
    config.save_pretrained(os.fspath(staging))


def _reduce_other(adapter: str | os.PathLike[str], cut: _Cut, base: str | None, staging: Path) -> None:
    path = need_file(adapter, SOURCE)
    config = read_config(adapter)
    named = {key.removeprefix(PREFIX): tensor for key, tensor in load_tensors(path).items()}
    tensors = {PREFIX + name: tensor for name, tensor in cut.tensors(named).items()}
    if config.get("trainable_token_indices") is not None:
        config["trainable_token_indices"] = cut.new_token_indices()
    config["base_model_name_or_path"] = base or config.get("base_model_name_or_path")
    save_tensors(tensors, staging / SOURCE, metadata={"format": "pt"})
    (staging / CONFIG_FILE).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    if (path.parent / README).is_file():
        shutil.copyfile(path.parent / README, staging / README)
