"""Looking at adapters (what is in them, how they relate, pictures of both), and ahead: what a run will take."""

from __future__ import annotations
