"""Settings of all tests: no network, one thread a process, and the same examples from hypothesis in every CI run."""

from __future__ import annotations

import os
from collections.abc import Iterator

# Read when the libraries are imported, so they stand before every other import.
for name, value in {
    "HF_HUB_OFFLINE": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "OMP_NUM_THREADS": "1",
    "MPLBACKEND": "agg",
}.items():
    os.environ.setdefault(name, value)

import peft
import pytest
import torch
import transformers
import transformers.integrations.peft as native
from hypothesis import settings
from packaging.version import Version

from tests.support.interpreter import Interpreter

settings.register_profile("ci", deadline=None, derandomize=True)
settings.register_profile("local", deadline=None)
settings.load_profile("ci" if os.environ.get("CI") else "local")

# The models of the tests are small: threads would cost more than they give, and change sums from machine to machine.
torch.set_num_threads(1)


# The oldest PEFT that transformers' own adapter verbs take, where this transformers says it.
NATIVE_PEFT = getattr(native, "MIN_PEFT_VERSION", "0")
REFUSED_NATIVELY = "The version of PEFT you are using is not compatible"


@pytest.fixture(scope="session")
def interpreter() -> Iterator[Interpreter]:
    with Interpreter() as found:
        yield found


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call():
    """Skip a test that uses transformers' own adapter verbs where transformers refuses the PEFT that is installed.

    Some tests use them in a process of their own, whose errors are then part of an assertion's message.
    """
    try:
        return (yield)
    except (ValueError, AssertionError) as error:
        if Version(peft.__version__) < Version(NATIVE_PEFT) and REFUSED_NATIVELY in str(error):
            pytest.skip(
                f"transformers {transformers.__version__} demands peft >= {NATIVE_PEFT} for its own adapter verbs"
            )
        raise
