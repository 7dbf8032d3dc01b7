"""A progress bar for what takes long between two phases, where no trainer shows one."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch.distributed as dist
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from ..core.sharded import in_several_processes


@contextmanager
def progress_bar(description: str, total: int) -> Iterator[Callable[..., None]]:
    """A bar on stderr that is gone afterwards: in the first process alone, and only where stderr is a terminal.

    Args:
        description: what is being done.
        total: how many steps it takes.

    Returns:
        a function to call after each step, or with a number after several.
    """
    console = Console(stderr=True)
    if not console.is_terminal or (in_several_processes() and dist.get_rank() > 0):
        # Not by `disable`, for which rich up to 14.1 writes an empty line.
        yield lambda count=1: None
        return
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task(description, total=total)
        yield lambda count=1: progress.advance(task, count)
