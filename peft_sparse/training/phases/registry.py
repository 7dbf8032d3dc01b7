"""Which first phase an adapter of a model has before it. Importing this knows all phases of the package."""

from __future__ import annotations

from typing import Any

from ...errors import ConfigError
from ...tuners.common.adapter_config import active_adapters_of, carrier_of
from . import dense_phase as dense_phase
from . import mask_phase as mask_phase
from . import one_shot as one_shot
from .phase import Phase, phase_called


def phase_before(model: Any) -> tuple[str, type[Phase]] | None:
    """(the active adapter that has its first phase before it or in progress, that phase); None if there is none.

    Raises:
        ConfigError: several have.
    """
    model = carrier_of(model)
    found: dict[str, type[Phase]] = {}
    for name in active_adapters_of(model):
        called = getattr(model.peft_config[name], "first_phase", None)
        if called is not None and (kind := phase_called(called)).is_before(model, name):
            found[name] = kind
    if len(found) > 1:
        raise ConfigError(
            "one adapter at a time can go through its phases or have its weights selected, got the active adapters "
            f"{list(found)}."
        )
    return next(iter(found.items()), None)
