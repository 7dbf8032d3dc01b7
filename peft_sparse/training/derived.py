"""Trainer classes made out of others: a mixin of this library and a class of transformers, TRL or the user."""

from __future__ import annotations

import inspect
from typing import Any

from transformers import Trainer

from ..errors import ConfigError


def derived_trainer(trainer_class: type[Trainer], mixin: type, *, prefix: str) -> type[Any]:
    """A class derived from a mixin and a trainer class; the trainer class itself if it has the mixin already.

    Args:
        trainer_class: `transformers.Trainer` or a class derived from it.
        mixin: what is added; its module and docstring become the new class's.
        prefix: of the new class's name.

    Raises:
        ConfigError: not a trainer class.
    """
    if not (isinstance(trainer_class, type) and issubclass(trainer_class, Trainer)):
        raise ConfigError(f"trainer_class must be a class derived from transformers.Trainer, got {trainer_class!r}.")
    if issubclass(trainer_class, mixin):
        return trainer_class
    body = {"__module__": mixin.__module__, "__doc__": mixin.__doc__}
    return type(f"{prefix}{trainer_class.__name__}", (mixin, trainer_class), body)


def takes_argument(cls: type, name: str) -> bool:
    """Whether the constructor of a class, or of one that it is derived from, has an argument of this name."""
    own = (vars(base)["__init__"] for base in cls.__mro__ if inspect.isfunction(vars(base).get("__init__")))
    return any(name in inspect.signature(init).parameters for init in own)
