"""Languages as typological vectors: where to get them, how alike two languages are, how to mix adapters by that."""

from __future__ import annotations

from .table import Typology, load_typology

__all__ = ["Typology", "load_typology"]
