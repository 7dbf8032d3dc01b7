"""Which language a model computes with: one for all, or one for each example of the batch."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ...errors import ConfigError

# One language for the whole batch, or one for each example.
Languages = str | tuple[str, ...]
ARGUMENT = "language"


class SharedPart(Protocol):
    """What the sites of an adapter share (`generator.SharedPart`), as far as languages go."""

    def vector(self, code: str) -> Tensor:
        """The typological vector of a language."""


class _OneForward(threading.local):
    """What holds for the forward of the base model that this thread computes; copies and pickles start empty."""

    batch: Languages | None = None
    passed_on: dict[SharedPart, Tensor] | None = None

    def __reduce__(self) -> tuple[type[_OneForward], tuple[()]]:
        return _OneForward, ()


class MadGState:
    """What all MAD-G layers of a model share.

    Attributes:
        shared: {adapter name: what the sites of the adapter share}.
        chosen: what `set_language` was given.
        handles: the hooks that take the `language` of a batch from the base model's inputs.
    """

    def __init__(self) -> None:
        self.shared: dict[str, SharedPart] = {}
        self.chosen: Languages | None = None
        self.handles: list[RemovableHandle] = []
        self._forward = _OneForward()
        # Of the last forward that a backward may follow. Gradient checkpointing computes layers again inside the
        # backward, where the language of the batch is gone and another one may be set.
        self._trained: Languages | None = None
        self._recomputed = False
        self._ambiguous = False

    @property
    def passed_on(self) -> dict[SharedPart, Tensor] | None:
        """During a forward of the base model, what `SharedPart.generate` wants; None outside of one."""
        return self._forward.passed_on

    def begin(self, batch: Languages | None) -> None:
        """A forward of the base model starts, with a language of its own or without."""
        self._forward.batch, self._forward.passed_on = batch, {}
        if torch.is_grad_enabled():
            now = batch if batch is not None else self.chosen
            waits = not self._recomputed and self._trained is not None
            self._ambiguous = waits and (self._ambiguous or self._trained != now)
            self._trained, self._recomputed = now, False

    def end(self) -> None:
        """A forward of the base model is over."""
        self._forward.batch = self._forward.passed_on = None

    def current(self) -> Languages:
        """The language, or languages, that a layer has to compute with now.

        Raises:
            ConfigError: no language is set, or a layer is computed again and it is not known with which.
        """
        if not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1 and self._trained is not None:
            self._recomputed = True
            if self._ambiguous:
                raise ConfigError(
                    "gradient checkpointing computes layers again in the backward, and several forwards with different "
                    "languages came before it. Run the backward of each batch before the next forward, or put several "
                    "languages into one batch."
                )
            return self._trained
        now = self._forward.batch if self._forward.batch is not None else self.chosen
        if now is None:
            raise ConfigError(
                'no language is set: call model.set_language("quy"), or give the batch a language '
                '(model(..., language="quy"), or one per example).'
            )
        return now

    def attach(self, model: nn.Module) -> None:
        """Take the `language` of a batch from the base model's inputs, from now on."""
        if not self.handles:
            self.handles = [
                model.register_forward_pre_hook(self._take_language, with_kwargs=True),
                model.register_forward_hook(self._forget_language, always_call=True),
            ]

    def detach(self) -> None:
        """Take the hooks out."""
        for handle in self.handles:
            handle.remove()
        self.handles = []

    # Methods, and no functions inside of `attach`, so that models with these hooks can be copied and pickled.

    def _take_language(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        given = kwargs.get(ARGUMENT)
        self.begin(None if given is None else as_languages(given))
        return args, {name: value for name, value in kwargs.items() if name != ARGUMENT}

    def _forget_language(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        self.end()


class LanguageContext:
    """What `set_language` gives back: used as a context manager it puts the language before back at the end."""

    def __init__(self, state: MadGState, before: Languages | None) -> None:
        self._state, self._before = state, before

    def __enter__(self) -> LanguageContext:
        return self

    def __exit__(self, *exception: object) -> None:
        self._state.chosen = self._before


def check_one_per_example(languages: tuple[str, ...], count: int) -> None:
    """Refuse other than one language for each of `count` examples.

    Raises:
        ConfigError: there are more or fewer.
    """
    if len(languages) != count:
        raise ConfigError(f"language must name one language per example ({count}), got {len(languages)}: {languages}.")


def as_languages(given: str | Sequence[str]) -> Languages:
    """A language, or one for each example; a list of one is that language, whatever the batch.

    Raises:
        ConfigError: it is neither.
    """
    if isinstance(given, str):
        return given
    if not isinstance(given, Sequence) or not given or not all(isinstance(code, str) for code in given):
        raise ConfigError(f"language must be a code or a list with one code per example, got {given!r}.")
    return given[0] if len(given) == 1 else tuple(given)
