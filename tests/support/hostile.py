"""Changes that make a file hurt, and what reading it may cost."""

from __future__ import annotations

import contextlib
import json
import os
import resource
import time
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from tests.support.adapter_hub import tensors

SECONDS, MEGABYTES = 3, 100  # a second on a quiet machine
ADVICE = "weights_only"
Change = Callable[[Path], object]


@contextlib.contextmanager
def little_time_and_memory() -> Iterator[None]:
    before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.monotonic()
    yield
    assert time.monotonic() - start < SECONDS
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < MEGABYTES * 1000


class Executed:
    def __reduce__(self):
        return (exec, ("raise SystemExit('a pickle was executed')",))


def on_config(change: Callable[[dict], object]) -> Change:
    def apply(folder: Path) -> None:
        config = json.loads((folder / "adapter_config.json").read_text())
        changed = change(config)
        (folder / "adapter_config.json").write_text(json.dumps(config if changed is None else changed))

    return apply


def setting(**fields) -> Change:
    return on_config(lambda config: config["config"].update(fields))


def on_tensors(change: Callable[[dict], object]) -> Change:
    return lambda folder: torch.save(change(tensors()), folder / "pytorch_adapter.bin")


def raw(name: str, content: bytes) -> Change:
    return lambda folder: (folder / name).write_bytes(content)


def first(change: Callable[[torch.Tensor], object]) -> Change:
    """One tensor changed."""

    def apply(found: dict) -> dict:
        key = next(iter(found))
        return {**found, key: change(found[key])}

    return on_tensors(apply)


def every(change: Callable[[torch.Tensor], torch.Tensor]) -> Change:
    return on_tensors(lambda found: {key: change(tensor) for key, tensor in found.items()})


def fifo(name: str) -> Change:
    def apply(folder: Path) -> None:
        (folder / name).unlink()
        os.mkfifo(folder / name)

    return apply


def device(name: str) -> Change:
    def apply(folder: Path) -> None:
        (folder / name).unlink()
        (folder / name).symlink_to("/dev/zero")

    return apply


def zip_bomb(folder: Path) -> None:
    """The same archive as torch's, with a storage of two gigabytes of zeros that packs into two megabytes."""
    path = folder / "pytorch_adapter.bin"
    with zipfile.ZipFile(path) as archive:
        members = {entry.filename: archive.read(entry) for entry in archive.infolist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
        with archive.open("pytorch_adapter/data/999", "w", force_zip64=True) as member:
            for _ in range(64):
                member.write(bytes(2**20))


def expanded(tensor: torch.Tensor) -> torch.Tensor:
    """A claim of forty gigabytes, of four bytes."""
    return torch.zeros(1).expand(10**10)
