"""Runs PEFT's own test-suite over the configs of this library. See `tests/conformance/run_peft_suite.py`."""

from __future__ import annotations
