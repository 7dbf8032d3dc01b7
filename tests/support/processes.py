"""Several processes on one machine: start them, run one function in each, collect what each of them came to."""

from __future__ import annotations

import contextlib
import faulthandler
import multiprocessing
import multiprocessing.connection
import os
import queue
import time
import traceback
import warnings
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

# Seconds. Longer than any case takes, so that what hangs is a failure and not a wait; a busy machine wants more.
TIMEOUT = int(os.environ.get("PEFT_SPARSE_DISTRIBUTED_TIMEOUT", "100"))
# "fork" in a process that has imported what is heavy and computed nothing yet.
START = os.environ.get("PEFT_SPARSE_DISTRIBUTED_START", "forkserver")


def run(case: Callable[..., Any], folder: Path, /, *, world: int = 2, **options: Any) -> list[Any]:
    """What `case(**options)` returns in each of `world` processes of one gloo group; in one process there is no group.

    The processes are forked from a server that has imported the heavy modules once, or from this one: see `START`.

    Args:
        case: a function of an importable module.
        folder: where the processes meet and leave their results.
        world: number of processes.
        options: arguments of the case.

    Raises:
        AssertionError: a process raised (its traceback is shown), died, or did not end.
    """
    folder.mkdir(parents=True, exist_ok=True)
    context = multiprocessing.get_context(START)
    if START == "forkserver":
        modules = ["transformers", "peft_sparse", "torch.distributed.tensor", "transformers.trainer"]
        context.set_forkserver_preload(modules)
    failures: Any = context.Queue()
    arguments = (case, str(folder), world, options, failures)
    processes = [context.Process(target=_work, args=(rank, *arguments), daemon=True) for rank in range(world)]
    for process in processes:
        process.start()
    end = time.monotonic() + TIMEOUT
    while any(process.is_alive() for process in processes) and time.monotonic() < end:
        multiprocessing.connection.wait([p.sentinel for p in processes if p.is_alive()], timeout=1)
        if any(process.exitcode for process in processes):
            # The others wait for it in vain; they may have something to say about it themselves.
            end = min(end, time.monotonic() + 3)
    hung = [rank for rank, process in enumerate(processes) if process.is_alive()]
    for process in processes:
        process.kill()
        process.join()
    told = []
    with contextlib.suppress(queue.Empty):
        while True:
            told.append(failures.get(timeout=0.2))
    assert not told, "\n".join(told)
    stacks = [f"rank {rank} was here:\n{(folder / f'stack_{rank}.txt').read_text()}" for rank in hung]
    assert not hung, "\n".join([f"ranks {hung} did not end within {TIMEOUT} s", *stacks])
    assert all(process.exitcode == 0 for process in processes), [process.exitcode for process in processes]
    return [torch.load(folder / f"result_{rank}.pt", weights_only=False) for rank in range(world)]


def _work(rank: int, case: Callable[..., Any], folder: str, world: int, options: dict[str, Any], failures: Any) -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    # What a hang was waiting for, written before the parent ends it and before gloo's own limit.
    stack = open(Path(folder, f"stack_{rank}.txt"), "w")  # noqa: SIM115
    faulthandler.dump_traceback_later(TIMEOUT * 0.45, file=stack)
    try:
        if world > 1:
            os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world), LOCAL_WORLD_SIZE=str(world))
            os.environ.update(MASTER_ADDR="localhost", GLOO_SOCKET_IFNAME="lo")
            dist.init_process_group(
                "gloo",
                init_method=f"file://{folder}/meeting",
                rank=rank,
                world_size=world,
                timeout=timedelta(seconds=TIMEOUT / 2),
            )
        torch.save(case(**options), Path(folder, f"result_{rank}.pt"))
        if world > 1:
            dist.barrier()
            dist.destroy_process_group()
    except BaseException:  # noqa: BLE001
        failures.put(f"rank {rank}:\n{traceback.format_exc()}")
        failures.close()
        failures.join_thread()
        os._exit(1)
