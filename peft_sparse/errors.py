"""The library's exceptions. All derive from `ValueError`, so code that expects Python's own keeps working."""

from __future__ import annotations


class SparseError(ValueError):
    """Base class of every error that this library raises on purpose."""


class ConfigError(SparseError):
    """A configuration field has a value that no run can honour."""


class SelectionError(SparseError):
    """The requested weights cannot be selected (too few candidates, NaN scores)."""


class FormatError(SparseError):
    """An adapter file does not hold what its format promises. The model is left as it was."""
