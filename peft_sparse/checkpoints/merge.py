"""Merging adapters into a checkpoint on disk, a tensor at a time, for models that do not fit into memory."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import Progress

from ..checks import FLOAT_DTYPES, check_factors, dtype_named
from ..composition.coinciding_draws import warn_of_coinciding_draws
from ..core.delta import SparseDelta
from ..errors import ConfigError
from ..files import check_apart
from .adapter_files import in_list, read_adapter
from .merge_plan import Change, MergePlan, Part
from .shards import MAX_SHARD_BYTES, Checkpoint, ShardWriter, copy_companions

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Merged:
    """What `merge_checkpoint` wrote.

    Attributes:
        directory: where.
        num_weights: how many weights the adapters changed.
        changed: names of the tensors that hold a delta or are a head, in the checkpoint.
        added: those of them that the base checkpoint did not have (heads, and matrices that were tied).
    """

    directory: Path
    num_weights: int
    changed: list[str]
    added: list[str]


def merge_checkpoint(
    base: str | os.PathLike[str],
    adapters: Sequence[str | os.PathLike[str]] | str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    weights: Sequence[float] | None = None,
    head_from: str | os.PathLike[str] | None = None,
    dtype: torch.dtype | None = None,
    revision: str | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    overwrite: bool = False,
    show_progress: bool = False,
) -> Merged:
    """Write a checkpoint with adapters in its weights, without loading the model.

    The tensors are, bit for bit, those that `PeftModel.merge_and_unload` and `save_pretrained` give. Whatever else the
    base checkpoint holds is copied. All that can be refused is refused before anything is written, and the output
    appears only when it is complete.

    Args:
        base: the base model's checkpoint: a directory or a repository on the Hub, in safetensors.
        adapters: one sparse adapter or several: directories, or ids of the Hub, which may go on with a folder and a
            revision ("owner/name/folder@revision").
        output: directory to write into.
        weights: one factor per adapter, of any sign, as for `add_weighted_adapter`; None adds all of them as they are,
            each once, as `merge_and_unload(adapter_names=...)` does.
        head_from: the one of `adapters` whose heads (`modules_to_save`) the result gets, if several have some.
        dtype: dtype of the result's floating-point tensors; None keeps each as it is. Sums are rounded once, to it.
        revision: of the base model on the Hub.
        max_shard_bytes: size of the files.
        overwrite: replace a checkpoint that lies in `output`.
        show_progress: show a progress bar on stderr.

    Raises:
        FormatError: a file is damaged or no sparse adapter's, or the adapters do not fit the checkpoint; the message
            lists the tensors.
        ConfigError: there is no such adapter, the output exists, the base is quantised, or arguments do not fit each
            other.

    Cost: the memory of the adapters, one shard of the result and the largest tensor.
    """
    given = in_list(adapters)
    for adapter in given:
        check_apart(output, adapter=adapter)
    if dtype is not None:
        dtype = dtype_named("dtype", dtype, FLOAT_DTYPES)
    parts = [_read_part(adapter) for adapter in (_each_once(given) if weights is None else given)]
    factors = _check_factors(parts, weights)
    head = _choose_head(parts, None if head_from is None else os.fspath(head_from))
    checkpoint = Checkpoint(base, revision=revision)
    check_apart(output, base_checkpoint=checkpoint.folder)
    if checkpoint.config.get("quantization_config"):
        raise ConfigError(
            f"{checkpoint.source} is quantised, and a delta would be lost in rounding. Merge into the unquantised "
            "checkpoint, or load the model and call merge_and_unload(dequantize=True)."
        )
    plan = MergePlan(checkpoint, parts, factors, head)
    plan.check_range(dtype)
    configs = [part.config for part in parts]
    warn_of_coinciding_draws([part.source for part in parts], configs, [part.deltas for part in parts], factors)
    writer = ShardWriter(output, max_shard_bytes=max_shard_bytes, overwrite=overwrite)
    with writer, Progress(console=Console(stderr=True), transient=True, disable=not show_progress) as progress:
        task = progress.add_task("merging", total=len(checkpoint.names()))
        for name in checkpoint.names():
            change = plan.changes.get(plan.model_name[name], Change())
            writer.add(name, change.apply(name, checkpoint.tensor(name), dtype))
            progress.advance(task)
        for name in plan.added:
            writer.add(name, plan.changes.get(name, Change()).apply(name, plan.original(name), dtype))
        copy_companions(checkpoint, writer.staging, changed=plan.config_changes(dtype))
    changed = [name for name in checkpoint.names() if plan.model_name[name] in plan.changes]
    deltas = {id(delta): delta for change in plan.changes.values() for delta in change.deltas}
    num_weights = sum(delta.count for delta in deltas.values())
    logger.info("Merged %d weights into %d tensors of %s", num_weights, len(changed), checkpoint.source)
    return Merged(Path(output), num_weights, [*changed, *plan.added], plan.added)


def _each_once(adapters: Sequence[str | os.PathLike[str]]) -> list[str | os.PathLike[str]]:
    """Adapters in order; a folder that is named twice, however it is spelled, once."""
    found: dict[str, str | os.PathLike[str]] = {}
    for one in adapters:
        folder = Path(one).expanduser()
        found.setdefault(os.path.realpath(folder) if folder.is_dir() else os.fspath(one), one)
    return list(found.values())


def _read_part(where: str | os.PathLike[str]) -> Part:
    files = read_adapter(where)
    if files.config.get("trainable_token_indices"):
        raise ConfigError(
            f"{files.source} trains rows of the embedding (trainable_token_indices), which cannot be merged this way. "
            "Load it with PEFT and call merge_and_unload()."
        )
    dtype = getattr(torch, files.config.get("values_dtype", "float32"))
    deltas = {n: SparseDelta(d.indices, d.values.to(dtype), d.shape) for n, d in files.deltas.items() if d.count}
    plain = {name.replace(".base_layer.", "."): tensor for name, tensor in files.others.items()}
    return Part(files.source, files.config, deltas, plain)


def _check_factors(parts: list[Part], weights: Sequence[float] | None) -> list[float] | None:
    if not parts:
        raise ConfigError("at least one adapter is needed to merge, got none.")
    return None if weights is None else check_factors(weights, len(parts))


def _choose_head(parts: list[Part], head_from: str | None) -> Part | None:
    having = [part for part in parts if part.heads]
    if head_from is not None:
        chosen = [part for part in having if part.source == head_from]
        if not chosen:
            sources = [part.source for part in having]
            raise ConfigError(f"head_from must be one of the adapters that have heads ({sources}), got {head_from!r}.")
        return chosen[0]
    if len(having) > 1:
        sources = [part.source for part in having]
        raise ConfigError(f"the adapters {sources} all have heads (modules_to_save): say whose to keep with head_from.")
    return having[0] if having else None
