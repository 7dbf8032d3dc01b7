"""Adapters that a checkpoint holds in PEFT's files, put back into a model."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from typing import Any

from peft import load_peft_weights, set_peft_model_state_dict

from .completeness import folder_of, holds_adapter, naming

logger = logging.getLogger(__name__)


def load_adapters(model: Any, folder: str, adapters: Sequence[str]) -> None:
    """Load adapters and heads. All are read before one is changed; one that was added later starts afresh.

    Raises:
        FormatError: a file is damaged.
    """
    known = [name for name in adapters if holds_adapter(folder, name)]
    for name in set(adapters) - set(known):
        logger.warning("adapter %r is not in %s: it starts afresh.", name, folder)
    loaded = {name: _read(os.path.join(folder, folder_of(name))) for name in known}
    for name, tensors in loaded.items():
        set_peft_model_state_dict(model, tensors, adapter_name=name)


def _read(folder: str) -> dict[str, Any]:
    with naming(folder):
        return load_peft_weights(folder, device="cpu")
