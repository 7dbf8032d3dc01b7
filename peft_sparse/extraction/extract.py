"""Sparse adapters out of two models that are there already: no training, a tensor at a time."""

from __future__ import annotations

import logging
import os
from dataclasses import asdict, replace
from typing import Any, Literal

import torch
from rich.console import Console
from rich.progress import Progress

from ..checkpoints.adapter_files import CONFIG_FILE, find_file
from ..checkpoints.foreign import COMPOSABLE_SFT, how_to_import
from ..checkpoints.native import build
from ..checkpoints.output import ADAPTER, save_adapter
from ..checkpoints.shards import Checkpoint
from ..core.delta import SparseDelta
from ..errors import ConfigError, FormatError
from ..files import check_apart, check_output
from ..selection.budget import Budget, groups_of, total_from_request
from ..selection.criteria import Denoising, change_criterion
from ..tuners.sparse_ft.configs.base import SparseConfig
from .other_adapters import AdapterOnBase
from .ranking import Ranking, Scores, measure
from .result import Extraction, Kept
from .sources import CheckpointPair, Source

logger = logging.getLogger(__name__)

# What num_weights may be besides a number.
CHANGED = "changed"


def extract_adapter(
    base: str | os.PathLike[str],
    tuned: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    density: float | None = None,
    num_weights: int | Literal["changed"] | None = None,
    equivalent_rank: int | None = None,
    density_of: str = "targets",
    criterion: str = "change",
    rank: float = 0.9,
    residual_density: float = 0.05,
    denoise_embeddings: bool = False,
    budget: Budget = "global",
    target_modules: list[str] | str | None = None,
    exclude_modules: list[str] | str | None = None,
    target_biases: bool = False,
    target_norms: bool | None = None,
    target_parameters: list[str] | None = None,
    values_dtype: str | None = None,
    base_revision: str | None = None,
    tuned_revision: str | None = None,
    overwrite: bool = False,
    show_progress: bool = False,
) -> Extraction:
    """Make a sparse adapter that leads from a base model towards a tuned one, without training.

    The weights that a criterion ranks highest get their difference as value. The adapter is an ordinary one of type
    SPARSE_FT: `PeftModel.from_pretrained(base_model, output)` loads it, where `base_model` has the architecture of the
    tuned checkpoint (a classifier, with its number of labels, if that is one).

    Args:
        base: directory or Hub repository of the model that was fine-tuned.
        tuned: directory or Hub repository of what became of it: a checkpoint of the same architecture, with the same
            head, another or none; or an adapter of PEFT's types LORA, SHIRA or SUPERTUNING that belongs to `base`
            (on the Hub: "owner/name[/folder][@revision]").
        output: directory for the adapter.
        density: share of the targeted weights to keep, in (0, 1]; exactly so many are kept. 1 keeps all of them,
            whether they differ or not.
        num_weights: number of weights to keep instead; "changed" keeps all that differ, and no others.
        equivalent_rank: as many weights as LoRA of this rank trains, instead.
        density_of: "targets" or "model", see `SparseConfig`.
        criterion: "change" (the largest differences) or "denoised" (the largest differences after each matrix was
            denoised, see `selection.denoise`: the selection of DeFT-X).
        rank, residual_density, denoise_embeddings: of "denoised", see `DeftXConfig`.
        budget: how the total is spread, see `SparseConfig`; "global" ranks all tensors together.
        target_modules, exclude_modules, target_biases, target_norms, target_parameters: as in `SparseConfig`, but
            without any of them everything is targeted that both checkpoints have. A tied output layer counts beside its
            embedding, because an adapter acts on each separately.
        values_dtype: "float32", "bfloat16", "float16" or "float64". By default float32, and float64 where all that
            differs is kept and no float32 would give some of the tuned weights back bit for bit.
        base_revision, tuned_revision: branch, tag or commit on the Hub.
        overwrite: replace an adapter that is in `output`.
        show_progress: show a progress bar on stderr.

    Returns:
        what was kept, in all and per layer.

    With density=1 or num_weights="changed", loading the result onto the base in the wider of the two dtypes and merging
    gives the tuned weights bit for bit, but for zeros that lost their minus sign and what `inexact` counts (see
    `core.exact_difference`; with float64 values nothing in practice). Only what no adapter can hold (`left_out`) stays
    behind.

    Raises:
        ConfigError: an argument has a value that cannot be honoured, or `output` is taken.
        FormatError: a checkpoint cannot be read or is quantised, or the architectures do not match; all mismatches are
            counted. Nothing is written.
        SelectionError: more weights are asked for than differ.

    Cost: each tensor is read once to rank its weights and once more for the values. Memory: up to four times the
        largest tensor in float32, and up to 32 bytes for each weight kept. Weights are mapped from their files.
    Source: the selection is that of LT-SFT (Ansell et al. 2022, arXiv:2110.07560, section 3.1), without the second
        phase, which trains the values again.
    """
    keeps_differing = num_weights == CHANGED
    request = SparseConfig(
        method="fixed",
        density=density,
        num_weights=1 if keeps_differing else num_weights,
        equivalent_rank=equivalent_rank,
        density_of=density_of,
        budget=budget if isinstance(budget, str) else dict(budget),
        target_modules=target_modules,
        exclude_modules=exclude_modules,
        target_biases=target_biases,
        target_norms=target_norms,
        target_parameters=target_parameters,
        values_dtype=values_dtype or "float32",
    )
    if keeps_differing and budget != "global":
        raise ConfigError(f"num_weights='changed' keeps all that differ, which leaves no budget; got {budget!r}.")
    denoising = Denoising(rank=rank, residual_density=residual_density, denoise_embeddings=denoise_embeddings)
    scores = change_criterion(criterion, denoising)
    check_apart(output, base_model=base, tuned_model=tuned)
    check_output(output, overwrite=overwrite, what=ADAPTER)
    source = _open(os.fspath(base), os.fspath(tuned), base_revision, tuned_revision)
    may_widen = values_dtype is None
    tensors, deltas, inexact = _select(source, request, None if keeps_differing else scores, may_widen, show_progress)
    result = Extraction(
        output=os.fspath(output),
        base=os.fspath(base),
        tuned=os.fspath(tuned),
        criterion=criterion,
        tensors=tensors,
        heads=tuple(source.heads),
        left_out=_left_out(source, request),
        values_dtype=request.values_dtype,
        inexact=inexact,
        file_size=0,
    )
    provenance = {"tuned": result.tuned, "tuned_revision": source.tuned_revision, "criterion": criterion}
    if criterion != "change":
        provenance |= asdict(denoising)
    config = _config(request, source, result, provenance | {"share_kept": round(result.total.share_kept, 6)})
    size = save_adapter(output, build(deltas, source.head_tensors()), config, overwrite=overwrite)
    return replace(result, file_size=size)


def _open(base: str, tuned: str, base_revision: str | None, tuned_revision: str | None) -> Source:
    if find_file(tuned, CONFIG_FILE, revision=tuned_revision) is not None:
        return AdapterOnBase(base, tuned, base_revision=base_revision, tuned_revision=tuned_revision)
    if find_file(tuned, COMPOSABLE_SFT, revision=tuned_revision) is not None:
        raise FormatError(how_to_import(tuned))
    return CheckpointPair(Checkpoint(base, revision=base_revision), Checkpoint(tuned, revision=tuned_revision))


def _select(
    source: Source, request: SparseConfig, scores: Scores | None, may_widen: bool, show_progress: bool
) -> tuple[tuple[Kept, ...], dict[str, SparseDelta], int]:
    """Rank the differences of the targets and gather those that are kept.

    Args:
        source: of the differences.
        request: says what is kept; its `values_dtype` becomes float64 if that is needed and allowed.
        scores: the criterion; None keeps all that differ.
        may_widen: whether values may be float64 where all are kept and float32 ones would miss some tuned weights.
        show_progress: show a progress bar.

    Returns:
        what was kept of each tensor; the deltas by parameter; how many sums miss the tuned weight.
    """
    names = [name for name in source.skeleton.targets(request) if name in set(source.names)]
    with Progress(console=Console(stderr=True), disable=not show_progress, transient=True) as bar:
        task = bar.add_task("differences", total=2 * len(names))
        ranking = Ranking(source, names, advance=lambda: bar.advance(task))
        if scores is None:
            ranking.take_differing()
        else:
            _take(ranking, request, scores)
        keeps_all = scores is None or sum(map(len, ranking.selected.values())) == sum(ranking.sizes.values())
        deltas, inexact = ranking.gather(getattr(torch, request.values_dtype))
        if keeps_all and inexact and may_widen:
            request.values_dtype = "float64"
            bar.update(task, description="differences, in float64", completed=len(names))
            deltas, inexact = ranking.gather(torch.float64)
    return ranking.report(deltas), deltas, inexact


def _take(ranking: Ranking, request: SparseConfig, criterion: Scores) -> None:
    """Select as many weights as the request says, where its budget puts them."""
    skeleton = ranking.source.skeleton
    total = total_from_request(
        density=request.density,
        num_weights=request.num_weights,
        equivalent_rank=request.equivalent_rank,
        shapes=ranking.shapes,
        density_of=request.density_of,
        model_numel=skeleton.numel,
        linear_names=skeleton.linear_names(ranking.names),
    )
    groups = groups_of(request.budget, total, ranking.sizes)
    if total == sum(ranking.sizes.values()):
        ranking.take_all()
    else:
        ranking.take_best(groups, criterion)


def _left_out(source: Source, request: SparseConfig) -> dict[str, float]:
    """{parameter: squared difference} of what was meant to be kept and cannot be."""
    found = {name: measure(source.difference(name)) for name in source.skeleton.untunable(request, source.names)}
    lost = {name: measured.squared for name, measured in found.items() if measured.differing}
    if lost:
        logger.warning(
            "%d parameters differ that no sparse adapter can hold, and were left out: %s", len(lost), ", ".join(lost)
        )
    return lost


def _config(request: SparseConfig, source: Source, result: Extraction, provenance: dict[str, Any]) -> SparseConfig:
    """What the adapter's file says of it."""
    counts = {kept.name: kept.count for kept in result.tensors if kept.count}
    is_request_known = request.density is not None or request.equivalent_rank is not None
    return SparseConfig(
        method="fixed",
        density=request.density,
        num_weights=None if is_request_known else sum(counts.values()),
        equivalent_rank=request.equivalent_rank,
        density_of=request.density_of,
        budget=request.budget,
        counts=counts,
        target_modules=sorted({name.rpartition(".")[0] for name in counts}),
        modules_to_save=list(source.heads) or None,
        values_dtype=result.values_dtype,
        task_type=source.skeleton.task_type,
        base_model_name_or_path=result.base,
        revision=source.base_revision,
        inference_mode=True,
        provenance={key: value for key, value in provenance.items() if value is not None},
    )
