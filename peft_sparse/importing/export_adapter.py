"""Adapters of this library, made into files of others on disk."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from ..checkpoints.adapter_files import AdapterFiles, read_adapter
from ..errors import ConfigError
from ..files import check_output
from .composable_sft import DIFF_FILE, write_composable_sft
from .foreign import COMPOSABLE_SFT


@dataclass(frozen=True)
class Exported:
    """What `export_adapter` wrote.

    Attributes:
        output: the directory.
        file: the weights in it.
        num_weights: how many weights it changes.
        heads: parameters that are in it whole.
    """

    output: str
    file: str
    num_weights: int
    heads: tuple[str, ...]


def export_adapter(
    adapter: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    to: str = COMPOSABLE_SFT,
    overwrite: bool = False,
) -> Exported:
    """Write a sparse adapter in the format of another library, without a model.

    Args:
        adapter: the sparse adapter: folder, or id of the Hub ("owner/name[/folder][@revision]").
        output: directory to write into.
        to: "composable-sft": `pytorch_diff.bin`, which composable-sft and BiStil read. `import_adapter` makes the same
            adapter of it again, but for what its config says of how it was trained.
        overwrite: replace what is in `output`.

    Raises:
        ConfigError: there is no such adapter, `to` is not known, the output is taken, or the adapter holds what the
            format has no place for.
        FormatError: the adapter is damaged, or no sparse one.
    """
    if to not in _WRITERS:
        raise ConfigError(f"to must be one of {list(_WRITERS)}, got {to!r}.")
    files = read_adapter(adapter)
    check_output(output, overwrite=overwrite)
    path, heads = _WRITERS[to](files, Path(output))
    count = sum(delta.count for delta in files.deltas.values())
    return Exported(os.fspath(output), os.fspath(path), count, heads)


def _to_composable_sft(files: AdapterFiles, output: Path) -> tuple[Path, tuple[str, ...]]:
    if files.config.get("trainable_token_indices"):
        raise ConfigError(
            f"'{files.source}' trains rows of the embedding whole (trainable_token_indices), and {DIFF_FILE} has no "
            "place for them."
        )
    saved = tuple(files.config.get("modules_to_save") or ())
    strangers = [name for name in files.others if not any(part in saved for part in _paths(name))]
    if strangers:
        raise ConfigError(
            f"'{files.source}' brings {strangers[0]!r} beside the adapter (PEFT's save_embedding_layers), and "
            f"{DIFF_FILE} has no place for it. Save the adapter with save_embedding_layers=False."
        )
    return write_composable_sft(output, files.deltas, files.others), tuple(files.others)


def _paths(name: str) -> list[str]:
    """All runs of parts of a name that could be how a config calls a module."""
    parts = name.split(".")
    return [".".join(parts[a:b]) for a in range(len(parts)) for b in range(a + 1, len(parts))]


_WRITERS: dict[str, Callable[[AdapterFiles, Path], tuple[Path, tuple[str, ...]]]] = {COMPOSABLE_SFT: _to_composable_sft}
