"""Whether the adapter that is being made is made for a file: PEFT and transformers add it first, and fill it next.

Only who calls can tell. A config that was read back from a folder looks the same where it is used for a new adapter,
which is to choose weights of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import wraps
from typing import Any

from peft import PeftModel
from transformers.integrations import PeftAdapterMixin

_MARK = "_peft_sparse_expects_a_file"
_expected: ContextVar[bool] = ContextVar("expected", default=False)


def is_file_expected() -> bool:
    """Whether an adapter that is made now is about to be filled from a file."""
    return _expected.get()


@contextmanager
def expecting_a_file() -> Iterator[None]:
    """Around whatever makes adapters and fills them from files."""
    before = _expected.set(True)
    try:
        yield
    finally:
        _expected.reset(before)


def tell_of_files() -> None:
    """Let the verbs of PEFT's and transformers' models that load adapters say so meanwhile; else nothing changes."""
    for kind in (PeftModel, PeftAdapterMixin):
        if not hasattr(kind.load_adapter, _MARK):
            kind.load_adapter = _telling(kind.load_adapter)
    if not hasattr(PeftModel.from_pretrained, _MARK):
        PeftModel.from_pretrained = classmethod(_telling(PeftModel.from_pretrained.__func__))


def _telling(load: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(load)
    def loading(*args: Any, **kwargs: Any) -> Any:
        with expecting_a_file():
            return load(*args, **kwargs)

    setattr(loading, _MARK, True)
    return loading
