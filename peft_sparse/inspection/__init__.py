"""Looking at adapters: what is in them, how they relate, and pictures of both."""

from __future__ import annotations
