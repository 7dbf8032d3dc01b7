"""PEFT's own test-suite over our configs: `python -m pytest tests/conformance -m conformance`."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.conformance
@pytest.mark.timeout(3600)
def test_peft_suite():
    runner = Path(__file__).with_name("run_peft_suite.py")
    outcome = subprocess.run([sys.executable, str(runner)], capture_output=True, text=True)
    assert outcome.returncode == 0, outcome.stdout[-20_000:] + outcome.stderr[-5_000:]
