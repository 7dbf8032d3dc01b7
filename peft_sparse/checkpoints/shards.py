"""Model checkpoints on disk, a tensor at a time: read lazily by name, written in shards of bounded size."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError, RepositoryNotFoundError
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..checks import check_whole
from ..errors import ConfigError, FormatError
from ..files import AtomicFolder, save_tensors
from ..untrusted import check_regular
from .files import read_json

WEIGHTS, INDEX, CONFIG = "model.safetensors", "model.safetensors.index.json", "config.json"
MAX_SHARD_BYTES = 10**9
# What a checkpoint holds beside its weights: configs, tokenizers, chat templates, the code of its own classes.
# (*.spm: Marian's and DeBERTa's pieces; *.tiktoken: Qwen's; *.codes: PhoBERT's.)
COMPANIONS = (
    *("*.json", "*.txt", "*.model", "*.spm", "*.tiktoken", "*.codes"),
    *("*.jinja", "additional_chat_templates/*.jinja", "*.py"),
)
_PICKLED = ("pytorch_model.bin", "pytorch_model.bin.index.json")
# An adapter that lies in the same folder is no part of the checkpoint.
_OF_ADAPTERS = "adapter_config.json"
_READ_BEFORE_CLOSING = 2**26
_WRITTEN = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors(\.index\.json)?")
# What transformers looks for by name beside any weights: another model's would be taken for this one's.
_LOOKED_FOR = re.compile(
    r"(generation_config|(pre|video_pre)?processor_config|tokenizer|tokenizer_config|special_tokens_map|added_tokens"
    r"|vocab|chat_template)\.json|(vocab|merges)\.txt|.+\.(model|spm|tiktoken|codes|jinja)|additional_chat_templates"
)


class Checkpoint:
    """A model's saved weights, in one safetensors file or several; no tensor is read before it is asked for.

    Args:
        path_or_id: a directory that `save_pretrained` wrote, or a repository on the Hub, which is downloaded (its
            safetensors files and the small files beside them) if it is not in the cache.
        revision: branch, tag or commit on the Hub.

    Attributes:
        source: `path_or_id` as text.
        folder: where the files are.
        shards: {file name: names of the tensors in it}, both in the order in which the files and the index name them.

    Raises:
        FormatError: there are no safetensors weights, the files do not hold what the index says, or the repository
            cannot be had.

    Cost: the headers of the files. Tensors are mapped into memory, so that the system reads what is used of them.
    """

    def __init__(self, path_or_id: str | os.PathLike[str], *, revision: str | None = None) -> None:
        self.source = os.fspath(path_or_id)
        self.folder = _find_folder(self.source, revision)
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._shard_of: dict[str, str] = {}
        self._opened: tuple[str, Any] | None = None
        self._read_bytes = 0
        self.shards: dict[str, list[str]] = {}
        for shard, expected in _find_shards(self.folder, self.source).items():
            self.shards[shard] = self._read_header(shard, expected)

    def _read_header(self, shard: str, expected: set[str]) -> list[str]:
        file = self._open(shard)
        names = list(file.keys())
        if expected and expected != set(names):
            differing = sorted(expected ^ set(names))
            raise FormatError(
                f"{self.source}: {shard} and {INDEX} do not agree on {len(differing)} tensors, the first of which is "
                f"'{differing[0]}'. Download or save the checkpoint again."
            )
        for name in names:
            self._shapes[name] = tuple(file.get_slice(name).get_shape())
            self._shard_of[name] = shard
        return names

    def _open(self, shard: str) -> Any:
        # One file at a time, and not for long: what was read of it counts as memory of this process until it is closed.
        if self._opened is None or self._opened[0] != shard or self._read_bytes > _READ_BEFORE_CLOSING:
            path = self.folder / shard
            self._read_bytes = 0
            check_regular(path)
            try:
                self._opened = shard, safe_open(path, framework="pt", device="cpu")
            except SafetensorError as error:
                raise FormatError(
                    f"{path} is not a readable safetensors file ({error}). Download or save the checkpoint again."
                ) from error
            except FileNotFoundError as error:
                raise FormatError(f"{self.source}: {shard} is missing, which {INDEX} names.") from error
        return self._opened[1]

    def names(self) -> list[str]:
        """The names of all tensors, in the order of the shards."""
        return [name for names in self.shards.values() for name in names]

    def __contains__(self, name: object) -> bool:
        return name in self._shapes

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a tensor, from the header alone."""
        return self._shapes[self._known(name)]

    def dtype(self, name: str) -> torch.dtype:
        """The dtype of a tensor; its data is not read."""
        dtype: torch.dtype = self._open(self._shard_of[self._known(name)]).get_tensor(name).dtype
        return dtype

    def tensor(self, name: str) -> Tensor:
        """A tensor, mapped from its file: reading from it loads what is read, and writing to it never reaches the file.

        Fast in the order of `names()`; jumping between shards opens files again.
        """
        tensor: Tensor = self._open(self._shard_of[self._known(name)]).get_tensor(name)
        self._read_bytes += tensor.nbytes
        return tensor

    def _known(self, name: str) -> str:
        if name not in self._shapes:
            raise FormatError(f"{self.source} has no tensor '{name}'.")
        return name

    @cached_property
    def config(self) -> dict[str, Any]:
        """The content of config.json; empty if there is none."""
        path = self.folder / CONFIG
        return read_json(path) if path.is_file() else {}

    def companions(self) -> list[Path]:
        """The files beside the weights that a copy needs: configs, tokenizer, chat template, code; no weights."""
        found = {path for pattern in COMPANIONS for path in self.folder.glob(pattern) if path.is_file()}
        others = {*_PICKLED, _OF_ADAPTERS}
        return sorted(path for path in found if path.name not in others and not path.name.endswith(".index.json"))


def _find_folder(source: str, revision: str | None) -> Path:
    if Path(source).is_dir():
        return Path(source)
    outside_folders: dict[str, Any] = {"ignore_patterns": "*/*", "revision": revision}
    try:
        folder = Path(snapshot_download(source, allow_patterns=list(COMPANIONS), **outside_folders))
        weights = list(_find_shards(folder, source)) if (folder / INDEX).is_file() else [WEIGHTS]
        return Path(snapshot_download(source, allow_patterns=weights, **outside_folders))
    except (HFValidationError, RepositoryNotFoundError, LocalEntryNotFoundError) as error:
        raise FormatError(
            f"{source!r} is neither a directory nor a repository on the Hub that can be reached ({error})."
        ) from error


def _find_shards(folder: Path, source: str) -> dict[str, set[str]]:
    """{file name: tensors that it must hold; empty if there is no index to say so}."""
    if (folder / WEIGHTS).is_file():
        return {WEIGHTS: set()}
    if not (folder / INDEX).is_file():
        pickled = any((folder / name).is_file() for name in _PICKLED)
        reason = " but pickled ones, and reading those runs the code in them" if pickled else ""
        raise FormatError(
            f"{source} has no safetensors weights ({WEIGHTS} or {INDEX}){reason}. Load the model and save it again: "
            "AutoModel.from_pretrained(...).save_pretrained(directory)."
        )
    weight_map = read_json(folder / INDEX).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise FormatError(f"{source}: {INDEX} has no 'weight_map'. Download or save the checkpoint again.")
    shards: dict[str, set[str]] = {}
    for name, shard in weight_map.items():
        if not isinstance(shard, str) or Path(shard).name != shard or not shard.endswith(".safetensors"):
            raise FormatError(f"{source}: {INDEX} says that '{name}' is in {shard!r}, no safetensors file beside it.")
        shards.setdefault(shard, set()).add(name)
    return shards


def is_of_checkpoint(name: str) -> bool:
    """Whether a file or folder of this name belongs to the checkpoint beside it, and goes when that is replaced."""
    return (_WRITTEN.fullmatch(name) or _LOOKED_FOR.fullmatch(name)) is not None


def refuse_beside_adapter(directory: str | os.PathLike[str]) -> None:
    """Refuse to write a checkpoint into an adapter's folder, where transformers would load the adapter on top of it.

    Raises:
        ConfigError: there is an adapter_config.json.
    """
    if Path(directory, _OF_ADAPTERS).is_file():
        raise ConfigError(
            f"{os.fspath(directory)} holds an adapter ({_OF_ADAPTERS}), which transformers would load together with a "
            "checkpoint in the same folder. Give another output directory."
        )


class ShardWriter:
    """Writes a checkpoint tensor by tensor into a directory that appears only when all of it is there.

    Use it in a `with` block: leaving it moves the finished files into place, an exception removes what was written.

        with ShardWriter("tuned") as writer:
            for name in checkpoint.names():
                writer.add(name, checkpoint.tensor(name))
            copy_companions(checkpoint, writer.staging)

    Args:
        directory: where the checkpoint will be.
        max_shard_bytes: a shard is written when the next tensor would make it larger; only a single tensor may be.
        overwrite: replace a checkpoint that is there: its weights go, and what transformers would read with the new
            ones (tokenizer, chat templates, generation config). Others stay unless one of the same name is written.

    Attributes:
        staging: where files are collected until then; whatever else is put there moves along.

    Raises:
        ConfigError: the directory holds something and `overwrite` was not asked for; or it holds an adapter; or
            `max_shard_bytes` is no whole number above 0.

    Cost: the memory of one shard; mapped tensors that go in unchanged cost none that the system cannot take back.
    """

    def __init__(
        self, directory: str | os.PathLike[str], *, max_shard_bytes: int = MAX_SHARD_BYTES, overwrite: bool = False
    ) -> None:
        check_whole("max_shard_bytes", max_shard_bytes)
        refuse_beside_adapter(directory)
        self.max_shard_bytes = max_shard_bytes
        self._folder = AtomicFolder(
            directory,
            overwrite=overwrite,
            what="checkpoint",
            is_replaced=is_of_checkpoint,
            doors=(WEIGHTS, INDEX, CONFIG),
        )
        self.directory, self.staging = self._folder.directory, self._folder.staging
        self._names: list[list[str]] = []
        self._known: set[str] = set()
        self._shard: dict[str, Tensor] = {}
        self._shard_bytes = self._total_bytes = 0

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if kind is not None:
            self._folder.__exit__(kind, error, traceback)
            return
        with self._folder:
            self._finish()

    def add(self, name: str, tensor: Tensor) -> None:
        """Append a tensor; it must not change before the shard is written."""
        if name in self._known:
            raise FormatError(f"tensor '{name}' is written twice.")
        self._known.add(name)
        size = tensor.numel() * tensor.element_size()
        if self._shard and self._shard_bytes + size > self.max_shard_bytes:
            self._flush()
        self._shard[name] = tensor.detach().cpu().contiguous()
        self._shard_bytes += size
        self._total_bytes += size

    def _flush(self) -> None:
        save_tensors(self._shard, self.staging / str(len(self._names)), metadata={"format": "pt"})
        self._names.append(list(self._shard))
        self._shard, self._shard_bytes = {}, 0

    def _finish(self) -> None:
        """Write what is left, under the names that a checkpoint has."""
        if self._shard or not self._names:
            self._flush()
        count = len(self._names)
        files = [WEIGHTS] if count == 1 else [f"model-{i:05}-of-{count:05}.safetensors" for i in range(1, count + 1)]
        for number, file in enumerate(files):
            os.replace(self.staging / str(number), self.staging / file)
        if count > 1:
            weight_map = {name: file for file, names in zip(files, self._names, strict=True) for name in names}
            index = {"metadata": {"total_size": self._total_bytes}, "weight_map": dict(sorted(weight_map.items()))}
            (self.staging / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def copy_companions(checkpoint: Checkpoint, directory: Path, *, changed: Mapping[str, Any] | None = None) -> None:
    """Copy what a checkpoint holds beside its weights.

    Args:
        checkpoint: the source.
        directory: an existing directory, such as `ShardWriter.staging`.
        changed: entries that config.json gets in the copy.
    """
    for path in checkpoint.companions():
        copy = directory / path.relative_to(checkpoint.folder)
        copy.parent.mkdir(exist_ok=True)
        shutil.copyfile(path, copy)
    if changed:
        text = json.dumps({**checkpoint.config, **changed}, indent=2, sort_keys=True)
        (directory / CONFIG).write_text(text + "\n", encoding="utf-8")
