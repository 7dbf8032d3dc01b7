"""Names that are loaded when asked for; those of the package are in its stub, for type checkers and Python alike."""

from __future__ import annotations

import ast
import difflib
from collections.abc import Callable, Mapping
from importlib import import_module
from pathlib import Path
from typing import Any


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


def lazy(package: str, homes: Mapping[str, tuple[str, str]]) -> Callable[[str], Any]:
    """A package's `__getattr__`, which imports a name of one of its modules when that is asked for.

    Args:
        package: `__name__` of the package.
        homes: {name: (module in the package, name there)}.
    """

    def __getattr__(name: str) -> Any:
        if name not in homes:
            plain = {known.lower(): known for known in homes}
            alike = [] if name.startswith("_") else difflib.get_close_matches(name.lower(), plain, n=1)
            meant = f". Did you mean {plain[alike[0]]!r}?" if alike else ""
            raise AttributeError(f"module {package!r} has no attribute {name!r}{meant}")
        module, attribute = homes[name]
        return getattr(import_module(f"{package}.{module}"), attribute)

    return __getattr__
