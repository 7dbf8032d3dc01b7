"""`pytorch_diff.bin`, the adapters of composable-sft and BiStil: read, recognised, and written.

Source of the format: cambridgeltl/composable-sft and parovicm/bistil. No code of theirs is here.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..core.delta import SparseDelta
from ..errors import FormatError
from ..files import atomic_file
from .foreign import COMPOSABLE_SFT, Foreign, check_holdable
from .gap_lists import decode_gap_list, encode_gap_list
from .restricted_pickle import integers
from .torch_file import StoredTensor, TorchFile, checked_shape

DIFF_FILE = "pytorch_diff.bin"
_DIFFS, _HEADS, _BLOCKS = "diffs", "abs", "block_sparses"
_ENCODED = {"size", "index_steps", "values"}
# Heads of masked language models, which language adapters carry and models for tasks lack.
_MLM_HEADS = ("cls.predictions.", "lm_head.")
_EMBEDDINGS = re.compile(r"(?P<family>bert|roberta)\.embeddings\.word_embeddings\.weight")
# Base models by the size of their vocabulary: the file does not name one.
_BASES: dict[tuple[str, tuple[int, ...]], str] = {
    ("bert", (119_547, 768)): "google-bert/bert-base-multilingual-cased",
    ("roberta", (250_002, 768)): "FacebookAI/xlm-roberta-base",
}


def read_composable_sft(path: Path, *, source: str) -> Foreign:
    """Read an adapter of composable-sft or BiStil.

    Args:
        path: the file.
        source: what errors call it.

    Raises:
        FormatError: it is damaged, holds what the format has not, or changes what no sparse adapter can hold.

    Cost: the weights and the positions of the largest tensor in memory, and a sort of each tensor's positions.
    """
    file = TorchFile(path)
    diffs, heads = _sections(file)
    untouched = frozenset(name for name, delta in diffs.items() if not delta.count)
    deltas = {name: delta for name, delta in diffs.items() if delta.count}
    check_holdable(deltas, source)
    return Foreign(COMPOSABLE_SFT, source, path, deltas, heads, untouched=untouched, task_type=_task_of(diffs, heads))


def is_mlm_head(name: str) -> bool:
    """Whether a parameter belongs to the head of a masked language model of the families that the format serves."""
    return name.startswith(_MLM_HEADS)


def base_by_vocabulary(foreign: Foreign) -> str | None:
    """The base model whose embeddings have the shape that an adapter was made for; None if that tells nothing."""
    for name, delta in foreign.deltas.items():
        found = _EMBEDDINGS.fullmatch(name)
        if found is not None:
            return _BASES.get((found["family"], delta.shape))
    return None


def _sections(file: TorchFile) -> tuple[dict[str, SparseDelta], dict[str, Tensor]]:
    content = file.content
    if not isinstance(content, dict) or not {_DIFFS, _HEADS} & content.keys():
        raise file.error(f"holds no '{_DIFFS}' and no '{_HEADS}', so it is no adapter of composable-sft")
    if surplus := sorted(map(str, content.keys() - {_DIFFS, _HEADS, _BLOCKS})):
        raise file.error(f"holds {surplus[0]!r:.100}, which is not part of this format")
    for name in content:
        if not isinstance(content[name], dict) or any(not isinstance(key, str) for key in content[name]):
            raise file.error(f"must hold parameters by name under '{name}', got a {type(content[name]).__name__}")
    if content.get(_BLOCKS):
        raise file.error(f"replaces whole layers by block-sparse ones ('{_BLOCKS}'), which is no difference of weights")
    reader = _Reader(file)
    sections = [content.get(_DIFFS, {}), content.get(_HEADS, {})]
    # Taken out of the content one by one, so that lists of gaps and decoded positions are not all held at once.
    diffs = {name: reader.delta(name, sections[0].pop(name)) for name in list(sections[0])}
    heads = {name: reader.head(name, sections[1].pop(name)) for name in list(sections[1])}
    if both := diffs.keys() & heads.keys():
        raise file.error(f"holds {sorted(both)[0]!r:.100} both as a difference and whole")
    return diffs, heads


class _Reader:
    """Turns items of the file into tensors, none of which is read for two names: a file grows by what it holds."""

    def __init__(self, file: TorchFile) -> None:
        self._file = file
        self._seen: dict[Any, str] = {}

    def delta(self, name: str, item: Any) -> SparseDelta:
        where = f"{self._file.source}: {name!r:.200}"
        if not isinstance(item, dict) or set(item) != _ENCODED:
            raise FormatError(f"{where} must hold {sorted(_ENCODED)}, got {_kind(item)}.")
        gaps, values = item["index_steps"], item["values"]
        try:
            shape = checked_shape(item["size"])
        except FormatError as error:
            raise FormatError(f"{where}: size: {error}.") from error
        if not isinstance(values, StoredTensor):
            raise FormatError(f"{where}: values must be a tensor, got a {type(values).__name__}.")
        self._once(where, gaps, values)
        numbers = integers(gaps)
        if numbers is None:
            raise FormatError(f"{where}: index_steps must be a list of integers, got a {type(gaps).__name__}.")
        return decode_gap_list(numbers, self._file.tensor(values), shape, name=where)

    def head(self, name: str, item: Any) -> Tensor:
        """A tensor, which BiStil may have written as a difference from zero."""
        where = f"{self._file.source}: {name!r:.200}"
        if isinstance(item, dict):
            delta = self.delta(name, item)
            if delta.numel > max(1024, 1000 * delta.count):
                raise FormatError(f"{where} claims {delta.numel} elements and holds {delta.count}.")
            return delta.to_dense()
        if not isinstance(item, StoredTensor):
            raise FormatError(f"{where} must be a tensor, got a {type(item).__name__}.")
        self._once(where, item)
        tensor = self._file.tensor(item)
        if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
            raise FormatError(f"{where} holds NaN or infinity, so the run that wrote it had diverged.")
        return tensor

    def _once(self, where: str, *items: Any) -> None:
        for item in items:
            key = item.storage if isinstance(item, StoredTensor) and item.numel else id(item)
            if isinstance(item, (list, StoredTensor)) and key in self._seen:
                raise FormatError(f"{where} is held in the memory of {self._seen[key]}. Nothing was read.")
            self._seen[key] = where


def _kind(item: Any) -> str:
    return f"a {type(item).__name__}" if not isinstance(item, dict) else f"{sorted(map(str, item))!r:.200}"


def _task_of(diffs: Mapping[str, SparseDelta], heads: Mapping[str, Tensor]) -> str | None:
    """PEFT's task type, by what the head is called in BERT and XLM-R."""
    if any(name.startswith("qa_outputs.") for name in heads):
        return "QUESTION_ANS"
    if any(name.startswith("classifier.out_proj.") for name in heads):
        return "SEQ_CLS"
    if "classifier.weight" in heads:
        # Only the classifier of sequences looks at the pooler, so that the one of tokens has none to list.
        return "SEQ_CLS" if any(".pooler." in f".{name}" for name in diffs) else "TOKEN_CLS"
    return None


# Writing


def write_composable_sft(directory: Path, deltas: Mapping[str, SparseDelta], heads: Mapping[str, Tensor]) -> Path:
    """Write `pytorch_diff.bin`, in one step: a crash leaves the old file or the new one.

    Plain integers only, so that `torch.load(..., weights_only=True)` reads it in any version.

    Args:
        directory: where; it is made if need be.
        deltas: {parameter: difference}.
        heads: {parameter: tensor} of what was trained whole.

    Returns:
        the file.
    """
    content: dict[str, dict[str, Any]] = {_DIFFS: {}, _HEADS: {}}
    for name, delta in deltas.items():
        gaps, values = encode_gap_list(delta)
        content[_DIFFS][name] = {"size": torch.Size(delta.shape), "index_steps": gaps, "values": values}
    content[_HEADS] = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in heads.items()}
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / DIFF_FILE
    with atomic_file(path) as temporary:
        torch.save(content, temporary)
    return path
