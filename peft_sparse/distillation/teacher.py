"""The teacher: a frozen model with adapters, which speaks the language of each batch."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import torch
from peft import PeftModel
from torch import nn

from ..errors import ConfigError
from ..training.languages.multisource import LANGUAGE
from ..tuners.common.adapter_config import refuse_transformers_verbs
from ..tuners.madg.config import MAD_G
from ..tuners.madg.model import set_language
from .attention import inner_model


class Teacher:
    """A base model, an adapter for each language, and one for the task: frozen, in evaluation mode, no `nn.Module`.

    So it is never a part of the student: not in its checkpoints, nor in optimizers or DDP's buckets.

    Args:
        base: a model of transformers, which then belongs to the teacher, or a PeftModel that holds the adapters.
        languages: {language: its adapter}: folders, Hub ids, or names in the PeftModel. With several, batches name
            theirs under "language". Languages may share an adapter, which is loaded once; a MAD-G adapter generates
            each one's own, so the languages are then the codes of its typology.
        task: the task's adapter, likewise, active above the language's.

    Attributes:
        model: with the adapters of the last batch active.
        languages: {language: name of its adapter in the model}.

    Raises:
        ConfigError: no model of transformers, or one to which its own verbs gave adapters and which is to get more; or
            PEFT's own errors for an adapter that does not fit.

    Source: BiStil, section 3.2 and 3.3: base + language SFT, and in phase 2 the task SFT, "trained beforehand".
    """

    def __init__(
        self,
        base: nn.Module,
        *,
        languages: Mapping[str, str | os.PathLike[str]] | None = None,
        task: str | os.PathLike[str] | None = None,
    ) -> None:
        inner_model(base)
        if languages or task is not None:
            refuse_transformers_verbs(base)
        self.model = base
        adapters = {language: os.fspath(where) for language, where in (languages or {}).items()}
        names = {
            where: self._add(where, f"language{place}") for place, where in enumerate(dict.fromkeys(adapters.values()))
        }
        self.languages = {language: names[where] for language, where in adapters.items()}
        self.task = None if task is None else self._add(task, "task")
        self._generates = any(self.model.peft_config[name].peft_type == MAD_G for name in self.languages.values())
        for language in self.languages if self._generates else ():
            self.activate(language)  # one that the typology does not have is refused here
        self.model.eval().requires_grad_(False)

    def _add(self, where: str | os.PathLike[str], name: str) -> str:
        where = os.fspath(where)
        if not isinstance(self.model, PeftModel):
            self.model = PeftModel.from_pretrained(self.model, where, adapter_name=name)
            return name
        taken = self.model.peft_config
        if where in taken:
            return where
        # PEFT would load the file into an adapter that has the name already.
        free = next(one for one in (name, *(f"{name}_{i}" for i in range(len(taken)))) if one not in taken)
        self.model.load_adapter(where, free)
        return free

    def activate(self, language: str | None) -> None:
        """Switch to a language's adapter, with the task's above it.

        Raises:
            ConfigError: the teacher has languages, and this is none of them.
        """
        if self.languages and language is None and len(self.languages) == 1:
            language = next(iter(self.languages))
        if self.languages and language not in self.languages:
            raise ConfigError(
                f"the batch's {LANGUAGE!r} must be one that the teacher has an adapter for ({sorted(self.languages)}), "
                f"got {language!r}: MultiSourceCollator writes it into batches."
            )
        wanted = [self.languages[language]] if self.languages else []
        wanted += [self.task] if self.task is not None else []
        # Asked of the model, where others may have switched in the meantime.
        if wanted and wanted != list(self.model.active_adapters):
            self.model.base_model.set_adapter(wanted)
            self.model.requires_grad_(False)
        if self._generates and language is not None:
            set_language(self.model, language)

    @torch.no_grad()
    def __call__(self, language: str | None = None, **inputs: Any) -> Any:
        """What the model gives for a batch in a language."""
        self.activate(language)
        if self.model.training:
            self.model.eval()
        return self.model(**inputs)

    def to(self, device: torch.device | str) -> Teacher:
        """Move to a device."""
        self.model.to(device)
        return self
