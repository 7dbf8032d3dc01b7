"""`push_to_hub`: the card that it uploads.

transformers' `PushToHubMixin.push_to_hub`, which `PeftModel` inherits, calls `save_pretrained` and then writes a card
of its own (the repository's, or its template) over the one that was saved.
"""

from __future__ import annotations

import json
import os
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn
from transformers.utils import PushToHubMixin

from .card import DEFAULT, update_card


def keep_card_when_pushing(model: nn.Module) -> None:
    """Let this model's `push_to_hub` put the library's part into the card that it uploads.

    An attribute of the instance, made without a reference to it: models can be freed, copied and pickled as before.
    """
    if isinstance(model, PushToHubMixin):
        model._upload_modified_files = partial(upload_with_card, type(model))


def upload_with_card(model_class: type[PushToHubMixin], working_dir: str, *args: Any, **kwargs: Any) -> Any:
    """Stand in for the mixin's method, which uses nothing of its instance but the name of the class."""
    update_cards(working_dir)
    stand_in = object.__new__(model_class)
    return model_class._upload_modified_files(stand_in, working_dir, *args, **kwargs)


def update_cards(directory: str | os.PathLike[str]) -> None:
    """Write the library's part into the cards of all its adapters that were saved into a folder and its subfolders."""
    root = Path(directory)
    for folder in [root, *sorted(path for path in root.iterdir() if path.is_dir())]:
        path = folder / "adapter_config.json"
        if not path.is_file():
            continue
        config = json.loads(path.read_text(encoding="utf-8"))
        update_card(folder, config, adapter_name=DEFAULT if folder == root else folder.name)
