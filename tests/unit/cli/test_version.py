"""`peft-sparse --version`, and misspelt names of the package."""

from __future__ import annotations

import pytest
from typer.testing import CliRunner

import peft_sparse
from peft_sparse import parsing
from peft_sparse.cli import app


def test_the_version_is_the_packages():
    result = CliRunner().invoke(app, ["--version"])
    assert (result.exit_code, result.output) == (0, f"peft-sparse {peft_sparse.__version__}\n")


def test_a_misspelt_name_is_answered_with_the_one_that_is_meant():
    message = r"module 'peft_sparse' has no attribute 'SpielAgConfig'\. Did you mean 'SpielAGConfig'\?"
    with pytest.raises(AttributeError, match=message):
        peft_sparse.SpielAgConfig  # noqa: B018
    with pytest.raises(AttributeError, match=r"module 'peft_sparse\.parsing' has no attribute 'Parser'"):
        parsing.Parser  # noqa: B018
