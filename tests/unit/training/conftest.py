from __future__ import annotations

import gc

import pytest


@pytest.fixture(autouse=True, scope="session")
def _quick_garbage_collection():
    """Trainers collect garbage several times a run; keep them from walking over every imported module each time."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()
