"""The command line, `peft-sparse`: argument parsing only. One module per command."""

from __future__ import annotations

import sys
from importlib import import_module

import typer
from rich.console import Console

from ..errors import SparseError

# Modules of this package, each of which adds its command to `app`, in the order in which --help lists them.
COMMANDS: tuple[str, ...] = (
    "diff",
    "import_",
    "export",
    "inspect",
    "plot",
    "merge",
    "plan",
)

app = typer.Typer(name="peft-sparse", no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)


@app.callback()
def _commands() -> None:
    """Make, look at, plan and merge sparse adapters."""


for _command in COMMANDS:
    import_module(f"{__name__}.{_command}")


def main() -> None:
    """Run the command line: what the user can mend is one line on stderr and exit status 1, not a traceback."""
    try:
        app()
    except (SparseError, OSError) as error:
        Console(stderr=True).print(f"Error: {error}", style="red", markup=False, highlight=False, soft_wrap=True)
        sys.exit(1)
