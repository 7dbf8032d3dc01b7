"""How often hypothesis tries a law."""

from __future__ import annotations

import os

from hypothesis import settings

# A third keeps the default tests short; the weekly workflows set it.
ALL_EXAMPLES = bool(os.environ.get("PEFT_SPARSE_ALL_EXAMPLES"))


def examples(count: int) -> settings:
    """Settings that try a law on `count` examples where all are asked for, and on a third of them by default."""
    return settings(max_examples=count if ALL_EXAMPLES else -(-count // 3), deadline=None)
