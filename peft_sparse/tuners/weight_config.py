"""What the configs of this library share in how they are written to disk and read from it."""

from __future__ import annotations

from typing import Any, ClassVar

from peft import PeftConfig

from ..checkpoints.card import update_card
from ..checkpoints.files import size_of_weights


class WeightConfig(PeftConfig):
    """Base class of configs whose files are the same for equal configs, and lie beside a model card of ours."""

    # Not fields. The name of the adapter that is being saved, set by the hook that collects its tensors, since PEFT
    # tells `save_pretrained` only a folder.
    saved_as = "default"
    # Whether the config came from a folder, whose weights are still to be loaded; and how many bytes those have.
    awaits_file = False
    file_bytes: ClassVar[int | None] = None
    # What writes this library's part of the model card.
    write_card = staticmethod(update_card)

    def to_dict(self) -> dict[str, Any]:
        """All fields; sets as sorted lists, so that equal configs give equal files."""
        return {name: sorted(v) if isinstance(v, set) else v for name, v in super().to_dict().items()}

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:
        """Write the config (PEFT's method), and this library's part of the model card beside it."""
        super().save_pretrained(save_directory, **kwargs)
        self.write_card(save_directory, self.to_dict(), adapter_name=self.saved_as)

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str, subfolder: str | None = None, **kwargs: Any
    ) -> WeightConfig:
        """Load a config (PEFT's method), and note that weights are to follow, and how large their file is."""
        config = super().from_pretrained(pretrained_model_name_or_path, subfolder=subfolder, **kwargs)
        download_kwargs, _, _ = cls._split_kwargs(kwargs)
        config.awaits_file = True
        config.file_bytes = size_of_weights(pretrained_model_name_or_path, subfolder=subfolder, **download_kwargs)
        return config
