"""What the package imports is what it declares: nothing comes along by luck, and nothing is asked for in vain."""

from __future__ import annotations

import ast
import re
import sys
from pathlib import Path

import peft_sparse

ROOT = Path(peft_sparse.__file__).parent
PYPROJECT = (ROOT.parent / "pyproject.toml").read_text(encoding="utf-8")
# {name to import: name to install}, where they differ.
INSTALLED_AS = {"yaml": "pyyaml", "huggingface_hub": "huggingface-hub"}
# Imported where a function needs them, with an error that says how to install them, or where they are installed.
OPTIONAL = {"trl", "bitsandbytes", "matplotlib", "triton"}


def declared(block: str) -> set[str]:
    """Names of a list of requirements in pyproject.toml."""
    text = re.search(rf"^{block} = (\[[^\n]+\]$|\[\n.*?^\])", PYPROJECT, re.M | re.S)[1]
    text = "\n".join(line.split(" #")[0] for line in text.splitlines() if not line.lstrip().startswith("#"))
    return {re.match(r"[\w.-]+", requirement)[0].lower() for requirement in ast.literal_eval(text)}


def imported() -> set[str]:
    """Top-level names of other packages that ours imports, at any depth of its code."""
    found: set[str] = set()
    for file in ROOT.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                found.update(alias.name.partition(".")[0] for alias in node.names)
            elif isinstance(node, ast.ImportFrom) and not node.level:
                found.add(str(node.module).partition(".")[0])
    return found - sys.stdlib_module_names - {"peft_sparse"}


def test_what_is_imported_is_declared_and_the_other_way_round():
    needed = {INSTALLED_AS.get(name, name) for name in imported() - OPTIONAL}
    assert needed == declared("dependencies")


def test_what_is_optional_has_an_extra():
    assert declared("trl") | declared("quantization") | declared("plots") == OPTIONAL - {"triton"}
    assert "datasets" in declared("examples")
