"""Where the names of the package live, read from its stub: they are written once, for type checkers and for Python."""

from __future__ import annotations

import ast
from pathlib import Path


def read_stub(path: Path) -> tuple[dict[str, tuple[str, str]], list[str]]:
    """{name: (its module, its name there)} of the imports of a stub, and the stub's `__all__`."""
    homes: dict[str, tuple[str, str]] = {}
    public: list[str] = []
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.ImportFrom) and node.level == 1:
            homes.update({alias.asname or alias.name: (str(node.module), alias.name) for alias in node.names})
        elif isinstance(node, ast.Assign):
            public = list(ast.literal_eval(node.value))
    return homes, public
