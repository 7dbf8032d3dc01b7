"""Looking at adapters, and ahead."""

from __future__ import annotations
