"""Settings of all tests: no network, one thread a process, and the same examples from hypothesis in every CI run."""

from __future__ import annotations

import functools
import gc
import os
import warnings
from collections.abc import Iterator
from types import SimpleNamespace

# Read when the libraries are imported, so they stand before every other import.
for name, value in {
    "HF_HUB_OFFLINE": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "OMP_NUM_THREADS": "1",
    "MPLBACKEND": "agg",
}.items():
    os.environ.setdefault(name, value)

import pytest
from hypothesis import settings
from packaging.version import Version

from tests.support.interpreter import Interpreter

settings.register_profile("ci", deadline=None, derandomize=True)
settings.register_profile("local", deadline=None)
settings.load_profile("ci" if os.environ.get("CI") else "local")

REFUSED_NATIVELY = "The version of PEFT you are using is not compatible"
INTERPRETER = pytest.StashKey[Interpreter]()


def pytest_configure(config: pytest.Config) -> None:
    """Import the heavy libraries, but not in pytest-xdist's first process, which only deals the tests out."""
    if config.getoption("dist", "no") != "no" and not hasattr(config, "workerinput"):
        return
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import peft  # noqa: F401
        import torch
        import transformers  # noqa: F401
    config.stash[INTERPRETER] = Interpreter()
    # The models are small: threads would cost more than they give, and change sums from machine to machine.
    torch.set_num_threads(1)


def pytest_unconfigure(config: pytest.Config) -> None:
    if INTERPRETER in config.stash:
        config.stash[INTERPRETER].close()


@pytest.fixture(autouse=True, scope="session")
def _quick_garbage_collection() -> Iterator[None]:
    """Keep collections from walking over every imported module each time, and accelerate from one at each run's start
    and end, which is there for accelerators' memory.
    """
    import accelerate.utils.memory

    gc.collect()
    gc.freeze()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(accelerate.utils.memory, "gc", SimpleNamespace(collect=lambda: 0))
        yield
    gc.unfreeze()


@pytest.fixture(autouse=True, scope="session")
def _templates_are_compiled_once() -> Iterator[None]:
    """Every save writes a model card, and compiling its template takes half the time of saving a tiny adapter."""
    import jinja2

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jinja2.Environment, "compile", functools.lru_cache(maxsize=64)(jinja2.Environment.compile))
        yield


@pytest.fixture(scope="session")
def interpreter(pytestconfig: pytest.Config) -> Interpreter:
    return pytestconfig.stash[INTERPRETER]


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call():
    """Skip a test that uses transformers' own adapter verbs where transformers refuses the PEFT that is installed.

    Some tests use them in a process of their own, whose errors are then part of an assertion's message.
    """
    try:
        return (yield)
    except (ValueError, AssertionError) as error:
        if REFUSED_NATIVELY in str(error):
            skip_where_native_verbs_are_refused()
        raise


def skip_where_native_verbs_are_refused() -> None:
    import peft
    import transformers
    from transformers.integrations import peft as native

    # The oldest PEFT that transformers' own adapter verbs take, where this transformers says it.
    oldest = getattr(native, "MIN_PEFT_VERSION", "0")
    if Version(peft.__version__) < Version(oldest):
        pytest.skip(f"transformers {transformers.__version__} demands peft >= {oldest} for its own adapter verbs")
