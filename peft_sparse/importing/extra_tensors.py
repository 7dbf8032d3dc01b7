"""Tensors of an adapter file that are neither deltas nor heads: other formats have no place for them."""

from __future__ import annotations

from ..checkpoints.adapter_files import AdapterFiles
from ..core.names import lies_in_trained_whole
from ..errors import ConfigError


def refuse_extra_tensors(files: AdapterFiles, kind: str) -> None:
    """Refuse to export what is neither a delta nor a module that was trained whole (`modules_to_save`).

    Args:
        files: the adapter.
        kind: what the error calls the other format.

    Raises:
        ConfigError: rows of an embedding, or a copy of it.
    """
    if files.config.get("trainable_token_indices"):
        raise ConfigError(
            f"'{files.source}' trains rows of the embedding whole (trainable_token_indices), and {kind} has no "
            "place for them."
        )
    saved = files.config.get("modules_to_save") or ()
    strangers = [name for name in files.others if not lies_in_trained_whole(name.rpartition(".")[0], saved)]
    if strangers:
        raise ConfigError(
            f"'{files.source}' brings {strangers[0]!r} beside the adapter (PEFT's save_embedding_layers), and "
            f"{kind} has no place for it. Save the adapter with save_embedding_layers=False."
        )
