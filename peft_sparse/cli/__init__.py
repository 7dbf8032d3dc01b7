"""The command line, `peft-sparse`: argument parsing only. One module per command."""

from __future__ import annotations

import signal
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from types import FrameType
from typing import Annotated

import typer
from rich.console import Console

from .. import __version__
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
    "shrink",
    "translate",
)

app = typer.Typer(
    name="peft-sparse",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


def _say_version(asked: bool) -> None:
    if asked:
        typer.echo(f"peft-sparse {__version__}")
        raise typer.Exit


@app.callback()
def _commands(
    asks_version: Annotated[
        bool, typer.Option("--version", is_eager=True, callback=_say_version, help="Show the version and exit.")
    ] = False,
) -> None:
    """Make, look at, plan and merge sparse adapters; shrink models; translate rows."""


for _command in COMMANDS:
    import_module(f"{__name__}.{_command}")


def main() -> None:
    """Run the command line: what the user can mend is one line on stderr and exit status 1, not a traceback."""
    try:
        with _stopping_cleanly(), warnings.catch_warnings():
            # Deprecations that PEFT and transformers see in each other are nothing that a user of a command can mend.
            warnings.filterwarnings("ignore", category=FutureWarning)
            app()
    except (SparseError, OSError) as error:
        Console(stderr=True).print(f"Error: {error}", style="red", markup=False, highlight=False, soft_wrap=True)
        sys.exit(1)


@contextmanager
def _stopping_cleanly() -> Iterator[None]:
    """Let signals that end a process do so by an exception, so that what is half written is removed on the way out."""
    signals = [getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]  # Windows has one
    before = {number: signal.signal(number, _stop) for number in signals}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _stop(number: int, frame: FrameType | None) -> None:
    sys.exit(128 + number)
