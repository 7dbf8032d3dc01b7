"""Which first phase an adapter of a model has before it. Importing this knows all phases of the package."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from ...errors import ConfigError
from ...tuners.common.adapter_config import active_adapters_of, carriers_of
from . import dense_phase as dense_phase
from . import mask_phase as mask_phase
from . import one_shot as one_shot
from .phase import Phase, phase_called


def phase_before(model: Any) -> tuple[str, type[Phase]] | None:
    """(the active adapter that has its first phase before it or in progress, that phase); None if there is none.

    Raises:
        ConfigError: several have.
    """
    carriers = carriers_of(model)
    found = [(name, kind) for carrier in carriers for name, kind in _phases_before(carrier)]
    if len(found) > 1:
        raise ConfigError(
            "one adapter at a time can go through its phases or have its weights selected, got the active adapters "
            f"{[name for name, _ in found]}."
        )
    if found and len(carriers) > 1:
        name, kind = found[0]
        raise ConfigError(
            f"{len(carriers)} parts of this {type(model).__name__} have adapters. Where one ({name!r}) has a "
            f"{kind.name} phase before it, it must be the only part that has any: let it go through its phases "
            "before the others get theirs."
        )
    return found[0] if found else None


def _phases_before(carrier: Any) -> Iterator[tuple[str, type[Phase]]]:
    for name in active_adapters_of(carrier):
        called = getattr(carrier.peft_config[name], "first_phase", None)
        if called is not None and (kind := phase_called(called)).is_before(carrier, name):
            yield name, kind
