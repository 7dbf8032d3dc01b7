"""Adapters of composable-sft, BiStil, the SpIEL fork of PEFT and RoSA, made into ours on disk."""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from ..checkpoints.tasks import BASE_CLASSES, HEADS
from ..core.names import lies_in_trained_whole
from ..errors import ConfigError, FormatError
from ..files import check_apart, check_output
from ..tuners.sparse_ft.configs.base import VALUE_DTYPES, SparseConfig
from .base_model_check import check_shapes, config_of_base
from .composable_sft import is_mlm_head
from .foreign import COMPOSABLE_SFT, ROSA, SPIEL, Foreign, modules_of_heads
from .labels import TASKS, published_task
from .mlm_head import differences_of_head
from .request import READERS, Request
from .spiel import fields_of
from .writing import write_both, write_sparse

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Imported:
    """What `import_adapter` wrote.

    Attributes:
        output: the directory that was asked for.
        kind: "composable-sft", "spiel" or "rosa".
        base: the base model that the result belongs to.
        sparse: folder of the sparse adapter; None if there is no sparse part (RoSA).
        lora: folder of the low-rank part as a LoRA adapter of PEFT; None but for RoSA.
        num_weights: how many weights the sparse adapter changes.
        num_tensors: in how many parameters.
        heads: modules that are saved whole.
        labels: of the head, in the order of their ids; empty if they are not known.
        left_out: parameters of the original that the result has not.
        sha256: of the original's weights file, in hexadecimal.
        file_size: bytes of the sparse adapter's file.
    """

    output: str
    kind: str
    base: str
    sparse: str | None
    lora: str | None
    num_weights: int
    num_tensors: int
    heads: tuple[str, ...]
    labels: tuple[str, ...]
    left_out: tuple[str, ...]
    sha256: str
    file_size: int

    def to_dict(self) -> dict[str, Any]:
        """As plain values, for JSON."""
        return asdict(self)


def import_adapter(
    where: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    base: str | os.PathLike[str] | None = None,
    base_revision: str | None = None,
    revision: str | None = None,
    with_head: bool | None = None,
    task_type: str | None = None,
    labels: Sequence[str] | None = None,
    overwrite: bool = False,
) -> Imported:
    """Make an adapter of another library into one of this, on disk. No model is loaded, and no pickle is run.

    Read are `pytorch_diff.bin` of composable-sft and BiStil, adapters of the SpIEL fork of PEFT (`peft_type` "SFT") and
    of RoSA (`peft_type` "ROSA"). The result is an ordinary adapter: `PeftModel.from_pretrained(model, output)`. That of
    RoSA is two, `output`/sparse and `output`/lora, one of ours and one of PEFT's LoRA, whose sum it is.

    Merged into its base the result gives base + difference, bit for bit.

    Args:
        where: folder, or id of the Hub ("owner/name[/folder][@revision]"); or the file `pytorch_diff.bin`.
        output: directory for the adapter.
        base: the base model: folder or Hub id. By default what the adapter's config says; composable-sft has none, but
            its published adapters are known by name and by the size of their vocabulary. The config.json of a given
            base is read, and names and shapes are checked; SpIEL's need it, for only it says what the positions count
            in.
        base_revision: of the base on the Hub.
        revision: of the adapter on the Hub, if its id does not say it.
        with_head: whether to import what was trained whole. By default heads for tasks are imported, and those of
            masked language models left out, which models for tasks lack. True imports these too, as a difference from
            the base's own head, whose weights are read for it.
        task_type: PEFT's, such as "TOKEN_CLS"; by default what the file shows.
        labels: of the head, in the order of their ids; by default those of composable-sft's published adapters, by the
            name of the folder or repository.
        overwrite: replace an adapter that is in `output`.

    Returns:
        what was written.

    Raises:
        ConfigError: there is no such adapter, the base is not known or cannot be had, or an argument does not fit.
        FormatError: the adapter is damaged, hostile, of a kind that cannot be imported, or of another base. Nothing is
            written.

    Cost: 7.67 million weights of composable-sft: three seconds on one core, and 250 MB beyond the libraries.
    """
    _check_arguments(task_type, labels)
    check_apart(output, adapter=where, base_model=base)
    check_output(output, overwrite=overwrite)
    request = Request(where, base, base_revision, revision, task_type)
    foreign, low_rank = READERS[request.kind](request)
    if not foreign.deltas and low_rank is None:
        raise FormatError(f"{foreign.source} changes no weight of the base model. Nothing was written.")
    if request.base_config is not None and request.kind == COMPOSABLE_SFT:
        check_shapes(
            {name: delta.shape for name, delta in foreign.deltas.items()},
            request.base_config,
            task_type=foreign.task_type,
            base=request.base,
            source=foreign.source,
        )
    foreign, auto_mapping, left_out = _choose_heads(foreign, with_head, request)
    known = _labels_of(foreign, labels)
    sha256 = _sha256(foreign.path)
    common: dict[str, Any] = {
        "modules_to_save": modules_of_heads(foreign) or None,
        "task_type": foreign.task_type,
        "auto_mapping": auto_mapping,
        "base_model_name_or_path": request.base,
        "revision": request.base_revision,
        "inference_mode": True,
    }
    provenance = {
        "imported_from": foreign.source,
        "format": foreign.kind,
        "sha256": sha256,
        "revision": request.revision,
        "labels": list(known),
        "left_out": left_out,
        "settings": dict(foreign.settings),
    }
    config = _config(foreign, common, {key: value for key, value in provenance.items() if value})
    if config is None or foreign.kind == ROSA:
        sparse, lora, size = write_both(Path(output), foreign, config, low_rank, common)
    else:
        sparse, lora = os.fspath(output), None
        size = write_sparse(output, foreign, config, overwrite=overwrite)
    return Imported(
        output=os.fspath(output),
        kind=foreign.kind,
        base=request.base,
        sparse=sparse,
        lora=lora,
        num_weights=foreign.num_weights,
        num_tensors=len(foreign.deltas),
        heads=tuple(common["modules_to_save"] or ()),
        labels=known,
        left_out=tuple(left_out),
        sha256=sha256,
        file_size=size,
    )


def _check_arguments(task_type: str | None, labels: Sequence[str] | None) -> None:
    if task_type is not None and task_type not in BASE_CLASSES:
        raise ConfigError(f"task_type must be one of {list(BASE_CLASSES)}, got {task_type!r}.")
    if labels is not None and (isinstance(labels, str) or len(set(labels)) != len(labels)):
        raise ConfigError(f"labels must be a list of different texts, got {labels!r:.200}.")


def _choose_heads(
    foreign: Foreign, with_head: bool | None, request: Request
) -> tuple[Foreign, dict[str, str] | None, list[str]]:
    """The heads to import; PEFT's `auto_mapping` where they need a class; and what is left out."""
    heads, deltas, auto_mapping = dict(foreign.heads), dict(foreign.deltas), None
    if foreign.kind == COMPOSABLE_SFT:
        of_mlm = {name: tensor for name, tensor in heads.items() if is_mlm_head(name)}
    else:
        saved = request.settings.get("modules_to_save") or ()
        saved = (saved,) if isinstance(saved, str) else tuple(saved)
        saved += HEADS.get(foreign.task_type or "", ())  # PEFT before 0.8 did not write these into the config
        of_mlm = {}
        heads = {n: tensor for n, tensor in heads.items() if lies_in_trained_whole(n.rpartition(".")[0], saved)}
    if with_head is False:
        heads = {}
    elif of_mlm:
        heads = {name: tensor for name, tensor in heads.items() if name not in of_mlm}
        if with_head:
            config = request.base_config or config_of_base(
                request.base,
                revision=request.base_revision,
                reason="with_head: the head of a masked language model is kept as a difference from the base's own",
            )
            assert config is not None  # a reason was given
            more, auto_mapping = differences_of_head(
                of_mlm, config, base=request.base, revision=request.base_revision, source=foreign.source
            )
            deltas |= {name: delta for name, delta in more.items() if delta.count}
    imported = {*heads, *(of_mlm if auto_mapping else ())}
    left_out = [name for name in foreign.heads if name not in imported]
    return replace(foreign, heads=heads, deltas=deltas), auto_mapping, left_out


def _labels_of(foreign: Foreign, labels: Sequence[str] | None) -> tuple[str, ...]:
    """The labels of the head: those given, or the published ones if they are as many."""
    rows = next((foreign.heads[name].shape[0] for name in _OUTPUTS if name in foreign.heads), None)
    if labels is not None:
        if len(labels) != rows:
            raise ConfigError(f"labels must be as many as the head has outputs, {rows}, got {len(labels)}.")
        return tuple(labels)
    task = published_task(foreign.source)
    known = TASKS[task][1] if task is not None else ()
    if known and rows is not None and len(known) != rows:
        logger.warning(
            "%s has a head of %d outputs, and the published one for %r has %d labels: give labels=...",
            foreign.source,
            rows,
            task,
            len(known),
        )
    return known if len(known) == rows else ()


_OUTPUTS = ("classifier.weight", "classifier.out_proj.weight", "score.weight", "biaffine_rels.weight")


def _config(foreign: Foreign, common: Mapping[str, Any], provenance: dict[str, Any]) -> SparseConfig | None:
    """What the sparse adapter's file says of it; None if there is no sparse part."""
    counts = {name: delta.count for name, delta in foreign.deltas.items()}
    if not counts:
        return None
    total = sum(counts.values())
    fields = fields_of(foreign.settings, total) if foreign.kind == SPIEL else {"method": "fixed", "num_weights": total}
    return SparseConfig(
        **fields,
        **common,
        counts=counts,
        target_modules=sorted({name.rpartition(".")[0] for name in counts}),
        values_dtype=_values_dtype(foreign),
        provenance=provenance,
    )


def _values_dtype(foreign: Foreign) -> str:
    """The narrowest dtype that holds all values as they are."""
    dtypes = {delta.values.dtype for delta in foreign.deltas.values()} or {torch.float32}
    widest = dtypes.pop()
    for dtype in dtypes:
        widest = torch.promote_types(widest, dtype)
    name = str(widest).removeprefix("torch.")
    assert name in VALUE_DTYPES, name
    return name


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        digest = hashlib.sha256()
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()
