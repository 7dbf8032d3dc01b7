"""What the configs of this library share in how they are written to disk."""

from __future__ import annotations

from typing import Any

from peft import PeftConfig

from ..checkpoints.card import update_card


class WeightConfig(PeftConfig):
    """Base class of configs whose files are the same for equal configs, and lie beside a model card of ours."""

    # Not a field: the name of the adapter that is being saved, set by the hook that collects its tensors, since PEFT
    # tells `save_pretrained` only a folder.
    saved_as = "default"

    def to_dict(self) -> dict[str, Any]:
        """All fields; sets as sorted lists, so that equal configs give equal files."""
        return {name: sorted(v) if isinstance(v, set) else v for name, v in super().to_dict().items()}

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:
        """Write the config (PEFT's method), and this library's part of the model card beside it."""
        super().save_pretrained(save_directory, **kwargs)
        update_card(save_directory, self.to_dict(), adapter_name=self.saved_as)
